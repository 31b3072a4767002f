"""Metrics sent to trackers beside metrics.jsonl, through accelerate: TensorBoard, W&B, MLflow, Trackio."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from distill.errors import MissingExtraError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""The package of each tracker."""


class Send(Protocol):
    """Sends the numbers of one step."""

    def __call__(self, values: Mapping[str, Any], step: int) -> None:
        """Send what is a number; the rest is left out."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise MissingExtraError(PACKAGES[name], "track" if name == "tensorboard" else name)


@contextmanager
def trackers(names: Sequence[str], project: str, run: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[Send]:
    """Open the recipe's trackers for a run; yields what sends to all of them, or to nobody where there are none.

    `folder` is where trackers that write files do so; `settings` are the run's plain settings, shown beside its curves.
    """
    if not names:
        yield lambda values, step: None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    opened = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(run if name == "tensorboard" else project, **where)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration({key: value for key, value in settings.items() if _plain(value)})
        opened.append(tracker)

    def send(values: Mapping[str, Any], step: int) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
        for tracker in opened:
            tracker.log(numbers, step=step)

    try:
        yield send
    finally:
        for tracker in opened:
            tracker.finish()


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool)
