"""Bad input and a refusing disk: the exit code, one line that names the file and the remedy, and a clean run store."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import make_plan
from distill.runs import STAGE_FILE, locked

Cli = Callable[..., Any]
TinyModel = Callable[[str], Path]

QUESTIONS = [(f"What is {a} + {b}?", a + b) for a in range(3, 9) for b in range(11, 17)]


def rows(path: Path, *made: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Any]:
    """A recipe that trains nothing: prompts from a file, traces that somebody recorded."""
    rows(tmp_path / "prompts.jsonl", *({"question": q, "answer": str(a)} for q, a in QUESTIONS))
    answers = ({"question": q, "response": f"<think>\nI add.\n</think>\n\n\\boxed{{{a}}}"} for q, a in QUESTIONS)
    rows(tmp_path / "traces.jsonl", *answers)
    return {
        "prompts": [{"name": "sums", "file": "prompts.jsonl", "heldout": 4}],
        "teacher": {"engine": "recorded", "recorded": {"files": ["traces.jsonl"]}},
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def with_student(sections: dict[str, Any], init: Path | str) -> dict[str, Any]:
    phase = {"kind": "sft", "max_steps": 1, "step_tokens": 256, "micro_batch_tokens": 256}
    return {**sections, "student": {"init": str(init), "phases": [phase]}}


def sealed(runs: Path) -> list[Path]:
    return list(runs.rglob(STAGE_FILE))


def refused(said: Any, runs: Path, *expected: str) -> None:
    """Exit 2, one line with every expected word, stdout empty and nothing under runs/."""
    line = said.error_line
    assert said.code == 2 and said.out == ""
    assert all(part in line for part in expected), line
    assert not runs.exists() or not list(runs.rglob("*")), list(runs.rglob("*"))


def test_the_recipe_that_the_cases_below_break_does_run(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path
) -> None:
    said = cli("run", write_recipe(**sections), "--runs", runs, "--json")
    assert said.code == 0, said.err
    assert set(said.json["stages"]) == {"prompts", "generate", "select"}
    assert len(sealed(runs)) == 3


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "generate", "train"])
def test_unknown_key(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path, verb: str
) -> None:
    sections["teacher"]["engin"] = "solver"
    refused(cli(verb, write_recipe(**sections), "--runs", runs), runs, "recipe.yaml:", "engin", "did you mean 'engine'")


def test_wrong_type(cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path) -> None:
    sections["prompts"][0]["heldout"] = "many"
    refused(cli("run", write_recipe(**sections), "--runs", runs), runs, "recipe.yaml:", "prompts.0.heldout", "integer")


def test_duplicate_key(cli: Cli, tmp_path: Path, runs: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: a\nname: b\n")
    refused(cli("run", tmp_path / "recipe.yaml", "--runs", runs), runs, "recipe.yaml:2", "'name'", "keep one")


def test_missing_recipe(cli: Cli, tmp_path: Path, runs: Path) -> None:
    refused(cli("run", tmp_path / "none.yaml", "--runs", runs), runs, "none.yaml", "distill init")


def test_a_verb_that_the_recipe_has_no_section_for(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path
) -> None:
    refused(cli("train", write_recipe(**sections), "--runs", runs), runs, "nothing to train", "add a student section")


# --- the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts.jsonl", "traces.jsonl"])
def test_missing_file(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, runs: Path, name: str
) -> None:
    (tmp_path / name).unlink()
    refused(cli("run", write_recipe(**sections), "--runs", runs), runs, name)


@pytest.mark.parametrize(
    ("key", "column"),
    [
        ("prompts.0.question_column", "problem"),
        ("prompts.0.gold_column", "solution"),
        ("prompts.0.template", "'{qestion}'"),
        ("teacher.recorded.response_column", "completion"),
        ("teacher.recorded.question_column", "problem"),
    ],
)
def test_missing_column(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path, key: str, column: str
) -> None:
    said = cli("run", write_recipe(**sections), f"{key}={column}", "--runs", runs)
    refused(said, runs, column.strip("'{}"), "question")


def test_empty_prompts(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, runs: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    refused(cli("run", write_recipe(**sections), "--runs", runs), runs, "prompts.jsonl")


def test_a_row_that_is_not_json(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, runs: Path
) -> None:
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write("{not json}\n")
    said = cli("run", write_recipe(**sections), "--runs", runs, "--quiet")
    assert said.code == 2 and f"prompts.jsonl:{len(QUESTIONS) + 1}" in said.error_line
    # found only once the whole file is read, so the pipeline's own record is there; no stage has left anything
    assert not sealed(runs) and not list(runs.glob("prompts/*"))


# --- the base model -------------------------------------------------------------------------------------------------


def test_base_model_that_is_not_there(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, runs: Path
) -> None:
    recipe = write_recipe(**with_student(sections, tmp_path / "no-model"))
    refused(cli("run", recipe, "--runs", runs), runs, "no-model", "no such model")


def test_base_model_that_no_hub_gives(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path
) -> None:
    recipe = write_recipe(**with_student(sections, "nobody/no-such-model"))
    refused(cli("run", recipe, "--runs", runs), runs, "nobody/no-such-model", "hub")


def test_truncated_safetensors(
    cli: Cli,
    write_recipe: Callable[..., Path],
    sections: dict[str, Any],
    tiny_model: TinyModel,
    tmp_path: Path,
    runs: Path,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model("llama").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    recipe = write_recipe(**with_student(sections, model))
    refused(cli("run", recipe, "--runs", runs), runs, "model.safetensors", "truncated", "again")


def test_gguf_that_is_not_one(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, runs: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 a zip file, really")
    recipe = write_recipe(**with_student(sections, tmp_path / "model.gguf"))
    refused(cli("run", recipe, "--runs", runs), runs, "model.gguf", "not a GGUF file")


def test_gguf_that_is_cut_off(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, runs: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    recipe = write_recipe(**with_student(sections, tmp_path / "model.gguf"))
    refused(cli("run", recipe, "--runs", runs), runs, "model.gguf")


# --- the disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a tmpfs with options; skips the test where mounting is not permitted."""
    mounted: list[Path] = []

    def mount(*options: str) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def test_a_full_disk_seals_nothing_and_the_same_command_finishes_once_there_is_room(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], mount: Callable[..., Path]
) -> None:
    disk = mount("size=64k")
    recipe = write_recipe(**sections)
    (disk / "ballast").write_bytes(b"x" * (44 << 10))
    said = cli("run", recipe, "--runs", disk / "runs", "--quiet")
    assert said.code == 2
    assert "no space left" in said.error_line and "--runs" in said.error_line
    assert not list((disk / "runs").glob("select/*/" + STAGE_FILE))
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    again = cli("run", recipe, "--runs", disk / "runs", "--json")
    assert again.code == 0, again.err
    fresh = cli("run", recipe, "--runs", disk / "other", "--json")
    digests = [{label: stage["digest"] for label, stage in said.json["stages"].items()} for said in (again, fresh)]
    assert digests[0] == digests[1]


def test_a_read_only_runs_folder(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], mount: Callable[..., Path]
) -> None:
    disk = mount("ro")
    said = cli("run", write_recipe(**sections), "--runs", disk / "runs")
    refused(said, disk, "read-only", str(disk), "--runs")


@pytest.mark.parametrize("below", ["", "runs"])
def test_a_file_where_the_runs_folder_should_be(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], tmp_path: Path, below: str
) -> None:
    (tmp_path / "occupied").write_text("a file")
    said = cli("run", write_recipe(**sections), "--runs", tmp_path / "occupied" / below)
    assert said.code == 2
    assert "occupied" in said.error_line and "--runs" in said.error_line
    assert (tmp_path / "occupied").read_text() == "a file"


@pytest.mark.parametrize("label", ["prompts", "generate", "select"])
def test_a_second_writer_on_a_locked_run(
    cli: Cli, write_recipe: Callable[..., Path], sections: dict[str, Any], runs: Path, label: str
) -> None:
    recipe = write_recipe(**sections)
    folder = make_plan(recipe, runs=runs).steps[label].folder
    folder.mkdir(parents=True)
    with locked(folder, "held by a test"):
        said = cli("run", recipe, "--runs", runs, "--quiet")
    assert said.code == 2
    assert str(folder) in said.error_line and "wait for it or stop it" in said.error_line
    assert not (folder / STAGE_FILE).exists()
    assert cli("run", recipe, "--runs", runs, "--quiet").code == 0
