"""The report: one self-contained HTML file, or the same as plain values, of everything a pipeline measured.

    distill report recipe.yaml          distill.write_report("recipe.yaml")

The page opens offline and runs no script: charts are HTML and SVG with their numbers in tables beside them. It reads
the run store and changes nothing in it but its own file; it says what is missing, and works on pipelines that are not
finished. `lineage` finds the stages, `facts` and `scores` read them, `page` writes them down.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.errors import storage_errors
from distill.runs import PARTIAL, RunOptions

from .facts import Estimate, Facts, gather
from .lineage import Pipeline, find_pipeline
from .scores import Score, Scores, read_scores

REPORTS = "reports"
"""Folder of the run store in which reports lie unless another place is given."""


@dataclass(frozen=True)
class Headline:
    """The answer in one line, on the set that the export's gate reads."""

    set: str
    scores: tuple[Score, ...]
    """Teacher, base, student and the smallest variant, as far as the pipeline has them."""
    gain: Estimate | None
    """Student minus base."""
    variant_minus_student: Estimate | None


@dataclass(frozen=True)
class Report:
    """Everything a page says."""

    name: str
    identity: str
    updated: str
    runs: str
    headline: Headline | None
    missing: tuple[str, ...]
    """Stages without a result, each with its state."""
    scores: Scores
    facts: Facts


def write_report(target: Recipe | Path, options: RunOptions, out: Path | None = None) -> Path:
    """Write the HTML report of a recipe, a pipeline's record or a stage's folder; returns its path.

    Without `out` it is written to `reports/` in the run store, under the pipeline's name and identity. Raises RunError
    if nothing of the pipeline has run or a finished stage was changed, DataError if the target is no such thing, all
    before anything is written; StorageError if the disk refuses.
    """
    from .page import render

    pipeline = find_pipeline(target, options)
    path = out or pipeline.runs / REPORTS / f"{pipeline.name}-{pipeline.identity}.html"
    page = render(read_report(pipeline))
    with storage_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PARTIAL)
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    return path


def report_data(target: Recipe | Path, options: RunOptions) -> dict[str, Any]:
    """What the report says, as plain JSON values: the machine form. Accuracies and rates are shares of one.

    Raises what `write_report` raises.
    """
    return {"schema": 1, **asdict(read_report(find_pipeline(target, options)))}


def read_report(pipeline: Pipeline) -> Report:
    """Read everything that a pipeline's stages say."""
    scores = read_scores(pipeline)
    return Report(
        name=pipeline.name,
        identity=pipeline.identity,
        updated=pipeline.updated or max(str(run.document.get("finished", "")) for run in pipeline.stages.values()),
        runs=pipeline.runs.as_posix(),
        headline=headline(pipeline, scores.scores),
        missing=tuple(f"{run.label} ({run.state})" for run in pipeline.stages.values() if run.state != "done"),
        scores=scores,
        facts=gather(pipeline),
    )


def headline(pipeline: Pipeline, scores: tuple[Score, ...]) -> Headline | None:
    """The set that the export's gate reads (else the first one), and the models of the answer on it."""
    if not scores:
        return None
    wanted = pipeline.section("export").get("set")
    name = wanted if wanted in {score.set for score in scores} else scores[0].set
    of_set = [score for score in scores if score.set == name]
    models = [score for score in of_set if score.kind != "variant"]
    smallest = min((score for score in of_set if score.kind == "variant"), key=_size, default=None)
    student = next((score for score in models if score.kind == "student"), None)
    return Headline(
        set=name,
        scores=(*models, *([smallest] if smallest else [])),
        gain=student.minus_base if student else None,
        variant_minus_student=smallest.minus_student if smallest else None,
    )


def _size(score: Score) -> float:
    """Order of variants by size; those that are not built yet come last."""
    return float("inf") if score.megabytes is None else score.megabytes
