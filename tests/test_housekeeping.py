"""The run store as a whole: listed, traced back, cleared of what nobody needs, and its runs side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RecipeError, RunError
from distill.housekeeping import collect, list_runs, needs
from distill.runs import RunOptions, locked
from distill.sweep.run import run_sweep

RECIPE = """
prompts:
  - {name: sums, reasoning_gym: {task: basic_arithmetic, size: 400, seed: 7}, heldout: 64}
teacher: {engine: solver}
select: {limit: 100}
student: {init: nobody/model, revision: "0000000000000000000000000000000000000000", phases: [{kind: sft}]}
evaluate: {models: [base, student]}
export: {variants: [int4]}
"""
Cli = Callable[..., Any]


@pytest.fixture
def runs(lab: Any, tmp_path: Path) -> Path:
    """A store with two sweeps over one recipe: `small` (100 examples) and `large` (1000)."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, limit in (("small", 100), ("large", 1000)):
        sweep = {"name": name, "recipe": "recipe.yaml", "grid": {"select.limit": [limit]}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(sweep))
        run_sweep(tmp_path / f"{name}.yaml", RunOptions(tmp_path / "runs", quiet=True), lab.Painted(looks=1))
    return tmp_path / "runs"


def stages(runs: Path) -> list[str]:
    return sorted(one.stage for one in list_runs(runs))


ONE = ["eval", "eval", "export", "generate", "prompts", "select", "train"]


def test_runs_are_listed_with_sizes_and_their_lineage_as_a_tree(runs: Path, cli: Cli) -> None:
    said = cli("runs", "--runs", runs)
    assert said.code == 0 and "11 stage runs" in said.out and "train/recipe-0-" in said.out
    export = next((runs / "export").iterdir())
    found = cli("runs", export.name, "--runs", runs, "--json").json
    assert found[0]["stage"] == "export" and found[0]["depth"] == 0 and found[0]["bytes"] > 106_000
    depths = {one["label"]: one["depth"] for one in reversed(found)}  # where each stands first
    assert depths["train:0"] == 1 and depths["select"] == 2 and depths["generate"] == 3
    wrong = cli("runs", "nothing", "--runs", runs)
    assert wrong.code == 2 and "no stage run is called so" in wrong.error_line


def test_nothing_that_a_sweep_a_pipeline_or_an_artifact_needs_is_garbage(runs: Path) -> None:
    assert {one.kind for one in needs(runs, list_runs(runs))} == {"sweep", "artifact"}
    assert collect(runs).removed == []


def test_only_what_is_named_is_kept_and_only_when_asked_is_anything_deleted(runs: Path, cli: Cli) -> None:
    (runs / "ledger" / "cfg").mkdir(parents=True)
    said = cli("gc", "--keep", "small", "--runs", runs)
    assert said.code == 0 and "4 stage runs" in said.out and "can go; --delete deletes them; 7 are needed" in said.out
    assert len(list_runs(runs)) == 11 and "kept for sweep small" in said.out
    said = cli("gc", "--keep", "small", "--runs", runs, "--delete")
    assert "4 stage runs" in said.out and "deleted" in said.out
    assert stages(runs) == ONE and (runs / "ledger" / "cfg").is_dir()
    again = cli("gc", "--keep", "small", "--runs", runs, "--json").json
    assert again["removed"] == [] and again["kept"] == 7


def test_an_artifact_keeps_its_whole_lineage(runs: Path) -> None:
    for sweep in ("small", "large"):
        (runs / "sweeps" / sweep / "sweep.json").unlink()
    artifact = sorted((runs / "export").iterdir())[0].name
    collect(runs, [artifact], delete=True)
    # evaluations are no part of what an artifact without a task gate is made from, but this one has one
    assert stages(runs) == ONE


def test_what_nothing_names_is_found_and_what_is_being_written_stays(runs: Path) -> None:
    lost, busy = runs / "train" / "lost-0123456789abcdef", runs / "train" / "busy-fedcba9876543210"
    for folder in (lost, busy):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("{}\n")
    with locked(busy, "held by the test"):
        done = collect(runs, delete=True)
    assert [one.folder for one in done.removed] == [lost] and [one.folder for one in done.busy] == [busy]
    assert not lost.exists() and busy.exists() and done.kept == 11


def test_without_names_it_says_what_keeps_everything_and_how_to_keep_less(runs: Path, cli: Cli) -> None:
    said = cli("gc", "--runs", runs)
    assert "0 stage runs" in said.out and "kept for sweep large" in said.out
    assert "`distill gc --keep NAME` keeps only what NAME needs" in said.out


def test_what_a_running_sweep_needs_stays_whatever_is_named(runs: Path) -> None:
    with locked(runs / "sweeps" / "large", "run by the test"):
        assert collect(runs, ["small"], delete=True).removed == []
    assert len(collect(runs, ["small"], delete=True).removed) == 4


def test_unknown_names_and_stores_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'tiny': no pipeline, sweep or artifact is called so; there is .*large"):
        collect(runs, ["tiny"])
    with pytest.raises(RunError, match="no run store there"):
        list_runs(tmp_path / "nowhere")


# --- side by side ---------------------------------------------------------------------------------------------------


def test_trials_are_compared_with_the_first_problem_by_problem(runs: Path, cli: Cli) -> None:
    said = cli("compare", "small:0", "large:0", "--runs", runs)
    assert said.code == 0, said.err
    student = next(line for line in said.out.splitlines() if line.startswith("student"))
    assert "+41.4 (" in student and "53.1% (" in student and "94.5% (" in student
    assert "select.limit" in said.out and "dollars" in said.out
    found = cli("compare", "small:0", "large:0", "--runs", runs, "--json").json
    assert found["differing"] == {"select.limit": [100, 1000]}
    row = next(row for row in found["rows"] if row["model"] == "student")
    assert row["minus_first"][0] is None and row["minus_first"][1]["low"] > 0.3


def test_recipes_and_stage_folders_are_compared_too(runs: Path, tmp_path: Path, cli: Cli) -> None:
    folder = next((runs / "export").iterdir())
    said = cli("compare", tmp_path / "recipe.yaml", folder, "--runs", runs)
    assert said.code == 0 and "int4" in said.out
    assert "at least two runs" in cli("compare", tmp_path / "recipe.yaml").error_line
    assert "has no trial 7" in cli("compare", "small:7", "large:0", "--runs", runs).error_line
