"""Sweeps over students that really train: stopped when they fall behind, killed, resumed, shipped."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import Interrupted
from distill.runs import RunOptions
from distill.sweep.record import read_events, read_record
from distill.sweep.report import write_report
from distill.sweep.run import run_sweep
from distill.sweep.schedule import Scheduler

pytestmark = pytest.mark.full
pytest.importorskip("optuna")


@pytest.fixture
def base(lab: Any, tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    """A recipe whose student is a tiny random model, watched after every tenth step."""
    path: Path = lab.write_light_recipe(tmp_path)
    recipe = json.loads(path.read_text())
    phase = {
        "kind": "sft", "max_steps": 400, "step_tokens": 256, "micro_batch_tokens": 256, "heldout_traces": 8,
        "warmup_ratio": 0.0, "checkpoint_every_steps": 20, "monitor": {"every_steps": 10}, "epochs": 1000,
    }  # fmt: skip
    recipe["student"] = {"init": str(tiny_model("llama")), "precision": "fp32", "phases": [phase]}
    recipe["format"] = {"max_tokens": 256}
    recipe["evaluate"] = {"models": ["student"], "sampling": {"max_new_tokens": 8}, "sets": {"heldout": {"limit": 4}}}
    path.write_text(json.dumps(recipe))
    return path


OPTIONS: dict[str, Any] = {"device": "cpu", "quiet": True}


@pytest.mark.timeout(600)
def test_a_student_that_does_not_learn_is_stopped_and_keeps_its_checkpoint(
    lab: Any, base: Path, tmp_path: Path
) -> None:
    path = lab.write_sweep(
        tmp_path, grid={"student.phases.0.lr": [2e-3, 1e-12]}, resources={"cpus": 1},
        pruner={"kind": "asha", "reduction": 2, "first_step": 10},
        objectives=[{"metric": "accuracy"}, {"metric": "bytes"}],
    )  # fmt: skip
    options = RunOptions(tmp_path / "runs", **OPTIONS)
    outcome = run_sweep(path, options)
    assert (outcome.done, outcome.pruned_trials, outcome.errors) == (1, (1,), {})
    record = read_record(path, tmp_path / "runs")
    (event,) = [event for event in read_events(record.folder) if event.what == "pruned"]
    folder = record.folder_of(event.identity)
    assert not (folder / "stage.json").exists() and any((folder / "work").rglob("*")), "its checkpoint is kept"
    page = write_report(record).html.read_text()
    assert "pruned" in page and "Learning curves" in page


@pytest.mark.timeout(600)
def test_a_sweep_stopped_in_the_middle_of_a_training_ends_as_one_that_was_not(
    lab: Any, base: Path, tmp_path: Path
) -> None:
    path = lab.write_sweep(tmp_path, resources={"cpus": 1}, objectives=[{"metric": "accuracy"}])
    run_sweep(path, RunOptions(tmp_path / "whole", **OPTIONS))
    options = RunOptions(tmp_path / "runs", **OPTIONS)

    def stop(scheduler: Scheduler) -> None:
        for one in scheduler.running.values():
            metrics = one.node.step.folder / "metrics.jsonl"
            if one.node.step.label == "train:0" and metrics.exists() and len(metrics.read_text().splitlines()) > 30:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run_sweep(path, options, view=stop)
    assert not list((tmp_path / "runs" / "train").glob("*/stage.json"))
    assert run_sweep(path, options).done == 1

    def weights(runs: Path) -> str:
        return str(json.loads(next((runs / "train").glob("*/stage.json")).read_text())["digest"])

    assert weights(tmp_path / "runs") == weights(tmp_path / "whole")
