"""Run an artifact: requests join the running batch at any time, and their text streams back as it is written.

One thread owns the model and steps a `distill.onnx_batching.Batch`, the loop that evaluation runs too. Each request
has its own sampling, limits and stop sequences; reasoning comes apart from the answer, with a budget if one is set.
onnxruntime-genai's own engine was measured and not taken: on the artifact's graph it runs fixed batches (of four,
unless told), slower than this loop; its continuous batching wants a graph with a paged cache; and it cannot force the
tokens that end a reasoning budget.
Neither torch nor transformers is needed.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from distill.config import FormatConfig
from distill.errors import ArtifactError, EngineError
from distill.onnx_batching import Row
from distill.onnx_decoding import OnnxDecoder
from distill.runs import available_cores
from distill.untrusted import refuse_unsafe_configs

from .chat_template import Chat
from .manifest import MANIFEST_FILE, read_manifest
from .text_stream import Detokenizer, ReasoningSplitter, Split, StopFinder

PREFILL_TOKENS = 128
"""Prompt tokens run between two steps of the running texts: what a long prompt may hold up the others at once."""
KEPT_TEXTS = 8
"""Ended texts whose keys and values are kept, so that the next turn of a chat does not run the earlier ones again."""

Finish = Literal["stop", "length", "cancelled", "error"]


class Usage(NamedTuple):
    """Tokens of one request."""

    prompt: int
    completion: int
    """New tokens: those of the reasoning, forced ones and the end token are among them."""
    reasoning: int
    shared: int
    """Prompt tokens that were in the cache already."""


class Delta(NamedTuple):
    """What is new of an answer; the last one has `finish` and `usage`."""

    reasoning: str = ""
    content: str = ""
    finish: Finish | None = None
    usage: Usage | None = None
    error: str = ""


class Answer(NamedTuple):
    """A whole answer."""

    reasoning: str
    content: str
    finish: Finish
    usage: Usage
    ids: list[int]
    """Its new token ids."""


@dataclass(frozen=True)
class Request:
    """One text to write behind a prompt."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are left out of it; looked for in the answer, not in the reasoning."""
    think_budget: int | None = None
    """Tokens of reasoning after which the closing marker is written for the model; None: as many as it likes."""
    opened: bool = False
    """Whether the prompt ends inside the reasoning."""
    ignore_end: bool = False
    """Go on behind the model's end tokens, for measuring."""


class Ticket:
    """A request that was taken; what happens to it comes through `deliver`, in the runtime's thread."""

    def __init__(self, request: Request, row: Row, deliver: Callable[[Delta], None], text: "_Text") -> None:
        self.request, self.row, self.deliver, self.text = request, row, deliver, text
        self.ended = False


class _Text:
    """The text of one answer while it is written."""

    def __init__(self, request: Request, chat: Chat, format: FormatConfig) -> None:
        self.splitter = ReasoningSplitter(format.open_marker, format.close_marker, request.opened)
        self.reasoning_tokens = 0
        self.closed = False
        """Whether the closing marker was written for the model."""
        self._characters = Detokenizer(chat.decode)
        self._stops = StopFinder(request.stop)

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def push(self, token: int) -> Split:
        before = self.splitter.state
        split = self.splitter.push(self._characters.push(token))
        self.reasoning_tokens += "reasoning" in (before, self.splitter.state)
        return Split(split.reasoning, self._stops.push(split.answer))

    def end(self) -> Split:
        first = self.splitter.push(self._characters.end())
        last = self.splitter.end()
        answer = self._stops.push(first.answer + last.answer)
        return Split(first.reasoning + last.reasoning, answer + self._stops.end())


class Runtime:
    """An artifact, loaded and ready to write.

    `max_rows` texts run at once, each of `max_tokens` (prompt and answer together) at most, within `cache_gb` of keys
    and values. Raises EngineError, ModelError or ArtifactError if the folder cannot be used. Use as a context manager,
    or `close` it.
    """

    def __init__(
        self,
        folder: Path,
        variant: str | None = None,
        threads: int = 0,
        max_rows: int = 64,
        max_tokens: int | None = None,
        cache_gb: float = 4.0,
    ) -> None:
        self.threads = threads or available_cores()
        self.decoder = OnnxDecoder(folder, self.threads, max_rows, cache_gb, variant)
        self.graph = self.decoder.graph
        refuse_unsafe_configs(self.graph.root)
        self.format = read_format(self.graph.root)
        self.name = artifact_name(self.graph.root)
        self.chat = Chat(self.graph.root)
        self.max_tokens = min(max_tokens or self.decoder.shape.context, self.decoder.shape.context)
        self._batch = self.decoder.open_batch(max_rows, self.max_tokens, KEPT_TEXTS)
        self._close_ids = self.chat.encode(f"\n{self.format.close_marker}\n\n")
        self._changed = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._tickets: dict[Row, Ticket] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="runtime", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """Texts in the batch."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._batch.waiting) + len(self._arrived)

    # --- asking

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], bool]:
        """Ids of a chat as training rendered it, and whether it ends inside the reasoning.

        The recipe's system prompt, where the artifact has one, stands in front of chats that bring none.
        """
        if self.format.system is not None and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.format.system}, *messages]
        text = self.chat.render(messages)
        return self.chat.encode(text), text.rstrip().endswith(self.format.open_marker)

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Ticket:
        """Queue a request; `deliver` is called with every part of its answer, from another thread.

        Raises ValueError for an empty prompt, or one that leaves no room for an answer.
        """
        length = len(request.prompt_ids)
        if not 0 < length < self.max_tokens or request.max_new_tokens < 1:
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens {request.max_new_tokens}: prompts of 1 to"
                f" {self.max_tokens - 1} tokens can be continued, by at least one token"
            )
        row = Row(
            request.prompt_ids,
            min(request.max_new_tokens, self.max_tokens - length),
            np.random.default_rng(request.seed),
            frozenset(() if request.ignore_end else self.decoder.shape.end_ids),
            request.temperature,
            request.top_p,
        )
        ticket = Ticket(request, row, deliver, _Text(request, self.chat, self.format))
        with self._changed:
            if self._closing:
                raise EngineError("the runtime is closed")
            self._arrived.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop writing; its row is free before the next step. One that has ended is left alone."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify()

    def stream(self, request: Request) -> Iterator[Delta]:
        """The parts of one answer as they come; leaving the loop cancels it."""
        parts: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        ticket = self.submit(request, parts.put)
        try:
            while True:
                yield (part := parts.get())
                if part.finish:
                    return
        finally:
            self.cancel(ticket)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Whole answers, written together; raises EngineError if one fails."""
        parts: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()

        def deliver(place: int, part: Delta) -> None:
            parts.put((place, part))

        tickets = [self.submit(request, partial(deliver, place)) for place, request in enumerate(requests)]
        found: list[list[Delta]] = [[] for _ in requests]
        missing = len(requests)
        while missing:
            place, part = parts.get()
            found[place].append(part)
            missing -= part.finish is not None
        return [whole(deltas, ticket) for deltas, ticket in zip(found, tickets)]

    # --- the thread that owns the model

    def _run(self) -> None:
        while self._take_orders():
            try:
                for row in self._batch.step(PREFILL_TOKENS):
                    self._advanced(self._tickets[row])
            except Exception as error:  # the batch is lost, the next requests are not
                self._fail(f"{type(error).__name__}: {error}")
        for row in self._batch.clear():
            self._end(self._tickets[row], "cancelled")

    def _take_orders(self) -> bool:
        """Wait until there is something to do, take in what has come; false when it is time to end."""
        with self._changed:
            while not (self._closing or self._arrived or self._cancelled or self._batch.busy):
                self._changed.wait()
            arrived, cancelled = list(self._arrived), list(self._cancelled)
            self._arrived.clear()
            self._cancelled.clear()
            for ticket in arrived:
                self._tickets[ticket.row] = ticket
                self._batch.waiting.append(ticket.row)
            closing = self._closing
        for ticket in cancelled:
            if not ticket.ended:
                self._end(ticket, "cancelled")
        return not closing

    def _advanced(self, ticket: Ticket) -> None:
        """A row has one more token."""
        row, text = ticket.row, ticket.text
        if ticket.ended:
            return
        is_end = row.tokens[-1] in row.end_ids
        split = Split() if is_end else text.push(row.tokens[-1])
        if split.reasoning or split.answer:
            ticket.deliver(Delta(split.reasoning, split.answer))
        if text.stopped or is_end:
            self._end(ticket, "stop")
        elif row.ended:
            self._end(ticket, "length")
        elif self._is_over_budget(ticket):
            text.closed = True
            row.forced.extend(self._close_ids)

    def _is_over_budget(self, ticket: Ticket) -> bool:
        budget, text = ticket.request.think_budget, ticket.text
        if budget is None or text.closed or text.splitter.at_marker:
            return False
        return text.splitter.state == "reasoning" and text.reasoning_tokens >= budget

    def _end(self, ticket: Ticket, finish: Finish, error: str = "") -> None:
        ticket.ended = True
        self._batch.remove(ticket.row)
        self._tickets.pop(ticket.row, None)
        row, text = ticket.row, ticket.text
        rest = text.end() if finish in ("stop", "length") else Split()
        usage = Usage(len(row.prompt), len(row.tokens), text.reasoning_tokens, row.shared)
        ticket.deliver(Delta(rest.reasoning, rest.answer, finish, usage, error))

    def _fail(self, why: str) -> None:
        self._batch.clear()
        for ticket in list(self._tickets.values()):
            self._end(ticket, "error", why)


def whole(deltas: Sequence[Delta], ticket: Ticket) -> Answer:
    """An answer from its parts; raises EngineError if it failed."""
    last = deltas[-1]
    if last.finish == "error" or last.finish is None or last.usage is None:
        raise EngineError(f"the model could not answer: {last.error}")
    reasoning, content = ("".join(parts) for parts in zip(*((delta.reasoning, delta.content) for delta in deltas)))
    return Answer(reasoning, content, last.finish, last.usage, list(ticket.row.tokens))


# --- what an artifact says of itself ----------------------------------------------------------------------------------


def artifact_name(folder: Path) -> str:
    """What the artifact calls itself, or its folder's name."""
    return read_manifest(folder).name if (folder / MANIFEST_FILE).is_file() else folder.resolve().name


def read_format(folder: Path) -> FormatConfig:
    """Markers and system prompt that the student was trained with, as far as the manifest says."""
    if not (folder / MANIFEST_FILE).is_file():
        return FormatConfig()
    said = read_manifest(folder).options.get("format", {})
    known = {key: said[key] for key in ("open_marker", "close_marker", "system") if key in said}
    try:
        return FormatConfig(**known)
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST_FILE}: options.format cannot be used: {error}") from error
