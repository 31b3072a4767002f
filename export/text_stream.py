"""Text from token ids as they come: whole characters only, reasoning apart from the answer, cut at stop sequences.

Each piece takes text in any portions and holds back what the next portion could still change, so that what was given
out never has to be taken back.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

UNFINISHED = "\ufffd"
"""What decoding gives for bytes that are not a whole character (yet)."""
MOST_PENDING = 8
"""Tokens after which bytes that are still no character are taken as they are; four make any character."""


class Detokenizer:
    """Text of token ids, one by one; together what `decode` gives for all of them, less half a character at the end.

    A token that ends inside a character is held until the character is whole. Earlier tokens are decoded along, because
    some decoders treat the first token of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0
        """Tokens of `_ids` whose text was given out."""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        before, text = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._given < MOST_PENDING:
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text[len(before) :]

    def end(self) -> str:
        """What is left at the end; a character that a limit cut in half is left out."""
        text = self._decode(self._ids)[len(self._decode(self._ids[: self._given])) :]
        self._ids, self._given = [], 0
        return text.rstrip(UNFINISHED)


class Split(NamedTuple):
    """A portion of text by what it is."""

    reasoning: str = ""
    answer: str = ""


class ReasoningSplitter:
    """Takes the reasoning out of a text: what stands between the markers, or before the closing one if `opened`.

    As `distill.format.parse_completion` reads a whole text, with what a stream cannot know left out: an opening marker
    counts at the start only, and the first closing one ends the reasoning.
    """

    def __init__(self, open_marker: str, close_marker: str, opened: bool) -> None:
        self._open, self._close = open_marker, close_marker
        self.state: Literal["start", "reasoning", "answer"] = "reasoning" if opened else "start"
        self._opened = opened
        self._held = ""
        self._begun = False
        """Whether the part we are in has given out anything: white space at its start is left out."""

    @property
    def at_marker(self) -> bool:
        """Whether the text ends in what may become the closing marker."""
        return self.state == "reasoning" and bool(overlap(self._held, self._close))

    def push(self, text: str) -> Split:
        """The reasoning and the answer that are certain now."""
        self._held += text
        if self.state == "start":
            self._start()
        reasoning = self._reasoning() if self.state == "reasoning" else ""
        return Split(reasoning, self._answer() if self.state == "answer" else "")

    def end(self) -> Split:
        """What is left at the end: the start of a marker was none after all; white space behind reasoning goes."""
        held, self._held = self._held, ""
        if self.state == "reasoning":
            return Split(reasoning=held.rstrip() if self._begun else held.strip())
        return Split(answer=held if self._begun else held.lstrip())

    def _start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._open):
            self.state, self._held = "reasoning", text[len(self._open) :]
        elif not self._open.startswith(text):
            self.state = "answer"

    def _reasoning(self) -> str:
        if self._opened:  # some models write the marker that the prompt holds once more
            text = self._held.lstrip()
            if text != self._open and self._open.startswith(text):
                return ""
            self._held, self._opened = text.removeprefix(self._open), False
        before, marker, behind = self._held.partition(self._close)
        if marker:
            self.state, self._held = "answer", behind
            text, self._begun = before.rstrip() if self._begun else before.strip(), False
            return text
        return self._sure(len(before) - overlap(before, self._close), keep_space=False)

    def _answer(self) -> str:
        return self._sure(len(self._held), keep_space=True)

    def _sure(self, length: int, keep_space: bool) -> str:
        """Give out up to `length` characters of what is held, less white space that may stand at an edge."""
        text = self._held[:length]
        text = text if keep_space else text.rstrip()
        self._held = self._held[len(text) :]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


class StopFinder:
    """Cuts a text before the stop sequence that is complete first (the longest of several), whatever the portions."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text before a stop sequence, as far as it is certain; nothing once one was found."""
        if self.found:
            return ""
        text = self._held + text
        spans = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if spans:
            self.found, self._held = True, ""
            return text[: min(spans)[1]]
        length = len(text) - max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[length:]
        return text[:length]

    def end(self) -> str:
        """What was held back in case it became a stop sequence."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is the start of `marker`, but not all of it."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if marker.startswith(text[-size:])), 0)
