"""What a sweep found, as plain values: candidates, fronts, what mattered, and whether the best is really better.

Trials that differ in nothing but their seed are one candidate, whose figures are means over the seeds. Comparisons are
made problem by problem on what the candidates answered; nothing is measured anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from distill.report.facts import Estimate
from distill.report.lineage import Pipeline
from distill.report.scores import Evaluated, evaluations, model_sizes
from distill.statistics import bootstrap_mean, explained_share, mcnemar, paired_difference

from .config import Objective
from .measures import Measure, chosen, measure, pipeline_of, set_of
from .record import Record, State
from .trials import Trial

LEVEL = 0.05
BINS = 4
"""Groups into which many values of a number are cut before asking how much they explain."""


@dataclass(frozen=True)
class TrialResult:
    """One trial and what it came to."""

    trial: Trial
    state: State
    pipeline: Pipeline
    measures: Mapping[str, Measure]
    error: str = ""

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @cached_property
    def product(self) -> Evaluated | None:
        """The evaluation of what ships."""
        return self.evaluated("product")

    @cached_property
    def _evaluations(self) -> list[Evaluated]:
        return list(evaluations(self.pipeline))

    def evaluated(self, model: str) -> Evaluated | None:
        """The evaluation of a model on the set that decides."""
        found = self._evaluations
        return chosen(found, model_sizes(self.pipeline), model, set_of(self.pipeline, found, None))


@dataclass(frozen=True)
class Candidate:
    """Trials that differ in nothing but their seed."""

    name: str
    """Numbers of its trials: `3`, `3-5`."""
    trials: tuple[TrialResult, ...]
    values: Mapping[str, float]
    """Mean of each objective over the seeds; only what all of them have."""
    accuracy: Estimate | None
    """Of what ships, by problem."""

    @property
    def first(self) -> TrialResult:
        """The trial that stands for it."""
        return self.trials[0]

    def answers(self, model: str = "product") -> dict[str, float]:
        """Share of right answers to each problem, mean over samples and seeds."""
        return answers_of([one for trial in self.trials if (one := trial.evaluated(model))])


@dataclass(frozen=True)
class Comparison:
    """A candidate's accuracy less another's, on the same problems."""

    name: str
    against: str
    difference: Estimate
    p: float | None
    """McNemar's exact test; None where problems were answered more than once."""
    problems: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0 and McNemar's test, where it is made, does not object."""
        return (self.difference.low > 0 or self.difference.high < 0) and (self.p is None or self.p < LEVEL)


@dataclass(frozen=True)
class Influence:
    """How much of an objective's variance one key explains."""

    key: str
    share: float
    values: int
    """Distinct values that it had."""


@dataclass(frozen=True)
class Results:
    """Everything that a sweep found."""

    name: str
    objectives: tuple[Objective, ...]
    trials: tuple[TrialResult, ...]
    candidates: tuple[Candidate, ...]
    """Those with a value for the first objective, best first."""
    fronts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the title of every objective but the first: names of candidates that none beats in both."""
    influences: Mapping[str, tuple[Influence, ...]] = field(default_factory=dict)
    """By objective, the strongest first."""
    comparisons: tuple[Comparison, ...] = ()
    """The best against its base, then against every other candidate."""

    @property
    def best(self) -> Candidate | None:
        """The best by the first objective."""
        return self.candidates[0] if self.candidates else None

    @property
    def smallest_equal(self) -> Candidate | None:
        """The best by the second objective among the best and those that cannot be told from it."""
        if self.best is None or len(self.objectives) < 2:
            return self.best
        second = self.objectives[1]
        alike = {one.against for one in self.comparisons if not one.told_apart} | {self.best.name}
        fit = [one for one in self.candidates if one.name in alike and second.title in one.values]
        return min(fit, key=lambda one: _cost(one, second), default=self.best)

    def is_on_a_front(self, name: str) -> bool:
        """Whether a candidate is on any front."""
        return any(name in front for front in self.fronts.values())


def read_results(record: Record) -> Results:
    """Read what every trial came to and compare them."""
    objectives = tuple(record.sweep.objectives)
    trials = tuple(_result(record, number) for number in record.numbers)
    first = objectives[0]
    found = [one for one in candidates(trials, objectives) if first.title in one.values]
    ranked = tuple(sorted(found, key=lambda one: (_cost(one, first), *_further(one, objectives[1:]))))
    return Results(
        record.name, objectives, trials, ranked,
        {other.title: tuple(one.name for one in front(ranked, first, other)) for other in objectives[1:]},
        {one.title: tuple(influences(ranked, one)) for one in objectives},
        tuple(comparisons(ranked)),
    )  # fmt: skip


def _result(record: Record, number: int) -> TrialResult:
    pipeline, failure = pipeline_of(record, number), record.failure_of(number)
    state = record.state_of(number)
    error = f"{failure.label}: {failure.error}" if failure and state == "failed" else ""
    return TrialResult(record.trial(number), state, pipeline, measure(pipeline, record.sweep.objectives), error)


def candidates(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> list[Candidate]:
    """Finished trials, those of one combination together."""
    groups: dict[str, list[TrialResult]] = {}
    for one in trials:
        if one.state == "done":
            groups.setdefault(one.trial.group, []).append(one)
    return [_candidate(group, objectives) for group in groups.values()]


def _candidate(group: Sequence[TrialResult], objectives: Sequence[Objective]) -> Candidate:
    numbers = [one.number for one in group]
    name = str(numbers[0]) if len(numbers) == 1 else ",".join(map(str, numbers))
    values = {}
    for objective in objectives:
        known = [value for one in group if (value := one.measures[objective.title].value) is not None]
        if len(known) == len(group):
            values[objective.title] = sum(known) / len(known)
    return Candidate(name, tuple(group), values, _accuracy(group))


def _accuracy(group: Sequence[TrialResult]) -> Estimate | None:
    """One trial's own interval; of several, a bootstrap over problems of their means."""
    found = [one.product for one in group]
    if len(group) == 1:
        summary = found[0].summary if found[0] and found[0].available else None
        return Estimate(*(summary[f"accuracy{end}"] for end in ("", "_low", "_high"))) if summary else None
    shares = answers_of([one for one in found if one])
    return Estimate(*bootstrap_mean(list(shares.values()))) if shares else None


def answers_of(found: Sequence[Evaluated]) -> dict[str, float]:
    """Share of right answers by problem over several evaluations."""
    by_problem: dict[str, list[bool]] = {}
    for one in found:
        for (prompt_id, _), item in one.items.items():
            by_problem.setdefault(prompt_id, []).append(item.verdict.correct)
    return {prompt_id: sum(right) / len(right) for prompt_id, right in sorted(by_problem.items())}


def _cost(one: Candidate, objective: Objective) -> float:
    """What is to be small: the value, or its negative where more is better."""
    value = one.values[objective.title]
    return -value if objective.rising else value


def _further(one: Candidate, objectives: Sequence[Objective]) -> list[float]:
    return [_cost(one, other) if other.title in one.values else float("inf") for other in objectives]


def front(found: Sequence[Candidate], first: Objective, other: Objective) -> list[Candidate]:
    """Candidates that no other beats in both objectives, ordered by the second."""
    having = [one for one in found if first.title in one.values and other.title in one.values]
    best, kept = float("inf"), []
    for one in sorted(having, key=lambda one: (_cost(one, other), _cost(one, first))):
        if _cost(one, first) < best:
            best = _cost(one, first)
            kept.append(one)
    return kept


def influences(found: Sequence[Candidate], objective: Objective) -> list[Influence]:
    """How much of an objective's variance each key explains on its own; what keys do together is not seen."""
    having = [one for one in found if objective.title in one.values]
    keys = list(dict.fromkeys(key for one in having for key in one.first.trial.varied))
    shares = []
    for key in keys:
        groups = _by_value(having, key, objective)
        if len(groups) > 1:
            shares.append(Influence(key, explained_share(list(groups.values())), len(groups)))
    return sorted(shares, key=lambda one: -one.share)


def _by_value(found: Sequence[Candidate], key: str, objective: Objective) -> dict[str, list[float]]:
    """The objective's values by that of a key; many numbers are cut into a few groups of equal size."""
    values = [one.first.trial.varied.get(key) for one in found]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    binned = len(numbers) == len(values) and len(set(values)) > BINS
    ranks = {value: rank for rank, value in enumerate(sorted(set(numbers)))} if binned else {}
    groups: dict[str, list[float]] = {}
    for one, value in zip(found, values):
        name = str(BINS * ranks[value] // len(ranks)) if binned and value in ranks else repr(value)
        groups.setdefault(name, []).append(one.values[objective.title])
    return groups


def comparisons(ranked: Sequence[Candidate]) -> list[Comparison]:
    """The best against its own base, then against all others that answered the same problems."""
    if not ranked:
        return []
    best = ranked[0]
    mine = best.answers()
    found = [compare(best.name, "base", mine, best.answers("base"))]
    found += [compare(best.name, other.name, mine, other.answers()) for other in ranked[1:]]
    return [one for one in found if one is not None]


def compare(name: str, against: str, mine: Mapping[str, float], theirs: Mapping[str, float]) -> Comparison | None:
    """Paired by problem; None where the problems are not the same."""
    if not mine or mine.keys() != theirs.keys():
        return None
    a, b = [mine[key] for key in mine], [theirs[key] for key in mine]
    single = set(a) | set(b) <= {0.0, 1.0}
    p = mcnemar([value == 1 for value in a], [value == 1 for value in b]) if single else None
    return Comparison(name, against, Estimate(*paired_difference(a, b)), p, len(a))


def results_json(results: Results) -> dict[str, Any]:
    """The results as plain values."""
    return {
        "schema": 1,
        "name": results.name,
        "objectives": [{"title": one.title, "goal": "max" if one.rising else "min"} for one in results.objectives],
        "best": results.best.name if results.best else None,
        "smallest_equal": results.smallest_equal.name if results.smallest_equal else None,
        "fronts": {title: list(names) for title, names in results.fronts.items()},
        "influences": {title: [vars(one) for one in found] for title, found in results.influences.items()},
        "comparisons": [
            {**vars(one), "difference": vars(one.difference), "told_apart": one.told_apart}
            for one in results.comparisons
        ],
        "trials": [
            {
                "number": one.number, "state": one.state, "overrides": one.trial.overrides, "seed": one.trial.seed,
                "pipeline": one.pipeline.identity, "error": one.error,
                "measures": {title: vars(value) for title, value in one.measures.items()},
            }
            for one in results.trials
        ],
    }  # fmt: skip
