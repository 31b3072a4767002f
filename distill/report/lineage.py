"""From what a user names to the stages of its pipeline: a recipe, a pipeline's record or the folder of one stage.

A stage that has not run is part of a pipeline too, so that a report can say what is missing. Files of a sealed stage
are read only as the bytes that its stage.json says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from distill.config import Recipe, load_recipe
from distill.errors import DataError, RunError

# the resolution that `inspect` has; shared, so that both take the same targets
from distill.inspection import place_of_folder, read_document
from distill.plan import STAGES, make_plan, pipeline_file
from distill.runs import STAGE_FILE, RunOptions, file_digest, open_sealed

State = Literal["done", "unfinished", "not run"]

MODEL_ORDER = ("teacher", "base", "student")
"""The order in which models are told of; variants follow in the recipe's order."""


@dataclass(frozen=True)
class StageRun:
    """One stage of a pipeline, run or not."""

    label: str
    identity: str
    folder: Path
    upstream: Mapping[str, str] = field(default_factory=dict)
    """Labels of the stages it reads, by role."""

    @property
    def stage(self) -> str:
        """Stage name: prompts, generate, select, train, eval, export."""
        return self.label.partition(":")[0]

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """Its stage.json; empty where it is not finished."""
        return open_sealed(self.folder, check=False).document if (self.folder / STAGE_FILE).is_file() else {}

    @property
    def state(self) -> State:
        """How far it has come."""
        if self.document:
            return "done"
        return "unfinished" if self.folder.is_dir() else "not run"

    @property
    def counts(self) -> Mapping[str, Any]:
        """What it counted; empty where it is not finished."""
        return dict(self.document.get("counts", {}))

    @property
    def seconds(self) -> float | None:
        """Wall time over all attempts so far; None where that is not known."""
        attempts = self.folder / "attempts.json"
        if not self.document and attempts.is_file():
            return float(read_document(attempts).get("seconds", 0.0))
        return float(self.document["seconds"]) if self.document else None

    def file(self, name: str) -> Path | None:
        """A file of the run; None where there is none.

        Raises RunError if the stage is finished and the file is not the one that was sealed.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        sealed = self.document.get("files", {}).get(name)
        if sealed is not None and file_digest(path) != sealed["sha256"]:
            raise RunError(
                f"{path}: holds other bytes than {STAGE_FILE} says (it was changed after the stage ended);"
                f" restore it, or delete {self.folder} and run again"
            )
        return path

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON document of the run; None where there is none."""
        path = self.file(name)
        return read_document(path) if path else None


@dataclass(frozen=True)
class Pipeline:
    """Everything a recipe's stages left, and what they have not done yet."""

    name: str
    identity: str
    runs: Path
    stages: Mapping[str, StageRun]
    """By label, in the order in which they are told."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe; empty where only a stage's folder is known."""
    updated: str = ""
    """When the pipeline's record was last written."""

    def of(self, stage: str) -> list[StageRun]:
        """Its stages of one kind."""
        return [run for run in self.stages.values() if run.stage == stage]

    def one(self, stage: str) -> StageRun | None:
        """Its first stage of a kind, or None."""
        return next(iter(self.of(stage)), None)

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the recipe; empty where there is none."""
        return dict(self.recipe.get(name) or {})


def find_pipeline(target: Recipe | Path, options: RunOptions) -> Pipeline:
    """The pipeline of a recipe, of a pipeline's record or of one stage's folder.

    A folder stands for the newest pipeline that names it, else for itself and what it was made from. Raises RunError
    if nothing of it has run, DataError if the target is none of these.
    """
    pipeline = _resolve(target, options)
    if all(run.state == "not run" for run in pipeline.stages.values()):
        raise RunError(
            f"nothing to report: no stage of {pipeline.name} has run in {pipeline.runs}; run the recipe first"
        )
    return pipeline


def _resolve(target: Recipe | Path, options: RunOptions) -> Pipeline:
    if isinstance(target, Recipe):
        return _of_recipe(target, options)
    if target.suffix in (".yaml", ".yml"):
        return _of_recipe(load_recipe(target), options)
    if target.is_dir():
        return _of_stage_folder(target)
    if target.suffix == ".json" and target.is_file():
        return _of_record(target)
    raise DataError(
        f"{target}: no such run; give a recipe (.yaml), a pipeline (runs/pipelines/*.json) or a stage's folder"
    )


def _of_recipe(recipe: Recipe, options: RunOptions) -> Pipeline:
    plan = make_plan(recipe, options)
    record = pipeline_file(plan, options.runs)
    stages = [
        StageRun(step.label, step.identity, step.folder, {role: other.label for role, other in step.upstream.items()})
        for step in plan.steps.values()
    ]
    updated = str(read_document(record).get("updated", "")) if record.is_file() else ""
    return Pipeline(recipe.name, plan.identity, options.runs, in_order(stages), recipe.model_dump(mode="json"), updated)


def _of_record(path: Path) -> Pipeline:
    document = read_document(path)
    if "steps" not in document:
        raise DataError(f"{path}: not a pipeline's record (no steps in it); they lie in runs/pipelines/")
    runs = path.resolve().parent.parent
    stages = [
        StageRun(label, step["identity"], runs / step["folder"], step["upstream"])
        for label, step in document["steps"].items()
    ]
    names = {key: str(document.get(key, "")) for key in ("name", "identity", "updated")}
    return Pipeline(runs=runs, stages=in_order(stages), recipe=document.get("recipe", {}), **names)


def _of_stage_folder(folder: Path) -> Pipeline:
    folder = folder.resolve()
    records = [_of_record(path) for path in sorted((folder.parent.parent / "pipelines").glob("*.json"))]
    naming = [record for record in records if any(run.folder == folder for run in record.stages.values())]
    return max(naming, key=lambda record: record.updated) if naming else _lineage(folder)


def _lineage(folder: Path) -> Pipeline:
    """A stage that no pipeline names, and everything it was made from."""
    found: dict[Path, StageRun] = {}
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        place = place_of_folder(path)
        upstream = {role: place_of_folder(other).label for role, other in place.upstream.items()}
        found[path] = StageRun(place.label, path.name.rpartition("-")[2], path, upstream)
        waiting.extend(other for other in place.upstream.values() if other not in found)
    last = found[folder]
    return Pipeline(folder.name, last.identity, folder.parent.parent, in_order(list(found.values())))


def in_order(runs: list[StageRun]) -> dict[str, StageRun]:
    """Stages by label, in the order in which they are told."""
    return {run.label: run for run in sorted(runs, key=_place)}


def _place(run: StageRun) -> tuple[int, int, str]:
    """Where a stage is told of: by stage, then by model; what was measured of an artifact comes after it."""
    model = run.label.split(":")[1] if run.stage == "eval" else ""
    stages, rank = list(STAGES), MODEL_ORDER.index(model) if model in MODEL_ORDER else len(MODEL_ORDER)
    stage = len(stages) if "artifact" in run.upstream else stages.index(run.stage) if run.stage in stages else 0
    return stage, rank, run.label
