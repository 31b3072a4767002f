"""Where the stages of a sweep run: processes on this machine here, Ray tasks in `ray`; the same code runs in both.

An executor starts jobs, says which have ended, and asks one to stop. A stage whose process dies loses nothing that its
run folder holds; the scheduler starts it again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .work import Ended, Job

GRACE_S = 60.0
"""How long a stage that was asked to stop may take to save itself."""


class Executor(Protocol):
    """Runs jobs and says how they ended."""

    name: str

    @property
    def cpus(self) -> int | None:
        """CPU slots that it brings; None takes what the sweep and this machine say."""

    @property
    def blind(self) -> bool:
        """Whether what runs cannot be seen in the driver's run store before it has ended."""

    def check(self, jobs: Sequence[Job]) -> dict[str, str]:
        """What stages refuse before any work, by identity; no job has begun yet."""

    def start(self, job: Job) -> None:
        """Begin a job; returns at once."""

    def ended(self) -> list[Ended]:
        """Jobs that have ended since the last call; returns at once."""

    def wait(self, seconds: float) -> None:
        """Return when a job may have ended, after so many seconds at most."""

    def stop(self, identity: str) -> None:
        """Ask a job to save itself and end; it is still told of by `ended`."""

    def close(self, at_once: bool = False) -> None:
        """End whatever still runs; unless at once, it may save itself first."""


@dataclass
class Running:
    """A stage's process."""

    job: Job
    process: "subprocess.Popen[bytes]"
    result: Path
    stopped: bool = False


class LocalExecutor:
    """Each stage in a process of its own on this machine; what it prints is in `logs/`."""

    name = "local"
    cpus: int | None = None
    blind = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, Running] = {}

    def check(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Ask all stages in one process."""
        return checked(jobs, self.folder)

    def start(self, job: Job) -> None:
        """Begin a job in a new process."""
        self.running[job.identity] = Running(job, *spawn([job], log_of(self.folder, job)))

    def ended(self) -> list[Ended]:
        """Processes that are gone, and how."""
        gone = [one for one in self.running.values() if one.process.poll() is not None]
        for one in gone:
            del self.running[one.job.identity]
        return [how_it_ended(one) for one in gone]

    def wait(self, seconds: float) -> None:
        """Processes are polled: sleep."""
        time.sleep(seconds)

    def stop(self, identity: str) -> None:
        """Send SIGTERM, which a stage answers by saving itself."""
        if (one := self.running.get(identity)) and not one.stopped:
            one.stopped = True
            one.process.terminate()

    def close(self, at_once: bool = False) -> None:
        """Ask all to stop, let them save themselves unless it is to be at once, then kill what is left."""
        for identity in list(self.running):
            self.stop(identity)
        patience_s = time.monotonic() + (0 if at_once else GRACE_S)
        try:
            for one in self.running.values():
                one.process.wait(max(0.1, patience_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for one in self.running.values():
                one.process.kill()
                one.process.wait()


def log_of(folder: Path, job: Job) -> Path:
    """Where a stage's output goes."""
    return folder / "logs" / f"{job.label.replace(':', '-')}-{job.identity}.log"


def spawn(jobs: Sequence[Job], log: Path) -> "tuple[subprocess.Popen[bytes], Path]":
    """A process that runs jobs one after the other, and the file in which it says how they ended.

    It is in a session of its own, so that Ctrl-C reaches the driver alone, and ends when the driver is gone.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "distill.sweep.work"], stdin=subprocess.PIPE, stdout=out, stderr=out,
            env={**os.environ, **jobs[0].environment}, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    try:
        order = {"result": str(result.resolve()), "jobs": [job.to_json() for job in jobs]}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once: seen when it is polled
    return process, result


def results(path: Path) -> list[Ended]:
    """What a process has written of its jobs; nothing if it was killed."""
    try:
        return [Ended(**one) for one in json.loads(path.read_text(encoding="utf-8"))["ended"]]
    except (OSError, ValueError):
        return []


def how_it_ended(one: Running) -> Ended:
    """How a process that is gone ended: what it wrote, else what its exit code says."""
    if one.process.stdin is not None:
        one.process.stdin.close()
    if found := results(one.result):
        return found[0]
    identity, code = one.job.identity, one.process.returncode
    if one.stopped:
        return Ended(identity, "stopped", exit_code=128 + signal.SIGTERM)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Ended(identity, "died", f"its process {how}", code if code > 0 else 128 - code)


def checked(jobs: Sequence[Job], folder: Path) -> dict[str, str]:
    """What stages refuse before any work, by identity, found out in one process."""
    if not jobs:
        return {}
    process, result = spawn(jobs, folder / "logs" / "preflight.log")
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    return {one.identity: one.error for one in results(result) if one.outcome == "failed"}
