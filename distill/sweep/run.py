"""A sweep from its file to its end: plan, refuse what can be refused, run, and write down what happened.

`plan_sweep` is the dry run. `run_sweep` is the driver: it holds the sweep's lock, so that there is only one, and may be
killed and called again at any moment.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from distill.errors import BudgetError, IncompleteError, RecipeError, storage_errors
from distill.interrupts import graceful
from distill.progress import say
from distill.runs import RunOptions, locked

from .config import SweepFile, load_sweep
from .executors import Executor, LocalExecutor
from .forecast import SweepForecast, forecast, price_of
from .graph import Graph
from .measures import measure, pipeline_of
from .record import Events, known_numbers, read_record, sweep_folder, write_record
from .resources import is_paid, needed
from .schedule import Scheduler, Summary, job_of
from .study import Proposal, Searcher, database_errors, objective_values
from .trials import Numbers, Recipes, Trial, expand, trials_of
from .watch import Watch
from .work import Job

ExecutorName = Literal["local", "ray"]
EXECUTORS: Sequence[ExecutorName] = ("local", "ray")

View = Callable[[Scheduler], None]
"""Shows a running sweep; called every moment."""


class Planned(NamedTuple):
    """A sweep with its trials and their stages."""

    file: SweepFile
    recipes: Recipes
    numbers: Numbers
    graph: Graph
    folder: Path

    @property
    def chosen(self) -> list[Trial]:
        """The trials that run: all, or the first ones up to the limit."""
        return list(self.graph.trials.values())[: self.file.sweep.limits.trials]

    @property
    def chosen_numbers(self) -> list[int]:
        """Their numbers."""
        return [trial.number for trial in self.chosen]


@dataclass(frozen=True)
class SweepOutcome:
    """What a call of the driver did."""

    name: str
    folder: Path
    trials: int
    done: int
    summary: Summary
    failed_trials: tuple[int, ...] = ()
    pruned_trials: tuple[int, ...] = ()
    left_out: int = 0
    stages: int = 0
    """Distinct stages of all trials."""
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def overhead(self) -> float:
        """Share of the wall time in which no stage ran, where stages ran one at a time."""
        busy = self.summary.stage_seconds
        return max(0.0, self.summary.wall_seconds - busy) / busy if busy else 0.0


def plan_sweep(path: Path | str, options: RunOptions) -> Planned:
    """Read a sweep and plan all its trials; runs nothing and writes nothing.

    Of a search, whose trials are not known yet, the base recipe stands for what they share. Raises RecipeError,
    DataError or ModelError for a sweep or a trial that cannot run.
    """
    file = load_sweep(path)
    recipes = Recipes(file.base, file.base_path, str(file.path))
    folder = sweep_folder(file.sweep.name, options.runs)
    numbers, graph = Numbers(known_numbers(folder)), Graph(options)
    for trial in expand(file, recipes, numbers) if file.sweep.search is None else ():
        graph.add(trial)
    for node in graph.nodes.values():
        needed(node.step, node.recipe, file.sweep.resources)
        if file.sweep.limits.dollars and is_paid(node.step, node.recipe) and price_of(node.recipe) is None:
            raise RecipeError(
                f"{file.place('limits', 'dollars')}: limits.dollars takes prices, but what the teacher"
                f" {node.recipe.teacher and node.recipe.teacher.model!r} charges is in no list that we have; add"
                " teacher.prices to the base recipe"
            )
    if file.sweep.pruner is not None:
        _require_monitor(file, recipes)
    return Planned(file, recipes, numbers, graph, folder)


def _require_monitor(file: SweepFile, recipes: Recipes) -> None:
    """Refuse a pruner whose figure no training would write."""
    pruner, student = file.sweep.pruner, recipes.base.student
    assert pruner is not None
    phases = student.phases if student else []
    if pruner.phase >= len(phases) or phases[pruner.phase].monitor is None:
        raise RecipeError(
            f"{file.place('pruner')}: pruner reads {pruner.metric} of training phase {pruner.phase}, but the base"
            f" recipe measures nothing there; add student.phases.{pruner.phase}.monitor with every_steps"
        )


def foresee(planned: Planned) -> SweepForecast:
    """What the sweep would do; for a search, what its base recipe needs and how many trials there will be."""
    search = planned.file.sweep.search
    if search is not None and not planned.graph.trials:
        for trial in trials_of(planned.file.sweep, planned.recipes, {}, Numbers()):
            planned.graph.add(trial)
    return forecast(planned.file, planned.graph, search.trials if search else 0)


def open_executor(name: str, folder: Path) -> Executor:
    """Where stages run. Raises RecipeError for a name that is none."""
    if name == "local":
        return LocalExecutor(folder)
    if name == "ray":
        from .ray import RayExecutor

        return RayExecutor(folder)
    raise RecipeError(f"--executor {name!r}: choose one of {', '.join(EXECUTORS)}")


def run_sweep(
    path: Path | str,
    options: RunOptions,
    executor: str | Executor = "local",
    view: View = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> SweepOutcome:
    """Run a sweep, or go on with it.

    What went wrong with single trials is in the outcome, see `raise_for`. Raises LockedError if another driver runs it,
    RecipeError and its kin before anything is written, Interrupted after a signal: all that ended is kept.
    """
    planned = plan_sweep(path, options)
    with storage_errors(f"cannot write {planned.folder}"):
        planned.folder.mkdir(parents=True, exist_ok=True)
        with locked(planned.folder, f"sweep {planned.file.sweep.name} is being run"):
            # what ran between the plan and the lock is looked at again
            planned = plan_sweep(path, options)
            with _started(executor, planned.folder) as runs_on:
                return _drive(planned, runs_on, view, clock)


@contextmanager
def _started(executor: str | Executor, folder: Path) -> Iterator[Executor]:
    runs_on = open_executor(executor, folder) if isinstance(executor, str) else executor
    try:
        yield runs_on
    finally:
        runs_on.close()


def _drive(planned: Planned, executor: Executor, view: View, clock: Callable[[], float]) -> SweepOutcome:
    if planned.file.sweep.search is None:
        return _run_stages(planned, executor, view, clock)
    with closing(Searcher(planned.file, planned.recipes, planned.numbers, planned.folder)) as search:
        return _run_stages(planned, executor, view, clock, search)


def _run_stages(
    planned: Planned, executor: Executor, view: View, clock: Callable[[], float], search: Searcher | None = None
) -> SweepOutcome:
    file, graph = planned.file, planned.graph
    events = Events(planned.folder)
    if search is not None:
        for proposal in [*search.past, *search.open]:
            _add(graph, proposal)
    resources = file.sweep.resources
    if resources.cpus is None and executor.cpus is not None:
        resources = resources.model_copy(update={"cpus": executor.cpus})
    if file.sweep.pruner and executor.blind:
        raise RecipeError(
            f"{file.place('pruner')}: pruner reads the figures of trainings while they run, but there is a node that"
            " does not see the run store; leave the pruner out, or give all nodes shared storage"
        )
    write_record(planned.folder, file, graph, resources)
    watch = _watch(planned) if file.sweep.pruner else None
    scheduler = Scheduler(graph, executor, events, planned.folder, resources, file.sweep.limits, watch, clock)
    scheduler.admit(planned.chosen)
    owed = _owed(planned, scheduler)
    scheduler.refuse([job.identity for job in owed], executor.check(owed))
    feed = Feed(planned, search) if search else None

    def each(scheduler: Scheduler) -> bool:
        view(scheduler)
        return feed(scheduler) if feed else False

    with graceful() as stop:
        scheduler.run(stop, each)
        stop.raise_if_requested()
    return _outcome(planned, scheduler)


def _add(graph: Graph, proposal: Proposal) -> None:
    for trial in proposal.trials:
        if trial.number not in graph.trials:
            graph.add(trial)


def _watch(planned: Planned) -> Watch:
    pruner, store = planned.file.sweep.pruner, planned.graph.store
    assert pruner is not None
    label = f"train:{pruner.phase}"
    nodes = [node for node in planned.graph.nodes.values() if node.step.label == label]
    return Watch(pruner, [node.step.folder for node in nodes if node.identity in store.folders])


def _owed(planned: Planned, scheduler: Scheduler) -> list[Job]:
    """Stages that are still to run, to be asked what they refuse before any work or money is spent."""
    owed = [
        node
        for node in planned.graph.nodes.values()
        if node.identity not in scheduler.sealed and scheduler.begun.intersection(node.trials)
    ]
    return [
        job_of(node, node.recipe, planned.graph.options, needed(node.step, node.recipe, scheduler.resources)[0],
               check_only=True)
        for node in owed
    ]  # fmt: skip


class Feed:
    """Takes proposals of the search as others end."""

    def __init__(self, planned: Planned, search: Searcher) -> None:
        self.planned, self.search = planned, search

    def __call__(self, scheduler: Scheduler) -> bool:
        """Tell the study what has ended, ask for what may begin; whether more will come.

        Raises RunError if its database does not answer.
        """
        with database_errors(self.search.search):
            return self._next(scheduler)

    def _next(self, scheduler: Scheduler) -> bool:
        still_open = set(scheduler.open_trials())
        for proposal in list(self.search.open):
            numbers = {trial.number for trial in proposal.trials}
            if numbers <= scheduler.begun and not numbers & still_open:
                self._tell(proposal, scheduler)
        while len(self.search.open) < self.search.search.parallel and self.search.ask() is not None:
            pass
        for proposal in self.search.open:
            if not {trial.number for trial in proposal.trials} <= scheduler.begun:
                self._admit(proposal, scheduler)
        return bool(self.search.open)

    def _admit(self, proposal: Proposal, scheduler: Scheduler) -> None:
        _add(self.planned.graph, proposal)
        write_record(self.planned.folder, self.planned.file, self.planned.graph, scheduler.resources)
        scheduler.admit(proposal.trials)

    def _tell(self, proposal: Proposal, scheduler: Scheduler) -> None:
        numbers = [trial.number for trial in proposal.trials]
        nodes = {node.identity for number in numbers for node in self.planned.graph.steps(number)}
        if scheduler.out.intersection(numbers):
            self.search.tell(proposal, None, pruned=bool(nodes & scheduler.pruned.keys()))
            return
        self.search.tell(proposal, self._values(numbers))

    def _values(self, numbers: Sequence[int]) -> list[float] | None:
        """A value for each objective: the mean over the seeds."""
        record = read_record(self.planned.folder, self.planned.graph.options.runs)
        objectives = self.planned.file.sweep.objectives
        of_seeds = []
        for number in numbers:
            measured = measure(pipeline_of(record, number), objectives)
            values = objective_values({title: one.value for title, one in measured.items()}, objectives)
            if values is None:
                reasons = [f"{title}: {one.reason}" for title, one in measured.items() if one.value is None]
                say(f"trial {number} has no value for the search: {'; '.join(reasons)}")
                return None
            of_seeds.append(values)
        return [sum(column) / len(column) for column in zip(*of_seeds)]


def _outcome(planned: Planned, scheduler: Scheduler) -> SweepOutcome:
    graph = planned.graph
    errors: dict[int, str] = {}
    for identity, error in scheduler.failed.items():
        for number in graph.nodes[identity].trials:
            errors.setdefault(number, f"{graph.nodes[identity].step.label}: {error}")
    begun = sorted(scheduler.begun)
    done = [n for n in begun if all(node.identity in scheduler.sealed for node in graph.steps(n))]
    failed = tuple(number for number in begun if number in errors and number not in done)
    return SweepOutcome(
        planned.file.sweep.name, planned.folder, len(graph.trials), len(done), scheduler.summary, failed,
        tuple(n for n in begun if n in scheduler.out and n not in failed and n not in done),
        len(graph.trials) - len(begun), len(graph.nodes), {number: errors[number] for number in failed},
    )  # fmt: skip


def raise_for(outcome: SweepOutcome) -> None:
    """Raise BudgetError for a sweep that stopped at a limit, IncompleteError for one with failed trials."""
    if outcome.summary.reason:
        raise BudgetError(
            f"{outcome.name}: stopped at {outcome.summary.reason}; {outcome.done} of {outcome.trials} trials are done;"
            " a higher limit goes on"
        )
    if outcome.failed_trials:
        first = outcome.failed_trials[0]
        raise IncompleteError(
            f"{outcome.name}: {len(outcome.failed_trials)} of {outcome.trials} trials failed, the first, {first}, in"
            f" {outcome.errors[first]}; run the same command again to try them once more"
        )
