"""Everything a report says, in one value: the headline, the evaluations, the rest."""

from dataclasses import dataclass

from .facts import Estimate, Facts, gather
from .lineage import Pipeline
from .scores import Score, Scores, read_scores


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
    # of variants that are not built yet, the recipe's last one
    smallest = min((score for score in reversed(of_set) if score.kind == "variant"), key=_size, default=None)
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
