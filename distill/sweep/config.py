"""The sweep file: a base recipe, what varies in it, what is wanted of the result, and what it may cost.

The same loader and the same messages as recipes have: unknown keys are refused with the nearest one, a problem names
its file and line. What varies is given as dotted keys of the recipe, lists by index, exactly as overrides on the
command line.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from distill.config import Keys, Located, Section, check_key, read_values, validate, with_value
from distill.errors import RecipeError

StageName = Literal["prompts", "generate", "select", "prune", "score", "train", "eval", "export"]
MetricName = Literal[
    "accuracy", "bytes", "latency_ms", "tokens_per_s", "mean_tokens", "dollars", "teacher_tokens", "stage_seconds"
]

RISING = ("accuracy", "tokens_per_s")
"""Metrics of which more is better; of all others, less."""


class Objective(Section):
    """One thing that is wanted of a trial; fronts are drawn between the first and each of the others."""

    metric: MetricName = "accuracy"
    """`accuracy` on the set; `bytes` of the model that ships; `latency_ms` a generated token and `tokens_per_s`, both
    as measured in evaluation; `mean_tokens` an answer; `dollars` and `teacher_tokens` of the teacher's answers;
    `stage_seconds` of all the trial's stages."""
    goal: Literal["max", "min"] | None = None
    """Whether more or less is better; null takes what the metric's name says."""
    model: str = "product"
    """Which model is measured: `product` is what ships (the smallest exported variant, else the student, else the
    base), or `student`, `base`, `teacher`, or a variant."""
    set: str | None = None
    """Evaluation set; null takes the one that the export's gate reads, else the first."""

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.goal == "max" if self.goal else self.metric in RISING

    @property
    def title(self) -> str:
        """What it is called in tables: the metric, with model and set where they were chosen."""
        chosen = [part for part in (self.model if self.model != "product" else "", self.set or "") if part]
        return ":".join([self.metric, *chosen])


class Dimension(Section):
    """The values that a search may give one key: exactly one of `choice`, `int`, `float`."""

    choice: list[Any] | None = None
    """Any of these values."""
    integer: tuple[int, int] | None = Field(default=None, alias="int")
    """A whole number from the first to the second, both included."""
    real: tuple[float, float] | None = Field(default=None, alias="float")
    """A number from the first to the second."""
    step: float | None = Field(default=None, gt=0)
    """Distance of neighbouring values; null is 1 for `int` and none for `float`."""
    log: bool = False
    """Draw evenly in the logarithm; goes with no step."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [
            name for name, value in {"choice": self.choice, "int": self.integer, "float": self.real}.items() if value
        ]
        if len(given) != 1:
            raise ValueError(
                f"a dimension takes exactly one of choice, int, float (given: {', '.join(given) or 'none'})"
            )
        bounds = self.integer or self.real
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{given[0]}: [{bounds[0]}, {bounds[1]}] is empty; give the smaller bound first")
        if self.log and (not bounds or bounds[0] <= 0 or self.step):
            raise ValueError("log: goes with int or float above 0, and with no step")
        return self


class Pruner(Section):
    """Stops trainings that fall behind the others, by a figure of their monitor."""

    kind: Literal["asha", "median"] = "asha"
    """`asha` keeps the best share at each rung (Li et al. 2020); `median` stops what is worse than the median of the
    others at the same step."""
    metric: str = "heldout_loss"
    """Figure of `metrics.jsonl`: `heldout_loss`, `heldout_kl`, `accuracy`, `SET/accuracy`, …; the phase needs a
    monitor."""
    goal: Literal["max", "min"] | None = None
    """Whether more or less is better; null takes less for a loss or KL and more for anything else."""
    phase: int = Field(default=0, ge=0)
    """Training phase that is watched."""
    reduction: int = Field(default=3, ge=2)
    """Of `asha`: one in so many goes on at each rung."""
    first_step: int = Field(default=1, ge=0)
    """Training step before which nothing is stopped; of `asha`, the first rung."""

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.goal == "max" if self.goal else "loss" not in self.metric and self.metric != "heldout_kl"


class Search(Section):
    """Trials that are chosen one after the other by what the earlier ones gave (Optuna)."""

    space: dict[str, Dimension] = Field(min_length=1)
    """What each key may be."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe` models what was good (Bergstra et al. 2011), `random` draws, `grid` takes every combination once."""
    trials: int = Field(default=20, gt=0)
    """Trials to run."""
    parallel: int = Field(default=1, gt=0)
    """Trials that are open at once; the more, the less each can learn from the others."""
    seed: int = 0
    """Seed of the sampler."""
    startup: int = Field(default=8, ge=0)
    """Trials that `tpe` draws at random before it has a model."""
    storage: Literal["journal", "sqlite"] = "journal"
    """Form of the study's database in the sweep's folder: a log that also works on network file systems, or SQLite."""
    storage_env: str | None = None
    """Environment variable that holds the url of another database, such as PostgreSQL; the url is written nowhere."""


class Rule(Section):
    """Which combinations are left out: `skip` alone, or `if` with `only`; conditions compare keys of the recipe."""

    skip: dict[str, Any] | None = None
    """Leave out trials for which all of this holds."""
    condition: dict[str, Any] | None = Field(default=None, alias="if")
    """Where all of this holds …"""
    only: dict[str, Any] | None = None
    """… keep only trials for which this holds too."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.skip is None) == (self.condition is None) or (self.condition is None) != (self.only is None):
            raise ValueError("a rule is either skip: {key: value}, or if: {key: value} with only: {key: value}")
        return self


class Limits(Section):
    """Where the sweep stops: what runs is asked to save itself, and a higher limit goes on (exit 3)."""

    trials: int | None = Field(default=None, gt=0)
    """Trials to run, the first ones; the others are left for later."""
    hours: float | None = Field(default=None, gt=0)
    """Wall time of all attempts together."""
    dollars: float | None = Field(default=None, gt=0)
    """What teachers may be paid in all; handed on to each generate stage as its budget."""


class Needs(Section):
    """What a stage takes of the resources while it runs."""

    cpus: int | None = Field(default=None, gt=0)
    """CPU slots, and so its threads; null takes a share that fits the stage."""
    memory_gb: float = Field(default=0.0, ge=0)
    """Memory; 0 is not counted."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs; null takes one for stages that run models, where there are any."""


class Resources(Section):
    """What stages may use together, and what each kind of stage takes of it."""

    cpus: int | None = Field(default=None, gt=0)
    """CPU slots; null takes every core that this process may use."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory that stages may use together; null does not count it."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs; null takes those that this process may see. A stage sees only those that it was given."""
    stages: dict[StageName, Needs] = {}
    """What a stage takes. By default prompts and select take one CPU slot, all others up to four."""


class Sweep(Section):
    """One sweep: many recipes that differ in a few keys."""

    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the sweep's folder in the run store; the file's stem where it is not given."""
    recipe: Path
    """The base recipe; a relative path is taken from the sweep's folder."""
    fixed: dict[str, Any] = Field(default={}, alias="set")
    """Keys that all trials change alike."""
    grid: dict[str, list[Any]] = {}
    """Values of each key; every combination is a trial."""
    bundles: list[dict[str, Any]] = Field(default=[], alias="list")
    """Trials one by one, each as the keys that it changes; with `grid`, each is combined with the whole grid."""
    search: Search | None = None
    """Trials chosen as results come in; instead of `grid` and `list`."""
    seeds: list[int] = []
    """Run every combination once with each of these as the seed of all its training phases."""
    when: list[Rule] = []
    """Combinations to leave out."""
    objectives: list[Objective] = Field(default=[Objective(), Objective(metric="bytes")], min_length=1)
    """What is wanted; the first one decides which trial is best."""
    pruner: Pruner | None = None
    """What stops trainings that fall behind."""
    limits: Limits = Limits()
    """Where it stops."""
    resources: Resources = Resources()
    """What runs at once."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.search and (self.grid or self.bundles):
            raise ValueError("search: chooses the trials itself; leave out grid and list, or search")
        if empty := next((key for key, values in self.grid.items() if not values), None):
            raise ValueError(f"grid.{empty}: no values; give at least one, or leave the key out")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names one twice; each is a trial of its own")
        self._resources_suffice()
        return self

    def _resources_suffice(self) -> None:
        have = self.resources
        for stage, needs in have.stages.items():
            if have.cpus and needs.cpus and needs.cpus > have.cpus:
                raise ValueError(f"resources.stages.{stage}.cpus is {needs.cpus}, but resources.cpus is {have.cpus}")
            if have.memory_gb and needs.memory_gb > have.memory_gb:
                raise ValueError(
                    f"resources.stages.{stage}.memory_gb is {needs.memory_gb:g}, but resources.memory_gb is"
                    f" {have.memory_gb:g}"
                )
            if needs.gpus and have.gpus is not None and needs.gpus > have.gpus:
                raise ValueError(f"resources.stages.{stage}.gpus is {needs.gpus}, but resources.gpus is {have.gpus}")

    def named_keys(self) -> Iterator[tuple[Keys, str]]:
        """Every recipe key that is named, after where it stands in the file."""
        yield from ((("set", key), key) for key in self.fixed)
        yield from ((("grid", key), key) for key in self.grid)
        yield from ((("list", n, key), key) for n, bundle in enumerate(self.bundles) for key in bundle)
        yield from ((("search", "space", key), key) for key in (self.search.space if self.search else ()))
        for n, rule in enumerate(self.when):
            for part, keys in (("skip", rule.skip), ("if", rule.condition), ("only", rule.only)):
                yield from ((("when", n, part, key), key) for key in keys or {})


class SweepFile(NamedTuple):
    """A sweep with its base recipe as plain values, what is `set` included, and where both stand."""

    sweep: Sweep
    path: Path
    lines: Mapping[Keys, int]
    base: Located
    base_path: Path

    def place(self, *at: str | int) -> str:
        """`FILE:LINE` of a key, for messages."""
        line = next((self.lines[at[:size]] for size in range(len(at), 0, -1) if at[:size] in self.lines), None)
        return f"{self.path}:{line}" if line else str(self.path)


def load_sweep(path: Path | str) -> SweepFile:
    """Read a sweep file and its base recipe's values.

    Raises RecipeError naming file, line, key, value, what is allowed and the nearest valid key.
    """
    path = Path(path)
    located = read_values(path, "sweep")
    sweep = validate(Sweep, located.value, str(path), located.lines)
    base_path = sweep.recipe if sweep.recipe.is_absolute() else path.parent / sweep.recipe
    if not base_path.is_file():
        line = located.lines.get(("recipe",), 1)
        raise RecipeError(f"{path}:{line}: recipe is {str(sweep.recipe)!r}, but there is no such file: {base_path}")
    found = SweepFile(sweep, path, located.lines, read_values(base_path), base_path)
    for at, key in sweep.named_keys():
        check_key(key, f"{found.place(*at)}: {'.'.join(map(str, at[:-1]))}")
    values = found.base.value
    for key, value in sweep.fixed.items():
        values = with_value(values, key, value, f"{found.place('set', key)}: set: {key}")
    return found._replace(base=Located(values, found.base.lines))
