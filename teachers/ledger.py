"""The ledger: every answer a teacher ever gave, under a key of what was asked, so that none is bought twice.

`runs/ledger/<cfg>/` is not a run but outlives them all. `cfg` hashes exactly what is sent beside the prompt; within it
an answer is filed under (prompt_id, sample). `answers.jsonl` holds answers and failures as they came, `journal.jsonl`
every request before it was sent: what is journalled but neither answered nor failed was in flight when a process
died, and may have been paid for. Both are append-only and lose at most a torn last line, which is cut off. In memory
there are only the keys and where their lines stand.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from distill.config import FormatConfig, TeacherConfig, hashed_fields
from distill.records import Record, RecordLog, Trace, digest_json, repair_tail, write_json
from distill.runs import locked

Key = tuple[str, int]
"""prompt_id and sample index."""

FOLDER = "ledger"
SYNC_EVERY_S = 1.0
"""Longest time an answer waits to be forced onto the disk; a killed process loses nothing either way."""
CHARS_PER_TOKEN = 4
"""Rough guess for answers whose tokens nobody counted, so that a budget still bites."""


class Asked(Record):
    """A request, written down before it was sent."""

    prompt_id: str
    sample: int
    attempt: int
    """How often it had been asked before."""
    timestamp: str


class Spent(NamedTuple):
    """What answers cost."""

    answers: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def less(self, other: "Spent") -> "Spent":
        """What was spent since `other`."""
        return Spent(
            self.answers - other.answers, self.output_tokens - other.output_tokens, max(0.0, self.usd - other.usd)
        )


def billed_tokens(output_tokens: int, raw: str) -> int:
    """Output tokens as counted by the engine, or a guess from the text where nobody counted."""
    return output_tokens or -(-len(raw) // CHARS_PER_TOKEN)


def sent_to_teacher(
    teacher: TeacherConfig, format: FormatConfig, roots: Mapping[str, str], engine_version: str
) -> dict[str, Any]:
    """Everything that decides an answer beside prompt and sample index; its digest is the ledger's `cfg`.

    Values that are not set are left out, so an option added later changes no ledger. Local engines also render the
    prompt and batch it; a model that is identified by its content is not named by its path.
    """
    sampling = teacher.sampling.model_dump(mode="json", exclude={"n"}, exclude_none=True)
    sent: dict[str, Any] = {"engine": teacher.engine, "sampling": sampling}
    if teacher.model and "model" not in roots:
        sent["model"] = teacher.model
    if teacher.revision is not None:
        sent["revision"] = teacher.revision
    if teacher.system is not None:
        sent["system"] = teacher.system
    if roots:
        sent["roots"] = dict(roots)
    if teacher.engine in ("transformers", "onnx"):
        sent |= {"batch_size": teacher.batch_size, "format": hashed_fields(format)}
    if teacher.engine in ("solver", "recorded"):
        sent["version"] = engine_version
    if teacher.engine == "recorded":
        # reading the rows again costs nothing, so how they are read counts too
        markers = [format.open_marker, format.close_marker]
        sent |= {"recorded": hashed_fields(teacher.recorded), "markers": markers}
    return sent


def cfg_of(sent: Mapping[str, Any]) -> str:
    """The ledger's identity: 16 hex digits over what is sent."""
    return digest_json(sent)[:16]


@dataclass(frozen=True)
class _Failure:
    """Where the record of a failed attempt stands."""

    offset: int
    attempt: int


class Ledger:
    """The answers of one configuration, open for reading and appending; use `open_ledger`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spent = Spent()
        """What all answers and failures in it cost."""
        self.damaged_lines = 0
        """Lines that cannot be read (bytes changed on the disk); their requests count as not answered."""
        self._answers: dict[Key, int] = {}
        self._failures: dict[Key, _Failure] = {}
        self._attempts: dict[Key, int] = {}
        for name in ("answers.jsonl", "journal.jsonl"):
            repair_tail(folder / name)
        self._load_answers()
        self._load_journal()
        self._log = RecordLog(folder / "answers.jsonl")
        self._journal = RecordLog(folder / "journal.jsonl")
        self._end = self._path.stat().st_size
        self._reader = self._path.open("rb")
        self._synced_s = time.monotonic()

    @property
    def _path(self) -> Path:
        return self.folder / "answers.jsonl"

    # --- what is known ---

    def answered(self, key: Key) -> bool:
        """Whether the answer is there; it is then never asked for again."""
        return key in self._answers

    def failed(self, key: Key) -> bool:
        """Whether the last attempt failed and no other one succeeded."""
        return key in self._failures and key not in self._answers

    def possibly_paid(self, key: Key) -> bool:
        """Whether a request was in flight when a process died: journalled, but neither answered nor failed since."""
        if key in self._answers:
            return False
        failure = self._failures.get(key)
        return self._attempts.get(key, 0) > (failure.attempt + 1 if failure else 0)

    def get(self, key: Key) -> Trace | None:
        """The answer, or else the record of the last failure; None if there is neither."""
        offset = self._answers.get(key)
        if offset is None:
            failure = self._failures.get(key)
            if failure is None:
                return None
            offset = failure.offset
        self._reader.seek(offset)
        return Trace.model_validate_json(self._reader.readline())

    # --- what happens ---

    def ask(self, key: Key) -> int:
        """Write a request down before it is sent; returns how often it had been asked before."""
        attempt = self._attempts.get(key, 0)
        self._journal.append(Asked(prompt_id=key[0], sample=key[1], attempt=attempt, timestamp=now()))
        self._attempts[key] = attempt + 1
        return attempt

    def add(self, trace: Trace) -> None:
        """Append an answer or a failure; the first answer of a key stays."""
        key = (trace.prompt_id, trace.sample)
        if key in self._answers:
            return
        offset = self._end
        self._log.append(trace)
        self._end = self._path.stat().st_size
        self._index(key, offset, trace.failed, trace.attempt)
        self._count(trace.failed, billed_tokens(trace.usage.output, trace.raw), trace.cost_usd)
        if time.monotonic() - self._synced_s >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        self._journal.sync()
        self._log.sync()
        self._synced_s = time.monotonic()

    def close(self) -> None:
        """Sync and close; on a full disk each file is closed all the same."""
        with ExitStack() as files:
            for close in (self._log.close, self._journal.close, self._reader.close):
                files.callback(close)

    # --- reading it all once ---

    def _load_answers(self) -> None:
        for offset, line in _lines(self._path):
            row = _row(line)
            try:
                key = (str(row["prompt_id"]), int(row["sample"]))
                failed, tokens = row["error"] is not None, billed_tokens(row["usage"]["output"], row["raw"])
                self._index(key, offset, failed, row["attempt"])
                self._count(failed, tokens, row["cost_usd"])
            except (KeyError, TypeError, ValueError):
                self.damaged_lines += 1

    def _load_journal(self) -> None:
        """How often each unanswered key was asked."""
        for _, line in _lines(self.folder / "journal.jsonl"):
            row = _row(line)
            try:
                key = (str(row["prompt_id"]), int(row["sample"]))
                if key not in self._answers:
                    self._attempts[key] = max(self._attempts.get(key, 0), int(row["attempt"]) + 1)
            except (KeyError, TypeError, ValueError):
                self.damaged_lines += 1

    def _index(self, key: Key, offset: int, failed: bool, attempt: int) -> None:
        if failed:
            self._failures[key] = _Failure(offset, attempt)
            self._attempts[key] = max(self._attempts.get(key, 0), attempt + 1)
        else:
            self._answers.setdefault(key, offset)
            self._failures.pop(key, None)
            self._attempts.pop(key, None)

    def _count(self, failed: bool, tokens: int, usd: float) -> None:
        answers, output_tokens, dollars = self.spent
        self.spent = Spent(answers + (not failed), output_tokens + tokens, dollars + usd)


@contextmanager
def open_ledger(runs: Path, sent: Mapping[str, Any]) -> Iterator[Ledger]:
    """Hold the ledger of one configuration and its lock.

    Raises RunError if another process writes it.
    """
    folder = runs / FOLDER / cfg_of(sent)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "the ledger is being written"):
        if not (folder / "ledger.json").exists():
            write_json(folder / "ledger.json", description(sent))
        ledger = Ledger(folder)
        try:
            yield ledger
        finally:
            ledger.close()


def description(sent: Mapping[str, Any]) -> dict[str, Any]:
    """What `ledger.json` says to people who find the folder."""
    who = f"{sent.get('model') or 'the teacher'} through the engine {sent['engine']}"
    return {
        "schema": 1,
        "cfg": cfg_of(sent),
        "about": f"Answers of {who}, asked exactly as `sent` says. Deleting this folder means asking again.",
        "sent": dict(sent),
    }


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with the offset at which it starts."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            yield offset, line
            offset += len(line)


def _row(line: bytes) -> Any:
    """The JSON of a line, None where it is damaged."""
    try:
        return from_json(line)
    except ValueError:
        return None
