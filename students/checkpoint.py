"""Checkpoints from which a killed training goes on, bit for bit.

One file a checkpoint: whole fp32 weights and optimizer state by parameter name (so any number of processes can go on
from it), the running mean, what early stopping has seen, the step to do next, and what identifies the data. There is
no random state and no cursor to keep: every draw and every order follows from the seed and the step. A copy of the
state is written by a thread while training goes on, aside and then moved into place. The newest few are kept, so a
kill while one is written leaves the others.
"""

import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.errors import TrainingError
from distill.progress import say
from distill.runs import PARTIAL

PREFIX, SUFFIX = "checkpoint-", ".pt"
BEST = "best.pt"


class CheckpointWriter:
    """Writes checkpoints of one folder in the background, one at a time; keeps the `keep` newest."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write the state reached after `step` optimizer steps; its tensors must not change any more.

        Waits for the one before. Raises what writing that one raised.
        """
        self.finish()
        path = self.folder / f"{PREFIX}{step:08d}{SUFFIX}"
        self._thread = threading.Thread(target=self._write, args=(path, {"step": step, **state}), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; raises what writing it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            write_state(path, state)
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()
        except BaseException as error:  # raised again where the training can see it
            self._error = error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors aside, flush them to the disk and move them into place.

    Raises OSError where the disk refuses.
    """
    part = path.with_name(path.name + PARTIAL)
    with part.open("wb") as out:
        try:
            torch.save(dict(state), out)
        except RuntimeError as error:  # torch says at which byte it failed; why is what came before
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first; unfinished ones (`.part`) do not count."""
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))


def load_newest(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest readable checkpoint's state, or None where there is none.

    A damaged one is passed over, and that is said. `expected` are entries that must be equal for a resume to make
    sense (digest of the data, number of steps). Raises TrainingError naming the one that differs, or if every
    checkpoint is damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            state = read_state(path)
        except (RuntimeError, OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
            say(f"{path}: damaged, passed over ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
            continue
        _check_expected(path, state, expected)
        return state
    if found:
        raise TrainingError(f"{folder}: no checkpoint can be read; delete the folder to start this stage again")
    return None


def _check_expected(path: Path, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if state.get(key) != value:
            raise TrainingError(
                f"{path}: was written for another {key} ({state.get(key)!r}, now {value!r});"
                f" delete {path.parent} to start this stage again"
            )
