"""The run store: one folder a stage run, sealed last, so that anything can be killed at any byte.

`runs/<stage>/<name>-<identity>/` holds what a stage produced; `stage.json`, written last, says what that is (file
digests, result digest, counts, timings, environment). Without it the stage is unfinished and the same command
resumes it. A lock stops two writers; a consumer that finds other bytes than `stage.json` says refuses.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.errors import LockedError, RecipeError, RunError, storage_errors
from distill.records import write_json

STAGE_FILE = "stage.json"
LOCK_FILE = ".lock"
PARTIAL = ".part"
WORK_FOLDER = "work"
"""Folder inside a run for what a resume needs and a sealed run does not (checkpoints, unfinished variants)."""


@dataclass(frozen=True)
class Shard:
    """One of `of` parts of the prompts, counted from 1; a prompt belongs to a part by its id alone."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `2/4`. Raises RecipeError for anything else."""
        index, slash, of = text.partition("/")
        if not (slash and index.isdigit() and of.isdigit() and 1 <= int(index) <= int(of)):
            raise RecipeError(f"--shard {text!r}: write it as i/N with i from 1 to N, such as 1/4")
        return cls(int(index), int(of))

    def has(self, prompt_id: str) -> bool:
        """Whether a prompt belongs to this part."""
        return int(prompt_id[:8], 16) % self.of == self.index - 1


@dataclass(frozen=True)
class RunOptions:
    """Where and how fast a stage runs; never part of an identity."""

    runs: Path = Path("runs")
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""
    quiet: bool = False
    require: bool = False
    """Count a gate that could not run as failed."""
    accept_partial: bool = False
    """Seal the traces that are there and ask for none: a budget was reached, or some requests keep failing."""
    ask: bool = True
    """Whether the teacher may be asked; without, a stage is only put together from what the ledger has."""
    once: bool = False
    """Whether a run that somebody else has finished meanwhile is refused, rather than made again."""
    shard: "Shard | None" = None
    """The part of the prompts that this process answers."""

    @property
    def cpu_threads(self) -> int:
        """Threads to use: as asked, or every core this process may run on."""
        return self.threads or available_cores()


def available_cores() -> int:
    """Cores this process may run on (not those of the whole machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- digests --------------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """Streamed sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LARGE = 1 << 20
"""Bytes from which on a file's digest is remembered; smaller ones are read every time."""
AT_REST_NS = 2_000_000_000
"""Age of a file's last change before its digest is remembered: a clock's tick may hide a change right after it."""
SAVE_EVERY = 1 << 30
"""Bytes read between two saves of what was found."""


class DigestCache:
    """sha256 of large files, remembered outside the run store by path, size and times of modification and change.

    The time of change (ctime) is the system's own: no program sets it back, as it may the modification time. So a file
    whose bytes were changed is read again, whoever changed them; bytes that rot on the disk are not noticed.
    """

    def __init__(self, path: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = path or home / "distill" / "digests.json"

    def of(self, path: Path) -> str:
        """Digest of a file, or of a folder: the digests of its regular files under their relative names."""
        if not path.is_dir():
            return self.of_all([path])[0]
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        digests = zip(files, self.of_all(files), strict=True)
        names = "\n".join(f"{p.relative_to(path).as_posix()} {digest}" for p, digest in digests)
        return hashlib.sha256(names.encode()).hexdigest()

    def of_all(self, paths: Sequence[Path]) -> list[str]:
        """Digests of files; what is remembered is read and written once for all of them."""
        known = self._read() if any(path.stat().st_size >= LARGE for path in paths) else {}
        digests, unsaved = [], 0
        for path in paths:
            status = path.stat()
            name, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            before = known.get(name)
            if before is not None and before[:3] == stamp:
                digests.append(str(before[3]))
                continue
            read_at = time.time_ns()
            digests.append(file_digest(path))
            if status.st_size >= LARGE and read_at - max(stamp[1:]) >= AT_REST_NS:
                known[name] = [*stamp, digests[-1]]
                unsaved += status.st_size
            if unsaved >= SAVE_EVERY:
                self._write(known)
                unsaved = 0
        if unsaved:
            self._write(known)
        return digests

    def _read(self) -> dict[str, list[Any]]:
        try:
            found = dict(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            return {}
        return {name: one for name, one in found.items() if isinstance(one, list) and len(one) == 4}

    def _write(self, known: dict[str, list[Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {name: one for name, one in known.items() if Path(name).exists()})
        except OSError:
            pass  # a cache that cannot be written only costs the next hash


# --- steps and sealed runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One stage of a plan: what it is made from, and so what it is called and where it lives."""

    stage: str
    """Stage name: prompts, generate, select, train, eval, export."""
    label: str
    """Unique in its plan: `generate`, `train:0`, `eval:student:heldout`."""
    name: str
    """What people call the folder: recipe name and label."""
    identity: str
    """Hash over version, fields and upstream identities (16 hex digits)."""
    fields: Mapping[str, Any]
    """What was hashed, in plain JSON."""
    upstream: Mapping[str, "Step"]
    """Steps this one reads, by role: `{"traces": …}`."""
    runs: Path
    args: Mapping[str, Any] = field(default_factory=dict)
    """What the stage's `run` needs to know beside the recipe: phase index, model, set."""

    @functools.cached_property
    def folder(self) -> Path:
        """The stage run's folder: one that another recipe made under its own name, if the identity is the same."""
        made = sorted((self.runs / self.stage).glob(f"*-{self.identity}"))
        return made[0] if made else self.runs / self.stage / f"{self.name}-{self.identity}"

    @property
    def sealed(self) -> bool:
        """Whether the stage is finished."""
        return (self.folder / STAGE_FILE).exists()

    def result(self, role: str) -> "SealedRun":
        """The sealed run of an upstream step, its bytes checked."""
        return open_sealed(self.upstream[role].folder)


@dataclass(frozen=True)
class SealedRun:
    """A finished stage run, read-only."""

    folder: Path
    document: Mapping[str, Any]

    @property
    def counts(self) -> Mapping[str, Any]:
        """What the stage counted."""
        return dict(self.document["counts"])

    @property
    def digest(self) -> str:
        """The result digest: equal for equal results, whatever the timings."""
        return str(self.document["digest"])

    @property
    def seconds(self) -> float:
        """Wall time over all attempts."""
        return float(self.document["seconds"])

    def path(self, name: str) -> Path:
        """A file or folder of the run."""
        return self.folder / name


def open_sealed(folder: Path, check: bool = True) -> SealedRun:
    """Open a finished stage run.

    Files that were not changed since they were last read (see `DigestCache`) are not read again: a cache of tens of
    gigabytes opens in no time. Raises RunError if it is unfinished or holds other bytes than its stage.json says.
    """
    try:
        document = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: not finished (no {STAGE_FILE}); run the same command again to finish it") from None
    except ValueError as error:
        raise RunError(f"{folder / STAGE_FILE}: damaged ({error}); delete the folder and run again") from error
    if check:
        _check_files(folder, document["files"])
    return SealedRun(folder, document)


_checked: dict[tuple[str, int, int, int], str] = {}
"""Digests of files already read by this process, by path, size and times."""


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name in files:
        if not (folder / name).is_file():
            raise RunError(f"{folder / name}: missing, though {STAGE_FILE} lists it; delete {folder} and run again")
    keys = {name: _state_of(folder / name) for name in files}
    unread = [name for name, key in keys.items() if key not in _checked]
    for name, digest in zip(unread, DigestCache().of_all([folder / name for name in unread]), strict=True):
        _checked[keys[name]] = digest
    for name, expected in files.items():
        if _checked[keys[name]] != expected["sha256"]:
            raise RunError(
                f"{folder / name}: holds other bytes than {STAGE_FILE} says (it was changed after the stage ended);"
                f" restore it, or delete {folder} and run again"
            )


def _state_of(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


# --- writing a run --------------------------------------------------------------------------------------------------


class OpenRun:
    """A stage run being written; use `open_run`."""

    def __init__(self, step: Step, options: RunOptions) -> None:
        self.step = step
        self.options = options
        self.folder = step.folder
        self.started = time.monotonic()
        self._seconds_before = float(self._attempts().get("seconds", 0.0))

    @property
    def work(self) -> Path:
        """Scratch folder that outlives a kill and is removed when the run is sealed."""
        folder = self.folder / WORK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def seconds(self) -> float:
        """Wall time of this stage over all attempts so far."""
        return self._seconds_before + time.monotonic() - self.started

    def path(self, name: str) -> Path:
        """A path inside the run."""
        return self.folder / name

    def seal(self, digest: str, counts: Mapping[str, Any], **more: Any) -> SealedRun:
        """Write stage.json last: the stage is finished and its bytes are what they are."""
        (self.folder / "attempts.json").unlink(missing_ok=True)
        document = {
            "schema": 1,
            "stage": self.step.stage,
            "label": self.step.label,
            "name": self.step.name,
            "identity": self.step.identity,
            "fields": self.step.fields,
            "upstream": {role: step.identity for role, step in self.step.upstream.items()},
            "digest": digest,
            "counts": dict(counts),
            "seconds": round(self.seconds, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(self.options),
            "files": _inventory(self.folder),
            **more,
        }
        write_json(self.folder / STAGE_FILE, document)
        shutil.rmtree(self.folder / WORK_FOLDER, ignore_errors=True)
        return SealedRun(self.folder, document)

    def note_attempt(self) -> None:
        """Remember the time spent so far, for a stage that ends without being sealed."""
        if self.folder.exists():
            write_json(self.folder / "attempts.json", {"seconds": self.seconds, **environment(self.options)})

    def _attempts(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "attempts.json").read_text()))
        except (OSError, ValueError):
            return {}


@contextmanager
def open_run(step: Step, options: RunOptions) -> Iterator[OpenRun]:
    """Hold a stage run's folder and its lock while it is written.

    Raises LockedError if another process writes it, or with `options.once` has finished it; StorageError if the disk
    refuses.
    """
    with storage_errors(f"{step.label}: cannot write {step.folder}"):
        step.folder.mkdir(parents=True, exist_ok=True)
        with locked(step.folder, f"{step.label} is being written"):
            if options.once and step.sealed:
                raise LockedError(f"{step.folder}: another process has just finished it; run again to go on from there")
            run = OpenRun(step, options)
            try:
                yield run
            finally:
                if not step.sealed:
                    run.note_attempt()


@contextmanager
def follow_run(step: Step, options: RunOptions) -> Iterator[OpenRun]:
    """The same run for a process that works on it together with the one that holds it, and never seals it."""
    with storage_errors(f"{step.label}: cannot write {step.folder}"):
        step.folder.mkdir(parents=True, exist_ok=True)
        yield OpenRun(step, options)


@contextmanager
def locked(folder: Path, what: str, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder, exclusive or shared; the system frees it when the process ends, however it ends.

    Raises LockedError, naming who holds it, if it cannot be had now.
    """
    with (folder / LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise LockedError(f"{folder}: {what} by {owner}; wait for it or stop it, then run again") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def holder_of(folder: Path) -> str | None:
    """Who holds the lock on a folder now; None where nobody does."""
    path = folder / LOCK_FILE
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip() or "another process"
    return None


def environment(options: RunOptions) -> dict[str, Any]:
    """What equality of bits depends on: device kind, threads, library versions."""
    return {
        "device": options.device,
        "threads": options.cpu_threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": library_versions(),
    }


LIBRARIES = ("distill", "torch", "transformers", "tokenizers", "onnxruntime", "onnxruntime-genai", "reasoning-gym")


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions of the libraries that results depend on."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of a run with its digest and size; leftovers of interrupted writes are removed first."""
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or relative.parts[0] in (STAGE_FILE, LOCK_FILE, WORK_FOLDER):
            continue
        if path.name.endswith(PARTIAL):
            path.unlink()
        else:
            files[relative.as_posix()] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    return files
