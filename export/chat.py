"""`distill chat`: talk to an artifact in the terminal, or through a pipe.

Answers stream as they are written, reasoning dimmed. Ctrl-C stops an answer; a second one, or one at the prompt, ends
the chat. Without a terminal every line of stdin is a message, and stdout holds the answers alone.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from distill.errors import Interrupted

from .runtime import Request, Runtime

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
COMMANDS = "/reset forgets the chat, /system TEXT sets the system prompt, /exit ends"
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that a model may write and a terminal would obey."""


@dataclass(frozen=True)
class Settings:
    """How answers are drawn."""

    max_new_tokens: int = 1024
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    think_budget: int | None = None


@dataclass
class Conversation:
    """What was said so far."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the template takes them."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns


def run(folder: Path, settings: Settings, system: str | None = None, **loading: Any) -> None:
    """Chat until /exit, the end of stdin, or Ctrl-C at the prompt; `loading` is the runtime's."""
    with Runtime(folder, max_rows=1, **loading) as runtime:
        terminal = sys.stdin.isatty()
        if terminal:
            sys.stderr.write(f"{runtime.name} ({runtime.graph.variant}). {COMMANDS}.\n")
        conversation = Conversation(system)
        for line in _lines(terminal):
            if line.startswith("/"):
                if not obey(line, conversation, sys.stderr):
                    return
            elif line:
                reply(runtime, conversation, line, settings, sys.stdout, dimmed=sys.stdout.isatty())


def obey(line: str, conversation: Conversation, say: TextIO) -> bool:
    """Do what a line that starts with a slash says; false for /exit."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        conversation.turns.clear()
        say.write("The chat starts anew.\n")
    elif command == "/system":
        conversation.system = rest.strip() or None
        conversation.turns.clear()
        say.write("The system prompt is set, and the chat starts anew.\n")
    else:
        say.write(f"{command} is no command; {COMMANDS}\n")
    return True


def reply(
    runtime: Runtime, conversation: Conversation, text: str, settings: Settings, out: TextIO, dimmed: bool
) -> None:
    """Write the answer to a message as it comes; one that was stopped stays in the chat as far as it went."""
    conversation.turns.append({"role": "user", "content": text})
    try:
        ids, opened = runtime.prompt(conversation.messages)
        request = Request(
            ids, settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed,
            think_budget=settings.think_budget, opened=opened,
        )  # fmt: skip
        content = _write(runtime, request, out, dimmed)
    except ValueError as error:  # no room, or a template that refuses
        conversation.turns.pop()
        sys.stderr.write(f"{error}; /reset starts anew\n")
        return
    conversation.turns.append({"role": "assistant", "content": content})


def _write(runtime: Runtime, request: Request, out: TextIO, dimmed: bool) -> str:
    content, thinking = "", False
    with _stoppable() as stop:
        for part in runtime.stream(request):
            if stop.is_set():
                break
            if part.error:
                sys.stderr.write(f"{part.error}\n")
            if dimmed and part.reasoning:
                out.write(("" if thinking else DIM) + part.reasoning.translate(CONTROL))
                thinking = True
            if thinking and (part.content or part.finish):
                out.write(f"{PLAIN}\n\n")
                thinking = False
            out.write(part.content.translate(CONTROL))
            out.flush()
            content += part.content
    out.write(f"{PLAIN if thinking else ''}\n")
    out.flush()
    return content


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Let the first SIGINT set an event, the second end the program."""
    stop = threading.Event()

    def handle(signum: int, _: FrameType | None) -> None:
        if stop.is_set():
            raise Interrupted(signum)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed, line by line."""
    if not terminal:
        for line in sys.stdin:
            yield line.strip()
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            sys.stderr.write("\n")
            return
