"""One small recipe through every stage, by the command line as a user runs it; then the same with kill -9 at random.

The student and the teacher are tiny random models, so what is learned means nothing here; what is tested is that every
stage does its work, that nothing runs twice, and that a killed stage ends with the digest of an uninterrupted one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import distill

STAGES = {"generate": "generate", "train": "train:0", "eval": "eval:student:heldout", "export": "export"}
"""Stages that are killed, and the label whose start is waited for."""


class Finished(NamedTuple):
    """An uninterrupted run: the recipe, its run store, and each step's digest and seconds."""

    recipe: Path
    runs: Path
    digests: dict[str, str]
    seconds: dict[str, float]


def recipe_of(model: Path) -> dict[str, Any]:
    """Every stage, with limits that a random model keeps."""
    return {
        "name": "tiny",
        "prompts": [{"name": "sums", "reasoning_gym": {"task": "chain_sum", "size": 64, "seed": 3}, "heldout": 12}],
        "teacher": {
            "engine": "transformers",
            "model": str(model),
            "sampling": {"max_new_tokens": 12, "temperature": 1.0, "n": 2},
            "batch_size": 4,
        },
        "select": {"outcomes": ["correct", "wrong", "unverifiable"], "reasoning": "optional"},
        "format": {"max_tokens": 256},
        "student": {
            "init": str(model),
            "precision": "fp32",
            "phases": [
                {
                    "kind": "sft",
                    "lr": 1e-3,
                    "epochs": 150,
                    "step_tokens": 512,
                    "micro_batch_tokens": 256,
                    "checkpoint_every_steps": 5,
                }
            ],
        },
        "evaluate": {"sampling": {"max_new_tokens": 16}, "batch_size": 2, "models": ["base", "student"]},
        "export": {
            "gates": {
                "parity_tokens": 256,
                "greedy_prompts": 4,
                "greedy_tokens": 8,
                "max_kl": {"fp32": 1e-3, "int8": 1.0, "int4": 1.0},
                "min_top1": {"fp32": 0.99, "int8": 0.0, "int4": 0.0},
                "max_accuracy_drop": 1.0,
            },
            "golden_prompts": 2,
        },
    }


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "distill.cli", *words, "--threads", "1"]


def steps_of(runs: Path) -> dict[str, Path]:
    """Folder of every step of the store's only pipeline."""
    (pipeline,) = (runs / "pipelines").glob("*.json")
    steps = json.loads(pipeline.read_text())["steps"]
    return {label: runs / step["folder"] for label, step in steps.items()}


def sealed(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "stage.json").read_text()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Finished:
    folder = tmp_path_factory.mktemp("end-to-end")
    recipe, runs = folder / "tiny.yaml", folder / "runs"
    recipe.write_text(json.dumps(recipe_of(tiny_model("llama"))))
    outcome = distill.run(recipe, runs=runs, threads=1)
    assert outcome.executed == list(outcome.plan.steps)
    stages = {label: sealed(step) for label, step in steps_of(runs).items()}
    return Finished(
        recipe,
        runs,
        {label: stage["digest"] for label, stage in stages.items()},
        {label: stage["seconds"] for label, stage in stages.items()},
    )


def test_every_stage_is_sealed_and_the_artifact_verifies(finished: Finished) -> None:
    steps = steps_of(finished.runs)
    assert list(steps) == [
        "prompts",
        "generate",
        "select",
        "eval:base:heldout",
        "train:0",
        "eval:student:heldout",
        "export",
    ]
    artifact = steps["export"] / "artifact"
    result = subprocess.run(
        [sys.executable, "-m", "distill.cli", "verify", str(artifact)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    model = artifact / "onnx" / "model_q4.onnx_data"
    damaged = artifact.parent.parent / "damaged"
    shutil.copytree(artifact, damaged)
    (damaged / "onnx" / model.name).write_bytes(model.read_bytes()[:-1] + b"?")
    result = subprocess.run(
        [sys.executable, "-m", "distill.cli", "verify", str(damaged)], capture_output=True, text=True
    )
    assert result.returncode == 3
    assert "model_q4.onnx_data" in result.stderr


def test_the_command_line_finds_what_the_python_call_made(finished: Finished) -> None:
    result = subprocess.run(
        [*command("run", str(finished.recipe), "--runs", str(finished.runs)), "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    assert {label: stage["digest"] for label, stage in stages.items()} == finished.digests
    assert not any(stage["ran_now"] for stage in stages.values())


def test_a_changed_sealed_file_is_refused_by_the_next_stage(finished: Finished, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    steps = steps_of(runs)
    shutil.rmtree(steps["train:0"])
    with (steps["select"] / "examples.jsonl").open("a") as out:
        out.write("\n")
    result = subprocess.run(command("train", str(finished.recipe), "--runs", str(runs)), capture_output=True, text=True)
    assert result.returncode == 2
    assert "examples.jsonl" in result.stderr and "other bytes" in result.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_five_times_ends_like_an_uninterrupted_one(
    stage: str, finished: Finished, tmp_path: Path
) -> None:
    kill_and_finish(stage, 5, finished, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_ten_times_ends_like_an_uninterrupted_one(
    stage: str, finished: Finished, tmp_path: Path
) -> None:
    kill_and_finish(stage, 10, finished, tmp_path)


def kill_and_finish(stage: str, kills: int, finished: Finished, tmp_path: Path) -> None:
    """Kill a stage at random moments of its run, then let the same command finish; digests must not differ."""
    label, runs = STAGES[stage], tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    forget(label, runs)
    moments = random.Random(stage)
    words = command(stage, str(finished.recipe), "--runs", str(runs))
    killed = sum(kill_after(words, label, moments.uniform(0, finished.seconds[label])) for _ in range(kills))
    assert killed >= 1, "the stage was never caught running"
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sealed(steps_of(runs)[label])["digest"] == finished.digests[label]


def forget(label: str, runs: Path) -> None:
    """Remove a step and all that was made from it."""
    steps = steps_of(runs)
    for later in list(steps)[list(steps).index(label) :]:
        if label == "generate" or not later.startswith("eval:base"):
            shutil.rmtree(steps[later])
    if label == "generate":
        shutil.rmtree(runs / "ledger")


def kill_after(words: list[str], label: str, delay_s: float) -> bool:
    """Start a command, wait until the step begins, kill -9 its process group after a while; whether it still ran."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    begun = any(line.startswith(f"{label}: ") and "done before" not in line for line in process.stderr)
    time.sleep(delay_s if begun else 0)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    process.wait()
    return running
