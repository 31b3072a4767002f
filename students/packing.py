"""Which documents make an optimizer step, and how they are cut into forward passes.

A step is planned as a set of documents first, then as a list of packs that depends on nothing but that set; so how many
micro-batches or processes share it changes nothing but rounding. Documents are never split; a pack restarts positions
at every document and carries its boundaries.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill.config import LossWeights
from distill.documents import Array, Documents
from distill.errors import TrainingError
from distill.format import PROMPT, SEGMENTS

BUCKET_SPREAD = 1.25
"""How much longer than its shortest document a bucketed batch may be padded."""


class Pack(NamedTuple):
    """Documents of one forward pass.

    ids_BT, positions_BT: int64; packed documents lie end to end in one row (B = 1), bucketed ones in a row each, padded
    on the right. rows_N: cells of the flattened B x T grid whose *next* token is supervised, int64; targets_N: those
    next tokens, int64; weights_N: their weights in the loss, float32; segments_N: what they are, uint8. bounds:
    document starts and the end where documents are packed, else None.
    """

    ids_BT: Array
    positions_BT: Array
    rows_N: Array
    targets_N: Array
    weights_N: Array
    segments_N: Array
    bounds: list[int] | None
    documents: Sequence[int] = ()
    """Numbers of the documents, in order."""
    places_N: Array = np.zeros(0, np.int64)
    """Place of each row's target among all tokens of these documents that are not of a prompt, int64."""

    @property
    def weight(self) -> float:
        """What the summed loss of this pack is divided by, with that of its step's other packs."""
        return float(self.weights_N.sum(dtype=np.float64))


class Source(NamedTuple):
    """A set of documents of which every epoch takes some."""

    indices: Sequence[int]
    """Which of the documents."""
    weight: float | None = None
    """Tokens for each token of the traces; None takes every document once an epoch."""


def epochs_of(sources: Sequence[Source], lengths: Sequence[int] | Array, epochs: float, seed: int) -> Iterator[int]:
    """Document indices in the order of training, epoch by epoch, each in its own seeded order.

    The first source is the traces. Of the others every epoch takes documents worth `weight` times the traces' tokens,
    going on where the epoch before ended. A fractional epoch takes that share of the last order.
    """
    traces, *others = sources
    budget = sum(int(lengths[index]) for index in traces.indices)
    streams = [_endless(source.indices, f"{seed}:replay:{place}") for place, source in enumerate(others)]
    whole, part = divmod(epochs, 1)
    for epoch in range(int(whole) + (part > 0)):
        order = list(traces.indices)
        for source, stream in zip(others, streams):
            assert source.weight is not None
            order += _worth(stream, lengths, source.weight * budget)
        random.Random(f"{seed}:{epoch}").shuffle(order)
        yield from order if epoch < whole else order[: max(1, round(part * len(order)))]


def _endless(indices: Sequence[int], seed: str) -> Iterator[int]:
    passes = 0
    while True:
        order = list(indices)
        random.Random(f"{seed}:{passes}").shuffle(order)
        yield from order
        passes += 1


def _worth(stream: Iterator[int], lengths: Sequence[int] | Array, tokens: float) -> list[int]:
    """The next documents of a stream until they have so many tokens."""
    taken: list[int] = []
    while tokens > 0:
        taken.append(next(stream))
        tokens -= int(lengths[taken[-1]])
    return taken


def plan_steps(
    order: Iterator[int] | Sequence[int], lengths: Sequence[int] | Array, step_tokens: int, max_steps: int | None = None
) -> list[list[int]]:
    """Document indices of every optimizer step.

    A step takes documents in order until the next would exceed `step_tokens` (at least one). The last step of training
    may be smaller.
    """
    steps: list[list[int]] = []
    room = 0
    for index in order:
        length = int(lengths[index])
        if not steps or length > room:
            if len(steps) == max_steps:
                break
            steps.append([])
            room = step_tokens
        steps[-1].append(index)
        room -= length
    return steps


# --- cutting a step into passes -------------------------------------------------------------------------------------


def pack_step(documents: Sequence[int], lengths: Sequence[int] | Array, budget: int) -> list[list[int]]:
    """Best-fit decreasing: the documents of a step as packs of at most `budget` tokens.

    A document longer than the budget gets a pack of its own. Deterministic.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(documents, key=lambda i: (-lengths[i], i)):
        fitting = [(room, at) for at, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            _, at = min(fitting)
            packs[at].append(index)
            rooms[at] -= int(lengths[index])
        else:
            packs.append([index])
            rooms.append(budget - int(lengths[index]))
    return packs


def bucket_step(documents: Sequence[int], lengths: Sequence[int] | Array, budget: int) -> list[list[int]]:
    """The documents of a step as batches of like length, of at most `budget` tokens with padding. Deterministic."""
    batches: list[list[int]] = []
    for index in sorted(documents, key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        room = batches and (len(batches[-1]) + 1) * longest <= budget
        if room and longest <= BUCKET_SPREAD * lengths[index]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def lay_out(documents: Documents, chosen: Sequence[int], weights: LossWeights | None = None) -> Pack:
    """The arrays of one pack of documents laid end to end.

    Raises TrainingError if nothing in it is supervised.
    """
    lengths = [int(documents.lengths[index]) for index in chosen]
    bounds = [0, *np.cumsum(lengths).tolist()]
    ids_T = np.concatenate([documents.ids(index) for index in chosen]).astype(np.int64)
    segments_T = np.concatenate([documents.segments(index) for index in chosen])
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    return _supervised(ids_T[None], positions_T[None], segments_T[None], bounds, weights, chosen)


def lay_side_by_side(documents: Documents, chosen: Sequence[int], weights: LossWeights | None = None) -> Pack:
    """The arrays of a batch with a document a row, padded on the right with cells that nothing sees or predicts."""
    longest = max(int(documents.lengths[index]) for index in chosen)
    ids_BT, segments_BT = np.zeros((len(chosen), longest), np.int64), np.zeros((len(chosen), longest), np.uint8)
    for row, index in enumerate(chosen):
        length = int(documents.lengths[index])
        ids_BT[row, :length] = documents.ids(index)
        segments_BT[row, :length] = documents.segments(index)
    positions_BT = np.broadcast_to(np.arange(longest), ids_BT.shape).copy()
    return _supervised(ids_BT, positions_BT, segments_BT, None, weights, chosen)


def _supervised(
    ids_BT: Array,
    positions_BT: Array,
    segments_BT: Array,
    bounds: list[int] | None,
    weights: LossWeights | None,
    documents: Sequence[int],
) -> Pack:
    loss_weights = weights or LossWeights()
    by_segment = np.array([0.0, *(getattr(loss_weights, name) for name in SEGMENTS[1:])], np.float32)
    weights_BT = by_segment[segments_BT]
    weights_BT[:, 0] = 0  # nothing stands before the first token of a row
    targets = np.flatnonzero(weights_BT)
    if len(targets) == 0:
        raise TrainingError("a pack has no supervised tokens")
    flat, kinds = ids_BT.reshape(-1), segments_BT.reshape(-1)
    places = np.cumsum(kinds != PROMPT) - 1
    return Pack(
        ids_BT, positions_BT, targets - 1, flat[targets], weights_BT.reshape(-1)[targets], kinds[targets], bounds,
        documents, places[targets],
    )  # fmt: skip
