"""Removal on request: the traces of a prompt leave the ledgers, and a tombstone says so.

The tombstone is written first, so a kill leaves nothing behind that could come back: a prompt with a tombstone is
never asked again and appears in no view, whatever lines are still there. Stage runs sealed before hold copies;
they are named, and deleted on request, since the ledger makes them again at no cost. What a student has learned from a
trace cannot be taken back here.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from distill.errors import DataError
from distill.records import RecordLog
from distill.runs import PARTIAL, STAGE_FILE, locked

from .ledger import FOLDER, TOMBSTONES, Tombstone, now, removed_prompts, segments

ID_DIGITS = 16
FILES = ("answers.jsonl", "journal.jsonl", "verdicts.jsonl")


class Forgotten(NamedTuple):
    """What a removal did."""

    prompts: int
    """Prompts that got a tombstone now."""
    lines: int
    """Lines cut out of ledgers."""
    stages: tuple[Path, ...]
    """Sealed stage runs that hold copies."""
    purged: bool
    """Whether these were deleted."""


def forget(runs: Path, prompt_ids: Sequence[str], reason: str, purge: bool = False) -> Forgotten:
    """Remove every trace of these prompts from a run store.

    Raises DataError for an id that is none, LockedError while a ledger is being written.
    """
    for prompt_id in prompt_ids:
        if len(prompt_id) != ID_DIGITS or set(prompt_id) - set("0123456789abcdef"):
            raise DataError(f"{prompt_id!r} is not a prompt id: 16 hex digits, as `distill inspect` shows them")
    ledgers = runs / FOLDER
    if not ledgers.is_dir():
        raise DataError(f"{runs}: no ledger in this run store; name the right one with --runs DIR")
    folders = sorted(path.parent for path in ledgers.glob("*/ledger.json"))
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(locked(folder, "the ledger is being written"))
        new = [prompt_id for prompt_id in dict.fromkeys(prompt_ids) if prompt_id not in removed_prompts(runs)]
        with RecordLog(ledgers / TOMBSTONES) as log:
            log.append(*(Tombstone(prompt_id=prompt_id, reason=reason, timestamp=now()) for prompt_id in new))
        lines = sum(_cut_out(folder, set(prompt_ids)) for folder in folders)
    stages = tuple(_holders(runs, prompt_ids))
    for stage in stages if purge else ():
        shutil.rmtree(stage)
    return Forgotten(len(new), lines, stages, purge)


def _cut_out(folder: Path, prompt_ids: set[str]) -> int:
    """Write a ledger's files again without the lines that name these prompts or their traces."""
    names = {prompt_id.encode() for prompt_id in prompt_ids}
    for segment in segments(folder):
        names |= _trace_ids(segment / "answers.jsonl", names)
    return sum(_rewritten(segment / name, names) for segment in segments(folder) for name in FILES)


def _trace_ids(path: Path, names: set[bytes]) -> set[bytes]:
    """Trace ids of the lines that name one of the prompts; verdicts know only these."""
    found = set()
    for line in _lines(path):
        if any(name in line for name in names):
            _, _, after = line.partition(b'"trace_id":"')
            found.add(after[:ID_DIGITS])
    return found - {b""}


def _rewritten(path: Path, names: set[bytes]) -> int:
    if not path.exists():
        return 0
    part, cut = path.with_name(path.name + PARTIAL), 0
    with part.open("wb") as out:
        for line in _lines(path):
            named = any(name in line for name in names)
            cut += named
            if not named:
                out.write(line)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)
    return cut


def _holders(runs: Path, prompt_ids: Iterable[str]) -> list[Path]:
    """Sealed stage runs with a record that names one of the prompts."""
    names = [prompt_id.encode() for prompt_id in prompt_ids]
    stages = sorted(file.parent for file in runs.glob(f"*/*/{STAGE_FILE}"))
    return [stage for stage in stages if _names_any(stage, names)]


def _names_any(stage: Path, names: Sequence[bytes]) -> bool:
    if stage.parent.name == "prompts":
        return False  # problems are the recipe's own, not a teacher's
    return any(name in line for path in sorted(stage.glob("*.jsonl")) for line in _lines(path) for name in names)


def _lines(path: Path) -> Iterable[bytes]:
    if path.exists():
        with path.open("rb") as lines:
            yield from lines
