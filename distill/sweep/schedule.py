"""The scheduler: every distinct stage once, as many at a time as the resources allow, whatever becomes of the others.

It knows which stages wait for which, hands those that can run to an executor, and writes down how each ended. What is
finished is finished in the run store, so a driver that is killed at any moment loses nothing but its place in the
queue. A trial whose stage fails is out; stages that only such trials need are not begun.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.interrupts import Stop
from distill.progress import say
from distill.records import write_json
from distill.runs import RunOptions, SealedRun, Step, open_sealed

from .config import Limits, Resources
from .executors import Executor
from .graph import Graph, Node
from .record import LIVE, Event, Events, attempt_seconds, now, pruned
from .resources import Grant, is_paid, needed, pool_of
from .trials import Trial
from .watch import Watch
from .work import Ended, Job

TICK_S = 0.05
"""Pause between two looks at what runs."""
LIVE_EVERY_S = 1.0
"""Seconds between two notes of what runs, and between two looks at trainings."""
TRIES = 2
"""How often a stage is begun whose process dies of itself (out of memory, a lost node)."""
SECONDS_PER_HOUR = 3600


@dataclass
class Begun:
    """A stage that runs now."""

    node: Node
    grant: Grant
    started_s: float
    started: str
    pruned: bool = False


@dataclass
class Summary:
    """What one call of the scheduler did."""

    executed: list[str] = field(default_factory=list)
    """Labels and identities of the stages that ran to their end now."""
    failed: dict[str, str] = field(default_factory=dict)
    """Errors of stages that failed now, by identity."""
    reason: str = ""
    """Which limit ended it; empty where there was nothing left to do."""
    stage_seconds: float = 0.0
    wall_seconds: float = 0.0


class Scheduler:
    """Runs the stages of a graph; `run` is the way in."""

    def __init__(
        self,
        graph: Graph,
        executor: Executor,
        events: Events,
        folder: Path,
        resources: Resources,
        limits: Limits,
        watch: Watch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.graph, self.executor, self.events, self.folder = graph, executor, events, folder
        self.resources, self.limits, self.watch, self.clock = resources, limits, watch, clock
        self.pool = pool_of(resources)
        self.counts_gpus = bool(self.pool.gpus)
        self.options: RunOptions = graph.options
        self.running: dict[str, Begun] = {}
        self.sealed: set[str] = set()
        self.failed: dict[str, str] = {}
        self.pruned = pruned(events.seen)
        self.tries: dict[str, int] = {}
        self.checked: set[str] = set()
        """Stages that were asked what they refuse."""
        self.looked: set[str] = set()
        """Stages whose folder has been looked at."""
        self.out: set[int] = set()
        """Trials that failed or were pruned."""
        self.begun: set[int] = set()
        """Trials whose stages may run."""
        self.spent_usd: dict[str, float] = {}
        self.summary = Summary()
        self.winding = False
        """Whether what runs has been asked to stop."""
        events.count_killed()
        self.earlier_s = attempt_seconds(events.seen)
        self.attempt = datetime.now(UTC).isoformat()
        """When this attempt began, with `_started_s` on the clock."""
        self._started_s = self.clock()
        self._changed = True
        self._noted_s = float("-inf")

    # --- trials -----------------------------------------------------------------------------------------------------

    def admit(self, trials: Iterable[Trial]) -> None:
        """Let the stages of these trials run; they are in the graph."""
        for trial in trials:
            self.begun.add(trial.number)
            for node in self.graph.steps(trial.number):
                if node.identity not in self.looked:
                    self.looked.add(node.identity)
                    if node.identity in self.graph.store.sealed:
                        self._seal(node)
            if any(self._lost(node, trial) for node in self.graph.steps(trial.number)):
                self.out.add(trial.number)
        self._changed = True

    def _lost(self, node: Node, trial: Trial) -> bool:
        """Whether a stage will not end well for a trial: it failed, or the trial was given up when it fell behind."""
        given_up = node.identity in self.failed or trial.key in self.pruned.get(node.identity, ())
        return given_up and node.identity not in self.sealed

    def refuse(self, checked: Iterable[str], errors: dict[str, str]) -> None:
        """Note which stages were asked before any work, and count as failed what refused."""
        self.checked.update(checked)
        for identity, error in errors.items():
            self._fail(self.graph.nodes[identity], error)

    def open_trials(self) -> list[int]:
        """Trials that can still end well and have not yet."""
        return [
            number
            for number in sorted(self.begun - self.out)
            if any(node.identity not in self.sealed for node in self.graph.steps(number))
        ]

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, stop: Stop, each: Callable[["Scheduler"], bool] = lambda _: False) -> Summary:
        """Run until nothing is left, a limit is reached or `stop` is requested.

        `each` is called between two looks, may admit further trials, and says whether it will admit more.
        """
        try:
            while not self._over(stop):
                self._collect()
                more = each(self)
                self._begin()
                self._note()
                if not self.running and not more and not self._changed:
                    break
                self.executor.wait(TICK_S)
            self._wind_down()
        finally:
            self.executor.close(at_once=self.winding)  # then somebody asked twice
            self.winding = True
            self._collect()
            self.summary.wall_seconds = self.clock() - self._started_s
            self.events.add(Event(what="attempt", at=now(), **self._attempt()))
            (self.folder / LIVE).unlink(missing_ok=True)
        return self.summary

    def _attempt(self) -> dict[str, Any]:
        """When this attempt began and how long it has taken."""
        return {"started": self.attempt, "seconds": round(self.clock() - self._started_s, 3)}

    def _over(self, stop: Stop) -> bool:
        hours = (self.earlier_s + self.clock() - self._started_s) / SECONDS_PER_HOUR
        if self.limits.hours is not None and hours >= self.limits.hours:
            self.summary.reason = f"limits.hours: {self.limits.hours:g} hours have passed"
        return stop.requested or bool(self.summary.reason)

    def _wind_down(self) -> None:
        """Ask whatever runs to save itself, and wait for it."""
        self.winding = True
        for identity in list(self.running):
            self.executor.stop(identity)
        while self.running:
            self._collect()
            self.executor.wait(TICK_S)

    def _begin(self) -> None:
        """Start every stage that can run now, those of the first trials first."""
        if not self._changed:
            return
        self._changed = False
        for node in self.ready():
            wanted, gpus = needed(node.step, node.recipe, self.resources)
            if (paid := is_paid(node.step, node.recipe)) and not self._may_pay():
                continue
            if (grant := self.pool.take(wanted, gpus)) is None:
                continue
            job = self._job(node, grant, paid)
            self.running[node.identity] = Begun(node, grant, self.clock(), now())
            self._noted_s = float("-inf")
            self.executor.start(job)

    def ready(self) -> list[Node]:
        """Stages that nothing keeps from running: of live trials, all they read is there, in the order of trials."""
        found: dict[str, Node] = {}
        busy = self.sealed | self.running.keys() | self.failed.keys()
        for number in sorted(self.begun - self.out):
            for node in self.graph.steps(number):
                if node.identity not in busy and node.identity not in found and self.sealed.issuperset(node.needs):
                    found[node.identity] = node
        return list(found.values())

    def _may_pay(self) -> bool:
        """Whether a stage that costs money may begin: one at a time, so that each knows what the others spent."""
        if self.limits.dollars is None:
            return True
        if sum(self.spent_usd.values()) >= self.limits.dollars:
            self.summary.reason = f"limits.dollars: ${self.limits.dollars:g} are spent"
            return False
        return not any(is_paid(one.node.step, one.node.recipe) for one in self.running.values())

    def _job(self, node: Node, grant: Grant, paid: bool) -> Job:
        recipe = node.recipe
        if paid and self.limits.dollars is not None:
            recipe = _with_budget(recipe, self.limits.dollars - sum(self.spent_usd.values()))
        checked = node.identity in self.checked and not self.tries.get(node.identity)
        inputs = tuple(dict.fromkeys(map(_place, _upstream(node.step))))
        return job_of(
            node, recipe, self.options, grant, self.counts_gpus, checked=checked, place=_place(node.step), inputs=inputs
        )

    # --- what ended -------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        for ended in self.executor.ended():
            begun = self.running.pop(ended.identity)
            self.pool.give_back(begun.grant)
            self._changed = True
            self._write_down(begun, ended)
            if self.watch is not None and begun.node.step.label == self.watch.label:
                self.watch.ended(begun.node.step.folder)
            if begun.node.step.sealed:  # whatever its process says: what counts is on the disk
                self._seal(begun.node)
                self.summary.executed.append(f"{begun.node.step.label} {ended.identity}")
            elif ended.outcome in ("died", "stopped") and (self.winding or begun.pruned):
                continue
            elif ended.outcome in ("died", "stopped") and self._again(ended.identity):
                say(f"{begun.node.step.label}: {ended.error or 'it was stopped'}; it is begun again")
            else:
                self._fail(begun.node, ended.error or "it was stopped by somebody else")
                self._count_budget(begun, ended)

    def _again(self, identity: str) -> bool:
        self.tries[identity] = self.tries.get(identity, 1) + 1
        return self.tries[identity] <= TRIES

    def _count_budget(self, begun: Begun, ended: Ended) -> None:
        """A paid stage that stopped at its budget under a limit of the sweep: nothing more is bought."""
        if self.limits.dollars is not None and is_paid(begun.node.step, begun.node.recipe) and ended.exit_code == 3:
            self.summary.reason = f"limits.dollars: {ended.error}"

    def _write_down(self, begun: Begun, ended: Ended) -> None:
        seconds = self.clock() - begun.started_s
        self.summary.stage_seconds += seconds
        outcome = "done" if begun.node.step.sealed else "pruned" if begun.pruned else ended.outcome
        self.events.add(
            Event(
                what="stage", at=now(), identity=ended.identity, label=begun.node.step.label, outcome=outcome,
                seconds=round(seconds, 3), started=begun.started, error=ended.error if outcome != "done" else "",
                exit_code=ended.exit_code, cpus=begun.grant.cpus, gpus=begun.grant.gpus, executor=self.executor.name,
            )
        )  # fmt: skip

    def _seal(self, node: Node) -> None:
        self.sealed.add(node.identity)
        if node.step.stage == "generate":
            self.spent_usd[node.identity] = float(sealed(node).counts.get("spent_usd") or 0.0)

    def _fail(self, node: Node, error: str) -> None:
        self.failed[node.identity] = self.summary.failed[node.identity] = error
        out = self.begun.intersection(node.trials) - self.out
        self.out |= out
        self._changed = True
        trials = ", ".join(map(str, sorted(out)))
        say(f"{node.step.label} failed, and with it trial {trials or 'none'}: {error}")

    # --- while it runs ----------------------------------------------------------------------------------------------

    def _note(self) -> None:
        """Every second: write down what runs, and look at trainings that may fall behind."""
        if self.clock() - self._noted_s < LIVE_EVERY_S:
            return
        self._noted_s = self.clock()
        running = [
            {
                "identity": identity, "label": one.node.step.label, "trials": one.node.trials, "started": one.started,
                "seconds": round(self.clock() - one.started_s, 1), "cpus": one.grant.cpus, "gpus": one.grant.gpus,
                "folder": str(one.node.step.folder),
            }
            for identity, one in self.running.items()
        ]  # fmt: skip
        write_json(self.folder / LIVE, {"schema": 1, "updated": now(), "attempt": self._attempt(), "running": running})
        if self.watch is not None:
            self._look(self.watch)

    def _look(self, watch: Watch) -> None:
        for identity, one in self.running.items():
            if one.node.step.label != watch.label or one.pruned or identity in self.pruned:
                continue
            if (at := watch.falls_behind(one.node.step.folder)) is not None:
                self._prune(one, *at)

    def _prune(self, one: Begun, step: int, value: float) -> None:
        label, identity = one.node.step.label, one.node.identity
        assert self.watch is not None
        why = f"{self.watch.pruner.metric} {value:.4g} at step {step} falls behind"
        say(f"{label} of trial {one.node.trials[0]} is stopped: {why}")
        one.pruned = True
        given_up = self.begun.intersection(one.node.trials)
        keys = tuple(self.graph.trials[number].key for number in sorted(given_up))
        self.pruned[identity] = set(keys)
        self.events.add(Event(what="pruned", at=now(), identity=identity, label=label, error=why, trials=keys))
        self.out |= given_up
        self.executor.stop(identity)


def sealed(node: Node) -> SealedRun:
    """The finished run of a stage."""
    return open_sealed(node.step.folder, check=False)


def job_of(
    node: Node, recipe: Recipe, options: RunOptions, grant: Grant, counts_gpus: bool = False, **changes: Any
) -> Job:
    """A stage as an executor takes it."""
    return Job(
        node.step.label, node.identity, recipe.model_dump_json(), str(Path.cwd()), str(options.runs.resolve()),
        options.device, grant.cpus, grant.gpus if counts_gpus else None, options.require, **changes,
    )  # fmt: skip


def _place(step: Step) -> str:
    return "/".join(step.folder.parts[-2:])


def _upstream(step: Step) -> Iterator[Step]:
    """All that a stage is made from, upstream first."""
    for one in step.upstream.values():
        yield from _upstream(one)
        yield one


def _with_budget(recipe: Recipe, usd: float) -> Recipe:
    """The recipe with at most so many dollars for its teacher; a budget is in no identity."""
    assert recipe.teacher is not None  # it has a paid stage
    budget = recipe.teacher.budget
    most = usd if budget.usd is None else min(usd, budget.usd)
    teacher = recipe.teacher.model_copy(update={"budget": budget.model_copy(update={"usd": most})})
    return recipe.model_copy(update={"teacher": teacher})
