"""The example apps, run as a reader would run them, on a tiny random model; the page in a real browser."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
QUESTION = "What is 7 + 8?"
NODE = Path(os.environ.get("DISTILL_NODE") or ROOT / "build" / "node")
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (NODE / "node_modules" / "@huggingface").is_dir()),
    reason="transformers.js is not here: make js-env",
)


@pytest.fixture
def shipped(artifact: Callable[..., Path]) -> Path:
    """A tiny artifact whose default graph is int4."""
    return artifact("llama")


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200, **options)
    assert done.returncode == 0, done.stderr
    return done


# --- Python -----------------------------------------------------------------------------------------------------------


def test_the_python_app_answers_with_onnxruntime_genai_alone(shipped: Path, tmp_path: Path) -> None:
    """Run where neither distill nor torch nor transformers can be imported."""
    banned = tmp_path / "sitecustomize.py"
    banned.write_text("import sys\nfor name in ('torch', 'transformers', 'distill'): sys.modules[name] = None\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    app = EXAMPLES / "python" / "app.py"
    said = run(sys.executable, app, shipped, QUESTION, "--max-new-tokens", 12, env=environment)
    assert said.stdout.strip() and not said.stderr
    other = run(sys.executable, app, shipped, "Name a colour.", "--max-new-tokens", 12, env=environment)
    assert other.stdout != said.stdout


SPLITS = [
    ("", False, "", ""),
    ("<thi", False, "", ""),
    ("<think>\nI add", False, "I add", ""),
    ("<think>\nI add.\n</think>\n\n15", False, "I add.", "15"),
    ("I add", True, "I add", ""),
    ("I add.\n</think>\n\n15", True, "I add.", "15"),
    ("15 it is", False, "", "15 it is"),
]


def test_the_python_app_folds_the_reasoning_while_it_grows() -> None:
    spec = importlib.util.spec_from_file_location("example_app", EXAMPLES / "python" / "app.py")
    assert spec and spec.loader
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    for text, opened, reasoning, answer in SPLITS:
        assert app.split(text, opened) == (reasoning, answer), text


# --- Node -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def node_app(tmp_path: Path) -> Path:
    """The Node example beside its node_modules, as `npm install` leaves it."""
    folder = tmp_path / "node"
    shutil.copytree(EXAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    return folder


@needs_node
def test_the_node_app_answers_with_the_default_graph(shipped: Path, node_app: Path) -> None:
    said = run("node", "app.mjs", shipped, QUESTION, "--max-new-tokens", "12", cwd=node_app)
    assert said.stdout.strip() and not said.stderr
    named = run("node", "app.mjs", shipped, QUESTION, "--dtype", "q4", "--max-new-tokens", "12", cwd=node_app)
    assert named.stdout == said.stdout


@needs_node
def test_the_node_app_folds_the_reasoning_while_it_grows(node_app: Path) -> None:
    code = (
        "import { split } from './reasoning.mjs';"
        f"console.log(JSON.stringify({json.dumps(SPLITS)}.map(([text, opened]) => split(text, opened))))"
    )
    found = json.loads(run("node", "--input-type=module", "-e", code, cwd=node_app).stdout)
    assert found == [{"reasoning": reasoning, "answer": answer} for _, _, reasoning, answer in SPLITS]


def test_the_node_app_names_the_library_that_was_tested() -> None:
    wanted = json.loads((EXAMPLES / "node" / "package.json").read_text())["dependencies"]["@huggingface/transformers"]
    assert wanted.startswith("^4.")
    assert not list(EXAMPLES.rglob("package-lock.json")) and not list(EXAMPLES.rglob("vendor"))


# --- the browser ------------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    """A plain static server, as `python -m http.server` is one."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".js": "text/javascript"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(shipped: Path, tmp_path: Path) -> Iterator[str]:
    """Address of the built page."""
    run("node", EXAMPLES / "web" / "build.mjs", shipped, tmp_path / "site", NODE / "node_modules")
    handler = partial(Quiet, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.full
@needs_node
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not on the PATH")
def test_the_page_answers_in_the_browser_and_asks_nobody_else(site: str, browsers: Any) -> None:
    with (
        tempfile.TemporaryDirectory() as profile,
        browsers.chromium(Path(profile), browsers.Chromium) as browser,
    ):
        browser.call("Page.navigate", url=f"{site}?max_new_tokens=12")
        browser.until("document.getElementById('status')?.textContent === 'Ready.'")
        browser.value("document.getElementById('ask').click()")
        browser.until("document.getElementById('status').textContent.startsWith('Done: 12 tokens')")
        assert browser.value("document.getElementById('answer').textContent").strip()
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert asked and all(url.startswith((site, "blob:", "about:")) for url in asked), asked


@pytest.fixture(scope="session")
def browsers() -> Any:
    """The module that drives a headless Chromium."""
    spec = importlib.util.spec_from_file_location("chromium", ROOT / "tests" / "chromium.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
