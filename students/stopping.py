"""Early stopping: when a figure of the monitor has not improved for long enough, and which step was best."""

import math
from collections.abc import Mapping
from typing import Any

from distill.config import EarlyStopping
from distill.errors import TrainingError


class Stopping:
    """What has been seen so far; without a rule it never stops and knows no best step."""

    def __init__(self, rule: EarlyStopping | None) -> None:
        self.rule = rule
        self.best: float | None = None
        self.best_step: int | None = None
        self.looks_since = 0

    @property
    def stopped(self) -> bool:
        """Whether training should end now."""
        return self.rule is not None and self.looks_since >= self.rule.patience

    def take(self, figures: Mapping[str, Any], step: int) -> bool:
        """Take a look's figures in; whether they are the best so far.

        Raises TrainingError if the figure that the rule reads is not among them.
        """
        if self.rule is None:
            return False
        value = figures.get(self.rule.metric)
        if value is None:
            raise TrainingError(f"early_stopping.metric {self.rule.metric} was not measured at step {step}")
        sign = -1 if self.rule.metric == "heldout_loss" else 1
        gain = math.inf if self.best is None else sign * (value - self.best)
        if gain > self.rule.min_delta and not math.isnan(value):
            self.best, self.best_step, self.looks_since = value, step, 0
            return True
        self.looks_since += 1
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "looks_since": self.looks_since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.best, self.best_step, self.looks_since = state["best"], state["best_step"], state["looks_since"]
