"""Where the shards of a generate run are answered: processes on this machine, or tasks of a Ray cluster.

A shard gets plain text only (the resolved recipe as JSON, the run store, its number), runs the same code as
`distill generate --shard i/N`, and leaves its answers in the run store, which all nodes must share. So a process or a
node that dies loses nothing that had reached it: the shard is run again and asks only for what is missing.
"""

import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import __version__
from distill.config import Recipe, recipe_from
from distill.errors import DistillError, IncompleteError, LockedError, MissingExtraError, RecipeError
from distill.pipeline import run_shard
from distill.progress import say
from distill.runs import RunOptions, Shard

TRIES = 4
"""How often a shard is run whose process or node died."""
LOCK_WAIT_S = 120.0
"""Longest wait for the process of a lost node to let go of its shard."""
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One shard, as text and numbers that any process can take."""

    recipe: str
    folder: str
    """Where relative paths of the recipe are taken from; all nodes must see it."""
    runs: str
    index: int
    of: int
    device: str
    threads: int
    version: str

    @property
    def shard(self) -> Shard:
        """Which part it is."""
        return Shard(self.index, self.of)


@dataclass(frozen=True)
class Done:
    """How a shard ended: its counts, or the error that a user can mend."""

    index: int
    counts: dict[str, Any]
    error: str | None = None
    exit_code: int = 0


def run_shards(recipe: Recipe, options: RunOptions, count: int, executor: str) -> list[Done]:
    """Answer all shards; every one is run to its end, whatever becomes of the others.

    Raises RecipeError for an unknown executor, IncompleteError naming the shards that could not be finished.
    """
    if executor not in EXECUTORS:
        raise RecipeError(f"--executor {executor!r}: choose one of {', '.join(EXECUTORS)}")
    text = recipe.model_dump_json()
    here, runs = str(Path.cwd()), str(options.runs.resolve())
    jobs = [
        Job(text, here, runs, index, count, options.device, options.threads, __version__)
        for index in range(1, count + 1)
    ]
    ended = []
    for done in EXECUTORS[executor](jobs):
        ended.append(done)
        how = done.error or ", ".join(f"{key} {value}" for key, value in done.counts.items())
        say(f"shard {done.index}/{count} ({len(ended)} of {count} ended): {how}")
    if failed := [done for done in ended if done.error]:
        raise IncompleteError(
            f"{len(failed)} of {count} shards did not finish, the first because: {failed[0].error}; run the same"
            " command again: answers that have come are kept"
        )
    return ended


def run_job(job: Job) -> Done:
    """Run one shard in this process; what a user can mend comes back as text, everything else is raised."""
    if job.version != __version__:
        error = f"this node has distill {__version__}, the driver {job.version}; install the same version everywhere"
        return Done(job.index, {}, error, 2)
    options = RunOptions(Path(job.runs), job.device, job.threads, quiet=True, shard=job.shard)
    recipe = recipe_from(json.loads(job.recipe))
    patience_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            with chdir(job.folder):
                return Done(job.index, run_shard(recipe, options))
        except LockedError as error:
            if time.monotonic() > patience_s:
                return Done(job.index, {}, str(error), error.exit_code)
            time.sleep(POLL_S)
        except DistillError as error:
            return Done(job.index, {}, str(error), error.exit_code)


# --- on this machine ------------------------------------------------------------------------------------------------


def _local(jobs: Sequence[Job]) -> Iterator[Done]:
    """A process for each shard; one that dies takes its pool along, and its shard is run again."""
    owed = {job.index: job for job in jobs}
    for attempt in range(1, TRIES + 1):
        context = multiprocessing.get_context("spawn")
        pools = {index: ProcessPoolExecutor(1, mp_context=context) for index in owed}
        futures = {index: pools[index].submit(run_job, job) for index, job in owed.items()}
        for index, future in futures.items():
            try:
                yield future.result()
                del owed[index]
            except (OSError, EOFError, RuntimeError) as error:  # BrokenProcessPool is a RuntimeError
                say(f"shard {owed[index].shard}: its process died ({error}); try {attempt} of {TRIES}")
            finally:
                pools[index].shutdown(wait=False, cancel_futures=True)
        if not owed:
            return
    for job in owed.values():
        yield Done(job.index, {}, f"its process died {TRIES} times", 2)


# --- on Ray ---------------------------------------------------------------------------------------------------------


def _on_ray(jobs: Sequence[Job]) -> Iterator[Done]:
    """A Ray task for each shard, spread over the nodes; Ray runs it again where a node is lost."""
    with _cluster() as ray:
        task = ray.remote(max_retries=TRIES, num_cpus=1, scheduling_strategy="SPREAD")(run_job)
        waiting = {task.remote(job): job for job in jobs}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                yield Done(job.index, {}, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}", 2)


@contextmanager
def _cluster() -> Iterator[Any]:
    """The Ray cluster that RAY_ADDRESS names, or one of this machine alone."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    started = not ray.is_initialized()
    if started:
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


EXECUTORS: dict[str, Callable[[Sequence[Job]], Iterator[Done]]] = {"local": _local, "ray": _on_ray}
