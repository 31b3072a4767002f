"""The ledger: every answer a teacher ever gave, under a key of what was asked, so that none is bought twice.

`runs/ledger/<cfg>/` is not a run but outlives them all. `cfg` hashes exactly what is sent beside the prompt; within it
an answer is filed under (prompt_id, sample). `answers.jsonl` holds answers and failures as they came, `journal.jsonl`
every request before it was sent: what is journalled but neither answered nor failed was in flight when a process
died, and may have been paid for. Both are append-only and lose at most a torn last line, which is cut off.
`verdicts.jsonl` remembers verdicts that took a process of their own. Each shard of a run that several processes share
has the same three files under `shards/`; a ledger reads all of them and writes its own. In memory there are only keys
and where their lines stand, as plain integers.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic_core import from_json

from distill.config import FormatConfig, Sampling, TeacherConfig, hashed_fields
from distill.errors import LockedError, RunError
from distill.records import Record, RecordLog, Trace, Verdict, digest_json, read_records, repair_tail, write_json
from distill.runs import DigestCache, Shard, locked

Key = tuple[str, int]
"""prompt_id and sample index."""

FOLDER = "ledger"
TOMBSTONES = "tombstones.jsonl"
SHARDS = "shards"
CHARS_PER_TOKEN = 4
"""Rough guess for answers whose tokens nobody counted, so that a budget still bites."""
MOST_SAMPLES = 1 << 16
MOST_SEGMENTS = 1 << 12


class Asked(Record):
    """A request, written down before it was sent."""

    prompt_id: str
    sample: int
    attempt: int
    """How often it had been asked before."""
    timestamp: str


class Tombstone(Record):
    """A prompt whose traces were removed on request: it is never asked again and appears in no view."""

    prompt_id: str
    reason: str
    timestamp: str


class Spent(NamedTuple):
    """What answers cost."""

    answers: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def less(self, other: "Spent") -> "Spent":
        """What was spent since `other`."""
        return Spent(
            max(0, self.answers - other.answers),
            self.output_tokens - other.output_tokens,
            max(0.0, self.usd - other.usd),
        )

    def plus(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(self.answers + other.answers, self.output_tokens + other.output_tokens, self.usd + other.usd)


def billed_tokens(output_tokens: int, raw: str) -> int:
    """Output tokens as counted by the engine, or a guess from the text where nobody counted."""
    return output_tokens or -(-len(raw) // CHARS_PER_TOKEN)


def sent_to_teacher(
    teacher: TeacherConfig,
    format: FormatConfig,
    roots: Mapping[str, str],
    engine_version: str,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Everything that decides an answer beside prompt and sample index; its digest is the ledger's `cfg`.

    Values that are not set are left out, so an option added later changes no ledger. Local engines also render the
    prompt and batch it; a model that is identified by its content is not named by its path. `sampling` stands in for
    the teacher's own where a sample is asked again with another limit.
    """
    drawn = (sampling or teacher.sampling).model_dump(mode="json", exclude={"n"}, exclude_none=True)
    sent: dict[str, Any] = {"engine": teacher.engine, "sampling": drawn}
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
    if teacher.engine == "vllm":
        sent |= {"vllm": hashed_fields(teacher.vllm), "format": hashed_fields(format)}
    if teacher.continuous_batching:
        sent["continuous_batching"] = True  # who shares a batch is then a matter of time
    if teacher.engine in ("solver", "recorded"):
        sent["version"] = engine_version
    if teacher.engine == "recorded":
        # reading the rows again costs nothing, so how they are read counts too
        markers = [format.open_marker, format.close_marker]
        sent |= {"recorded": hashed_fields(teacher.recorded), "markers": markers}
    return sent


def samplings(teacher: TeacherConfig) -> list[Sampling]:
    """How a sample is drawn at first, and again each time it was cut off: one ledger each."""
    limits = [teacher.sampling.max_new_tokens, *teacher.escalate]
    return [teacher.sampling.model_copy(update={"max_new_tokens": limit}) for limit in limits]


def cfg_of(sent: Mapping[str, Any]) -> str:
    """The ledger's identity: 16 hex digits over what is sent."""
    return digest_json(sent)[:16]


# --- keys and places as integers ------------------------------------------------------------------------------------


def packed(key: Key) -> int:
    """A key in one integer: half a million of them as tuples would take four times the memory."""
    prompt_id, sample = key
    whole = prompt_id if len(prompt_id) == 16 else hashlib.sha256(prompt_id.encode()).hexdigest()[:16]
    return int(whole, 16) * MOST_SAMPLES + sample


class Place(NamedTuple):
    """Where the line of an answer stands."""

    segment: int
    offset: int
    truncated: bool

    def packed(self) -> int:
        """The same in one integer."""
        return (self.offset * MOST_SEGMENTS + self.segment) * 2 + self.truncated

    @classmethod
    def of(cls, number: int) -> "Place":
        """The place in an integer."""
        rest, truncated = divmod(number, 2)
        offset, segment = divmod(rest, MOST_SEGMENTS)
        return cls(segment, offset, bool(truncated))


class _Failure(NamedTuple):
    """Where the record of a failed attempt stands."""

    place: Place
    attempt: int
    retryable: bool


# --- the ledger -----------------------------------------------------------------------------------------------------


class Ledger:
    """The answers of one configuration, open for reading and appending; use `open_ledger`.

    `own` is the folder of the files that this process writes, `others` those that it only reads.
    """

    def __init__(self, own: Path, others: Sequence[Path] = (), removed: frozenset[str] = frozenset()) -> None:
        self.folder = own
        self.removed = removed
        """Prompts whose traces were removed on request."""
        self.spent = Spent()
        """What all answers and failures in it cost."""
        self.damaged_lines = 0
        """Lines that cannot be read (bytes changed on the disk); their requests count as not answered."""
        self._answers: dict[int, int] = {}
        self._failures: dict[int, _Failure] = {}
        self._attempts: dict[int, int] = {}
        self._verdicts: dict[int, tuple[int, int]] | None = None
        self._segments = [own, *others]
        self._readers: dict[tuple[int, str], IO[bytes]] = {}
        for name in ("answers.jsonl", "journal.jsonl", "verdicts.jsonl"):
            repair_tail(own / name)
        for number in range(len(self._segments)):
            self._load_answers(number)
        for number in range(len(self._segments)):
            self._load_journal(number)
        self._log = RecordLog(own / "answers.jsonl")
        self._journal = RecordLog(own / "journal.jsonl")
        self._judged = RecordLog(own / "verdicts.jsonl")

    # --- what is known ---

    def answered(self, key: Key) -> bool:
        """Whether the answer is there; it is then never asked for again."""
        return packed(key) in self._answers

    def truncated(self, key: Key) -> bool:
        """Whether the answer was cut off at the token limit."""
        return Place.of(self._answers[packed(key)]).truncated

    def failed(self, key: Key) -> bool:
        """Whether the last attempt failed and no other one succeeded."""
        return packed(key) in self._failures

    @property
    def any_failed(self) -> bool:
        """Whether any request's last attempt failed."""
        return bool(self._failures)

    def retryable(self, key: Key) -> bool:
        """Whether the last attempt failed for a reason that may pass by itself."""
        failure = self._failures.get(packed(key))
        return failure is not None and failure.retryable

    def possibly_paid(self, key: Key) -> bool:
        """Whether a request was in flight when a process died: journalled, but neither answered nor failed since."""
        at = packed(key)
        if at in self._answers:
            return False
        failure = self._failures.get(at)
        return self._attempts.get(at, 0) > (failure.attempt + 1 if failure else 0)

    def get(self, key: Key) -> Trace | None:
        """The answer, or else the record of the last failure; None if there is neither."""
        at = packed(key)
        if at in self._answers:
            place = Place.of(self._answers[at])
        elif at in self._failures:
            place = self._failures[at].place
        else:
            return None
        return Trace.model_validate_json(self._line(place.segment, "answers.jsonl", place.offset))

    def verdict(self, trace_id: str, verifier: str, gold: str | None) -> Verdict | None:
        """What the verifier (name and version) once said of a trace against this reference; None if it never did."""
        if self._verdicts is None:
            self._verdicts = {}
            for number in range(len(self._segments)):
                self._load_verdicts(number, self._verdicts)
        place = self._verdicts.get(_verdict_key(trace_id, verifier, gold))
        if place is None:
            return None
        return Verdict.model_validate_json(self._line(place[0], "verdicts.jsonl", place[1]))

    # --- what happens ---

    def ask(self, key: Key) -> int:
        """Write a request down before it is sent; returns how often it had been asked before."""
        at = packed(key)
        attempt = self._attempts.get(at, 0)
        self._journal.append(Asked(prompt_id=key[0], sample=key[1], attempt=attempt, timestamp=now()))
        self._attempts[at] = attempt + 1
        return attempt

    def add(self, trace: Trace) -> None:
        """Append an answer or a failure; the first answer of a key stays."""
        key = (trace.prompt_id, trace.sample)
        if self.answered(key) or trace.prompt_id in self.removed:
            return
        place = Place(0, self._log.end, trace.finish_reason == "length")
        self._log.append(trace)
        self._index(key, place, trace.failed, trace.attempt, trace.retryable)
        self._count(trace.failed, billed_tokens(trace.usage.output, trace.raw), trace.cost_usd)

    def add_verdict(self, verdict: Verdict) -> None:
        """Remember a verdict, so that neither a resume nor the selection has to run the verifier again."""
        if self.verdict(verdict.trace_id, verdict.verifier, verdict.gold) is None and self._verdicts is not None:
            place = (0, self._judged.end)
            self._judged.append(verdict)
            self._verdicts[_verdict_key(verdict.trace_id, verdict.verifier, verdict.gold)] = place

    def take_over(self, other: "Ledger") -> int:
        """Append what another ledger of the same configuration has beyond this one; returns how many answers came."""
        came = 0
        for number, folder in enumerate(other._segments):
            for offset, line in _lines(folder / "answers.jsonl"):
                at = _key_of(_row(line))
                if at is None or self.answered(at) or (self.failed(at) and not other.answered(at)):
                    continue
                trace = Trace.model_validate_json(line)
                if trace.failed or other._answers.get(packed(at)) == _packed_place(number, offset, trace):
                    self.add(trace)
                    came += not trace.failed
            for _, line in _lines(folder / "verdicts.jsonl"):
                if _row(line) is not None:
                    self.add_verdict(Verdict.model_validate_json(line))
        self.sync()
        return came

    def sync(self) -> None:
        """Wait until the disk has everything; a killed process loses nothing either way. May run in a thread."""
        for log in (self._journal, self._log, self._judged):
            log.sync()

    def close(self) -> None:
        """Sync and close; on a full disk each file is closed all the same."""
        with ExitStack() as files:
            for log in (self._log, self._journal, self._judged):
                files.callback(log.close)
            for reader in self._readers.values():
                files.callback(reader.close)

    # --- reading ---

    def _line(self, segment: int, name: str, offset: int) -> bytes:
        if (segment, name) not in self._readers:
            self._readers[segment, name] = (self._segments[segment] / name).open("rb")
        reader = self._readers[segment, name]
        reader.seek(offset)
        return reader.readline()

    def _load_answers(self, number: int) -> None:
        for offset, line in _lines(self._segments[number] / "answers.jsonl"):
            row = _row(line)
            key = _key_of(row)
            try:
                if key is None:
                    raise KeyError("prompt_id")
                if key[0] in self.removed:
                    continue
                failed, tokens = row["error"] is not None, billed_tokens(row["usage"]["output"], row["raw"])
                place = Place(number, offset, row["finish_reason"] == "length")
                if failed or not self.answered(key):
                    self._index(key, place, failed, row["attempt"], row.get("retryable", False))
                self._count(failed, tokens, row["cost_usd"])
            except (KeyError, TypeError, ValueError):
                self.damaged_lines += 1

    def _load_journal(self, number: int) -> None:
        """How often each unanswered key was asked."""
        for _, line in _lines(self._segments[number] / "journal.jsonl"):
            row = _row(line)
            key = _key_of(row)
            try:
                if key is None:
                    raise KeyError("prompt_id")
                at = packed(key)
                if at not in self._answers:
                    self._attempts[at] = max(self._attempts.get(at, 0), int(row["attempt"]) + 1)
            except (KeyError, TypeError, ValueError):
                self.damaged_lines += 1

    def _load_verdicts(self, number: int, found: dict[int, tuple[int, int]]) -> None:
        for offset, line in _lines(self._segments[number] / "verdicts.jsonl"):
            row = _row(line)
            if isinstance(row, dict) and {"trace_id", "verifier", "gold"} <= row.keys():
                found.setdefault(_verdict_key(row["trace_id"], row["verifier"], row["gold"]), (number, offset))

    def _index(self, key: Key, place: Place, failed: bool, attempt: int, retryable: bool) -> None:
        at = packed(key)
        if not failed:
            self._answers.setdefault(at, place.packed())
            self._failures.pop(at, None)
            self._attempts.pop(at, None)
        elif at not in self._answers:
            self._failures[at] = _Failure(place, attempt, retryable)
            self._attempts[at] = max(self._attempts.get(at, 0), attempt + 1)

    def _count(self, failed: bool, tokens: int, usd: float) -> None:
        self.spent = self.spent.plus(Spent(int(not failed), tokens, usd))


def _key_of(row: Any) -> Key | None:
    try:
        return (str(row["prompt_id"]), int(row["sample"]))
    except (KeyError, TypeError, ValueError):
        return None


def _packed_place(segment: int, offset: int, trace: Trace) -> int:
    return Place(segment, offset, trace.finish_reason == "length").packed()


def _verdict_key(trace_id: str, verifier: str, gold: str | None) -> int:
    return int(digest_json([trace_id, verifier, gold])[:16], 16)


# --- opening --------------------------------------------------------------------------------------------------------


@contextmanager
def open_ledger(runs: Path, sent: Mapping[str, Any], shard: Shard | None = None) -> Iterator[Ledger]:
    """Hold the ledger of one configuration and its lock; with a shard, its part of it beside other shards.

    Raises LockedError if another process writes the same, RunError if shards of another number are at work.
    """
    folder = runs / FOLDER / cfg_of(sent)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder if shard is None else folder / SHARDS / f"{shard.index}-of-{shard.of}"
    own.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(locked(folder, "the ledger is being written", shared=shard is not None))
        if shard is not None:
            held.enter_context(locked(own, f"shard {shard} of the ledger is being written"))
            _refuse_other_sharding(folder, shard)
        if not (folder / "ledger.json").exists():
            write_json(own / "ledger.json", description(sent))
            os.replace(own / "ledger.json", folder / "ledger.json")  # shards may do so at the same moment
        ledger = Ledger(own, [other for other in segments(folder) if other != own], removed_prompts(runs))
        try:
            yield ledger
        finally:
            ledger.close()


def open_for_reading(folder: Path, scratch: Path, removed: frozenset[str]) -> Ledger:
    """The ledger in a folder of another run store; nothing is written there, only in `scratch`. Close it."""
    return Ledger(scratch, segments(folder), removed)


def content_of(
    runs: Path,
    teacher: TeacherConfig,
    format: FormatConfig,
    roots: Mapping[str, str],
    engine_version: str,
    cache: DigestCache,
) -> str:
    """Digest of every answer file that a teacher's configuration has in a run store, with every token limit."""
    found = []
    for sampling in samplings(teacher):
        folder = runs / FOLDER / cfg_of(sent_to_teacher(teacher, format, roots, engine_version, sampling))
        files = [segment / "answers.jsonl" for segment in segments(folder)]
        found += [cache.of(file) for file in files if file.exists()]
    return digest_json(found)[:16]


def segments(folder: Path) -> list[Path]:
    """The folders of a ledger that hold answers: its own and those of shards."""
    return [folder, *sorted((folder / SHARDS).glob("*-of-*"))]


def _refuse_other_sharding(folder: Path, shard: Shard) -> None:
    """Two ways of cutting the prompts at once would ask for the same answers twice."""
    for other in (folder / SHARDS).glob("*-of-*"):
        if other.name.endswith(f"-of-{shard.of}"):
            continue
        try:
            with locked(other, "it is being written"):
                pass
        except LockedError:
            raise RunError(
                f"{folder}: shard {other.name} is at work, and this is shard {shard}: all shards of one run must"
                " give the same N; wait for it or stop it"
            ) from None


def removed_prompts(runs: Path) -> frozenset[str]:
    """Prompts with a tombstone in this run store."""
    path = runs / FOLDER / TOMBSTONES
    if not path.exists():
        return frozenset()
    return frozenset(tombstone.prompt_id for tombstone in read_records(path, Tombstone))


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
    """Each whole line with its offset; another process may be in the middle of writing a last one."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield offset, line
            offset += len(line)


def _row(line: bytes) -> Any:
    """The JSON of a line, None where it is damaged."""
    try:
        return from_json(line)
    except ValueError:
        return None
