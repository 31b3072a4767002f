"""What a trial came to: a value for each objective, read from its stages' own summaries.

Nothing is measured anew. A value that does not exist is None with its reason, as in the reports of single pipelines,
whose readers are used here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.report.facts import Estimate, costs
from distill.report.lineage import Pipeline, StageRun, in_order
from distill.report.scores import Evaluated, evaluations, model_sizes

from .config import Objective
from .record import Record

PRODUCTS = ("variant", "student", "base")
"""What ships, by preference."""
BYTES = 1_000_000
MS = 1000


@dataclass(frozen=True)
class Measure:
    """One value of a trial."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    """Why there is none."""


def pipeline_of(record: Record, number: int) -> Pipeline:
    """A trial's stages as reports take them."""
    stages = record.stages_of(number)
    labels = {identity: str(record.stage(identity)["label"]) for identity in stages}
    runs = [
        StageRun(
            labels[identity],
            identity,
            record.folder_of(identity),
            {role: labels[other] for role, other in record.stage(identity)["upstream"].items()},
        )
        for identity in stages
    ]
    trial = record.trial(number)
    name = f"{record.name} trial {number}"
    return Pipeline(name, record.pipeline(number), record.runs, in_order(runs), trial.recipe.model_dump(mode="json"))


def measure(pipeline: Pipeline, objectives: Iterable[Objective]) -> dict[str, Measure]:
    """Every objective's value, by its title."""
    found = list(evaluations(pipeline))
    return {one.title: _measure(pipeline, found, one) for one in objectives}


def _measure(pipeline: Pipeline, found: Sequence[Evaluated], objective: Objective) -> Measure:
    if objective.metric in ("dollars", "teacher_tokens"):
        return _of_teacher(pipeline, objective.metric)
    if objective.metric == "stage_seconds":
        seconds = [run.seconds for run in pipeline.stages.values()]
        known = [value for value in seconds if value is not None]
        return Measure(sum(known)) if len(known) == len(seconds) else Measure(None, reason="not all stages are done")
    sizes = model_sizes(pipeline)
    one = chosen(found, sizes, objective.model, set_of(pipeline, found, objective.set))
    if objective.metric == "bytes":
        return _size(one, sizes, objective.model)
    if one is None:
        return Measure(None, reason=f"{objective.model} is not evaluated")
    if not (one.available and one.summary):
        return Measure(None, reason=one.missing)
    return _of_summary(one.summary, objective.metric)


def _of_teacher(pipeline: Pipeline, metric: str) -> Measure:
    known = costs(pipeline)
    if known is None:
        return Measure(None, reason="the teacher has not answered yet")
    if metric == "dollars":
        return Measure(known.usd if known.usd is not None else 0.0)  # without prices nothing is charged
    return Measure(known.output_tokens or 0)


def _size(one: Evaluated | None, sizes: Mapping[str, float], model: str) -> Measure:
    name = one.model if one else model
    return (
        Measure(sizes[name] * BYTES) if name in sizes else Measure(None, reason="its weights are not in the run store")
    )


def _of_summary(summary: Mapping[str, Any], metric: str) -> Measure:
    if metric == "accuracy":
        return Measure(summary["accuracy"], summary["accuracy_low"], summary["accuracy_high"])
    if not summary["tokens"]:
        return Measure(None, reason="its engine counts no tokens")
    speed = float(summary["tokens_per_s"])
    return Measure({"tokens_per_s": speed, "latency_ms": MS / speed, "mean_tokens": summary["mean_tokens"]}[metric])


def set_of(pipeline: Pipeline, found: Sequence[Evaluated], wanted: str | None) -> str | None:
    """The evaluation set of an objective: as asked, else that of the export's gate, else the first."""
    sets = [one.set for one in found]
    gate = pipeline.section("export").get("set")
    return wanted or (gate if gate in sets else sets[0] if sets else None)


def chosen(
    found: Sequence[Evaluated], sizes: Mapping[str, float], model: str, set_name: str | None
) -> Evaluated | None:
    """The evaluation of the model that an objective names; of several variants, the smallest."""
    of_set = [one for one in found if one.set == set_name]
    if model != "product":
        return next((one for one in of_set if one.model == model), None)
    for kind in PRODUCTS:
        if models := [one for one in of_set if one.kind == kind]:
            return min(reversed(models), key=lambda one: sizes.get(one.model, float("inf")))
    return None


def estimate_of(measure: Measure) -> Estimate | None:
    """A measure with its interval; None where it has none."""
    if measure.value is None or measure.low is None or measure.high is None:
        return None
    return Estimate(measure.value, measure.low, measure.high)


def artifact_folder(pipeline: Pipeline) -> Path | None:
    """Where a trial's artifact lies; None where it has none that is finished."""
    export = pipeline.one("export")
    return export.folder / "artifact" if export and export.state == "done" else None
