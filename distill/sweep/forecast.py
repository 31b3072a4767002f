"""What a sweep would do before it runs: trials, distinct stages, what is done, how long, how many dollars.

Times are those of finished stages of the same kind in the run store, dollars the most that the teacher can generate at
its prices. What is not known is left open and said.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Recipe
from distill.forecast import tokens_at_most
from distill.progress import clock_text
from distill.runs import STAGE_FILE

from .config import SweepFile
from .graph import Graph, Node
from .resources import cpu_slots, needed

READ_AT_MOST = 100
"""Finished stages of a kind whose times are read."""
MTOK = 1_000_000


@dataclass(frozen=True)
class KindRow:
    """The distinct stages of one kind."""

    kind: str
    """Stage name, with the model for evaluations: `eval:student`."""
    wanted: int
    """As often as trials need one."""
    distinct: int
    done: int
    seconds_each: float | None
    """Median of finished ones; None where none has finished in this run store."""

    @property
    def owed(self) -> int:
        """Stages still to run."""
        return self.distinct - self.done


@dataclass(frozen=True)
class SweepForecast:
    """The whole sweep as a dry run shows it."""

    name: str
    trials: int
    proposed: int
    """Trials that a search will propose; 0 for a sweep without one."""
    kinds: tuple[KindRow, ...]
    seconds: float | None
    """Wall time of what is owed at the resources, as far as times are known."""
    untimed: tuple[str, ...]
    """Kinds of which no finished stage tells the time."""
    dollars: float | None
    """At most; None where tokens or prices are not known."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        kinds = [{**vars(row), "owed": row.owed} for row in self.kinds]
        return {**vars(self), "kinds": kinds, "untimed": list(self.untimed)}


def forecast(file: SweepFile, graph: Graph, proposed: int = 0) -> SweepForecast:
    """Look at the graph and at the run store; runs nothing."""
    kinds = _kinds(graph)
    times = {kind: median_seconds(graph.options.runs, kind) for kind in kinds}
    done = graph.store.sealed
    rows = tuple(
        KindRow(
            kind,
            sum(len(node.trials) for node in nodes),
            len(nodes),
            sum(node.identity in done for node in nodes),
            times[kind],
        )
        for kind, nodes in kinds.items()
    )
    owed = [node for node in graph.nodes.values() if node.identity not in done]
    resources = file.sweep.resources
    work = [Work(kind_of(node.step.label), needed(node.step, node.recipe, resources)[0].cpus) for node in owed]
    to_go = wall_time(work, times, cpu_slots(resources))
    return SweepForecast(
        file.sweep.name, len(graph.trials), proposed, rows, to_go.seconds, to_go.untimed, dollars_at_most(owed)
    )


def kind_of(label: str) -> str:
    """What stages are timed together: the stage, and of evaluations the model."""
    return ":".join(label.split(":")[: 2 if label.startswith("eval:") else 1])


def _kinds(graph: Graph) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        found.setdefault(kind_of(node.step.label), []).append(node)
    return found


def median_seconds(runs: Path, kind: str) -> float | None:
    """Median time of the finished stages of a kind in a run store; None where there are none."""
    stage, _, model = kind.partition(":")
    seconds = []
    for folder in sorted((runs / stage).glob("*"), reverse=True)[:READ_AT_MOST]:
        try:
            document = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not model or document["label"].startswith(f"{kind}:"):
            seconds.append(float(document["seconds"]))
    return statistics.median(seconds) if seconds else None


class Work(NamedTuple):
    """A stage that is still owed."""

    kind: str
    cpus: int
    spent_s: float = 0.0
    """How long it has been running."""


class ToGo(NamedTuple):
    """How long something still takes, as far as that is known."""

    seconds: float | None
    """Of the stages whose time is known; None where there are owed ones, and it is known of none."""
    untimed: tuple[str, ...] = ()
    """Kinds of stages whose time is not known; they come on top."""

    def __str__(self) -> str:
        if self.seconds is None:
            return "?"
        return f"{'>' if self.untimed else ''}{clock_text(self.seconds)}"


def wall_time(owed: Iterable[Work], times: Mapping[str, float | None], slots: int) -> ToGo:
    """Time of stages that are owed, if the CPU slots were always full; one that runs counts by what is left of it.

    Nothing is known of one that has been running for longer than such stages do.
    """
    work, untimed = [], []
    for one in owed:
        seconds = times[one.kind]
        if seconds is None or one.spent_s > seconds:
            untimed.append(one.kind)
        else:
            work.append(one.cpus * (seconds - one.spent_s))
    return ToGo(sum(work) / slots if work or not untimed else None, tuple(dict.fromkeys(untimed)))


def dollars_at_most(owed: Iterable[Node]) -> float | None:
    """What the teachers' answers can cost at most; None where a paid stage has no bound."""
    total = 0.0
    for node in owed:
        if node.step.stage != "generate":
            continue
        price, tokens = price_of(node.recipe), tokens_at_most(node.recipe, node.step)
        if price is None:
            continue
        if tokens is None:
            return None
        total += price * tokens / MTOK
    return total


def price_of(recipe: Recipe) -> float | None:
    """Dollars for a million of the teacher's tokens; None where nobody charges."""
    teacher = recipe.teacher
    if teacher is None:
        return None
    prices = teacher.prices_at(teacher.servers[0])
    return prices.output_usd_per_mtok if prices else None


def left_out(file: SweepFile, trials: int) -> int:
    """Trials beyond the sweep's limit."""
    return max(0, trials - (file.sweep.limits.trials or trials))


def shared_share(rows: Sequence[KindRow]) -> float:
    """Share of all wanted stages that need not run because another trial has them too."""
    wanted = Counter({row.kind: row.wanted for row in rows}).total()
    return 1 - sum(row.distinct for row in rows) / wanted if wanted else 0.0
