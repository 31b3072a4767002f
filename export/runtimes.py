"""Gates across runtimes: the artifact, loaded unmodified by each library, is asked the same questions as torch was.

Every runtime renders the same messages, tokenizes them, predicts the tokens of an answer, and writes greedy text. It
runs apart where it cannot live in this environment: transformers.js in Node and in a headless Chromium, Optimum under
transformers 4 (`runners/`). Nothing is installed here and no network is used: a runtime that is not there ends as gates
that were not run, which say how to get it.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple

from distill.artifact import Graph, data_file, locate
from distill.errors import ArtifactError, EngineError, MissingExtraError
from distill.onnx_decoding import GenaiDecoder, read_shape
from distill.statistics import surely_below

from .manifest import GateEntry, GateStatus
from .package import CONFIG, DTYPES, lint_end_tokens

RUNNERS = Path(__file__).parent / "runners"
NODE_HOME = "DISTILL_NODE"
"""Environment variable: the folder whose node_modules hold transformers.js."""
OPTIMUM_HOME = "DISTILL_OPTIMUM"
"""Environment variable: a virtual environment with Optimum in it."""
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-component-update",
    "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip
LARGEST_IN_A_PAGE = 2 << 30
"""Bytes of weights that a page can hold: it has 4 GiB, and needs them once as a file and once in the runtime."""
VENDORED = {
    "transformers.js": "@huggingface/transformers/dist/transformers.min.js",
    "ort.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "ort.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
"""What a page needs of node_modules, by the name under which it asks for it."""


class Case(NamedTuple):
    """One question, with torch's answers."""

    messages: Sequence[Mapping[str, str]]
    """The conversation, a system prompt included where there is one."""
    prompt: str
    """The messages as the student's template renders them, with the generation prompt."""
    prompt_ids: Sequence[int]
    document: Sequence[int]
    """Token ids that are fed to every runtime, whatever it would have written itself."""
    compared: range
    """Places in the document after which the preferred tokens are compared; those of an answer that a runtime feeds
    token by token through its cache, as it would write it."""
    top1: Sequence[int]
    """torch's preferred token after each of the compared places."""


class Answer(NamedTuple):
    """What one runtime made of a case."""

    prompt: str
    prompt_ids: list[int]
    top1: list[int]
    """The preferred token after each of the compared places."""
    written: list[int]
    """Greedy new tokens after the prompt, the end token included where it was reached."""


class Question(NamedTuple):
    """What is asked of every runtime."""

    graph: Graph
    cases: Sequence[Case]
    max_new_tokens: int
    threads: int
    timeout_s: float

    def request(self, folder: str, sessions: Mapping[str, Any]) -> dict[str, Any]:
        """The question as a runner reads it."""
        cases = [
            {
                "messages": list(case.messages),
                "document": list(case.document),
                "first": case.compared.start,
                "count": len(case.compared),
            }
            for case in self.cases
        ]
        return {
            "folder": folder, "dtype": DTYPES.get(self.graph.variant), "file": self.graph.path.name, "cases": cases,
            "max_new_tokens": self.max_new_tokens, "threads": self.threads, "session_options": sessions,
        }  # fmt: skip


class NotHereError(Exception):
    """A runtime is not on this machine; says how to get it."""


class NotInstalledError(NotHereError):
    """It is missing; the remedy names this machine's folders, which are none of an artifact's business."""


class BrokenError(Exception):
    """A runtime is here, but could not load or run the artifact."""


def runtime_gates(
    artifact: Path,
    variant: str,
    cases: Sequence[Case],
    min_top1: float,
    *,
    runtimes: Sequence[str] = (),
    max_new_tokens: int = 32,
    threads: int = 1,
    timeout_s: float = 1800,
) -> list[GateEntry]:
    """Three gates for each runtime (all of `RUNTIMES` by default): prompts, top-1 agreement with torch, stops.

    A gate of a runtime that is not here is not run, with the reason; one of a runtime that cannot load or run the
    artifact has failed, with its last words. `timeout_s` bounds each runtime.
    """
    question = Question(locate(artifact, variant), cases, max_new_tokens, threads, timeout_s)
    ends = read_shape(question.graph.root).end_ids
    gates: list[GateEntry] = []
    for name in runtimes or RUNTIMES:
        gate = partial(GateEntry, variant=variant)
        try:
            version, answers = RUNTIMES[name](question)
        except (NotInstalledError, MissingExtraError):
            why = f"{name} was not on the machine that exported; `distill doctor` says how to get it"
            gates += [gate(name=f"{name}_{what}", status="not_run", detail=why) for what in MEASURES]
        except NotHereError as error:
            gates += [gate(name=f"{name}_{what}", status="not_run", detail=str(error)) for what in MEASURES]
        except (BrokenError, EngineError) as error:
            words = _without_folders(str(error), artifact)
            gates += [gate(name=f"{name}_{what}", status="failed", detail=words) for what in MEASURES]
        else:
            gates += [
                prompt_gate(name, version, variant, cases, answers),
                top1_gate(name, version, variant, cases, answers, min_top1),
                stop_gate(name, version, variant, answers, ends, max_new_tokens),
            ]
    return gates


# --- gates ------------------------------------------------------------------------------------------------------------


def _without_folders(words: str, artifact: Path) -> str:
    """A runtime's last words less the folders of this machine, which are none of an artifact's business."""
    for folder, name in ((artifact.resolve(), "."), (artifact, "."), (Path.home(), "~"), (Path.cwd(), ".")):
        words = words.replace(str(folder), name)
    return words


MEASURES = ("prompts", "top1", "stops")


def prompt_gate(name: str, version: str, variant: str, cases: Sequence[Case], answers: Sequence[Answer]) -> GateEntry:
    """Rendered templates and their ids equal the student's, character by character and id by id."""
    texts = sum(case.prompt != answer.prompt for case, answer in zip(cases, answers, strict=True))
    ids = sum(list(case.prompt_ids) != answer.prompt_ids for case, answer in zip(cases, answers, strict=True))
    return GateEntry(
        name=f"{name}_prompts",
        variant=variant,
        status="passed" if cases and not texts + ids else "failed" if cases else "not_run",
        value=float(max(texts, ids)) if cases else None,
        limit=0.0,
        unit="prompts that differ",
        detail=f"{name} {version}: of {len(cases)} prompts {texts} render and {ids} tokenize otherwise",
    )


def top1_gate(
    name: str, version: str, variant: str, cases: Sequence[Case], answers: Sequence[Answer], min_top1: float
) -> GateEntry:
    """Share of the compared places after which the runtime prefers the token that torch prefers.

    It fails where so few are rare for a runtime that agrees just as often as it must (`surely_below`): a browser cannot
    be asked about thousands of places, and what the weights lose is measured on so many without it (`top1_agreement`).
    """
    pairs = [
        pair for case, answer in zip(cases, answers, strict=True) for pair in zip(case.top1, answer.top1, strict=True)
    ]
    detail = f"{name} {version}: teacher-forced over {len(pairs)} positions"
    gate = GateEntry(
        name=f"{name}_top1", variant=variant, status="not_run", limit=min_top1, unit="share", detail=detail
    )
    if not pairs:
        return gate
    agreed = sum(wanted == found for wanted, found in pairs)
    failed = surely_below(agreed, len(pairs), min_top1)
    if agreed / len(pairs) < min_top1 and not failed:
        detail += "; so few below the limit are no surprise, and more positions would show which side it is on"
    status: GateStatus = "failed" if failed else "passed"
    return gate.model_copy(update={"status": status, "value": agreed / len(pairs), "detail": detail})


def stop_gate(
    name: str, version: str, variant: str, answers: Sequence[Answer], ends: Sequence[int], max_new_tokens: int
) -> GateEntry:
    """Every greedy text ends at its first end token or at the limit, not before and not after.

    Not run where no text reached an end token: nothing was seen to stop then.
    """
    texts = [answer.written for answer in answers]
    wrong = sum(not stops_rightly(text, ends, max_new_tokens) for text in texts)
    ended = sum(bool(text) and text[-1] in ends for text in texts)
    return GateEntry(
        name=f"{name}_stops",
        variant=variant,
        status="failed" if wrong else "passed" if ended else "not_run",
        value=float(wrong) if wrong or ended else None,
        limit=0.0,
        unit="texts that stop wrongly",
        detail=f"{name} {version}: {ended} of {len(texts)} texts ended within {max_new_tokens} tokens",
    )


def stops_rightly(written: Sequence[int], ends: Sequence[int], max_new_tokens: int) -> bool:
    """Whether a text has an end token last, or none at all and the full length."""
    first = next((place for place, token in enumerate(written) if token in ends), None)
    return len(written) == max_new_tokens if first is None else first == len(written) - 1


def end_token_gate(artifact: Path) -> GateEntry:
    """All settings files end texts with the same tokens; see `lint_end_tokens`."""
    problems = lint_end_tokens(artifact)
    return GateEntry(
        name="end_tokens",
        status="failed" if problems else "passed",
        value=float(len(problems)),
        limit=0.0,
        unit="disagreements",
        detail="; ".join(problems),
    )


# --- runtimes ---------------------------------------------------------------------------------------------------------


def ask_genai(question: Question) -> tuple[str, list[Answer]]:
    """onnxruntime-genai, in this process."""
    answers = []
    try:
        decoder = GenaiDecoder(question.graph.root, question.threads, question.graph.variant)
        for case in question.cases:
            prompt, ids = decoder.rendered(case.messages)
            text = decoder.greedy(ids, question.max_new_tokens)
            answers.append(Answer(prompt, ids, decoder.preferred(case.document, case.compared), text))
    except (RuntimeError, ArtifactError) as error:
        raise BrokenError(f"onnxruntime-genai: {error}") from error
    return version("onnxruntime-genai"), answers


def ask_node(question: Question) -> tuple[str, list[Answer]]:
    """transformers.js in Node."""
    sessions = {"intraOpNumThreads": question.threads}
    command = [_node(), str(RUNNERS / "node.mjs"), str(_node_modules())]
    return _run(command, question.request(str(question.graph.root.resolve()), sessions), question.timeout_s)


def ask_optimum(question: Question) -> tuple[str, list[Answer]]:
    """Optimum's `ORTModelForCausalLM`, under transformers 4 in its own virtual environment."""
    python = _optimum()
    config = json.loads((question.graph.root / CONFIG).read_text(encoding="utf-8"))
    if read_shape(question.graph.root).head_size != config["hidden_size"] // config["num_attention_heads"]:
        raise NotHereError(
            "Optimum 0.1 takes hidden_size / num_attention_heads for the size of a head, which this model's is not;"
            " after loading it, set model.embed_size_per_head = model.config.head_dim"
        )
    command = [str(python), "-W", "ignore", str(RUNNERS / "optimum_check.py")]
    return _run(command, question.request(str(question.graph.root.resolve()), {}), question.timeout_s)


def missing_runtimes() -> dict[str, str]:
    """Runtimes that are not on this machine, and how to get each."""
    needed: dict[str, tuple[Callable[[], object], ...]] = {
        "node": (_node, _node_modules), "browser": (_node_modules, _chromium), "optimum": (_optimum,),
    }  # fmt: skip
    missing = {}
    for name, finders in needed.items():
        try:
            for find in finders:
                find()
        except NotHereError as error:
            missing[name] = str(error)
    return missing


def _node() -> str:
    if not (node := shutil.which("node")):
        raise NotInstalledError("there is no `node` on the PATH; install Node.js 20 or newer")
    return node


def _chromium() -> str:
    if not (chromium := next(filter(None, map(shutil.which, CHROMIUMS)), None)):
        raise NotInstalledError(f"there is no browser on the PATH; install one of {', '.join(CHROMIUMS)}")
    return chromium


def _optimum() -> Path:
    python = _home(OPTIMUM_HOME, "optimum") / "bin" / "python"
    if not python.is_file():
        home = python.parent.parent
        raise NotInstalledError(
            f"Optimum is not in {home}; run `python -m venv {home} && {home}/bin/pip install"
            f" 'optimum-onnx[onnxruntime]==0.1.*' torch`, or name another environment in {OPTIMUM_HOME}"
        )
    return python


def _node_modules() -> Path:
    modules = _home(NODE_HOME, "node") / "node_modules"
    if not (modules / "@huggingface" / "transformers").is_dir():
        raise NotInstalledError(
            f"transformers.js is not in {modules}; run `npm install --ignore-scripts --prefix {modules.parent}"
            f" @huggingface/transformers@4`, or name another folder in {NODE_HOME}"
        )
    return modules


def _home(variable: str, name: str) -> Path:
    """Where a runtime lives: as the environment says, else in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(variable) or cache / "distill" / name)


def _run(command: Sequence[str], request: Mapping[str, Any], timeout_s: float) -> tuple[str, list[Answer]]:
    """Put a request to a runner; raises BrokenError with its last words if it does not answer."""
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    text = json.dumps(request)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout_s, env=os.environ | quiet, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BrokenError(f"{Path(command[0]).name}: no answer within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise BrokenError(f"{Path(command[0]).name}: {last_words(done.stderr)}")
    return _answers(json.loads(done.stdout))


def _answers(answer: Mapping[str, Any]) -> tuple[str, list[Answer]]:
    return answer["version"], [Answer(**one) for one in answer["answers"]]


def last_words(text: str) -> str:
    """The line that says what went wrong: the last that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line or "error" in line), (lines or ["no word"])[-1])[
        :500
    ]


# --- the browser ------------------------------------------------------------------------------------------------------


def ask_browser(question: Question) -> tuple[str, list[Answer]]:
    """transformers.js in a headless Chromium, by WebAssembly; one thread, since a plain page may have no more."""
    modules, chromium = _node_modules(), _chromium()
    weights = data_file(question.graph.path)
    if weights.is_file() and weights.stat().st_size >= LARGEST_IN_A_PAGE:
        raise NotHereError(f"{weights.name} has {weights.stat().st_size:,} bytes; a page holds {LARGEST_IN_A_PAGE:,}")
    files = {"vendor/" + name: modules / path for name, path in VENDORED.items()}
    files |= {"": RUNNERS / "browser.html", "check.mjs": RUNNERS / "check.mjs"}
    request = json.dumps(question.request("artifact", {})).encode()
    answers: Queue[bytes] = Queue()
    page = partial(_Page, files=files, artifact=question.graph.root, request=request, answers=answers)
    with ThreadingHTTPServer(("127.0.0.1", 0), page) as server, tempfile.TemporaryDirectory() as profile:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        command = [chromium, *SWITCHES, f"--user-data-dir={profile}", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            answer = json.loads(_awaited(answers, browser, question.timeout_s))
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    if "error" in answer:
        raise BrokenError(f"the page failed: {answer['error'].splitlines()[0][:500]}")
    return _answers(answer)


def _awaited(answers: "Queue[bytes]", browser: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
    """The page's answer; raises BrokenError where none comes, at once if the browser has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            return answers.get(timeout=1)
        except Empty:
            if browser.poll() is not None and answers.empty():
                raise BrokenError(f"the browser ended with exit {browser.returncode} and no answer") from None
    raise BrokenError(f"the page gave no answer within {timeout_s:.0f} s")


class _Page(SimpleHTTPRequestHandler):
    """Serves the page, what it needs, and the artifact; takes its answer."""

    extensions_map = {".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", "": "text/html",
                      ".wasm": "application/wasm", ".json": "application/json"}  # fmt: skip

    def __init__(
        self, *arguments: Any, files: Mapping[str, Path], artifact: Path, request: bytes, answers: "Queue[bytes]"
    ) -> None:
        self.files, self.artifact, self.request_text, self.answers = files, artifact, request, answers
        super().__init__(*arguments, directory=str(artifact))

    def translate_path(self, path: str) -> str:
        name = path.partition("?")[0].lstrip("/")
        if name in self.files:
            return str(self.files[name])
        return super().translate_path("/" + name.removeprefix("artifact/"))

    def do_GET(self) -> None:
        if self.path != "/request.json":
            return super().do_GET()
        self._say(self.request_text)
        return None

    def do_POST(self) -> None:
        self.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self._say(b"{}")

    def _say(self, text: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """No log: the answer says what happened."""


RUNTIMES: dict[str, Callable[[Question], tuple[str, list[Answer]]]] = {
    "genai": ask_genai,
    "node": ask_node,
    "browser": ask_browser,
    "optimum": ask_optimum,
}
"""The libraries that must load an artifact unmodified, by the name that their gates carry."""
