"""The records that stages exchange on disk: prompts, traces, verdicts, flags, evaluated items.

JSON Lines, one typed record a line, `"schema": 1` in each. A trace is immutable; verdicts and flags lie beside it
and can be made again. Derived values are properties. Files are appended line by line; a torn last line (a kill in
the middle of a write) is cut off when the file is opened again.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import DataError

ThinkState = Literal["closed", "unclosed", "absent", "empty", "multiple"]
FinishReason = Literal["stop", "length", "error", "unknown"]
Outcome = Literal["correct", "wrong", "unverifiable", "timeout", "error"]

SCHEMA: Literal[1] = 1


class Record(BaseModel):
    """A frozen line of a JSON Lines file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)
    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")

    def to_line(self) -> str:
        """One line of JSON with its newline."""
        return self.model_dump_json(by_alias=True) + "\n"


RecordT = TypeVar("RecordT", bound=Record)


class Message(BaseModel):
    """One chat turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Usage(BaseModel):
    """Tokens of one request as the engine counted them; `reasoning` is the part of `output` inside the markers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    input: int = 0
    output: int = 0
    reasoning: int | None = None


def digest_json(value: object) -> str:
    """sha256 (hex) of a JSON value's canonical text: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def prompt_id_of(messages: Sequence[Message]) -> str:
    """The identity of a prompt: a hash of its messages, NFC-normalised and with white space folded."""
    normalised = [[m.role, " ".join(unicodedata.normalize("NFC", m.content).split())] for m in messages]
    return digest_json(normalised)[:16]


class Prompt(Record):
    """One problem to be answered."""

    prompt_id: str
    """Hash of the normalised messages: the key of ledger, split and duplicates."""
    messages: tuple[Message, ...]
    """What the teacher and the student are asked, without any system prompt of the recipe."""
    gold: str | None = None
    """The reference answer after the source's extraction rule; None where there is none."""
    verifier: str = "number"
    """Name of the verifier that judges answers to this prompt."""
    source: str = ""
    """Name of the prompt source in the recipe."""
    licence: str | None = None
    """Licence of the source."""
    row: dict[str, Any] = Field(default_factory=dict)
    """The source row's own fields that verifiers and built-in teachers read (question, task metadata)."""

    @classmethod
    def of(cls, messages: Sequence[Message], **fields: Any) -> Self:
        """A prompt whose id is derived from its messages."""
        return cls(prompt_id=prompt_id_of(messages), messages=tuple(messages), **fields)

    @property
    def text(self) -> str:
        """The last user turn, for people."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


class Teacher(BaseModel):
    """Who wrote a trace."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    engine: str
    engine_version: str = ""
    model: str = ""
    revision: str | None = None
    licence: str | None = None


class Trace(Record):
    """One sample of a model: immutable, identified by what it is and not by where it stood."""

    trace_id: str
    prompt_id: str
    cfg: str
    """Identity of everything that was sent beside the prompt (see the ledger)."""
    sample: int
    """Which of the prompt's samples this is, from 0."""
    attempt: int = 0
    reasoning: str | None = None
    """Text between the reasoning markers, without them; None where the format has none."""
    answer: str = ""
    raw: str = ""
    """The text as it came, before parsing; for answers with separate fields, reasoning and content rejoined."""
    think: ThinkState = "absent"
    finish_reason: FinishReason = "unknown"
    usage: Usage = Usage()
    cost_usd: float = 0.0
    latency_s: float = 0.0
    teacher: Teacher
    sampling: dict[str, Any] = Field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None
    error: str | None = None
    """Why there is no answer; such a trace is a failure record and never trains."""
    retryable: bool = False
    """Of a failure: whether it may pass by itself (an outage), so that asking again makes sense."""
    timestamp: str = ""

    @property
    def failed(self) -> bool:
        """Whether this is the record of a failed request."""
        return self.error is not None

    @property
    def result(self) -> dict[str, Any]:
        """The fields that must be equal after a kill: all but timestamps, latency and cost."""
        return self.model_dump(mode="json", exclude={"timestamp", "latency_s", "cost_usd", "attempt", "retryable"})


class Verdict(Record):
    """What a verifier said of one trace; re-runnable, so it lies beside the traces."""

    trace_id: str
    gold: str | None
    verifier: str
    """Name and version, as `number@1`."""
    outcome: Outcome
    detail: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer was judged right (`wrong` and `could not tell` both give False)."""
        return self.outcome == "correct"


class Flag(Record):
    """Something noticed about a trace: truncated, unclosed, api-error, duplicate-of, contaminated-by, …"""

    trace_id: str
    flag: str
    detail: str = ""


class Example(Record):
    """One selected training example: a prompt and the trace chosen for it, rendered later from the fields."""

    prompt: Prompt
    trace_id: str
    reasoning: str | None
    answer: str


class Item(Record):
    """One evaluated sample: what the model wrote and what the verifier said."""

    model: str
    set: str
    prompt: Prompt
    trace: Trace
    verdict: Verdict

    @property
    def tokens(self) -> int:
        """Generated tokens, the end token included."""
        return self.trace.usage.output

    @property
    def result(self) -> dict[str, Any]:
        """The fields that must be equal after a kill."""
        return {
            "model": self.model,
            "set": self.set,
            "prompt_id": self.prompt.prompt_id,
            "trace": self.trace.result,
            "outcome": self.verdict.outcome,
        }


# --- JSON Lines -----------------------------------------------------------------------------------------------------


def read_records(path: Path, kind: type[RecordT]) -> Iterator[RecordT]:
    """Stream the records of a JSON Lines file.

    Raises DataError naming file and line where a line is not such a record.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "line"
                raise DataError(f"{path}:{number}: not a {kind.__name__} record: {where}: {first['msg']}") from error


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write a JSON Lines file aside and move it into place; returns the number of records."""
    part = path.with_name(path.name + ".part")
    count = 0
    with part.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(record.to_line())
            count += 1
        _to_disk(out)
    os.replace(part, path)
    return count


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON document aside, flush it to the disk and move it into place."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=2, ensure_ascii=False)
        out.write("\n")
        _to_disk(out)
    os.replace(part, path)


def _to_disk(out: IO[str]) -> None:
    out.flush()
    os.fsync(out.fileno())


def repair_tail(path: Path) -> int:
    """Cut a torn last line off a JSON Lines file; returns how many bytes were cut.

    A line is whole when it ends in a newline and parses; only the last one can be torn, since lines are appended.
    """
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _last_line_start(file, size)
        file.seek(start)
        line = file.read()
        if not line or (line.endswith(b"\n") and _parses(line)):
            return 0
        file.truncate(start)
        file.flush()
        os.fsync(file.fileno())
        return size - start


def _last_line_start(file: BinaryIO, size: int, block: int = 1 << 16) -> int:
    """Offset of the last line, whose own trailing newline does not count."""
    position, tail = size, b""
    while position > 0:
        step = min(block, position)
        position -= step
        file.seek(position)
        tail = file.read(step) + tail
        newline = tail.rfind(b"\n", 0, len(tail) - 1)
        if newline >= 0:
            return position + newline + 1
    return 0


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class RecordLog:
    """An append-only JSON Lines file that survives a kill at any byte.

    Opening repairs a torn tail. `append` flushes to the operating system, so a killed process loses nothing that
    was appended; `sync` also pushes to the disk, which matters when the machine itself stops.
    """

    def __init__(self, path: Path) -> None:
        self.repaired_bytes = repair_tail(path)
        self._out = path.open("ab", buffering=0)
        self.end = self._out.seek(0, os.SEEK_END)
        """Offset at which the next line starts."""

    def append(self, *records: Record) -> None:
        """Write whole lines in one call to the operating system."""
        lines = "".join(record.to_line() for record in records).encode()
        written = self._out.write(lines)
        while written < len(lines):  # a disk that is nearly full takes a part
            written += self._out.write(lines[written:])
        self.end += len(lines)

    def sync(self) -> None:
        """Wait until the disk has the lines."""
        os.fsync(self._out.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._out.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
