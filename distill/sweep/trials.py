"""From a sweep to its trials: each is a whole recipe, known by the keys that it changes.

Ten thousand recipes that differ in a few keys share nearly all their sections. Sections are therefore validated once
for each distinct set of values and shared between the recipes as the same objects, which planning profits from.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.config import Located, Recipe, recipe_of, validate, with_paths_from, with_value
from distill.errors import RecipeError
from distill.records import digest_json

from .config import Rule, Sweep, SweepFile

COMPARISONS = ("in", "not", "ge", "gt", "le", "lt")
"""Keys of a condition that is no plain value."""


@dataclass(frozen=True)
class Trial:
    """One recipe of a sweep."""

    number: int
    """Its number in the sweep, from 0; it keeps it when the sweep grows."""
    overrides: Mapping[str, Any]
    """What it changes in the base recipe, seeds included."""
    seed: int | None
    recipe: Recipe

    @cached_property
    def key(self) -> str:
        """Identity of what it changes: the same trial in a sweep that has grown."""
        return key_of(self.overrides)

    @cached_property
    def varied(self) -> dict[str, Any]:
        """What it changes but for the seed."""
        return {key: value for key, value in self.overrides.items() if not (self.seed is not None and is_seed(key))}

    @cached_property
    def group(self) -> str:
        """Identity of the combination: trials that differ in nothing but the seed have the same."""
        return key_of(self.varied)

    @property
    def arguments(self) -> list[str]:
        """The overrides as the command line takes them."""
        return arguments_of(self.overrides)


def arguments_of(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as the command line takes them."""
    return [f"{key}={as_argument(value)}" for key, value in overrides.items()]


def key_of(overrides: Mapping[str, Any]) -> str:
    """Identity of a set of overrides."""
    return digest_json(overrides)[:12]


def as_argument(value: Any) -> str:
    """A value as YAML on one line, as an override is written."""
    return value if isinstance(value, str) and value.replace("_", "").isalpha() else json.dumps(value)


def is_seed(key: str) -> bool:
    """Whether a key is one that `seeds` sets."""
    return key.startswith("student.phases.") and key.endswith(".seed")


def combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """What each trial of `list` and `grid` changes, before rules and seeds."""
    for bundle in sweep.bundles or [{}]:
        for values in itertools.product(*sweep.grid.values()):
            yield {**bundle, **dict(zip(sweep.grid, values))}


class Recipes:
    """Makes the recipes of a sweep's trials, each distinct section once."""

    def __init__(self, base: Located, base_path: Path, place: str = "sweep") -> None:
        self.values: dict[str, Any] = base.value
        self.folder = base_path.parent
        self.place = place
        self.base: Recipe = recipe_of(base, base_path)
        self._sections: dict[tuple[str, str], Any] = {}

    def changed(self, overrides: Mapping[str, Any], place: str = "") -> dict[str, Any]:
        """The base recipe's plain values with other ones at the given keys."""
        values = self.values
        for key, value in overrides.items():
            values = with_value(values, key, value, f"{place or self.place}: {key}")
        return values

    def make(self, overrides: Mapping[str, Any], place: str = "") -> Recipe:
        """The recipe with these keys changed. Raises RecipeError naming the overrides."""
        values = self.changed(overrides, place)
        keys = {name: (name, _changes_of(name, overrides)) for name in values}
        known = {name: self._sections[key] for name, key in keys.items() if key in self._sections}
        if len(known) == len(values):
            try:
                return Recipe.model_validate(known)
            except ValidationError:
                pass  # sections that do not fit together: said in full below
        where = f"{place or self.place}: with {', '.join(f'{k}={v!r}' for k, v in overrides.items())}"
        recipe = with_paths_from(self.folder, validate(Recipe, values, where, {}))
        for name, key in keys.items():
            self._sections.setdefault(key, getattr(recipe, name))
        return Recipe.model_validate({name: self._sections[key] for name, key in keys.items()})

    def admits(self, rules: Sequence[Rule], overrides: Mapping[str, Any]) -> bool:
        """Whether no rule leaves this combination out."""
        if not rules:
            return True
        values = self.changed(overrides)
        for rule in rules:
            if rule.skip is not None and self._holds(rule.skip, values):
                return False
            applies = rule.condition is not None and self._holds(rule.condition, values)
            if applies and not self._holds(rule.only or {}, values):
                return False
        return True

    def _holds(self, condition: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        return all(_matches(self._value_at(key, values), wanted, key) for key, wanted in condition.items())

    def _value_at(self, key: str, values: Mapping[str, Any]) -> Any:
        """What the trial's file would say, else the base recipe's default."""
        given, found = _follow(values, key)
        return given if found else _follow(self._defaults, key)[0]

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return self.base.model_dump(mode="json")


def _changes_of(section: str, overrides: Mapping[str, Any]) -> str:
    own = {key: value for key, value in overrides.items() if key == section or key.startswith(section + ".")}
    return json.dumps(own, sort_keys=True, default=str) if own else ""


def _follow(values: Any, key: str) -> tuple[Any, bool]:
    """The value at a dotted key, and whether it is there."""
    for part in key.split("."):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None, False
    return values, True


def _matches(value: Any, wanted: Any, key: str) -> bool:
    """Whether a value is the wanted one, or passes a comparison such as `{ge: 500}`."""
    if not (isinstance(wanted, Mapping) and wanted and set(wanted) <= set(COMPARISONS)):
        return bool(value == wanted)
    for name, limit in wanted.items():
        if name == "in":
            passes = value in limit
        elif name == "not":
            passes = value != limit
        elif not isinstance(value, int | float) or isinstance(value, bool):
            raise RecipeError(f"when: {key} is {value!r}, which {name} cannot compare with {limit!r}; use in or not")
        else:
            passes = {"ge": value >= limit, "gt": value > limit, "le": value <= limit, "lt": value < limit}[name]
        if not passes:
            return False
    return True


def with_seed(recipes: Recipes, overrides: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """The overrides with a seed for every training phase."""
    if seed is None:
        return dict(overrides)
    phases, _ = _follow(recipes.changed(overrides), "student.phases")
    if not phases:
        raise RecipeError(f"{recipes.place}: seeds: there are no training phases whose seed they could be")
    return {**overrides, **{f"student.phases.{index}.seed": seed for index in range(len(phases))}}


class Numbers:
    """Gives trials their numbers: one that was there before keeps its own, a new one takes the next."""

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        self.known = dict(known or {})
        self.next = max(self.known.values(), default=-1) + 1

    def of(self, key: str) -> int:
        """The number of a trial."""
        if key not in self.known:
            self.known[key] = self.next
            self.next += 1
        return self.known[key]


def expand(file: SweepFile, recipes: Recipes, numbers: Numbers | None = None) -> list[Trial]:
    """Every trial of `grid`, `list` and `seeds` that the rules admit, in the file's order.

    Trials whose overrides are equal come once. Raises RecipeError for a combination that makes no valid recipe.
    """
    trials: dict[str, Trial] = {}
    numbers = numbers or Numbers()
    for combination in combinations(file.sweep):
        if recipes.admits(file.sweep.when, combination):
            for trial in trials_of(file.sweep, recipes, combination, numbers, _place_of(file, combination)):
                trials.setdefault(trial.key, trial)
    if not trials:
        raise RecipeError(f"{file.place('when')}: no combination is left; every one is excluded by a rule")
    return list(trials.values())


def trials_of(
    sweep: Sweep, recipes: Recipes, combination: Mapping[str, Any], numbers: Numbers, place: str = ""
) -> Iterator[Trial]:
    """The trials of one combination: one for each seed."""
    seeds: Sequence[int | None] = sweep.seeds or [None]
    for seed in seeds:
        overrides = with_seed(recipes, combination, seed)
        yield Trial(numbers.of(key_of(overrides)), overrides, seed, recipes.make(overrides, place))


def _place_of(file: SweepFile, combination: Mapping[str, Any]) -> str:
    """The line of the first varied key, for messages about a combination."""
    first = next(iter(combination), "")
    if first in file.sweep.grid:
        return file.place("grid", first)
    return file.place("list") if file.sweep.bundles else str(file.path)
