"""Searches and pruners: proposals that depend on the study alone, trainings that are stopped when they fall behind."""

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from distill.errors import Interrupted, RecipeError
from distill.runs import RunOptions
from distill.sweep.config import Dimension, Pruner, load_sweep
from distill.sweep.record import read_events, read_record
from distill.sweep.run import run_sweep
from distill.sweep.schedule import Scheduler
from distill.sweep.study import Searcher, grid_values
from distill.sweep.trials import Numbers, Recipes
from distill.sweep.watch import Watch, figures
from distill.sweep.work import Ended, Job

pytest.importorskip("optuna")

OBJECTIVE = [{"metric": "accuracy", "model": "teacher"}]


def options(tmp_path: Path, runs: str = "runs") -> RunOptions:
    return RunOptions(tmp_path / runs, "cpu", quiet=True)


def search(**changes: Any) -> dict[str, Any]:
    space = {"prompts.0.split_seed": {"int": [0, 50]}, "select.per_prompt": {"choice": ["first", "shortest"]}}
    return {"space": space, "trials": 5, "startup": 2, **changes}


def proposals(tmp_path: Path, runs: str = "runs") -> list[dict[str, Any]]:
    record = read_record("sweep", tmp_path / runs)
    return [dict(record.trial(number).overrides) for number in sorted(record.numbers)]


# --- searches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.full)])
def test_a_search_that_was_killed_proposes_what_an_undisturbed_one_proposes(
    lab: Any, tmp_path: Path, sampler: str
) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, search=search(sampler=sampler), objectives=OBJECTIVE)
    whole = run_sweep(path, options(tmp_path, "whole"), lab.Inline())
    assert whole.done == whole.trials == 5
    looks = 0

    def killer(_: Scheduler) -> None:
        nonlocal looks
        looks += 1
        if looks % 5 == 0:
            raise Interrupted(signal.SIGTERM)  # at any moment between two looks

    for _ in range(40):
        try:
            outcome = run_sweep(path, options(tmp_path), lab.Inline(), killer)
            break
        except Interrupted:
            continue
    assert looks > 10 and outcome.done == 5
    assert proposals(tmp_path) == proposals(tmp_path, "whole")
    assert run_sweep(path, options(tmp_path), lab.Inline()).summary.executed == []


def test_a_search_can_grow_and_keeps_its_trials(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    run_sweep(lab.write_sweep(tmp_path, search=search(trials=2), objectives=OBJECTIVE), options(tmp_path), lab.Inline())
    before = proposals(tmp_path)
    path = lab.write_sweep(tmp_path, search=search(trials=4, storage="journal"), objectives=OBJECTIVE)
    assert run_sweep(path, options(tmp_path), lab.Inline()).done == 4
    assert proposals(tmp_path)[:2] == before
    other = lab.write_sweep(tmp_path, search=search(trials=4), objectives=[{"metric": "stage_seconds"}])
    with pytest.raises(RecipeError, match=r"sweep.yaml:\d+: the study in .* was started with other objectives"):
        run_sweep(other, options(tmp_path), lab.Inline())


def test_a_grid_search_ends_when_every_combination_was_tried_and_rules_hold(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    space = {"prompts.0.split_seed": {"int": [0, 2]}, "select.per_prompt": {"choice": ["first", "shortest"]}}
    rules = [{"skip": {"prompts.0.split_seed": 1, "select.per_prompt": "first"}}]
    path = lab.write_sweep(
        tmp_path, search={"space": space, "trials": 50, "sampler": "grid", "parallel": 2, "storage": "sqlite"},
        when=rules, objectives=OBJECTIVE, seeds=[],
    )  # fmt: skip
    assert run_sweep(path, options(tmp_path), lab.Inline()).done == 5
    tried = {(one["prompts.0.split_seed"], one["select.per_prompt"]) for one in proposals(tmp_path)}
    assert len(tried) == 5 and (1, "first") not in tried
    assert (tmp_path / "runs" / "sweeps" / "sweep" / "study.db").is_file()


def test_a_failed_trial_is_told_to_the_study_and_the_search_goes_on(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    space = {"prompts.0.heldout": {"choice": [10, 5000]}, "prompts.0.split_seed": {"int": [0, 99]}}
    path = lab.write_sweep(tmp_path, search=search(space=space, sampler="random", trials=6), objectives=OBJECTIVE)
    outcome = run_sweep(path, options(tmp_path), lab.Inline())
    assert outcome.failed_trials and outcome.done == 6 - len(outcome.failed_trials) > 0
    assert "5000" in next(iter(outcome.errors.values())) or "5,000" in next(iter(outcome.errors.values()))


def test_the_storage_s_address_comes_from_the_environment_and_is_written_nowhere(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, search=search(storage_env="STUDY_URL", trials=1), objectives=OBJECTIVE)
    with pytest.raises(RecipeError, match="no such environment variable"):
        run_sweep(path, options(tmp_path), lab.Inline())
    monkeypatch.setenv("STUDY_URL", f"sqlite:///{tmp_path}/else-secret.db")
    assert run_sweep(path, options(tmp_path), lab.Inline()).done == 1
    texts = [file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert not any(b"else-secret" in text for text in texts)


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        ({"int": [1, 7], "step": 3}, [1, 4, 7]),
        ({"float": [0.0, 1.0], "step": 0.25}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"choice": ["a", None, [1]]}, ['"a"', "null", "[1]"]),
    ],
)
def test_the_values_of_a_grid(dimension: dict[str, Any], values: list[Any]) -> None:
    assert grid_values(Dimension.model_validate(dimension), "x") == values


def test_a_grid_over_what_has_no_end_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"search.space.x: sampler grid takes choice, int"):
        grid_values(Dimension.model_validate({"float": [0.0, 1.0]}), "search.space.x")


def test_choices_may_be_lists_and_sections(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    space = {"evaluate.token_budgets": {"choice": [[1, 2]]}, "select.per_prompt": {"choice": ["first"]}}
    file = load_sweep(lab.write_sweep(tmp_path, search=search(space=space), objectives=OBJECTIVE))
    (tmp_path / "study").mkdir()
    searcher = Searcher(file, Recipes(file.base, file.base_path), Numbers(), tmp_path / "study")
    proposal = searcher.ask()
    assert proposal and proposal.trials[0].overrides["evaluate.token_budgets"] == [1, 2]


# --- pruners --------------------------------------------------------------------------------------------------------


def write_looks(folder: Path, *losses: float) -> Path:
    """A training's metrics with a look after every step."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float]] = []
    for step, loss in enumerate(losses, 1):
        rows += [{"step": step, "loss": 9.0, "tokens": 1}, {"step": step, "heldout_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "held')
    return folder


def test_figures_are_those_of_looks_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert list(figures(write_looks(tmp_path, 3.0, 2.0), "heldout_loss")) == [(1, 3.0), (2, 2.0)]
    assert list(figures(tmp_path / "nothing", "heldout_loss")) == []


def test_median_stops_what_is_worse_than_the_others_at_the_same_step(tmp_path: Path) -> None:
    earlier = [write_looks(tmp_path / str(n), 3.0 - n / 10, 2.0 - n / 10) for n in range(3)]
    watch = Watch(Pruner(kind="median"), earlier)
    assert watch.falls_behind(write_looks(tmp_path / "good", 2.0, 1.0)) is None
    assert watch.falls_behind(write_looks(tmp_path / "bad", 5.0, 4.9)) == (1, 5.0) or watch.falls_behind(
        tmp_path / "bad"
    ) == (2, 4.9)


def test_asha_keeps_the_best_share_at_each_rung(tmp_path: Path) -> None:
    watch = Watch(Pruner(kind="asha", reduction=2, first_step=1))
    stopped = {
        loss: watch.falls_behind(write_looks(tmp_path / str(loss), loss, loss)) is not None
        for loss in (1.0, 2.0, 3.0, 4.0)
    }
    assert stopped == {1.0: False, 2.0: True, 3.0: True, 4.0: True}


RECIPE = """
prompts:
  - {name: sums, reasoning_gym: {task: basic_arithmetic, size: 400, seed: 7}, heldout: 64}
teacher: {engine: solver}
student:
  init: nobody/model
  revision: "0000000000000000000000000000000000000000"
  phases: [{kind: sft, heldout_traces: 8, monitor: {every_steps: 1}}]
export: {variants: [int4]}
evaluate: {models: [student]}
"""


def test_a_pruned_training_stays_unsealed_and_is_resumed_by_a_trial_that_needs_it(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    pruner = {"kind": "asha", "reduction": 2}
    grid: dict[str, list[Any]] = {"student.phases.0.lr": [1e-4, 9e-4]}

    def trains(job: Job, _: int) -> Ended | None:
        if job.label == "train:0":
            bad = json.loads(job.recipe)["student"]["phases"][0]["lr"] == 9e-4
            write_looks(lab.step_of(job).folder, *([5.0, 5.0] if bad else [1.0, 0.5]))
        return None

    def sweep(**changes: Any) -> Any:
        path = lab.write_sweep(
            tmp_path, grid={**grid, **changes}, pruner=pruner, objectives=[{"metric": "stage_seconds"}],
            resources={"cpus": 1},
        )  # fmt: skip
        executor = lab.Scripted(trains, looks=60)
        return run_sweep(path, options(tmp_path), executor, clock=itertools.count().__next__), executor

    first, executor = sweep()
    assert (first.done, first.pruned_trials, first.failed_trials) == (1, (1,), ())
    record = read_record("sweep", tmp_path / "runs")
    assert record.state_of(1) == "pruned"
    (event,) = [event for event in read_events(record.folder) if event.what == "pruned"]
    assert event.error == "heldout_loss 5 at step 1 falls behind"
    assert not (record.folder_of(event.identity) / "stage.json").exists()
    again, _ = sweep()
    assert again.summary.executed == []  # it stays out
    needed, executor = sweep(**{"export.variants": [["int4"], ["int8"]]})
    assert "train:0" in executor.order and needed.done == 4
