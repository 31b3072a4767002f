"""The graph of a sweep: every distinct stage of all its trials once, with the trials that need it.

A stage is known by its identity, so stages that many recipes share are one node however many trials there are. What is
done is seen in the run store, whose folders are listed once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Recipe
from distill.errors import DataError, ModelError, RecipeError
from distill.plan import STAGES, Plan, Shared, make_plan
from distill.runs import STAGE_FILE, RunOptions, Step

from .trials import Trial


@dataclass
class Node:
    """One distinct stage."""

    step: Step
    recipe: Recipe
    """Of the first trial that needs it."""
    trials: list[int] = field(default_factory=list)
    """Numbers of the trials that need it, in order."""

    @property
    def identity(self) -> str:
        """What it is made from."""
        return self.step.identity

    @property
    def needs(self) -> list[str]:
        """Identities of the stages it reads."""
        return [step.identity for step in self.step.upstream.values()]


class Store(NamedTuple):
    """The stage folders of a run store, listed once."""

    runs: Path
    folders: Mapping[str, Path]
    """By identity."""
    sealed: frozenset[str]
    """Identities of those that are finished."""


def read_store(runs: Path) -> Store:
    """What there is in a run store now."""
    folders: dict[str, Path] = {}
    for stage in STAGES:  # what else lies in a store may end in an identity too: a shipped folder does
        folders |= {path.name.rpartition("-")[2]: path for path in (runs / stage).glob("*") if path.is_dir()}
    sealed = frozenset(identity for identity, folder in folders.items() if (folder / STAGE_FILE).exists())
    return Store(runs, folders, sealed)


class Graph:
    """The distinct stages of a sweep's trials; trials can be added at any time."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.shared = Shared()
        self.store = read_store(options.runs)
        """As it was when the graph was made."""
        self.nodes: dict[str, Node] = {}
        """By identity, upstream stages first."""
        self.trials: dict[int, Trial] = {}
        self.plans: dict[int, Plan] = {}

    def add(self, trial: Trial) -> None:
        """Plan a trial and add what is new in it.

        Raises what planning raises, its message beginning with the trial.
        """
        try:
            plan = make_plan(trial.recipe, self.options, self.shared)
        except (RecipeError, DataError, ModelError) as error:
            raise type(error)(f"trial {trial.number} ({', '.join(trial.arguments)}): {error}") from error
        self.trials[trial.number] = trial
        self.plans[trial.number] = plan
        for step in plan.steps.values():
            node = self.nodes.setdefault(step.identity, Node(step, trial.recipe))
            node.trials.append(trial.number)

    def steps(self, trial: int) -> Iterator[Node]:
        """The stages of a trial, upstream first."""
        return (self.nodes[step.identity] for step in self.plans[trial].steps.values())

    def closure(self, identities: Sequence[str]) -> set[str]:
        """These stages and everything that they are made from."""
        found: set[str] = set()
        waiting = list(identities)
        while waiting:
            identity = waiting.pop()
            if identity not in found:
                found.add(identity)
                waiting.extend(self.nodes[identity].needs)
        return found


def node_json(node: Node) -> dict[str, Any]:
    """A stage as the sweep's record has it."""
    return {
        "label": node.step.label,
        "stage": node.step.stage,
        "name": node.step.name,
        "upstream": {role: step.identity for role, step in node.step.upstream.items()},
        "trials": node.trials,
    }
