"""Our side of the distillation benchmark: make student, teacher, data and cache; train from either.

prepare   SmolLM2-135M as the teacher, every second of its layers as the student, real traces, a cache of its
          distribution over them.
train     The train stage's loop on these, with the cache or with the teacher in memory, step by step.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import distill_side
from steps import Clock, asked, keep_freed_memory, loaded_mb, memory_mb, say

keep_freed_memory()  # before anything large is allocated

import torch  # noqa: E402  see above

from distill.attention import PER_DOCUMENT  # noqa: E402
from distill.config import KdPhase, Logprobs  # noqa: E402
from distill.documents import Documents  # noqa: E402
from distill.interrupts import Stop  # noqa: E402
from distill.logprobs import Facts, LogprobCache, write_manifest  # noqa: E402
from distill.models import find_model, load_model, load_tokenizer, set_threads  # noqa: E402
from distill.runs import RunOptions  # noqa: E402
from distill.students.loop import Trainer  # noqa: E402
from distill.students.prune import drop_layers  # noqa: E402
from distill.students.tutors import CachedTutor, TutorInMemory  # noqa: E402
from distill.teachers.score import LiveScorer, capture  # noqa: E402
from distill.token_store import tokenizer_digest  # noqa: E402

DRAWS = 50


def documents_of(folder: Path) -> Documents:
    """The prepared documents."""
    rows = distill_side.read_rows(folder / "train.jsonl")
    return Documents.of(distill_side.as_document(one) for one in rows)


def prepare(given: argparse.Namespace) -> None:
    """Models, data and cache; says what the cache takes."""
    distill_side.prepare(given)
    folder = given.folder
    (folder / "model").rename(folder / "teacher")
    student = load_model(find_model(str(folder / "teacher")))
    drop_layers(student, range(0, student.config.num_hidden_layers, 2))
    student.save_pretrained(folder / "model")
    tokenizer = load_tokenizer(find_model(str(folder / "teacher")))
    tokenizer.save_pretrained(folder / "model")
    documents = documents_of(folder)
    logprobs = Logprobs(teachers=[{"name": "teacher", "model": str(folder / "teacher")}], draws=DRAWS)
    facts = Facts.of(logprobs, len(tokenizer), tokenizer_digest(tokenizer))
    teacher = load_model(find_model(str(folder / "teacher")), "bfloat16", "cpu", PER_DOCUMENT)
    scorer = LiveScorer(teacher, documents, facts, logprobs)
    cache = folder / "cache"
    cache.mkdir()
    shards = capture(documents, facts, scorer, cache, RunOptions(quiet=True), "score")
    write_manifest(cache, facts, shards, {"name": "teacher"})
    rows = LogprobCache(cache).manifest["rows"]
    say(cache_bytes_per_row=sum(path.stat().st_size for path in cache.iterdir()) / rows, cached_rows=rows)


def train(given: argparse.Namespace) -> None:
    """Train while asked to; say what it took."""
    folder = given.folder
    student = load_model(find_model(str(folder / "model")), "float32", "cpu", PER_DOCUMENT)
    tutor: Any
    if given.tutor == "cache":
        tutor = CachedTutor([LogprobCache(folder / "cache")], [1.0])
    else:
        teacher = load_model(find_model(str(folder / "teacher")), "bfloat16", "cpu", PER_DOCUMENT)
        for weight in teacher.parameters():
            weight.data = weight.data.clone()
        tutor = TutorInMemory([teacher], [1.0], student.config.vocab_size, 1.0)
    loaded = loaded_mb(student)
    phase = KdPhase(
        kind="kd", lr=given.lr, schedule="constant", warmup_ratio=0.0, epochs=100, step_tokens=given.step_tokens,
        micro_batch_tokens=given.micro_batch_tokens, checkpoint_every_steps=1_000_000,
    )  # fmt: skip
    documents = documents_of(folder)
    clock = Clock(student.config.vocab_size)
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(student, documents, phase, given.precision, Path(work), tutor=tutor)
        steps = trainer.run(Stop())
        say(ready=True)
        while what := asked():
            clock.start(what)
            report: Any = next(steps)
            found = clock.stop()
            squares = sum(length**2 for length in trainer.last_lengths)
            say(loss=report.loss, tokens=report.tokens, cells=report.cells, supervised=report.supervised,
                squares=squares, **found)  # fmt: skip
        say(loaded_mb=loaded, peak_mb=memory_mb("VmHWM"))


def main() -> None:
    """Do one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"prepare": prepare, "train": train}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--data", type=Path, help="the traces")
    parser.add_argument("--heldout", type=int, default=24, help="documents that do not train")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tutor", choices=("cache", "memory"))
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    given = parser.parse_args()
    set_threads(RunOptions(threads=given.threads, device="cpu"))
    torch.manual_seed(0)
    tasks[given.task](given)


if __name__ == "__main__":
    main()
