"""The share of the teacher in TAID's moving target, step by step (Shing et al. 2025, section 3.2 and algorithm 1).

`linear` rises evenly. `adaptive` is never below that, never falls, and goes ahead of it by rate * sigmoid(m) *
(1 - share) a step, m being a running mean of the loss's relative fall from step to step. Its state is three numbers of
a checkpoint, so a resumed training has the very shares of one that was not stopped.
"""

import math
from dataclasses import dataclass
from typing import Any

from distill.config import KdPhase

TINY = 1e-15
"""Keeps a loss of zero out of the denominator."""


@dataclass
class TeacherShare:
    """The share at the step to come; `take` tells it the loss of each step, in order."""

    phase: KdPhase
    steps: int
    """Steps of the whole training."""
    share: float = 0.0
    momentum: float = 0.0
    loss: float | None = None
    """Of the step before."""

    def at(self, step: int) -> float:
        """The share in step `step`, counted from 0."""
        even = self._even(step)
        return even if self.phase.taid_schedule == "linear" else max(even, self.share)

    def take(self, step: int, loss: float) -> None:
        """Note the loss of step `step`, made with its share."""
        before, self.loss = self.loss, loss
        self.share = self.at(step)
        if before is None:
            return
        keep = self.phase.taid_momentum
        self.momentum = keep * self.momentum + (1 - keep) * (before - loss) / (before + TINY)
        ahead = self.phase.taid_rate * _sigmoid(self.momentum) * (1 - self.share)
        self.share = min(self.phase.taid_end, self.share + ahead)

    def _even(self, step: int) -> float:
        start, end = self.phase.taid_start, self.phase.taid_end
        return start + (end - start) * (step / max(1, self.steps - 1))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in ("share", "momentum", "loss")}

    def load(self, state: dict[str, Any]) -> None:
        """The way back of `state`."""
        for name, value in state.items():
            setattr(self, name, value)


def _sigmoid(value: float) -> float:
    """Written so that no argument overflows."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
