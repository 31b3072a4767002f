"""Plans: known whole before anything runs, named by what they are made from, able to say why a stage is not done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distill
from distill.plan import Plan, state_of

Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]


def rows(path: Path, *made: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: WriteRecipe) -> Path:
    """Prompts from a file, recorded traces, a student of the hub that nothing has to load, evaluation and export."""
    questions = [(f"What is {a} + {b}?", a + b) for a in range(3, 7) for b in range(11, 15)]
    rows(tmp_path / "prompts.jsonl", *({"question": q, "answer": str(a)} for q, a in questions))
    answers = ({"question": q, "response": f"<think>\nI add.\n</think>\n\n\\boxed{{{a}}}"} for q, a in questions)
    rows(tmp_path / "traces.jsonl", *answers)
    return write_recipe(
        prompts=[{"name": "sums", "file": "prompts.jsonl", "heldout": 4}],
        teacher={"engine": "recorded", "recorded": {"files": ["traces.jsonl"]}},
        student={
            "init": "nobody/model",
            "revision": "0" * 40,
            "phases": [{"kind": "sft"}, {"kind": "sft", "lr": 1e-6}],
        },
        evaluate={"models": ["base", "student"]},
        export={"variants": ["int4"]},
    )


def plan_of(recipe: Path, *overrides: str, runs: Path = Path("runs")) -> Plan:
    return distill.make_plan(distill.load_recipe(recipe, overrides), runs=runs)


def identities(plan: Plan) -> dict[str, str]:
    return {label: step.identity for label, step in plan.steps.items()}


def changed(recipe: Path, *overrides: str) -> set[str]:
    """Labels of the stages that an override gives another identity."""
    before, after = identities(plan_of(recipe)), identities(plan_of(recipe, *overrides))
    assert before.keys() == after.keys()
    return {label for label in before if before[label] != after[label]}


TRAINED = {"train:0", "train:1", "eval:student:heldout", "export"}


def test_the_whole_plan_is_known_before_anything_has_run(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe, runs=tmp_path / "runs")
    expected = ["prompts", "generate", "select", "eval:base:heldout", "train:0", "train:1", "eval:student:heldout"]
    assert list(plan.steps) == [*expected, "export"]
    assert not (tmp_path / "runs").exists()


def test_the_same_recipe_has_the_same_identities(recipe: Path) -> None:
    assert identities(plan_of(recipe)) == identities(plan_of(recipe))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.phases.1.lr=2e-6", {"train:1", "eval:student:heldout", "export"}),
        ("student.phases.0.lr=2e-6", TRAINED),
        ("select.per_prompt=shortest", {"select"} | TRAINED),
        ("evaluate.sampling.max_new_tokens=7", {"eval:base:heldout", "eval:student:heldout", "export"}),
        ("export.variants=[int8]", {"export"}),
    ],
)
def test_a_change_reaches_what_is_downstream_and_nothing_else(recipe: Path, override: str, expected: set[str]) -> None:
    assert changed(recipe, override) == expected


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "student.attention=per_document",
        "student.phases.0.checkpoint_every_steps=3",
        "student.phases.0.schedule=cosine",
        "teacher.licence=MIT",
        "teacher.budget.hours=1",
        "evaluate.token_budgets=[1,2]",
    ],
)
def test_where_how_fast_and_at_what_price_is_in_no_identity(recipe: Path, override: str) -> None:
    assert changed(recipe, override) == set()


def test_a_prompt_file_is_known_by_its_content(recipe: Path, tmp_path: Path) -> None:
    before = identities(plan_of(recipe))
    (tmp_path / "prompts.jsonl").rename(tmp_path / "moved.jsonl")
    assert identities(plan_of(recipe, "prompts.0.file=moved.jsonl")) == before
    with (tmp_path / "moved.jsonl").open("a") as file:
        file.write('{"question": "What is 1 + 1?", "answer": "2"}\n')
    after = identities(plan_of(recipe, "prompts.0.file=moved.jsonl"))
    assert {label for label in before if before[label] != after[label]} == before.keys()


def test_device_and_threads_are_in_no_identity(recipe: Path) -> None:
    loaded = distill.load_recipe(recipe)
    plans = [distill.make_plan(loaded, device=device, threads=threads) for device, threads in [("cpu", 1), ("auto", 0)]]
    assert identities(plans[0]) == identities(plans[1])


def test_a_stage_that_is_not_done_says_which_field_changed(recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    distill.select(recipe, runs=runs, quiet=True)
    plan = plan_of(recipe, "select.per_prompt=shortest", runs=runs)
    assert state_of(plan.steps["generate"]) == ("done", "finished before")
    state, why = state_of(plan.steps["select"])
    assert state == "new" and "per_prompt" in why and "shortest" in why
    assert state_of(plan.steps["train:0"]) == ("new", "never run")


def test_the_dry_run_of_the_command_line_is_the_plan_of_the_call(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    said = cli("run", recipe, "--dry-run", "--json", "--runs", tmp_path / "runs")
    plan = plan_of(recipe)
    assert said.json["identity"] == plan.identity
    assert {stage["label"]: stage["identity"] for stage in said.json["stages"]} == identities(plan)
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_says_how_many_tokens_at_most(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    overrides = ["prompts.0.limit=12", "evaluate.sampling.max_new_tokens=10", "student.phases.1.max_steps=3"]
    said = cli("run", recipe, *overrides, "--dry-run", "--json", "--runs", tmp_path / "runs")
    tokens = {stage["label"]: stage["tokens"] for stage in said.json["stages"]}
    assert tokens["generate"] == 0  # recorded traces cost nothing
    assert tokens["eval:base:heldout"] == 4 * 10
    assert tokens["train:0"] == (12 - 4) * 4096
    assert tokens["train:1"] == 3 * 16384


def test_the_dry_run_of_a_verb_stops_at_its_stage(cli: Cli, recipe: Path) -> None:
    stages = cli("select", recipe, "--dry-run", "--json").json["stages"]
    assert [stage["label"] for stage in stages] == ["prompts", "generate", "select"]


def test_the_dry_run_for_people_has_a_row_a_stage(cli: Cli, recipe: Path) -> None:
    said = cli("run", recipe, "--dry-run")
    assert said.code == 0 and said.err == ""
    assert all(f"\n{label} " in said.out for label in plan_of(recipe).steps)


def test_what_the_command_line_finished_is_finished_for_the_call(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    said = cli("select", recipe, "--runs", runs, "--quiet", "--json")
    assert said.code == 0, said.err
    outcome = distill.select(recipe, runs=runs, quiet=True)
    assert outcome.executed == []
    assert {label: stage["digest"] for label, stage in said.json["stages"].items()} == {
        label: sealed.digest for label, sealed in outcome.results.items()
    }
    assert Path(said.json["pipeline"]).is_file()


def test_inspect_follows_the_lineage_from_every_target(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    outcome = distill.select(recipe, runs=runs, quiet=True)
    targets = [recipe, next((runs / "pipelines").iterdir()), outcome.results["select"].folder]
    texts = [cli("inspect", target, "--limit", 1, "--runs", runs).out for target in targets]
    assert texts[0] == texts[1] == texts[2]
    assert "What is" in texts[0] and "correct (number@" in texts[0]
    bare = cli("inspect", outcome.results["generate"].folder, "--limit", 1).out
    assert "What is" in bare and "verdict" not in bare


def test_inspect_of_a_recipe_that_has_not_run_says_so(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    said = cli("inspect", recipe, "--runs", tmp_path / "runs")
    assert said.code == 2 and "run the recipe first" in said.error_line


def test_inspect_of_a_stage_that_is_not_there_names_those_that_are(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    distill.select(recipe, runs=tmp_path / "runs", quiet=True)
    said = cli("inspect", recipe, "--stage", "eval", "--runs", tmp_path / "runs")
    assert said.code == 2 and "generate, select" in said.error_line
