"""Any runs side by side: accuracy with intervals, differences paired by problem, size, speed, money, what differs.

A run is a recipe, a pipeline's record, a stage's folder, or a trial of a sweep (`SWEEP:3`). Reads only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import DataError, RecipeError
from distill.evaluation import difference
from distill.report.facts import Estimate, costs
from distill.report.lineage import Pipeline, find_pipeline
from distill.report.scores import Evaluated, Score, evaluations, read_scores
from distill.runs import RunOptions


@dataclass(frozen=True)
class Row:
    """One model on one set, over the runs; None where a run has no such evaluation."""

    model: str
    set: str
    scores: tuple[Score | None, ...]
    minus_first: tuple[Estimate | None, ...]
    """Accuracy less the first run's, paired by problem; None for the first and where problems differ."""


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    differing: Mapping[str, tuple[Any, ...]]
    """Keys of the recipes that are not the same in all, with each run's value."""
    seconds: tuple[float, ...]
    dollars: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": 1, **asdict(self)}


def compare(targets: Sequence[str], options: RunOptions) -> Comparison:
    """Read runs and lay them side by side, the first being what the others are compared with.

    Raises RecipeError for fewer than two, and what `find_pipeline` raises for one that is none.
    """
    if len(targets) < 2:
        raise RecipeError("compare takes at least two runs: recipes, pipelines, stage folders, or SWEEP:TRIAL")
    pipelines = [pipeline_of(target, options) for target in targets]
    return Comparison(
        tuple(targets),
        tuple(_rows(pipelines)),
        differing([one.recipe for one in pipelines]),
        tuple(sum(run.seconds or 0.0 for run in one.stages.values()) for one in pipelines),
        tuple(found.usd if (found := costs(one)) else None for one in pipelines),
    )


def pipeline_of(target: str, options: RunOptions) -> Pipeline:
    """The pipeline of a target; `SWEEP:3` is a trial of a sweep."""
    sweep, colon, number = target.rpartition(":")
    if colon and number.isdigit() and not Path(target).exists():
        from distill.sweep.measures import pipeline_of as pipeline_of_trial
        from distill.sweep.record import read_record

        record = read_record(sweep, options.runs)
        record.trial(int(number))
        return pipeline_of_trial(record, int(number))
    return find_pipeline(Path(target), options)


def _rows(pipelines: Sequence[Pipeline]) -> list[Row]:
    scores = [{(one.model, one.set): one for one in read_scores(pipeline).scores} for pipeline in pipelines]
    found = [{(one.model, one.set): one for one in evaluations(pipeline)} for pipeline in pipelines]
    keys = list(dict.fromkeys(key for each in scores for key in each))
    return [
        Row(
            *key,
            tuple(each.get(key) for each in scores),
            (None, *(_minus(each.get(key), found[0].get(key)) for each in found[1:])),
        )
        for key in keys
    ]


def _minus(one: Evaluated | None, first: Evaluated | None) -> Estimate | None:
    if one is None or first is None or not (one.available and first.available):
        return None
    try:
        return Estimate(*difference(list(one.items.values()), list(first.items.values())))
    except DataError:  # other problems: there is nothing to pair
        return None


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Keys whose values are not the same in all recipes; names do not count."""
    flat = [_flat(recipe) for recipe in recipes]
    keys = sorted({key for each in flat for key in each} - {"name"})
    return {key: tuple(each.get(key) for each in flat) for key in keys if len({repr(e.get(key)) for e in flat}) > 1}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping | list):
        return {k: v for index, part in enumerate(value) for k, v in _flat(part, f"{prefix}.{index}").items()}
    return {prefix: value}
