"""Publishing on a hub: refused before any work where it cannot succeed, and the token stays where it is."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, RecipeError, RunError
from distill.records import write_json
from distill.runs import open_sealed
from distill.teachers.hub import check_push, push

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow")

TOKEN = "hf_" + "qR7tZk2mVx9bLw4nHs8dJf3cPa6yGe1uT5"


class Hub(ThreadingHTTPServer):
    """As much of a hub as one commit needs; what was committed lies in `files`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"data/train-00000-of-00002.parquet": b"of an earlier push", "notes.md": b"mine"}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few addresses that the client asks."""

    server: Hub

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.files]
            self._answer(files)
        else:
            self._answer({"id": "ada/set", "sha": "0" * 40, "siblings": [{"rfilename": f} for f in self.server.files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self._answer({"error": f"no rights for {TOKEN}"}, 403)
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/datasets/ada/set"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self._answer({"commitUrl": f"{self.server.url}/datasets/ada/set/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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


def distill(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: the client reads its settings when it is imported."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = {"HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "distill.cli", *map(str, arguments)],
        cwd=cwd, env={**outside, **home, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_the_sealed_folder_is_pushed_as_it_is_and_the_token_is_shown_nowhere(
    hub: Hub, recipe: Path, tmp_path: Path
) -> None:
    where = ["--runs", tmp_path / "runs", "--push-to-hub", "ada/set", "--private"]
    done = distill("select", recipe, *where, cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/datasets/ada/set"
    (folder,) = (tmp_path / "runs/select").glob("*/dataset")
    made = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(made) == 3 and {name: hub.files[name] for name in made} == made
    assert set(hub.files) - set(made) == {"notes.md"}, "files of an earlier push would load beside these"
    assert hub.created == [{"name": "set", "organization": "ada", "type": "dataset", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert TOKEN not in done.stdout + done.stderr and not any(TOKEN.encode() in text for text in written)


def test_a_hub_that_refuses_is_one_line_without_the_token(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    hub.refuses = True
    where = ["--runs", tmp_path / "runs", "--push-to-hub", "ada/set", "--quiet"]
    done = distill("select", recipe, *where, cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ada/set: the hub did not take the data set") and "403" in last
    assert TOKEN not in done.stdout + done.stderr
    assert list((tmp_path / "runs/select").glob("*/stage.json")), "what was selected is kept"


def test_what_cannot_be_pushed_is_refused_before_any_work(recipe: Path, tmp_path: Path) -> None:
    where = ["--runs", tmp_path / "runs", "--push-to-hub"]
    offline = distill("select", recipe, *where, "ada/set", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    silent = distill("select", recipe, *where, "ada/set", cwd=tmp_path)
    assert silent.returncode == 2 and "no token; set HF_TOKEN" in silent.stderr
    nameless = distill("select", recipe, *where, "set", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert nameless.returncode == 2 and "write it as USER/NAME" in nameless.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["set", "ada/set/more", "ada/..", "ada/a b", ""])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="write it as USER/NAME"):
        check_push(name)


def test_this_test_run_may_not_ask_a_hub() -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        check_push("ada/set")


def test_a_run_without_a_data_set_says_how_to_get_one(tmp_path: Path) -> None:
    write_json(tmp_path / "stage.json", {"files": {}, "name": "r", "identity": "0"})
    with pytest.raises(RunError, match=r"made without it .*distill\[train\].*delete"):
        push(open_sealed(tmp_path), "ada/set")
