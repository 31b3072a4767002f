"""Which prompts train, which are held out and which are dropped: decided over a few integers a row.

Sources of any size are split and mixed here without their texts: a row is its prompt's id, a hash of its reference
answer, of the numbers in its question, and its group's place in the draw. Nothing here reads or writes a file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distill.config import PromptSource
from distill.errors import DataError, RecipeError

MARKS = np.dtype([("id", np.uint64), ("gold", np.int64), ("numbers", np.int64), ("rank", np.uint64)])
"""What is kept of a row: the prompt's id; a hash of its reference answer, 0 where there is none; a hash of the numbers
in its question, 0 where there are none or nobody asks; where its group stands in its source's draw. 64 bits each: among
a million prompts, two different ones share a value with odds of one in 30 million."""

Marks: TypeAlias = "NDArray[np.void]"
"""The rows of one source, as `MARKS`."""
Rows: TypeAlias = "NDArray[np.intp]"
"""Indices into the rows of one source."""

DROPPED, TRAIN, HELDOUT = range(3)


class Choice(NamedTuple):
    """What becomes of the rows of one source."""

    train: Rows
    """In the order of the rows."""
    heldout: Rows
    """In the order in which they were drawn."""
    counts: dict[str, int]

    def sides(self, rows: int) -> NDArray[np.uint8]:
        """DROPPED, TRAIN or HELDOUT for each row."""
        sides = np.full(rows, DROPPED, np.uint8)
        sides[self.train], sides[self.heldout] = TRAIN, HELDOUT
        return sides


def drawn_places(choices: Iterable[Choice]) -> Iterator[int]:
    """Where each held-out prompt, as drawn, stands among the held-out ones of all sources in the order of rows."""
    before = 0
    for choice in choices:
        yield from (before + np.argsort(np.argsort(choice.heldout))).tolist()
        before += len(choice.heldout)


def choose(sources: Sequence[PromptSource], marks: Sequence[Marks]) -> list[Choice]:
    """Split and mix sources; a prompt of several sources belongs to the first.

    Raises RecipeError if a source would hold everything out, DataError if nothing is left to train on.
    """
    own = first_rows(marks)
    splits = [split(of_one, rows, source) for of_one, rows, source in zip(marks, own, sources)]
    numbers = _heldout_numbers(sources, marks, splits)
    apart = [cut.train[~np.isin(of_one["numbers"][cut.train], numbers)] for of_one, cut in zip(marks, splits)]
    trained = subsample(sources, marks, apart)
    if not any(len(train) for train in trained):
        raise DataError("prompts: nothing is left to train on; hold out fewer prompts or add some")
    return [
        Choice(
            train,
            cut.heldout,
            {
                **counted(of_one, rows),
                "split_surplus": len(rows) - len(cut.train) - len(cut.heldout),
                "kept_apart": len(cut.train) - len(kept),
                "subsampled_away": len(kept) - len(train),
                "train": len(train),
                "heldout": len(cut.heldout),
            },
        )
        for of_one, rows, cut, kept, train in zip(marks, own, splits, apart, trained)
    ]


def hold_out_all(marks: Marks) -> Choice:
    """Every prompt of a set's own source, in the order of the rows."""
    [rows] = first_rows([marks])
    return Choice(rows[:0], rows, {**counted(marks, rows), "heldout": len(rows)})


def first_rows(marks: Sequence[Marks]) -> list[Rows]:
    """The rows of each source whose prompt no earlier row of this or an earlier source has."""
    ids = np.concatenate([of_one["id"] for of_one in marks])
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    ends = np.cumsum([len(of_one) for of_one in marks])
    return [np.flatnonzero(of_one) for of_one in np.split(first, ends[:-1])]


def counted(marks: Marks, own: Rows) -> dict[str, int]:
    """What was met while reading a source: `conflicting` rows repeat a prompt of the source with another answer."""
    _, first, which = np.unique(marks["id"], return_index=True, return_inverse=True)
    gold = marks["gold"]
    return {
        "rows": len(marks),
        "duplicates": len(marks) - len(own),
        "conflicting": int(np.count_nonzero(gold != gold[first][which])),
        "no_gold": int(np.count_nonzero(gold[first] == 0)),
    }


# --- splitting ------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Training rows in their order, held-out rows in the order in which they were drawn."""

    train: Rows
    heldout: Rows


def split(marks: Marks, rows: Rows, source: PromptSource) -> Split:
    """Set `source.heldout` prompts aside, whole groups at a time, the same ones whatever the order of rows.

    Groups are taken by rank; where the last one is larger than needed, its surplus is on neither side. Raises
    RecipeError if nothing would be left to train on.
    """
    if source.heldout == 0:
        return Split(rows, rows[:0])
    if source.heldout >= len(rows):
        raise RecipeError(
            f"prompts source {source.name!r}: heldout is {source.heldout}, but there are only {len(rows)} distinct"
            " prompts; hold out fewer or add prompts"
        )
    ranks = marks["rank"][rows]
    drawn = np.lexsort((marks["id"][rows], ranks))[: source.heldout]
    return Split(rows[~np.isin(ranks, ranks[drawn])], rows[drawn])


def rank(seed: int, what: str) -> int:
    """Where something stands in a draw: 64 bits that depend on it and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}".encode()).digest()[:8])


def _heldout_numbers(
    sources: Iterable[PromptSource], marks: Iterable[Marks], splits: Iterable[Split]
) -> NDArray[np.int64]:
    """The numbers of what is held out, of the sources that keep them apart."""
    found = [
        of_one["numbers"][cut.heldout]
        for source, of_one, cut in zip(sources, marks, splits)
        if source.split_by == "numbers"
    ]
    numbers: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *found])
    return np.setdiff1d(numbers, [0])


# --- weights --------------------------------------------------------------------------------------------------------


def subsample(sources: Sequence[PromptSource], marks: Sequence[Marks], train: Sequence[Rows]) -> list[Rows]:
    """Shrink the sources that have weights until their counts are in proportion to them; none grows.

    The source that is scarcest for its weight stays whole; which prompts of the others stay is decided by a hash of
    the seed and the prompt, so it does not depend on the order of rows.
    """
    scales = [Fraction(len(rows)) / Fraction(source.weight) for source, rows in zip(sources, train) if source.weight]
    return [
        rows if source.weight is None else _some(source, of_one, rows, int(min(scales) * Fraction(source.weight)))
        for source, of_one, rows in zip(sources, marks, train)
    ]


def _some(source: PromptSource, marks: Marks, rows: Rows, count: int) -> Rows:
    """So many of the rows, in their order."""
    if count == len(rows):
        return rows
    ids = marks["id"][rows].tolist()
    ranks = np.fromiter((rank(source.split_seed, f"mixture:{prompt:016x}") for prompt in ids), np.uint64)
    return np.sort(rows[np.argsort(ranks, kind="stable")[:count]])


# --- what is said of it ---------------------------------------------------------------------------------------------


def totals(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Sums over the sources, and each source beside them."""
    keys = dict.fromkeys(key for of_source in counts.values() for key in of_source)
    sums = {key: sum(of_source.get(key, 0) for of_source in counts.values()) for key in keys}
    return {**sums, "sources": {name: dict(of_source) for name, of_source in counts.items()}}


NOTED = {
    "duplicates": "dropped {count} of {rows} rows: the same prompt had been read before",
    "conflicting": "{count} of those duplicates have another reference answer than the first; look at the data",
    "no_gold": "{count} prompts have no reference answer and cannot be verified",
    "split_surplus": "dropped {count} prompts that share their numbers with held-out ones beyond the number asked for",
    "kept_apart": "dropped {count} training prompts that share their group with held-out ones of another source",
    "subsampled_away": "left out {count} prompts to keep the mixture's weights",
}
"""Decisions worth a line, by their count."""


def notes(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The decisions in words, source by source."""
    lines = []
    for name, of_source in counts.items():
        for key, text in NOTED.items():
            if of_source.get(key):
                lines.append(f"{name}: " + text.format(count=of_source[key], rows=of_source["rows"]))
        train = f"{of_source['train']} to train, " if "train" in of_source else ""
        lines.append(f"{name}: {train}{of_source['heldout']} held out")
    return lines
