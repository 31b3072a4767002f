"""Uploading to a hub: what could not succeed is refused first, and nothing ever shows the token."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, RecipeError
from distill.hub import check_push, upload

pytest.importorskip("huggingface_hub")


@pytest.mark.parametrize("name", ["set", "ada/set/more", "ada/..", "ada/a b", ""])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="write it as USER/NAME"):
        check_push(name)


def test_this_test_run_may_not_ask_a_hub() -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        check_push("ada/set")


UPLOADING = """
import sys
from pathlib import Path
from distill.hub import upload
print(upload(Path(sys.argv[1]), "ada/set", sys.argv[2], "by hand", ["old*"]))
"""


@pytest.mark.parametrize(("kind", "place"), [("model", ""), ("dataset", "datasets/")])
def test_a_folder_is_uploaded_as_it_is_in_place_of_what_is_named(
    open_hub: Callable[..., Any], tmp_path: Path, kind: str, place: str
) -> None:
    import subprocess
    import sys

    hub = open_hub("old.bin", "notes.md")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new.bin").write_bytes(b"\x00new")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", UPLOADING, str(tmp_path / "folder"), kind],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == f"{hub.url}/{place}ada/set", done.stderr
    assert hub.files == {"notes.md": b"of an earlier push", "new.bin": b"\x00new"}
    assert hub.created[0].get("type", "model") == kind and "visibility" not in hub.created[0]


def test_a_hub_that_cannot_be_reached_is_told_without_the_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(DataError, match="ada/set: the hub did not take the model") as refused:
        upload(tmp_path, "ada/set", "model", "by hand", [])
    assert "hf_secret" not in str(refused.value)
