"""Every shipped recipe loads, says how to run it, and gives its whole plan with no network and nothing on the disk."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.config import Recipe, load_recipe

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
"""Read when tests are collected, so that a new recipe is tested without being named here."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything opens a connection."""

    def refuse(*_: object) -> None:
        raise AssertionError("a plan opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a shipped recipe, beside small stand-ins for the files that its user would bring."""
    source: Path = request.param
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    row = {"question": "What is 40 + 2?", "answer": "#### 42", "response": "<think>\nAdd.\n</think>\n\\boxed{42}"}
    for name in _files(load_recipe(path)):
        name.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def _files(recipe: Recipe) -> list[Path]:
    recorded = recipe.teacher.recorded.files if recipe.teacher and recipe.teacher.recorded else []
    return [*recorded, *(source.file for source in recipe.prompts if source.file)]


def test_there_are_recipes() -> None:
    assert {"r1-distill-qwen2.5-0.5b", "r1-distill-llama-3.2-1b", "recorded-gsm8k"} <= {path.stem for path in CONFIGS}


def test_it_opens_with_what_it_does_and_the_command_that_runs_it(config: Path) -> None:
    first, *rest = config.read_text(encoding="utf-8").splitlines()
    opening = [line for line in rest if line.startswith("#")]
    assert first.startswith("# ") and first.endswith(".")
    assert any("distill run" in line or "make quickstart" in line for line in opening)


def test_it_gives_its_whole_plan_before_anything_has_run(
    config: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    said = cli("run", config, "--dry-run", "--json")
    assert said.code == 0, said.err
    stages = said.json["stages"]
    assert {stage["state"] for stage in stages} == {"new"}
    assert [stage["label"] for stage in stages if stage["label"].startswith("train")]
    assert set(tmp_path.rglob("*")) == before


def test_a_hub_commit_that_cannot_be_found_out_is_said(tmp_path: Path, cli: Callable[..., Any]) -> None:
    recipe = Path(__file__).resolve().parent.parent / "configs" / "r1-distill-qwen2.5-0.5b.yaml"
    said = cli("run", recipe, "--dry-run", "--runs", tmp_path)
    assert said.code == 0, said.err
    assert "unresolved: openai/gsm8k at main" in said.out and "unresolved: Qwen/Qwen2.5-0.5B at main" in said.out


# --- sweeps ---------------------------------------------------------------------------------------------------------

SWEEPS = sorted((Path(__file__).resolve().parent.parent / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_says_how_to_run_it_and_plans_without_a_network(
    path: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and any("distill sweep" in line for line in rest if line.startswith("#"))
    said = cli("sweep", path, "--dry-run", "--json", "--runs", tmp_path / "runs")
    assert said.code == 0, said.err
    assert said.json["trials"] >= 12 and not (tmp_path / "runs").exists()


def test_the_quickstart_s_sweep_shares_what_its_trials_have_in_common(tmp_path: Path, cli: Callable[..., Any]) -> None:
    (path,) = (path for path in SWEEPS if path.stem == "quickstart")
    rows = cli("sweep", path, "--dry-run", "--json", "--runs", tmp_path / "runs").json["kinds"]
    distinct = {row["kind"]: row["distinct"] for row in rows}
    assert distinct == {
        "prompts": 1, "generate": 1, "select": 3, "prune": 3, "eval:base": 4, "eval:teacher": 1, "train": 6,
        "eval:student": 6, "export": 12,
    }  # fmt: skip
