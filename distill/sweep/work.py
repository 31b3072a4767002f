"""One stage of a sweep in a process of its own: `python -m distill.sweep.work`, on any machine.

A job is text: the stage's label, the resolved recipe as JSON, folders. The process plans the recipe anew and refuses if
the stage is not the one that was meant, so a file that was changed meanwhile cannot slip in. Jobs come on standard
input, which stays open as long as the driver lives; when it closes, the stage is asked to save itself and stop. Without
a driver, `python -m distill.sweep.work JOBS.jsonl LINE` runs one line of a file.
"""

import functools
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from distill.config import recipe_from
from distill.errors import DistillError, Interrupted, LockedError, RunError
from distill.interrupts import interruptible
from distill.pipeline import stage_module
from distill.plan import make_plan
from distill.progress import say
from distill.records import write_json
from distill.runs import RunOptions, library_versions

from .resources import visible_gpus

POLL_S = 0.2

Outcome = Literal["done", "failed", "stopped", "died"]


@functools.cache
def versions_here() -> Mapping[str, str]:
    """What results depend on: Python and the libraries, as they are installed here."""
    return {"python": platform.python_version(), **library_versions()}


def differences(driver: Mapping[str, str], node: Mapping[str, str]) -> str:
    """What a node has of another version than the driver; empty where all is the same."""
    return ", ".join(
        f"{name} {node.get(name, 'not at all')} (the driver has {driver.get(name, 'none')})"
        for name in dict.fromkeys([*driver, *node])
        if driver.get(name) != node.get(name)
    )


@dataclass(frozen=True)
class Job:
    """One stage to run, as text and numbers that any process can take."""

    label: str
    identity: str
    recipe: str
    """The resolved recipe, as JSON."""
    folder: str
    """Where relative paths of the recipe are taken from."""
    runs: str
    device: str
    threads: int
    gpus: tuple[int, ...] | None = None
    """Which of the driver's GPUs the stage sees; None where nobody counts them."""
    require: bool = False
    check_only: bool = False
    """Only let the stage refuse what it can refuse before any work."""
    checked: bool = False
    """It has just been asked on this machine, and need not be asked again."""
    place: str = ""
    """Its folder in the run store."""
    inputs: tuple[str, ...] = ()
    """Folders in the run store of all stages that it is made from."""
    versions: Mapping[str, str] = field(default_factory=versions_here)
    """What the driver runs with: another node must have the same."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Job":
        """The job that `to_json` gave."""
        known = {field.name: values[field.name] for field in fields(cls)}
        gpus = None if known["gpus"] is None else tuple(known["gpus"])
        return cls(**{**known, "gpus": gpus, "inputs": tuple(known["inputs"])})

    @property
    def environment(self) -> dict[str, str]:
        """What libraries read before they are imported: threads, and the GPUs that they may see."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if self.gpus is None:
            return threads
        visible = visible_gpus()
        return threads | {
            "CUDA_VISIBLE_DEVICES": ",".join(visible[index] for index in self.gpus if index < len(visible))
        }


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended."""

    identity: str
    outcome: Outcome
    error: str = ""
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_job(job: Job) -> Ended:
    """Run one stage in this process: what a user can mend comes back as text, a signal raises Interrupted."""
    if differing := differences(job.versions, versions_here()):
        return Ended(job.identity, "failed", f"this node has {differing}; install the same everywhere", 2)
    try:
        with chdir(job.folder):
            _run(job)
    except DistillError as error:
        return Ended(job.identity, "failed", " ".join(str(error).split()), error.exit_code)
    return Ended(job.identity, "done")


def _run(job: Job) -> None:
    recipe = recipe_from(json.loads(job.recipe))
    options = RunOptions(Path(job.runs), job.device, job.threads, require=job.require, once=True)
    step = make_plan(recipe, options).steps.get(job.label)
    if step is None or step.identity != job.identity:
        raise RunError(
            f"{job.label}: its inputs are not what they were when the sweep was planned (a prompt file, a model or a"
            " library changed); run the sweep again"
        )
    if step.sealed:
        return
    module = stage_module(step)
    if not job.checked:
        module.preflight(recipe, step, options)
    said = ""
    while not (job.check_only or step.sealed):
        try:
            module.run(recipe, step, options)
        except LockedError as error:
            # another sweep works on it, or its process of a driver that was killed still saves itself
            if said != str(error):
                say(f"{job.label}: waiting: {error}")
            said = str(error)
            time.sleep(POLL_S)


def main(arguments: Sequence[str] = ()) -> int:
    """Run one line of a job file, or the jobs of a driver; returns the exit code."""
    if len(arguments) == 2:
        return _run_line(Path(arguments[0]), int(arguments[1]))
    return _run_for_driver()


def _run_line(path: Path, line: int) -> int:
    with path.open(encoding="utf-8") as lines:
        job = Job.from_json(json.loads(next(islice(lines, line, None))))
    os.environ.update(job.environment)  # the libraries that read it are not imported yet
    try:
        with interruptible():
            ended = _guarded(job)
    except Interrupted as stop:
        ended = Ended(job.identity, "stopped", str(stop), stop.exit_code)
    print(f"{job.label} {job.identity}: {ended.outcome} {ended.error}".strip(), flush=True)
    return ended.exit_code


def _run_for_driver() -> int:
    """Run the jobs of the first line of standard input; how each ended is written to the file named beside them."""
    order = json.loads(sys.stdin.readline())
    jobs = [Job.from_json(values) for values in order["jobs"]]
    ended: list[Ended] = []
    try:
        with interruptible():
            threading.Thread(target=_stop_with_the_driver, daemon=True).start()
            for job in jobs:
                ended.append(_guarded(job))
    except Interrupted as stop:
        ended.append(Ended(jobs[len(ended)].identity, "stopped", str(stop), stop.exit_code))
    write_json(Path(order["result"]), {"ended": [one.to_json() for one in ended]})
    return ended[-1].exit_code if ended else 0


def _guarded(job: Job) -> Ended:
    """A bug of a stage ends that stage, not the sweep; its traceback is in the log."""
    try:
        return run_job(job)
    except Exception as error:  # the boundary between stages: the others go on
        traceback.print_exc()
        return Ended(job.identity, "failed", f"{type(error).__name__}: {error} (a bug; the log has its traceback)", 1)


def _stop_with_the_driver() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
