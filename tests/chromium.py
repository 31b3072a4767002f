"""A real browser for the tests: one tab of a headless Chromium, driven by its DevTools protocol."""

import fcntl
import json
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
ANSWER_S = 60
"""How long the browser may take to answer, on a busy machine."""
MISDEEDS = ("Page.javascriptDialogOpening", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
"""Events of a page that does what it must not, or complains."""


TEXT = "document.body?.innerText.slice(0, 500)"


class Chromium:
    """One tab of a headless Chromium, told what to do in its DevTools protocol through a pair of pipes."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers = orders, answers
        self._unread, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **parameters: Any) -> Any:
        """Give an order and wait for its result; events that come meanwhile are kept."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters}
        order |= {"sessionId": self._session} if self._session else {}
        os.write(self._orders, json.dumps(order).encode() + b"\0")
        while (message := self._message()).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._answers], [], [], ANSWER_S)[0], "the browser does not answer"
            read = os.read(self._answers, 1 << 20)
            assert read, "the browser has ended"
            self._unread += read
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def go(self, address: str, ready: str = "document.readyState === 'complete'") -> None:
        """Load a page anew and wait until it is ready."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.until(ready)

    def value(self, expression: str) -> Any:
        """The value of an expression in the page; a click in it counts as a person's."""
        given = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=expression, **given)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true in the page."""
        patience = time.monotonic() + ANSWER_S
        while not (found := self.value(expression)):
            assert time.monotonic() < patience, f"never came true: {expression}; page: {self.value(TEXT)}"
            time.sleep(0.02)
        return found

    def press(self, *keys: str) -> None:
        """Press keys, as a person would."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36}.get(key, 0)
            for kind in ("keyDown", "keyUp"):
                given = {"text": text} if kind == "keyDown" else {}
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **given)

    def misdeeds(self, own: tuple[str, ...] = ("file:", "about:")) -> list[str]:
        """What the page did since it was opened that it must not do: dialogs, complaints, requests."""
        self.value("new Promise(done => setTimeout(done, 100))")
        found = [str(event["params"])[:500] for event in self.events if event["method"] in MISDEEDS]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return found + [url for url in asked if not url.startswith(own)]


@contextmanager
def chromium(profile: Path, tab: Callable[[int, int], Any]) -> Iterator[Any]:
    """A browser with a new profile; it reads its orders from descriptor 3, answers on 4, and ends when 3 is closed."""
    theirs_in, orders = os.pipe()
    answers, theirs_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]  # out of the way of 3 and 4
    actions = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
    actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (1, 2)]
    command = [str(CHROMIUM), *SWITCHES, f"--user-data-dir={profile}", "about:blank"]
    child = os.posix_spawn(str(CHROMIUM), command, os.environ, file_actions=actions)
    for fd in (theirs_in, theirs_out, *high):
        os.close(fd)
    try:
        yield tab(orders, answers)
    finally:
        os.close(orders)
        os.waitpid(child, 0)
        os.close(answers)
