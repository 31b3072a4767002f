"""Which documents make an optimizer step, and how they are packed into forward passes.

A step is planned as a set of documents first, so how it is cut into micro-batches changes nothing but rounding.
Documents are never split; a pack restarts positions at every document and carries its boundaries.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.errors import TrainingError


class Pack(NamedTuple):
    """Documents of one forward pass, laid end to end.

    ids_T, positions_T: int64 [T]; rows_N: positions in the pack whose *next* token is supervised, int64 [N];
    targets_N: those next tokens, int64 [N]; bounds: document starts and the end, len(documents) + 1 ints.
    """

    ids_T: np.ndarray[Any, np.dtype[np.int64]]
    positions_T: np.ndarray[Any, np.dtype[np.int64]]
    rows_N: np.ndarray[Any, np.dtype[np.int64]]
    targets_N: np.ndarray[Any, np.dtype[np.int64]]
    bounds: list[int]


def plan_steps(
    lengths: Sequence[int], step_tokens: int, epochs: float, seed: int, max_steps: int | None = None
) -> list[list[int]]:
    """Document indices of every optimizer step, epoch by epoch, each epoch in its own seeded order.

    A step takes documents in that order until the next would exceed `step_tokens` (at least one). A fractional epoch
    takes that share of the last order. The last step of training may be smaller.
    """
    order: list[int] = []
    whole, part = divmod(epochs, 1)
    for epoch in range(int(whole) + (part > 0)):
        shuffled = list(range(len(lengths)))
        random.Random(f"{seed}:{epoch}").shuffle(shuffled)
        order += shuffled if epoch < whole else shuffled[: max(1, round(part * len(lengths)))]
    steps: list[list[int]] = []
    room = 0
    for index in order:
        if not steps or lengths[index] > room:
            steps.append([])
            room = step_tokens
        steps[-1].append(index)
        room -= lengths[index]
    return steps[:max_steps]


def pack_step(documents: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
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
            rooms[at] -= lengths[index]
        else:
            packs.append([index])
            rooms.append(budget - lengths[index])
    return packs


def lay_out(ids: Sequence[Any], prompt_tokens: Sequence[int], pack: Sequence[int]) -> Pack:
    """The arrays of one pack.

    Raises TrainingError if nothing in it is supervised.
    """
    lengths = [len(ids[index]) for index in pack]
    bounds = [0, *np.cumsum(lengths).tolist()]
    rows = [
        np.arange(start + prompt_tokens[index] - 1, start + length - 1)
        for index, start, length in zip(pack, bounds, lengths)
    ]
    flat = np.concatenate([ids[index] for index in pack]).astype(np.int64)
    rows_N = np.concatenate(rows).astype(np.int64)
    if len(rows_N) == 0:
        raise TrainingError("a pack has no supervised tokens")
    return Pack(flat, np.concatenate([np.arange(n) for n in lengths]), rows_N, flat[rows_N + 1], bounds)
