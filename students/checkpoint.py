"""Checkpoints from which a killed training goes on, bit for bit.

One file a checkpoint, written aside and moved into place: master weights, optimizer state, the step to do next and
what identifies the data. The two newest are kept, so a kill while one is written leaves the other.
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.errors import TrainingError
from distill.progress import say

KEPT = 2
PREFIX, SUFFIX = "checkpoint-", ".pt"


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the state reached after `step` optimizer steps, then drop all but the newest checkpoints."""
    path = folder / f"{PREFIX}{step:08d}{SUFFIX}"
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        torch.save({"step": step, **state}, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


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
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
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
