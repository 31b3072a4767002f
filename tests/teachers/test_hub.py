"""Publishing a data set: refused before any work where it cannot succeed, and the token stays where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, RunError
from distill.records import write_json
from distill.runs import open_sealed
from distill.teachers.hub import check_push, push

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow")

Command = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Six sums, solved by the built-in teacher."""
    path = tmp_path / "sums.yaml"
    gym = {"task": "basic_arithmetic", "size": 8, "seed": 3, "params": {"operators": ["+"], "allow_parentheses": False}}
    write_json(
        path,
        {
            "prompts": [{"name": "sums", "reasoning_gym": gym, "heldout": 2, "licence": "Apache-2.0"}],
            "teacher": {"engine": "solver", "licence": "Apache-2.0"},
        },
    )
    return path


def test_the_sealed_folder_is_pushed_as_it_is_and_the_token_is_shown_nowhere(
    command: Command, open_hub: Command, recipe: Path, tmp_path: Path
) -> None:
    hub = open_hub("data/train-00000-of-00002.parquet", "notes.md")
    where = ["--runs", tmp_path / "runs", "--push-to-hub", "ada/set", "--private"]
    done = command("select", recipe, *where, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/datasets/ada/set"
    (folder,) = (tmp_path / "runs/select").glob("*/dataset")
    made = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(made) == 3 and {name: hub.files[name] for name in made} == made
    assert set(hub.files) - set(made) == {"notes.md"}, "files of an earlier push would load beside these"
    assert hub.created == [{"name": "set", "organization": "ada", "type": "dataset", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {hub.token}"}
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert hub.token not in done.stdout + done.stderr and not any(hub.token.encode() in text for text in written)


def test_a_hub_that_refuses_is_one_line_without_the_token(
    command: Command, open_hub: Command, recipe: Path, tmp_path: Path
) -> None:
    hub = open_hub()
    hub.refuses = True
    where = ["--runs", tmp_path / "runs", "--push-to-hub", "ada/set", "--quiet"]
    done = command("select", recipe, *where, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ada/set: the hub did not take the data set") and "403" in last
    assert hub.token not in done.stdout + done.stderr
    assert list((tmp_path / "runs/select").glob("*/stage.json")), "what was selected is kept"


def test_what_cannot_be_pushed_is_refused_before_any_work(command: Command, recipe: Path, tmp_path: Path) -> None:
    where = ["--runs", tmp_path / "runs", "--push-to-hub"]
    offline = command("select", recipe, *where, "ada/set", HF_HUB_OFFLINE="1", HF_TOKEN="hf_x")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    silent = command("select", recipe, *where, "ada/set")
    assert silent.returncode == 2 and "no token; set HF_TOKEN" in silent.stderr
    nameless = command("select", recipe, *where, "set", HF_TOKEN="hf_x")
    assert nameless.returncode == 2 and "write it as USER/NAME" in nameless.stderr
    assert not (tmp_path / "runs").exists()


def test_this_test_run_may_not_ask_a_hub() -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        check_push("ada/set")


def test_a_run_without_a_data_set_says_how_to_get_one(tmp_path: Path) -> None:
    write_json(tmp_path / "stage.json", {"files": {}, "name": "r", "identity": "0"})
    with pytest.raises(RunError, match=r"made without it .*distill\[train\].*delete"):
        push(open_sealed(tmp_path), "ada/set")
