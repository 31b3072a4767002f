"""Stages of a sweep as tasks of a Ray cluster: the one that RAY_ADDRESS names, or one of this machine alone.

A task starts the same process that the local executor starts, on whichever node has room. A node that sees the driver's
run store works in it. One that does not has a run store of its own: what a stage reads comes to it through Ray's object
store, and the finished stage goes back the same way. Ray begins a task again where a node is lost; on shared storage
the stage then goes on from what its folder holds.
"""

import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import recipe_from
from distill.errors import MissingExtraError, RecipeError, RunError

from .executors import GRACE_S, Running, checked, how_it_ended, log_of, spawn
from .parcels import Parcel, local_paths, pack_path, pack_stage, relocated, unpack_path, unpack_stage
from .work import Ended, Job, differences, versions_here

NODE_LOSSES = 4
"""How often a stage is begun again whose node is lost."""
ANSWERS_WITHIN_S = 180.0
"""How long a node may take to say what is installed there."""
OWN_STORE = "DISTILL_NODE_RUNS"
"""On a node: its own run store, for one that does not see the driver's."""
SIGN = "ray.sign"
"""File in the sweep's folder by which a node sees that it is the driver's."""


class Node(NamedTuple):
    """A node of the cluster as it answered."""

    id: str
    address: str
    versions: dict[str, str]
    sees_store: bool


class Home(NamedTuple):
    """Where the driver works; by the sign a node knows whether it sees the same folder."""

    folder: str
    sign: str

    @property
    def seen(self) -> bool:
        """Whether this node sees the driver's run store, and is to use it."""
        try:
            return OWN_STORE not in os.environ and (Path(self.folder) / SIGN).read_text(encoding="utf-8") == self.sign
        except OSError:
            return False

    @property
    def runs(self) -> Path:
        """The run store on a node that does not see the driver's: as its environment says, else under the same path."""
        return Path(os.environ.get(OWN_STORE) or Path(self.folder).parent.parent)


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
        self.running: dict[Any, Job] = {}
        self.home = Home(str(self.folder), uuid.uuid4().hex)
        (self.folder / SIGN).write_text(self.home.sign, encoding="utf-8")
        self.parcels: dict[str, Any] = {}
        """References to what has been put in the object store, by stage folder or path."""

    @property
    def cpus(self) -> int:
        """CPU slots of the whole cluster."""
        return int(self.ray.cluster_resources().get("CPU", 1))

    @cached_property
    def nodes(self) -> list[Node]:
        """Every node that can run stages, asked once. Raises RunError for one that does not answer."""
        alive = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        asked = {self._task(node["NodeID"], num_cpus=0)(look).remote(self.home): node for node in alive}
        found = []
        for task, node in asked.items():
            address = str(node["NodeManagerAddress"])
            try:
                versions, sees = self.ray.get(task, timeout=ANSWERS_WITHIN_S)
            except self.ray.exceptions.RayError as error:
                raise RunError(
                    f"node {address} ({node['NodeID'][:8]}) cannot say what is installed there: {_last_line(error)};"
                    " install the driver's version of distill on it, or take it out of the cluster"
                ) from error
            found.append(Node(node["NodeID"], address, versions, sees))
        return found

    @property
    def blind(self) -> bool:
        """Whether a node works in a run store of its own, so that what runs there is not seen before it has ended."""
        return not all(node.sees_store for node in self.nodes)

    def check(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Compare what is installed on all nodes, then ask all stages in one process of this one.

        Raises RunError naming each node that differs, what it has and what the driver has.
        """
        wrong = [
            f"node {node.address} ({node.id[:8]}) has {differing}"
            for node in self.nodes
            if (differing := differences(versions_here(), node.versions))
        ]
        if wrong:
            raise RunError(f"{'; '.join(wrong)}; install the same versions on every node, then run again")
        return checked(jobs, self.folder)

    def start(self, job: Job) -> None:
        """Submit a stage with what it was granted; which GPUs it sees is Ray's to say.

        Answers of teachers are kept where they were paid for: without shared storage those stages stay on a node that
        sees the driver's run store.
        """
        node = self._node_of_the_ledger() if self.blind and job.label == "generate" else None
        submit = self._task(node, max_retries=NODE_LOSSES, num_cpus=job.threads, num_gpus=len(job.gpus or ()))
        task = submit(run_on_node).remote(
            replace(job, gpus=None, checked=False).to_json(), self.home, self._parcels(job)
        )
        self.running[task] = job

    def _task(self, node: str | None, **options: Any) -> Any:
        """A decorator for tasks: on this node, or wherever there is room."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = "SPREAD" if node is None else NodeAffinitySchedulingStrategy(node, soft=False)
        return self.ray.remote(scheduling_strategy=where, **options)

    def _node_of_the_ledger(self) -> str:
        if (node := next((node.id for node in self.nodes if node.sees_store), None)) is None:
            raise RecipeError(
                f"no node of the cluster sees {self.home.runs}, where teachers' answers are kept; start the driver on a"
                " node of the cluster"
            )
        return node

    def _parcels(self, job: Job) -> dict[str, Any]:
        """References to all that a stage reads, each in a list: Ray fetches what stands alone before a task begins."""
        if not self.blind:
            return {}
        runs, recipe = Path(job.runs), recipe_from(json.loads(job.recipe))
        for name in job.inputs:
            if name not in self.parcels:
                self.parcels[name] = self.ray.put(pack_stage(runs / name))
        paths = local_paths(recipe)
        for name in paths:
            if name not in self.parcels:
                self.parcels[name] = self.ray.put(pack_path(Path(name).expanduser()))
        return {name: [self.parcels[name]] for name in [*job.inputs, *paths]}

    def ended(self) -> list[Ended]:
        """Tasks that have ended."""
        if not self.running:
            return []
        ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return [self._how(one) for one in ready]

    def _how(self, task: Any) -> Ended:
        job = self.running.pop(task)
        try:
            ended, parcel = self.ray.get(task)
            if parcel is not None:
                unpack_stage(Path(job.runs) / job.place, Parcel(*parcel))
            return Ended(**ended)
        except self.ray.exceptions.TaskCancelledError:
            return Ended(job.identity, "stopped")
        except self.ray.exceptions.RayError as error:
            return Ended(job.identity, "died", f"{type(error).__name__}: {_last_line(error)}", 2)
        except RunError as error:
            return Ended(job.identity, "died", str(error), error.exit_code)

    def wait(self, seconds: float) -> None:
        """Until a task has ended, or so long."""
        if self.running:
            self.ray.wait(list(self.running), timeout=seconds)
        else:
            time.sleep(seconds)

    def stop(self, identity: str) -> None:
        """Cancel a task, which asks its process to save itself."""
        for task, job in self.running.items():
            if job.identity == identity:
                self.ray.cancel(task, force=False)

    def close(self, at_once: bool = False) -> None:
        """Let go of the cluster; what still runs is cancelled."""
        for job in list(self.running.values()):
            self.stop(job.identity)
        if self.started and self.ray.is_initialized():
            if self.running and not at_once:
                self.ray.wait(list(self.running), num_returns=len(self.running), timeout=GRACE_S)
            self.ray.shutdown()
        (self.folder / SIGN).unlink(missing_ok=True)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


# --- on a node ------------------------------------------------------------------------------------------------------


def look(home: Home) -> tuple[dict[str, str], bool]:
    """What a stage would find on this node: versions, asked of a process like its own, and the driver's run store."""
    ask = "import json; from distill.sweep.work import versions_here; print(json.dumps(versions_here()))"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return json.loads(said.stdout), home.seen


def run_on_node(values: dict[str, Any], home: Home, parcels: dict[str, list[Any]]) -> tuple[dict[str, Any], Any]:
    """Run one stage on this node and wait for it: how it ended, and what it made where the driver does not see it."""
    job = Job.from_json(values)
    if home.seen:
        return _run_process(job, Path(home.folder)).to_json(), None
    if not parcels:
        error = f"node {os.uname().nodename} does not see {home.folder}, unlike those that the sweep began with"
        return Ended(job.identity, "failed", f"{error}; run it again", 2).to_json(), None
    ended = _run_process(_fetched(job, home.runs, parcels), home.runs / "sweeps" / Path(home.folder).name)
    made = next((home.runs / Path(job.place).parent).glob(f"*-{job.identity}"), None)
    return ended.to_json(), pack_stage(made) if made and ended.outcome == "done" else None


def _fetched(job: Job, runs: Path, parcels: dict[str, list[Any]]) -> Job:
    """The job over this node's own run store, with all that it reads there."""
    import ray

    places: dict[str, str] = {}
    runs.mkdir(parents=True, exist_ok=True)
    for name, (reference,) in parcels.items():
        if name not in job.inputs:
            places[name] = str(unpack_path(runs, name, Parcel(*ray.get(reference))))
        elif not (runs / name / "stage.json").exists():
            unpack_stage(runs / name, Parcel(*ray.get(reference)))
    recipe = json.dumps(relocated(json.loads(job.recipe), places))
    return replace(job, recipe=recipe, folder=str(runs), runs=str(runs))


def _run_process(job: Job, folder: Path) -> Ended:
    """Run a stage in a process of its own; a cancelled task passes the wish on."""
    running = Running(job, *spawn([job], log_of(folder, job)))
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
    return how_it_ended(running)
