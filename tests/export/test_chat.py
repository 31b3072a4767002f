"""Chatting in a terminal and through a pipe."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distill.format import R1_TEMPLATE

DIM, PLAIN = b"\x1b[2m", b"\x1b[0m"


def command(artifact: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "distill.cli", "chat", str(artifact), "--threads", "1", *options]


def test_a_piped_chat_answers_every_line(exported: Callable[..., Path]) -> None:
    lines = "Hi\n/system Be short.\n\n/what\nHi\n/exit\nnever\n"
    done = subprocess.run(
        command(exported(), "--max-new-tokens", "5"), input=lines, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and "\x1b" not in done.stdout
    assert "system prompt is set" in done.stderr and "/what is no command" in done.stderr


def test_a_chat_that_has_grown_too_long_says_so_and_goes_on(exported: Callable[..., Path]) -> None:
    lines = f"{'many words ' * 300}\nHi\n"
    done = subprocess.run(
        command(exported(), "--max-new-tokens", "5"), input=lines, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "/reset starts anew" in done.stderr and done.stdout.strip()


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execv(arguments[0], arguments)
        self.shown = b""

    def until(self, text: bytes) -> None:
        """Read until a text is shown."""
        patience = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < patience, self.shown
            if select.select([self._end], [], [], 0.1)[0]:
                self.shown += self._read()

    def _read(self) -> bytes:
        try:
            return os.read(self._end, 65536)
        except OSError:  # the program has ended and its terminal is gone
            return b""

    def type(self, text: bytes) -> None:
        self.shown = b""
        os.write(self._end, text)

    def code(self, pressing: bytes = b"") -> int:
        """The exit code; until then a key is pressed again and again, since one may fall between prompt and reading."""
        patience = time.monotonic() + 60
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > patience:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end: {self.shown!r}")
            if b"SIGINT" not in self.shown:  # once it has been noticed, another would meet a program that is ending
                os.write(self._end, pressing)
            if select.select([self._end], [], [], 0.3)[0]:
                self.shown += self._read()
        os.close(self._end)
        return os.waitstatus_to_exitcode(ended[1])


def test_in_a_terminal_reasoning_is_dimmed_and_ctrl_c_stops_an_answer_only(altered: Callable[..., Path]) -> None:
    artifact = altered(template=R1_TEMPLATE, end_ids=[])
    terminal = Terminal(command(artifact, "--max-new-tokens", "5000", "--temperature", "0"))
    terminal.until(b"> ")
    terminal.type(b"Hi\n")
    terminal.until(DIM)
    terminal.type(b"\x03")
    terminal.until(PLAIN)
    terminal.until(b"> ")
    terminal.type(b"/reset\n")
    terminal.until(b"anew")
    terminal.until(b"> ")
    terminal.type(b"/exit\n")
    assert terminal.code() == 0


def test_ctrl_c_at_the_prompt_ends_the_chat(exported: Callable[..., Path]) -> None:
    terminal = Terminal(command(exported()))
    terminal.until(b"> ")
    assert terminal.code(pressing=b"\x03") == 130
