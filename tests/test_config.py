"""Recipes: what is refused and how it is said, overrides, and what identities are made of."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from distill.config import (
    Budget,
    Recipe,
    Sampling,
    SftPhase,
    TeacherConfig,
    _Loader,
    hashed_fields,
    load_recipe,
    parse_yaml,
    recipe_from,
)
from distill.errors import RecipeError

WriteRecipe = Callable[..., Path]

GYM = {"name": "sums", "reasoning_gym": {"task": "chain_sum", "size": 40}, "heldout": 8}
SMALL = {
    "prompts": [GYM],
    "teacher": {"engine": "solver"},
    "student": {"init": "Qwen/Qwen2.5-0.5B", "phases": [{"kind": "sft"}, {"kind": "sft", "lr": 2e-5}]},
}


def recipe_text(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_duplicate_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    text = "name: a\nstudent:\n  init: x/y\n  precision: bf16\n  init: x/z\n"
    message = message_of(recipe_text(tmp_path, text))
    assert "recipe.yaml:5" in message and "'init'" in message and "line 3" in message


def test_an_unknown_key_names_file_line_and_the_nearest_valid_key(tmp_path: Path) -> None:
    text = "prompts:\n  - name: p\n    file: p.jsonl\n    heldot: 5\n"
    message = message_of(recipe_text(tmp_path, text))
    assert "recipe.yaml:4" in message and "heldot" in message and "did you mean 'heldout'" in message


def test_an_unknown_section_names_the_nearest_one(tmp_path: Path) -> None:
    assert "did you mean 'student'" in message_of(recipe_text(tmp_path, "studnet: {init: a/b}\n"))


def test_an_unknown_key_inside_a_phase_lists_what_a_phase_takes(tmp_path: Path) -> None:
    text = json.dumps({**SMALL, "student": {"init": "a/b", "phases": [{"kind": "sft", "learning_rate": 1}]}})
    message = message_of(recipe_text(tmp_path, text))
    assert "learning_rate" in message and "lr" in message and "warmup_ratio" in message


@pytest.mark.parametrize(("key", "hint"), [("knd", "is 'knd' meant to be it?"), ("lr", "is missing;")])
def test_a_phase_without_its_kind_is_told_the_kinds(tmp_path: Path, key: str, hint: str) -> None:
    text = json.dumps({**SMALL, "student": {"init": "a/b", "phases": [{key: "sft"}]}})
    message = message_of(recipe_text(tmp_path, text))
    assert "student.phases.0.kind is missing" in message and hint in message and "'sft', 'kd', 'on_policy'" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("student.phases.0.lr", "fast", "student.phases.0.lr"),
        ("student.phases.0.lr", "-1", "greater than 0"),
        ("student.phases.0.schedule", "cosin", "did you mean 'cosine'"),
        ("student.phases.0.kind", "sfft", "student.phases.0"),
        ("teacher.engine", "solvr", "did you mean 'solver'"),
        ("teacher.sampling.n", "1.5", "teacher.sampling.n"),
        ("prompts.0.name", "''", "prompts.0.name"),
        ("prompts", "nothing", "prompts"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_allowed(
    write_recipe: WriteRecipe, key: str, value: str, expected: str
) -> None:
    assert expected in message_of(write_recipe(**SMALL), f"{key}={value}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping of sections; given: list"),
        ("just words\n", "given: str"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message_of(recipe_text(tmp_path, text))


def test_a_missing_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    assert "distill init" in message_of(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"teacher": {"engine": "solver"}}, "add prompts"),
        ({"student": {"init": "a/b", "phases": [{"kind": "sft"}]}}, "add prompts and a teacher"),
        ({"export": {}}, "add student or export.model"),
        ({"prompts": [{**GYM, "heldout": 0}], "evaluate": {}}, "no prompts are held out"),
        ({"prompts": [GYM, GYM]}, "names must differ"),
        ({"prompts": [{"name": "p"}]}, "exactly one of reasoning_gym, file, hub (given: none)"),
        ({"prompts": [GYM], "teacher": {"engine": "recorded"}}, "recorded.files or recorded.hub"),
        ({"prompts": [GYM], "teacher": {"engine": "openai"}}, "takes a model"),
        ({"prompts": [GYM], "teacher": {"engine": "solver", "budget": {"usd": 1}}}, "takes prices"),
        ({"prompts": [GYM], "evaluate": {"sampling": {"n": 4}}}, "temperature above 0"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(
    write_recipe: WriteRecipe, sections: dict[str, Any], expected: str
) -> None:
    assert expected in message_of(write_recipe(**sections))


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("5E3", 5000.0),
        ("-2e-5", -2e-5),
        (".5", 0.5),
        ("1_000", 1000),
        ("3", 3),
        ("v1e4", "v1e4"),
        ("'1e-4'", "1e-4"),
        ("1e-4x", "1e-4x"),
        (".", "."),
        ("null", None),
    ],
)
def test_numbers_are_read_as_a_person_means_them(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}", "here").value["key"]
    assert read == value and type(read) is type(value)


def test_an_empty_recipe_is_valid_and_named_after_its_file(tmp_path: Path) -> None:
    assert load_recipe(recipe_text(tmp_path, "# nothing\n")) == Recipe(name="recipe")


def test_overrides_win_over_the_file_and_reach_into_lists(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(
        write_recipe(**SMALL),
        ["student.phases.1.lr=1e-5", "teacher.sampling.temperature=0.6", "student.precision=fp32"],
    )
    assert recipe.student is not None and recipe.teacher is not None
    assert [phase.lr for phase in recipe.student.phases] == [1e-5, 1e-5]
    assert (recipe.teacher.sampling.temperature, recipe.student.precision) == (0.6, "fp32")


def test_an_override_can_make_a_section_that_the_file_lacks(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(**SMALL), ["evaluate.batch_size=4", "select.limit=3"])
    assert recipe.evaluate is not None
    assert (recipe.evaluate.batch_size, recipe.select.limit) == (4, 3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.phases.7.lr=1", "'7' is not an index of a list of 2"),
        ("student.phases.first.lr=1", "'first' is not an index"),
        ("student.init.name=1", "not a section"),
        ("student", "write it as section.key=value"),
        ("=1", "write it as section.key=value"),
        ("student.inti=x", "did you mean 'init'"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(write_recipe: WriteRecipe, override: str, expected: str) -> None:
    assert expected in message_of(write_recipe(**SMALL), override)


def test_relative_paths_are_taken_from_the_recipe_and_not_from_here(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(prompts=[{"name": "p", "file": "data/p.jsonl"}])
    monkeypatch.chdir("/")
    assert load_recipe(path).prompts[0].file == tmp_path / "data" / "p.jsonl"


# --- identity -------------------------------------------------------------------------------------------------------


class LaterPhase(SftPhase):
    """The same phase in a version that has one more field."""

    label_smoothing: float = Field(default=0.0, ge=0)
    """New, with a default."""


def test_a_new_field_with_a_default_changes_no_identity() -> None:
    given = {"kind": "sft", "lr": 1e-4, "schedule": "linear"}
    assert hashed_fields(LaterPhase(**given)) == hashed_fields(SftPhase(**given))
    assert hashed_fields(LaterPhase(**given, label_smoothing=0.1)) != hashed_fields(SftPhase(**given))


def test_saying_a_default_out_loud_changes_no_identity() -> None:
    assert hashed_fields(Sampling(n=1, temperature=0.0)) == hashed_fields(Sampling()) == {}


def test_what_says_where_or_at_what_price_is_in_no_identity() -> None:
    plain = TeacherConfig(engine="openai", model="r1")
    priced = TeacherConfig.model_validate(
        {
            "engine": "openai",
            "model": "r1",
            "licence": "MIT",
            "endpoint": {"base_url": "http://127.0.0.1:1/v1", "concurrency": 3},
            "prices": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2},
            "budget": {"usd": 3},
        }
    )
    assert hashed_fields(priced) == hashed_fields(plain)
    assert hashed_fields(TeacherConfig(engine="openai", model="r2")) != hashed_fields(plain)
    assert hashed_fields(Budget(usd=1)) == {}


def test_files_enter_identities_by_content_and_not_by_name() -> None:
    here, there = ({"prompts": [{"name": "p", "file": f"/{place}/p.jsonl"}]} for place in ("here", "there"))
    assert hashed_fields(recipe_from(here)) == hashed_fields(recipe_from(there))


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().name = "other"  # type: ignore[misc]


# --- round trips ----------------------------------------------------------------------------------------------------

NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
PHASES = st.fixed_dictionaries(
    {"kind": st.just("sft")},
    optional={
        "lr": st.floats(1e-9, 1.0),
        "epochs": st.floats(0.01, 100),
        "max_steps": st.none() | st.integers(1, 10**6),
        "schedule": st.sampled_from(["cosine", "linear", "constant"]),
        "seed": st.integers(0, 2**31),
        "gradient_checkpointing": st.booleans(),
    },
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f\x85\ufeff"), max_size=30)
RECIPES = st.fixed_dictionaries(
    {
        "prompts": st.lists(
            st.fixed_dictionaries(
                {"name": NAMES, "hub": st.fixed_dictionaries({"id": NAMES}), "instruction": TEXTS},
                optional={"heldout": st.integers(1, 9), "gold": st.sampled_from(["as_is", "boxed"])},
            ),
            min_size=1,
            max_size=3,
            unique_by=lambda source: source["name"],
        ),
        "teacher": st.fixed_dictionaries(
            {"engine": st.just("solver")},
            optional={"system": st.none() | TEXTS, "sampling": st.fixed_dictionaries({"temperature": st.floats(0, 2)})},
        ),
    },
    optional={"student": st.fixed_dictionaries({"init": NAMES, "phases": st.lists(PHASES, max_size=3)})},
)


class Dumper(yaml.SafeDumper):
    """Quotes every text that our loader would read as something else, `1e5` among them."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def as_yaml(value: object) -> str:
    return yaml.dump(value, Dumper=Dumper, allow_unicode=True)


@given(RECIPES)
def test_any_recipe_survives_writing_and_reading(values: dict[str, Any]) -> None:
    recipe = recipe_from(values)
    dumped = recipe.model_dump(mode="json")
    assert recipe_from(dumped) == recipe
    assert recipe_from(parse_yaml(as_yaml(dumped), "dumped").value) == recipe
    assert hashed_fields(recipe_from(dumped)) == hashed_fields(recipe)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none() | TEXTS)
def test_any_value_that_yaml_writes_is_read_back(value: object) -> None:
    assert parse_yaml(as_yaml({"key": value}), "dumped").value == {"key": value}
