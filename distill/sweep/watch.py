"""Stopping trainings that fall behind: figures of their monitors, judged by one of Optuna's pruners.

A training that is shared by several trials is judged once. Earlier trainings, finished or not, count by the figures
that their `metrics.jsonl` still holds, so a driver that starts again knows what the last one knew.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .config import Pruner
from .study import optuna

METRICS = "metrics.jsonl"


class Watch:
    """Follows the figures of running trainings and says which should stop."""

    def __init__(self, pruner: Pruner, earlier: Iterable[Path] = ()) -> None:
        self.pruner = pruner
        self.library = optuna()
        direction = "maximize" if pruner.rising else "minimize"
        # in memory: it is made anew from the trainings' own files
        self.study = self.library.create_study(direction=direction, pruner=self._judge())
        self.followed: dict[Path, Any] = {}
        self.reported: dict[Path, int] = {}
        for folder in earlier:
            self._remember(folder)

    def _judge(self) -> Any:
        of = self.library.pruners
        if self.pruner.kind == "median":
            return of.MedianPruner(n_startup_trials=2, n_warmup_steps=self.pruner.first_step)
        return of.SuccessiveHalvingPruner(
            min_resource=max(1, self.pruner.first_step), reduction_factor=self.pruner.reduction
        )

    @property
    def label(self) -> str:
        """Label of the stages that are watched."""
        return f"train:{self.pruner.phase}"

    def _remember(self, folder: Path) -> None:
        """Count a training that ended earlier, figure by figure: some pruners keep notes while they judge."""
        if any(figures(folder, self.pruner.metric)):
            while self.falls_behind(folder):
                pass
            self.ended(folder)

    def falls_behind(self, folder: Path) -> tuple[int, float] | None:
        """Read what a running training has written since; the step and figure at which it should stop, if it should."""
        trial = self.followed.setdefault(folder, None) or self.study.ask()
        self.followed[folder] = trial
        for step, value in figures(folder, self.pruner.metric):
            if step <= self.reported.get(folder, -1):
                continue
            self.reported[folder] = step
            trial.report(value, step)
            if trial.should_prune():
                return step, value
        return None

    def ended(self, folder: Path) -> None:
        """A training has ended; its last figure counts for the others."""
        if (trial := self.followed.pop(folder, None)) is not None:
            looks = dict(figures(folder, self.pruner.metric))
            state = self.library.trial.TrialState
            if looks:
                self.study.tell(trial, looks[max(looks)])
            else:
                self.study.tell(trial, state=state.FAIL)


def figures(folder: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Step and value of a figure in a training's metrics, as far as it has come; a torn last line is left out."""
    path = folder / METRICS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if "loss" not in row and isinstance(value := row.get(metric), int | float):
            yield int(row["step"]), float(value)
