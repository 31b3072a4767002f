"""Stages of a sweep as tasks of a Ray cluster: the one that RAY_ADDRESS names, or one of this machine alone.

A task starts the same process that the local executor starts, on whichever node has room; run store and inputs lie on
storage that all nodes see under the same paths. Ray begins a task again where a node is lost; the stage goes on from
what its folder holds. Versions are compared by the process itself.
"""

import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.errors import MissingExtraError

from .executors import GRACE_S, Running, checked, how_it_ended, log_of, spawn
from .work import Ended, Job

NODE_LOSSES = 4
"""How often a stage is begun again whose node is lost."""


class RayExecutor:
    """Each stage as a task; stops are passed on to the stage's own process."""

    name = "ray"

    def __init__(self, folder: Path) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray") from error
        self.ray: Any = ray
        self.folder = folder.resolve()
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
        self.running: dict[Any, str] = {}

    @property
    def cpus(self) -> int:
        """CPU slots of the whole cluster."""
        return int(self.ray.cluster_resources().get("CPU", 1))

    def check(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Ask all stages in one process of this node."""
        return checked(jobs, self.folder)

    def start(self, job: Job) -> None:
        """Submit a stage with what it was granted; which GPUs it sees is Ray's to say."""
        task = self.ray.remote(
            max_retries=NODE_LOSSES, num_cpus=job.threads, num_gpus=len(job.gpus or ()), scheduling_strategy="SPREAD"
        )(run_on_node)
        self.running[task.remote(replace(job, gpus=None).to_json(), str(self.folder))] = job.identity

    def ended(self) -> list[Ended]:
        """Tasks that have ended."""
        if not self.running:
            return []
        ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return [self._how(one) for one in ready]

    def _how(self, task: Any) -> Ended:
        identity = self.running.pop(task)
        try:
            return Ended(**self.ray.get(task))
        except self.ray.exceptions.TaskCancelledError:
            return Ended(identity, "stopped")
        except self.ray.exceptions.RayError as error:
            return Ended(identity, "died", f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}", 2)

    def wait(self, seconds: float) -> None:
        """Until a task has ended, or so long."""
        if self.running:
            self.ray.wait(list(self.running), timeout=seconds)
        else:
            time.sleep(seconds)

    def stop(self, identity: str) -> None:
        """Cancel a task, which asks its process to save itself."""
        for task, running in self.running.items():
            if running == identity:
                self.ray.cancel(task, force=False)

    def close(self, at_once: bool = False) -> None:
        """Let go of the cluster; what still runs is cancelled."""
        for identity in list(self.running.values()):
            self.stop(identity)
        if self.started and self.ray.is_initialized():
            if self.running and not at_once:
                self.ray.wait(list(self.running), num_returns=len(self.running), timeout=GRACE_S)
            self.ray.shutdown()


def run_on_node(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run one stage on this node in a process of its own, and wait for it; a cancelled task passes the wish on."""
    job = Job.from_json(values)
    running = Running(job, *spawn([job], log_of(Path(folder), job)))
    try:
        running.process.wait()
    except KeyboardInterrupt:  # how Ray cancels
        running.stopped = True
        running.process.terminate()
        try:
            running.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
    ended: dict[str, Any] = how_it_ended(running).to_json()
    return ended
