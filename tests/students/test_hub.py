"""Publishing a student: the last phase's sealed folder with its card, and refusals before any training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.config import load_recipe
from distill.errors import RunError
from distill.plan import make_plan
from distill.records import Example, Message, Prompt, write_json, write_records
from distill.runs import RunOptions, SealedRun, Step, open_run, open_sealed
from distill.students.card import facts_of, write_card
from distill.students.hub import push

pytest.importorskip("huggingface_hub")

Command = Callable[..., Any]


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A student of two phases."""
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    sft = {"kind": "sft", "max_steps": 1}
    return write_recipe(
        "tiny.yaml",
        prompts=[{"name": "sums", "file": "sums.jsonl", "licence": "MIT"}],
        teacher={"engine": "solver", "licence": "MIT"},
        student={"init": str(tiny_model("llama")), "licence": "MIT", "phases": [sft, {**sft, "lr": 1e-6}]},
    )


def pretend_to_have_run(recipe: Path, runs: Path) -> list[Step]:
    """Seal every stage up to the last phase without doing its work; the train steps."""
    loaded, options = load_recipe(recipe), RunOptions(runs=runs, quiet=True)
    steps = make_plan(loaded, options).until("train")
    for step in steps:
        with open_run(step, options) as run:
            if step.stage == "select":
                prompt = Prompt.of([Message(role="user", content="1 + 1?")], source="sums", licence="MIT")
                one = Example(prompt=prompt, trace_id="t", reasoning="I add.", answer="2")
                write_records(run.path("examples.jsonl"), [one])
            if step.stage == "train":
                run.path("model").mkdir()
                run.path("model/model.safetensors").write_bytes(step.label.encode())
                run.path("model/config.json").write_text("{}")
                write_card(run.path("model"), facts_of(loaded, step, {"steps": 1}))
            run.seal("d", {})
    return [step for step in steps if step.stage == "train"]


def test_the_last_phases_checkpoint_is_pushed_with_its_card(
    command: Command, open_hub: Command, recipe: Path, tmp_path: Path
) -> None:
    last = pretend_to_have_run(recipe, tmp_path / "runs")[-1]
    hub = open_hub(
        "model-00001-of-00002.safetensors", "adapter_config.json", "tokenizer.model", "NOTICE", "onnx/model.safetensors"
    )
    where = ["--runs", tmp_path / "runs", "--push-to-hub", "ada/tiny-r1", "--private", "--json", "--quiet"]
    done = command("train", recipe, *where, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"model": f"{hub.url}/ada/set"}
    made = {path.name: path.read_bytes() for path in (last.folder / "model").iterdir()}
    assert made["model.safetensors"] == b"train:1" and made["README.md"].startswith(b"---\nlibrary_name: transformers")
    assert {name: hub.files[name] for name in made} == made
    assert set(hub.files) - set(made) == {"NOTICE", "onnx/model.safetensors"}, "what would load beside it goes"
    (created,) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("tiny-r1", "ada", "private")
    assert created.get("type", "model") == "model"
    assert hub.tokens == {f"Bearer {hub.token}"}
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert hub.token not in done.stdout + done.stderr and not any(hub.token.encode() in text for text in written)


def test_a_hub_that_refuses_is_one_line_without_the_token(
    command: Command, open_hub: Command, recipe: Path, tmp_path: Path
) -> None:
    pretend_to_have_run(recipe, tmp_path / "runs")
    hub = open_hub()
    hub.refuses = True
    where = ["--runs", tmp_path / "runs", "--push-to-hub", "ada/tiny-r1", "--quiet"]
    done = command("train", recipe, *where, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ada/tiny-r1: the hub did not take the model")
    assert hub.token not in done.stderr


def test_what_cannot_be_pushed_is_refused_before_any_training(command: Command, recipe: Path, tmp_path: Path) -> None:
    where = ["--runs", tmp_path / "runs", "--push-to-hub"]
    offline = command("train", recipe, *where, "ada/tiny", HF_HUB_OFFLINE="1", HF_TOKEN="hf_x")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    silent = command("train", recipe, *where, "ada/tiny")
    assert silent.returncode == 2 and "no token; set HF_TOKEN to one that may write to ada/tiny" in silent.stderr
    nameless = command("train", recipe, *where, "tiny", HF_TOKEN="hf_x")
    assert nameless.returncode == 2 and "write it as USER/NAME" in nameless.stderr
    assert not (tmp_path / "runs").exists()


# --- what is no student ---------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path: Path) -> Callable[..., SealedRun]:
    """A function from the files of a checkpoint to its sealed run."""

    def seal(**files: str) -> SealedRun:
        step = Step("train", "train:0", "r", "0" * 16, {}, {}, tmp_path)
        with open_run(step, RunOptions(runs=tmp_path)) as run:
            run.path("model").mkdir()
            for name, text in files.items():
                run.path("model").joinpath(name.replace("_", ".")).write_text(text)
            return run.seal("d", {})

    return seal


def test_a_checkpoint_without_a_card_is_not_pushed(sealed: Callable[..., SealedRun]) -> None:
    with pytest.raises(RunError, match=r"README\.md: this run was made without a model card; delete"):
        push(sealed(config_json="{}"), "ada/tiny")


def test_a_checkpoint_that_was_changed_is_not_pushed(sealed: Callable[..., SealedRun]) -> None:
    run = sealed(config_json="{}", README_md="# r")
    run.path("model/config.json").write_text('{"changed": true}')
    with pytest.raises(RunError, match=r"config\.json: holds other bytes"):
        push(run, "ada/tiny")


def test_a_folder_that_is_no_sealed_run_is_none(tmp_path: Path) -> None:
    write_json(tmp_path / "stage.json", {"files": {}, "name": "r", "identity": "0"})
    with pytest.raises(RunError, match="made without a model card"):
        push(open_sealed(tmp_path), "ada/tiny")
