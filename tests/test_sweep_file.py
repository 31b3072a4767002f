"""Sweep files: messages as good as those of recipes, trials that are whole recipes, a plan before anything runs."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RecipeError
from distill.runs import RunOptions
from distill.sweep.config import Sweep, load_sweep
from distill.sweep.run import Planned, foresee, plan_sweep
from distill.sweep.trials import Numbers, Recipes, Trial, expand

RECIPE = """
prompts:
  - {name: sums, reasoning_gym: {task: basic_arithmetic, size: 400, seed: 7}, heldout: 64}
teacher: {engine: solver}
student:
  init: nobody/model
  revision: "0000000000000000000000000000000000000000"
  phases: [{kind: sft, lr: 1e-4}]
evaluate: {models: [base, student]}
export: {variants: [int4]}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a sweep file beside its base recipe."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def write_sweep(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text("recipe: recipe.yaml\n" + text)
        return path

    return write_sweep


Write = Callable[[str], Path]


def trials_of(path: Path, known: dict[str, int] | None = None) -> list[Trial]:
    file = load_sweep(path)
    return expand(file, Recipes(file.base, file.base_path, str(path)), Numbers(known))


def planned(path: Path, tmp_path: Path) -> Planned:
    return plan_sweep(path, RunOptions(tmp_path / "runs"))


# --- trials ---------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_the_order_of_the_file(write: Write) -> None:
    trials = trials_of(write("grid: {select.limit: [10, 20], student.phases.0.lr: [1e-4, 2e-4]}"))
    assert [(t.recipe.select.limit, t.recipe.student.phases[0].lr) for t in trials if t.recipe.student] == [
        (10, 1e-4), (10, 2e-4), (20, 1e-4), (20, 2e-4),
    ]  # fmt: skip
    assert [trial.number for trial in trials] == [0, 1, 2, 3]


def test_bundles_change_several_keys_at_once_and_meet_the_whole_grid(write: Write) -> None:
    path = write("list:\n  - {select.limit: 10, format.system: a}\n  - {select.limit: 20}\ngrid: {precision: [1]}")
    with pytest.raises(RecipeError, match=r"sweep.yaml:5: grid: a recipe has no key 'precision'"):
        trials_of(path)
    path.write_text(path.read_text().replace("precision: [1]", "student.precision: [bf16, fp32]"))
    found = [(t.recipe.select.limit, t.recipe.format.system) for t in trials_of(path)]
    assert len(found) == 4 and found[0] == found[1] == (10, "a") and found[2][0] == 20


def test_what_is_set_holds_for_all_trials_and_is_checked_too(write: Write) -> None:
    trials = trials_of(write("set: {prompts.0.heldout: 32, student.precision: fp32}\ngrid: {select.limit: [10, 20]}"))
    assert [(t.recipe.prompts[0].heldout, t.recipe.select.limit) for t in trials] == [(32, 10), (32, 20)]
    assert all("prompts.0.heldout" not in trial.overrides for trial in trials)
    with pytest.raises(RecipeError, match=r"sweep.yaml:2: set: a recipe has no key 'selct' \(did you mean 'select'"):
        trials_of(write("set: {selct.limit: 1}"))


def test_a_sweep_without_anything_that_varies_is_its_base(write: Write) -> None:
    (trial,) = trials_of(write("name: one"))
    assert trial.overrides == {} and trial.arguments == []


def test_seeds_are_those_of_all_phases_and_make_a_group(write: Write) -> None:
    trials = trials_of(write("grid: {select.limit: [10, 20]}\nseeds: [3, 4]"))
    assert [t.recipe.student.phases[0].seed for t in trials if t.recipe.student] == [3, 4, 3, 4]
    assert trials[0].group == trials[1].group != trials[2].group
    assert trials[0].varied == {"select.limit": 10}


def test_a_trial_keeps_its_number_when_the_sweep_grows(write: Write) -> None:
    before = {trial.key: trial.number for trial in trials_of(write("grid: {select.limit: [10, 30]}"))}
    after = {trial.recipe.select.limit: trial.number for trial in trials_of(
        write("grid: {select.limit: [10, 20, 30]}"), before)}  # fmt: skip
    assert after == {10: 0, 20: 2, 30: 1}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{skip: {select.limit: 10, student.precision: fp32}}", {(10, "bf16"), (20, "bf16"), (20, "fp32")}),
        ("{if: {select.limit: 10}, only: {student.precision: fp32}}", {(10, "fp32"), (20, "bf16"), (20, "fp32")}),
        ("{skip: {select.limit: {lt: 20}}}", {(20, "bf16"), (20, "fp32")}),
        ("{skip: {student.precision: {in: [fp32, fp64]}}}", {(10, "bf16"), (20, "bf16")}),
        ("{skip: {export.variants: [int4], select.limit: {ge: 20}}}", {(10, "bf16"), (10, "fp32")}),
        ("{skip: {evaluate.batch_size: 64, select.limit: {not: 10}}}", {(10, "bf16"), (10, "fp32")}),
    ],
)
def test_rules_leave_combinations_out(write: Write, rule: str, expected: set[tuple[int, str]]) -> None:
    path = write(f"grid: {{select.limit: [10, 20], student.precision: [bf16, fp32]}}\nwhen: [{rule}]")
    found = {(t.recipe.select.limit, t.recipe.student.precision) for t in trials_of(path) if t.recipe.student}
    assert found == expected


def test_trials_share_the_sections_that_they_do_not_change(write: Write) -> None:
    first, second = trials_of(write("grid: {select.limit: [10, 20]}"))
    assert first.recipe.student is second.recipe.student and first.recipe.select != second.recipe.select


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "girds: {}",
            r"sweep.yaml:2: unknown key 'girds' \(did you mean 'grid'\?\); allowed here: name, recipe, set, grid",
        ),
        ("grid: {}\ngrid: {}", r"sweep.yaml:3: 'grid' is given twice"),
        ("grid:\n  student.phases.0.lrr: [1]", r"sweep.yaml:3: grid: .*'student.phases.0.lrr' \(did you mean 'lr'\?\)"),
        ("grid: {student.phases.3.lr: [1]}", r"'3' is not an index of a list of 1"),
        ("grid: {select.limit: []}", r"grid.select.limit: no values"),
        ("grid: {select.limit: [10, -1]}", r"sweep.yaml:2: with select.limit=-1: select.limit is -1: input should be"),
        ("seeds: [1, 1]", r"seeds: \[1, 1\] names one twice"),
        ("when: [{skip: {a.b: 1}}]", r"sweep.yaml:2: when.0.skip: a recipe has no key 'a'"),
        ("when: [{if: {select.limit: 1}}]", r"a rule is either skip: .* or if"),
        ("when: [{skip: {select.limit: null}}]", r"no combination is left"),
        ("when: [{skip: {student.init: {gt: 3}}}]", r"student.init is 'nobody/model', which gt cannot compare"),
        ("objectives: [{metric: acuracy}]", r"objectives.0.metric is 'acuracy'; choose .*did you mean 'accuracy'"),
        ("search: {space: {}}", r"search.space is \{\}"),
        ("search: {space: {select.limit: {int: [5, 1]}}}", r"int: \[5, 1\] is empty"),
        ("search: {space: {select.limit: {int: [1, 5], choice: [1]}}}", r"exactly one of choice, int, float"),
        ("search: {space: {select.limit: {int: [1, 5]}}}\ngrid: {select.limit: [1]}", r"chooses the trials itself"),
        ("resources: {cpus: 1, stages: {train: {cpus: 2}}}", r"resources.stages.train.cpus is 2, but .* is 1"),
        ("resources: {stages: {trian: {}}}", r"resources.stages.trian"),
        ("pruner: {kind: asha}", r"sweep.yaml:2: pruner reads heldout_loss .* add student.phases.0.monitor"),
        ("recipe: x", r"'recipe' is given twice"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_remedy(write: Write, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(write(text), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_base_recipe_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("name: x\nrecipe: nowhere.yaml\n")
    with pytest.raises(RecipeError, match=r"sweep.yaml:2: recipe is 'nowhere.yaml', but there is no such file"):
        load_sweep(path)


def test_a_problem_of_the_base_recipe_is_said_of_that_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("heldout", "held_out"))
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: unknown key 'prompts.0.held_out'"):
        planned(write("grid: {select.limit: [1]}"), tmp_path)


def test_every_key_of_a_sweep_is_documented() -> None:
    from distill.reference import sections

    assert not [
        name for _, part in sections(Sweep) for name, field in part.model_fields.items() if not field.description
    ]


# --- plans ----------------------------------------------------------------------------------------------------------


def test_stages_that_trials_share_are_one(write: Write, tmp_path: Path) -> None:
    plan = planned(write("grid: {select.limit: [10, 20], export.variants: [[int4], [int8]]}"), tmp_path)
    kinds = {row.kind: (row.wanted, row.distinct) for row in foresee(plan).kinds}
    assert kinds == {
        "prompts": (4, 1), "generate": (4, 1), "select": (4, 2), "eval:base": (4, 1), "train": (4, 2),
        "eval:student": (4, 2), "export": (4, 4),
    }  # fmt: skip


def test_a_plan_with_shared_work_has_the_identities_of_plans_made_alone(write: Write, tmp_path: Path) -> None:
    from distill.plan import make_plan

    plan = planned(write("grid: {select.limit: [10, 20], student.phases.0.lr: [1e-4, 3e-4]}"), tmp_path)
    for number, trial in plan.graph.trials.items():
        alone = make_plan(trial.recipe, RunOptions(tmp_path / "runs"))
        assert alone.identity == plan.graph.plans[number].identity


def test_a_dry_run_prints_trials_and_stages_and_writes_nothing(
    write: Write, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    path = write("grid: {select.limit: [10, 20, 30]}\nlimits: {trials: 2}")
    said = cli("sweep", path, "--dry-run", "--runs", tmp_path / "runs")
    assert said.code == 0, said.err
    assert "sweep: 3 trials, of which the first 2 run; 15 distinct stages for the 21" in said.out
    assert "time: not known; no such stage has finished" in said.out and "dollars: at most 0.00" in said.out
    found = cli("sweep", "run", path, "--dry-run", "--json", "--runs", tmp_path / "runs").json
    assert found["trials"] == 3 and [row["owed"] for row in found["kinds"] if row["kind"] == "train"] == [3]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_search_says_what_its_trials_share(write: Write, tmp_path: Path) -> None:
    path = write("search: {space: {student.phases.0.lr: {float: [1e-5, 1e-3], log: true}}, trials: 7}")
    seen = foresee(planned(path, tmp_path))
    assert seen.proposed == 7 and {row.kind for row in seen.kinds} >= {"prompts", "train", "export"}


def test_times_come_from_finished_stages_and_dollars_from_prices(write: Write, tmp_path: Path) -> None:
    for index, seconds in enumerate((10.0, 30.0, 20.0)):
        folder = tmp_path / "runs" / "train" / f"x-{index:016x}"
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(json.dumps({"label": "train:0", "seconds": seconds}))
    text = RECIPE.replace(
        "{engine: solver}",
        "{engine: openai, model: m, sampling: {max_new_tokens: 1000}, prices: {input_usd_per_mtok: 0,"
        " output_usd_per_mtok: 2.5}}",
    )
    (tmp_path / "recipe.yaml").write_text(text)
    path = write("grid: {select.limit: [10, 20]}\nresources: {cpus: 2, stages: {train: {cpus: 1}}}")
    seen = foresee(planned(path, tmp_path))
    assert seen.seconds == pytest.approx(2 * 20.0 / 2)  # two trainings of one slot each on two slots
    assert seen.dollars == pytest.approx((400 - 64) * 1000 * 2.5 / 1e6)
    assert "select" in seen.untimed and "train" not in seen.untimed


def test_ten_thousand_trials_are_planned_in_seconds(write: Write, tmp_path: Path) -> None:
    limits, rates = list(range(100, 200)), [f"{step}e-6" for step in range(1, 51)]
    path = write(f"grid: {{select.limit: {limits}, student.phases.0.lr: [{', '.join(rates)}], "
                 "export.variants: [[int4], [int8]]}")  # fmt: skip
    started_s = time.process_time()
    seen = foresee(planned(path, tmp_path))
    assert seen.trials == 10_000
    assert sum(row.distinct for row in seen.kinds) == 3 + 100 + 2 * 5_000 + 10_000
    assert time.process_time() - started_s < 10
