"""Answers that come in pieces: server-sent events, and how their chunks make one answer.

Read leniently: comments and blank lines are keep-alives, `data:` may lack its space, lines may end in any way, an
event may have several data lines or miss its blank line, `[DONE]` may be missing once a finish reason was there.

A chunk that was delivered twice is dropped where the stream carries something to know it by: the event's `id`, a
running `usage`, or OpenAI's `obfuscation`, equal in two equal chunks in a row. Other equal neighbours may well be two
equal tokens; they are held against the final usage. A chunk is at least one token, so more chunks than tokens means
that some came twice: if as many as there are equal neighbours, those are dropped; if fewer, nobody can tell which,
and the answer is asked for again. Servers that pack several tokens in a chunk, or send no usage, hide duplicates.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from .wire import Answer, BrokenAnswerError, ChatMessage, ErrorInBodyError, TokenUsage

DONE = b"[DONE]"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One server-sent event."""

    data: bytes
    id: bytes = b""


class Events:
    """Bytes in, events out; holds no more than one unfinished event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._id = b""
        self._begun = False

    @property
    def held(self) -> int:
        """Bytes of the unfinished event."""
        return len(self._rest) + sum(map(len, self._data))

    def feed(self, received: bytes) -> Iterator[Event]:
        """The events that these bytes finish."""
        text = self._rest + received
        if not self._begun and len(text) >= len(BYTE_ORDER_MARK):
            text, self._begun = text.removeprefix(BYTE_ORDER_MARK), True
        lines = text.splitlines(keepends=True)
        # the last line may go on, and one that ends in \r may be half of \r\n
        self._rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            yield from self._line(line.rstrip(b"\r\n"))

    def end(self) -> Iterator[Event]:
        """The event that lacks only its blank line when the stream ends."""
        for line in (self._rest.rstrip(b"\r"), b""):
            yield from self._line(line)

    def _line(self, line: bytes) -> Iterator[Event]:
        if not line:
            if self._data:
                yield Event(b"\n".join(self._data), self._id)
            self._data, self._id = [], b""
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"id":
            self._id = value.removeprefix(b" ")


class ChunkChoice(BaseModel):
    """A piece of one sample; some servers end with the whole message instead of a piece."""

    delta: ChatMessage | None = None
    message: ChatMessage | None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    """The data of one event."""

    choices: list[ChunkChoice] = []
    usage: TokenUsage | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    obfuscation: Any = None
    error: Any = None


class Piece(NamedTuple):
    """Text that one chunk adds."""

    reasoning: str | None
    content: str
    repeated: bool
    """Whether the chunk equals the one before it."""


class Assembly:
    """Chunks in, one answer out."""

    def __init__(self) -> None:
        self.done = False
        """Whether the server said that nothing follows."""
        self.held = 0
        """Characters of text."""
        self._pieces: list[Piece] = []
        self._last = b""
        self._last_id = b""
        self._finish: str | None = None
        self._usage: TokenUsage | None = None
        self._model: str | None = None
        self._fingerprint: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the answer is all there, as far as the stream says."""
        return self.done or self._finish is not None

    def add(self, event: Event) -> None:
        """Take one event. Raises BrokenAnswerError or ErrorInBodyError."""
        if event.data.strip() == DONE:
            self.done = True
            return
        try:
            chunks = [Chunk.model_validate_json(event.data)]
        except ValidationError:
            chunks = [self._of_a_line(line) for line in event.data.splitlines()]
        for chunk in chunks:
            self._take(chunk, event)
        self._last, self._last_id = event.data, event.id

    def _of_a_line(self, line: bytes) -> Chunk:
        """A chunk of a server that leaves the blank lines between events out."""
        if line.strip() == DONE:
            self.done = True
            return Chunk()
        try:
            return Chunk.model_validate_json(line)
        except ValidationError:
            raise BrokenAnswerError(f"not a chunk of an answer: {line.decode(errors='replace')!r}") from None

    def _take(self, chunk: Chunk, event: Event) -> None:
        if chunk.error is not None:
            raise ErrorInBodyError(chunk.error)
        repeated = event.data == self._last
        known_by = chunk.usage is not None or chunk.obfuscation is not None or (event.id and event.id == self._last_id)
        if repeated and known_by:
            return
        self._usage = chunk.usage or self._usage
        self._model = chunk.model or self._model
        self._fingerprint = chunk.system_fingerprint or self._fingerprint
        for choice in chunk.choices[:1]:
            self._finish = choice.finish_reason or self._finish
            if choice.message is not None and choice.message.content:
                self._pieces = []
            self._add_text(choice.message or choice.delta, repeated)

    def _add_text(self, message: ChatMessage | None, repeated: bool) -> None:
        if message is None:
            return
        piece = Piece(message.thought, message.content or "", repeated)
        if piece.reasoning is not None or piece.content:
            self._pieces.append(piece)
            self.held += len(piece.reasoning or "") + len(piece.content)

    def answer(self) -> Answer:
        """What came, put together. Raises BrokenAnswerError where something is missing or came twice."""
        if not self.whole:
            raise BrokenAnswerError("the stream ended before the answer did")
        pieces = without_repeats(self._pieces, self._usage)
        thoughts = [piece.reasoning for piece in pieces if piece.reasoning is not None]
        return Answer(
            "".join(thoughts) if thoughts else None,
            "".join(piece.content for piece in pieces),
            self._finish,
            self._usage,
            self._model,
            self._fingerprint,
        )


def without_repeats(pieces: list[Piece], usage: TokenUsage | None) -> list[Piece]:
    """The pieces without those that surely came twice; see the module's own words.

    Raises BrokenAnswerError where some did and nobody can tell which.
    """
    tokens = usage.completion_tokens if usage else None
    repeated = sum(piece.repeated for piece in pieces)
    too_many = sum(bool(piece.reasoning or piece.content) for piece in pieces) - (tokens or 0)
    if not tokens or not repeated or too_many <= 0 or too_many > repeated:
        return pieces
    if too_many < repeated:
        raise BrokenAnswerError(f"{too_many} of {repeated} equal chunks in the stream came twice")
    return [piece for piece in pieces if not piece.repeated]
