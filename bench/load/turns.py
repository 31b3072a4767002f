"""What all sides of the decoding benchmark share: the prompts, what a turn is, what of it is timed.

Imported by scripts that run in several virtual environments, so it needs nothing but the standard library.
"""

import random
import time
from collections.abc import Callable

from steps import DECODE, PREFILL, asked, memory_mb, say

PROMPT = 128
"""Tokens that are read before decoding is timed."""

Turn = Callable[[str, int], float]
"""Decodes or prefills so many tokens and gives the seconds that took."""


def prompt(tokens: int) -> list[int]:
    """Random tokens, the same for every side and in every turn."""
    draw = random.Random(tokens)
    return [draw.randrange(1000, 32000) for _ in range(tokens)]


def step_by_step(start: Callable[[list[int]], int], step: Callable[[int], int]) -> Turn:
    """Turns of a model that is driven token by token.

    `start` forgets what was read, reads a prompt and gives the token after it; `step` reads one token and gives the
    next. A text goes on whatever token it would end with, so that all sides write the same number of tokens.
    """

    def turn(what: str, tokens: int) -> float:
        ids = prompt(tokens if what == PREFILL else PROMPT)
        began = time.perf_counter()
        token = start(ids)
        if what == DECODE:
            began = time.perf_counter()
            for _ in range(tokens):
                token = step(token)
        return time.perf_counter() - began

    return turn


def answer(turn: Turn) -> None:
    """Say what loading took, then answer turns until nothing more is asked, and say the highest memory."""
    loaded_mb = memory_mb("VmRSS")
    say(ready=True)
    while wanted := asked().split():
        what, tokens = wanted[0], int(wanted[1])
        say(seconds=turn(what, tokens), tokens=tokens)
    say(loaded_mb=loaded_mb, peak_mb=memory_mb("VmHWM"))
