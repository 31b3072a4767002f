"""Shipping from a sweep: the trial that passes the conditions and is best by one figure, its artifact and its lineage.

The chosen artifact is copied as it was sealed, byte for byte; beside it lie the resolved recipe, every stage.json that
it was made from, and why this trial was chosen among which.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distill import hub
from distill.errors import GateError, RecipeError, RunError, storage_errors
from distill.records import write_json
from distill.runs import PARTIAL, STAGE_FILE, open_sealed

from .config import Objective
from .measures import Measure, measure, pipeline_of
from .record import Record

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
    "=": lambda value, limit: value == limit,
}
CONDITION = re.compile(r"^\s*([A-Za-z_][\w:.-]*?)\s*(>=|<=|==|>|<|=)\s*([-+.\deE]+)\s*$")
SHIPPED = "shipped"
"""Folder of the run store for what was shipped, unless another place is given."""


class Condition(NamedTuple):
    """One condition of `--where`: a figure, a comparison, a number."""

    figure: Objective
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read `accuracy>=0.8`. Raises RecipeError for anything else."""
        found = CONDITION.match(text)
        try:
            limit = float(found.group(3)) if found else 0.0
        except ValueError:
            found = None
        if found is None:
            raise RecipeError(f"--where {text!r}: write FIGURE, one of {', '.join(COMPARISONS)}, and a number, such as"
                              " accuracy>=0.8")  # fmt: skip
        return cls(figure_of(found.group(1)), found.group(2).replace("==", "="), limit)

    def holds(self, measured: Measure) -> bool:
        """Whether a trial passes; one without the figure does not."""
        return measured.value is not None and COMPARISONS[self.comparison](measured.value, self.limit)

    def __str__(self) -> str:
        return f"{self.figure.title}{self.comparison}{self.limit:g}"


def figure_of(text: str) -> Objective:
    """A figure as `--where`, `--min` and `--max` name it: `accuracy`, `accuracy:student`, `accuracy:int4:heldout`.

    Raises RecipeError naming the figures that there are.
    """
    from distill.config import validate

    metric, _, rest = text.partition(":")
    model, _, set_name = rest.partition(":")
    values = {"metric": metric, **({"model": model} if model else {}), **({"set": set_name} if set_name else {})}
    return validate(Objective, values, repr(text), {})


@dataclass(frozen=True)
class Choice:
    """The trial that ships, and why."""

    number: int
    passed: tuple[int, ...]
    """All trials that passed the conditions, best first."""
    considered: int
    conditions: tuple[str, ...]
    by: str
    figures: dict[str, float | None]


def choose(
    record: Record,
    where: Sequence[str] = (),
    least: str | None = None,
    most: str | None = None,
    trial: int | None = None,
) -> Choice:
    """The finished trial that passes every condition and has the least or most of a figure.

    Without `least` and `most` the first objective decides. Raises RunError for a trial that is not finished, GateError
    if none passes, naming the nearest.
    """
    if least and most:
        raise RecipeError("--min and --max: give one of the two")
    conditions = [Condition.parse(text) for text in where]
    first = record.sweep.objectives[0]
    by = figure_of(least or most or "") if least or most else first
    falling = bool(least) or (not most and not first.rising)
    figures = [*dict.fromkeys([by, *(one.figure for one in conditions), *record.sweep.objectives])]
    done = [number for number in record.numbers if record.state_of(number) == "done"]
    if trial is not None:
        if record.state_of(record.trial(trial).number) != "done":
            raise RunError(f"trial {trial} of {record.name} is {record.state_of(trial)}; only a finished one can ship")
        done = [trial]
    found = {number: measure(pipeline_of(record, number), figures) for number in done}
    passed = [n for n in done if all(one.holds(found[n][one.figure.title]) for one in conditions)]
    if not passed:
        raise GateError(_none_passed(record, conditions, found))
    values = {n: found[n][by.title].value for n in passed}
    order = sorted(passed, key=lambda n: _rank(values[n], falling))
    chosen = {title: one.value for title, one in found[order[0]].items()}
    wording = f"{'least' if falling else 'most'} {by.title}" if trial is None else "named by its number"
    return Choice(order[0], tuple(order), len(done), tuple(map(str, conditions)), wording, chosen)


def _rank(value: float | None, falling: bool) -> float:
    return float("inf") if value is None else value if falling else -value


def _none_passed(record: Record, conditions: Sequence[Condition], found: dict[int, dict[str, Measure]]) -> str:
    if not found:
        return f"{record.name}: no trial has come to its end yet; see distill sweep status"
    wanted = " and ".join(map(str, conditions))
    nearest = []
    for one in conditions:
        known = [value for figures in found.values() if (value := figures[one.figure.title].value) is not None]
        best = (min if one.comparison in ("<", "<=") else max)(known, default=None)
        nearest.append(
            f"{one.figure.title} reaches {best:.6g}" if best is not None else f"{one.figure.title} is unknown"
        )
    return (
        f"{record.name}: none of {len(found)} finished trials has {wanted}; {', '.join(nearest)}; loosen the condition"
    )


def ship(record: Record, choice: Choice, out: Path | None = None) -> Path:
    """Copy the chosen trial's artifact with its lineage to a new folder; returns it.

    Raises RecipeError if the trial exports nothing or the folder is there already, RunError if what was sealed was
    changed since.
    """
    pipeline = pipeline_of(record, choice.number)
    export = pipeline.one("export")
    if export is None:
        raise RecipeError(
            f"trial {choice.number} of {record.name} exports nothing; add an export section to the base recipe and"
            " run the sweep again: all other stages are kept"
        )
    folder = out or record.runs / SHIPPED / f"{record.name}-{choice.number}-{export.identity}"
    if folder.exists():
        raise RecipeError(f"{folder}: exists already and is not overwritten; name another folder with --out DIR")
    open_sealed(export.folder)  # its bytes are those that were gated
    part = folder.with_name(folder.name + PARTIAL)
    with storage_errors(f"cannot write {folder}"):
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(export.folder / "artifact", part / "artifact")
        (part / "README.md").write_text(_signpost(record, choice), encoding="utf-8")
        (part / "lineage").mkdir()
        for run in pipeline.stages.values():
            shutil.copyfile(run.folder / STAGE_FILE, part / "lineage" / f"{run.label.replace(':', '-')}.json")
        write_json(part / "recipe.json", dict(pipeline.recipe))
        write_json(part / "choice.json", choice_json(record, choice))
        part.rename(folder)
    return folder


def _signpost(record: Record, choice: Choice) -> str:
    return (
        f"# Trial {choice.number} of {record.name}\n\n`artifact/` is what ships: give that folder to a runtime, a hub"
        " or `distill verify`. `lineage/` holds a record of every stage it was made by, `recipe.json` the whole recipe,"
        " `choice.json` why it was chosen.\n"
    )


def choice_json(record: Record, choice: Choice) -> dict[str, Any]:
    """Why this trial, as plain values."""
    trial = record.trial(choice.number)
    return {
        "schema": 1, "sweep": record.name, "trial": choice.number, "overrides": dict(trial.overrides),
        "pipeline": record.pipeline(choice.number), "chosen_by": choice.by, "conditions": list(choice.conditions),
        "passed": list(choice.passed), "considered": choice.considered, "figures": choice.figures,
    }  # fmt: skip


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload what ships to `USER/NAME` of the hub; returns its address. Raises DataError if the hub refuses.

    The artifact becomes the repository's root, where runtimes look for it; its manifest names what it was made from.
    """
    replaced = ["onnx/*", "gguf/*"]
    return hub.upload(folder / "artifact", repo, "model", f"distill sweep ship {folder.name}", replaced, private)
