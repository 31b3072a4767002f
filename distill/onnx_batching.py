"""Continuous batching: texts of any length share one key/value cache, and join and leave the batch at any step.

Prompts are prefilled one at a time, in the order they came, in pieces between two steps of the running texts, so that a
long prompt does not hold up the others. Nothing is padded: a row's text does not depend on its neighbours beyond the
rounding of a batched product. What runs the model is the caller's (`OnnxDecoder`); evaluation and serving both run
this loop.
"""

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from distill.onnx_decoding import Shape

Logits = NDArray[np.float32]
Views = dict[str, NDArray[np.floating[Any]]]
Forward = Callable[[NDArray[Any], NDArray[Any], Views], Logits]
"""Runs T new tokens [B, T] of each row behind its cached ones [B]; logits [B, T or 1, vocabulary], of the last token
at least. Writes into the views."""

PREFILL_CHUNK = 256
"""Prompt tokens run at once, between two steps of the texts that are being written."""
SHARED_LEAST = 16
"""Tokens at the start of a prompt that must be in the cache already for a copy to pay."""
NUCLEUS_GUESS = 256
"""Most likely tokens sorted first when sampling with `top_p`; all are sorted only where these do not suffice."""


class Cache:
    """Keys and values of all layers: per layer and kind one array [rows, heads, capacity, head_size].

    Pages that no token reached are never touched and `release` gives a row's pages back, so memory follows the texts,
    not the capacity.
    """

    def __init__(self, shape: "Shape", rows: int, capacity: int, dtype: type[np.floating[Any]] = np.float32) -> None:
        size = (rows, shape.heads, capacity, shape.head_size)
        names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
        self._maps = [_pages(math.prod(size) * np.dtype(dtype).itemsize) for _ in names]
        self.arrays: Views = {name: np.frombuffer(pages, dtype).reshape(size) for name, pages in zip(names, self._maps)}

    @property
    def bytes_a_token(self) -> int:
        """Of all layers together."""
        return sum(array[0, :, 0].nbytes for array in self.arrays.values())

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens of each at full length."""
        rows, _, capacity, _ = next(iter(self.arrays.values())).shape
        return rows, capacity

    def rows(self, first: int, last: int) -> Views:
        """Views of rows `first` to `last` (exclusive); what runs on them writes into the cache."""
        return {name: array[first:last] for name, array in self.arrays.items()}

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row over another."""
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]

    def release(self, row: int) -> None:
        """Give the memory of a row back to the system; what was in it is gone."""
        size = next(iter(self.arrays.values()))[row].nbytes
        first = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this row only
        length = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED, first, length)


def _pages(size: int) -> mmap.mmap:
    """Memory that is only there where it was written to: small pages, since huge ones would follow the capacity."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


@dataclass(eq=False)
class Row:
    """One text being written."""

    prompt: Sequence[int]
    limit: int
    """New tokens it may have at most."""
    rng: np.random.Generator
    end_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    index: int = 0
    """What its owner knows it by."""
    cached: int = 0
    """Tokens whose keys and values are in the cache: all but the last one chosen."""
    shared: int = 0
    """Tokens of the prompt that were copied from another row rather than run."""
    tokens: list[int] = field(default_factory=list)
    """New tokens so far."""
    forced: deque[int] = field(default_factory=deque)
    """Tokens that come next, whatever the model would choose."""

    @property
    def ended(self) -> bool:
        """Whether the last token ends the text, or no more may follow."""
        return bool(self.tokens) and (self.tokens[-1] in self.end_ids or len(self.tokens) >= self.limit)

    @property
    def reserved(self) -> int:
        """Tokens of cache it may come to need."""
        return len(self.prompt) + self.limit

    def extend(self, logits_V: Logits) -> None:
        """Choose the next token."""
        chosen = self.forced.popleft() if self.forced else choose(logits_V, self.temperature, self.top_p, self.rng)
        self.tokens.append(chosen)


class Kept(NamedTuple):
    """A text that ended and whose keys and values are still there, for a prompt that begins with it."""

    place: int
    ids: list[int]


class Batch:
    """Up to `places` rows of a cache, running together.

    `tokens` bounds what all texts may reserve in it (None: as much as it has). Where the cache has more rows than
    `places`, ended texts are kept in them, and a prompt copies the keys and values of a start that it shares with a
    running or a kept text rather than run it again.
    Put rows into `waiting`; call `step` while `busy`. Not safe across threads.
    """

    def __init__(self, forward: Forward, cache: Cache, places: int, tokens: int | None = None) -> None:
        self._forward = forward
        self.cache = cache
        self.places = places
        rows, capacity = cache.size
        self.tokens = rows * capacity if tokens is None else tokens
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        """By their place in the cache: those that write, and behind them at most one that is still being prefilled."""
        self.kept: list[Kept] = []
        """Oldest first."""
        self._free = list(range(places, rows))

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.rows)

    def step(self, prefill_tokens: int | None = None) -> Iterator[Row]:
        """Prefill up to `prefill_tokens` (None: while there is room), then one token for every row that writes.

        Yields each row as it gets a token; one that `ended` has left the batch by then.
        """
        left = prefill_tokens
        while (left is None or left > 0) and (row := self._to_fill()):
            count = self._fill(row, PREFILL_CHUNK if left is None else min(left, PREFILL_CHUNK))
            left = None if left is None else left - count
            if row.tokens:
                yield from self._settled([row])
        if writing := self.rows[: self._writing()]:
            self._advance(writing)
            yield from self._settled(writing)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is; its place is free at once. One that is not there is no error."""
        if row in self.waiting:
            self.waiting.remove(row)
        if row not in self.rows:
            return
        gap = self.rows.index(row)
        self._keep(row, gap)
        for source in sorted({self._writing() - 1, len(self.rows) - 1}):  # the one being prefilled stays the last
            if source > gap:
                self.cache.copy(source, gap, self.rows[source].cached)
                self.rows[gap] = self.rows[source]
                gap = source
        del self.rows[gap]
        self.cache.release(gap)

    def clear(self) -> list[Row]:
        """Take everything out, after a step that failed; returns the rows that were there."""
        rows = [*self.rows, *self.waiting]
        self.waiting.clear()
        for place in range(len(self.rows)):
            self.cache.release(place)
        self.rows.clear()
        while self.kept:
            self._drop_oldest()
        return rows

    def _writing(self) -> int:
        """How many rows have been prefilled."""
        return len(self.rows) - bool(self.rows and not self.rows[-1].tokens)

    def _settled(self, rows: Sequence[Row]) -> Iterator[Row]:
        for row in rows:
            if row.ended:
                self.remove(row)
        yield from rows

    # --- prompts

    def _to_fill(self) -> Row | None:
        """The row that is being prefilled, or the next one if there is room for it."""
        if self.rows and not self.rows[-1].tokens:
            return self.rows[-1]
        if not self.waiting or len(self.rows) >= self.places:
            return None
        reserved = sum(row.reserved for row in self.rows) + self.waiting[0].reserved
        while self.kept and reserved + sum(len(text.ids) for text in self.kept) > self.tokens:
            self._drop_oldest()
        if self.rows and reserved > self.tokens:
            return None
        row = self.waiting.popleft()
        self.rows.append(row)
        self._share(row, len(self.rows) - 1)
        return row

    def _fill(self, row: Row, most: int) -> int:
        """Run the next piece of a prompt; behind its end the first token is chosen. Returns the tokens run."""
        place = len(self.rows) - 1
        ids = row.prompt[row.cached : row.cached + most]
        logits_1TV = self._forward(np.array([ids]), np.array([row.cached]), self.cache.rows(place, place + 1))
        row.cached += len(ids)
        if row.cached == len(row.prompt):
            row.extend(logits_1TV[0, -1])
        return len(ids)

    def _advance(self, rows: Sequence[Row]) -> None:
        """One step for all rows that write: feed each its last token, choose the next."""
        ids_B1 = np.array([[row.tokens[-1]] for row in rows])
        logits_B1V = self._forward(ids_B1, np.array([row.cached for row in rows]), self.cache.rows(0, len(rows)))
        for row, logits_V in zip(rows, logits_B1V[:, 0], strict=True):
            row.cached += 1
            row.extend(logits_V)

    # --- what texts share

    def _share(self, row: Row, place: int) -> None:
        """Copy the longest start of a prompt that is in the cache already; its last token is always run."""
        if not self._free and not self.kept:
            return
        there = [(other, [*it.prompt, *it.tokens][: it.cached]) for other, it in enumerate(self.rows[:-1])]
        there += [(text.place, text.ids) for text in self.kept]
        count, source = max(
            ((common_start(ids, row.prompt[:-1]), other) for other, ids in there),
            default=(0, 0),
            key=lambda one: one[0],
        )
        if count >= SHARED_LEAST:
            self.cache.copy(source, place, count)
            row.cached = row.shared = count

    def _keep(self, row: Row, place: int) -> None:
        """Copy a text that leaves to a place of its own, in place of the oldest kept one or of its own beginning."""
        if row.cached < SHARED_LEAST or not (self._free or self.kept):
            return
        ids = [*row.prompt, *row.tokens][: row.cached]
        for text in [text for text in self.kept if text.ids == ids[: len(text.ids)]]:
            self._drop(text)
        if not self._free:
            self._drop_oldest()
        target = self._free.pop()
        self.cache.copy(place, target, row.cached)
        self.kept.append(Kept(target, ids))

    def _drop_oldest(self) -> None:
        self._drop(self.kept[0])

    def _drop(self, text: Kept) -> None:
        self.kept.remove(text)
        self._free.append(text.place)
        self.cache.release(text.place)


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    for count, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return count
    return min(len(first), len(second))


# --- sampling -------------------------------------------------------------------------------------------------------


def choose(logits_V: Logits, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The next token: the most likely at temperature 0, else drawn from softmax(logits / temperature).

    With `top_p` below 1 only the most likely tokens whose probabilities first reach `top_p` together can be drawn
    (Holtzman et al. 2020, nucleus sampling). Ties go to the lower id.
    """
    if temperature <= 0:
        return int(logits_V.argmax())
    weights_V = logits_V.astype(np.float64)  # in place from here on: this is done for every row of every step
    weights_V /= temperature
    weights_V -= weights_V.max()
    np.exp(weights_V, out=weights_V)
    weights_V /= weights_V.sum()
    tokens = np.arange(weights_V.size) if top_p >= 1 else nucleus(weights_V, top_p)
    cumulative = weights_V[tokens].cumsum()
    drawn = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(tokens[min(drawn, tokens.size - 1)])


def nucleus(probabilities_V: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ids of the fewest tokens, most likely first, whose probabilities reach `top_p` together (at least one)."""
    # tokens below this have less than 1 - top_p together, so that all others reach it
    likely = np.flatnonzero(probabilities_V >= (1 - top_p) / probabilities_V.size)
    candidates = likely
    if likely.size > NUCLEUS_GUESS:
        first = np.argpartition(probabilities_V[likely], -NUCLEUS_GUESS)[-NUCLEUS_GUESS:]
        candidates = np.sort(likely[first])
    if probabilities_V[candidates].sum() < top_p:
        candidates = likely
    order = candidates[np.argsort(-probabilities_V[candidates], kind="stable")]
    reached = np.searchsorted(probabilities_V[order].cumsum(), top_p)
    return order[: int(reached) + 1]
