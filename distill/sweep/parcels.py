"""Finished stages and input files on their way to a node that does not see them, and back.

A parcel is plain values and byte arrays, which Ray's object store holds once for all nodes that ask. What is unpacked
is what was sealed, byte for byte, or it is refused; `stage.json` is written last, so a kill leaves no finished run.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from distill.config import Recipe
from distill.errors import LockedError, RunError
from distill.runs import PARTIAL, STAGE_FILE, locked, open_sealed

INPUTS = "inputs"
"""Folder of a node's run store for files that the recipe names."""
POLL_S = 0.2


class Parcel(NamedTuple):
    """The files of one folder, or one file, under their relative names."""

    files: dict[str, Any]
    """Bytes as uint8 arrays: they travel without being copied."""
    document: dict[str, Any]
    """The stage.json of a stage run; empty for files that the recipe names."""

    @property
    def digest(self) -> str:
        """What the files are, by name and content."""
        names = "\n".join(f"{name} {_digest(self.files[name])}" for name in sorted(self.files))
        return hashlib.sha256(names.encode()).hexdigest()


def pack_stage(folder: Path) -> Parcel:
    """A finished stage run, its bytes checked. Raises RunError if it is unfinished or was changed."""
    sealed = open_sealed(folder)
    return Parcel({name: _bytes_of(folder / name) for name in sealed.document["files"]}, dict(sealed.document))


def unpack_stage(folder: Path, parcel: Parcel) -> None:
    """Make a stage run of what was packed; one that is finished already stays.

    Raises RunError if a file is not what stage.json says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while not (folder / STAGE_FILE).exists():
        try:
            with locked(folder, "it is being fetched"):
                _write(folder, parcel.files)
                _check(folder, parcel)
                _place(folder / STAGE_FILE, json.dumps(parcel.document, indent=2, ensure_ascii=False).encode() + b"\n")
        except LockedError:  # another task of this node fetches it
            time.sleep(POLL_S)


def _check(folder: Path, parcel: Parcel) -> None:
    for name, expected in parcel.document["files"].items():
        if name not in parcel.files or _digest(parcel.files[name]) != expected["sha256"]:
            raise RunError(f"{folder / name}: other bytes came than {STAGE_FILE} says; run the same command again")


# --- files that the recipe names ------------------------------------------------------------------------------------


def local_paths(recipe: Recipe) -> list[str]:
    """Files and folders of this machine that a recipe names, as it writes them."""
    return list(dict.fromkeys(text for text in _paths_in(recipe) if Path(text).expanduser().exists()))


def _paths_in(value: Any) -> Iterator[str]:
    """Every path, and of other text what begins as one: models are named by text."""
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~", "."))):
        yield str(value)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _paths_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _paths_in(part)


def pack_path(path: Path) -> Parcel:
    """A file, or all that is in a folder but hidden files, which count for no identity."""
    if path.is_file():
        return Parcel({path.name: _bytes_of(path)}, {})
    found = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
    return Parcel({f"{path.name}/{one.relative_to(path).as_posix()}": _bytes_of(one) for one in found}, {})


def unpack_path(runs: Path, name: str, parcel: Parcel) -> Path:
    """Put a file or folder that the recipe calls `name` into a node's run store; returns where it lies there."""
    folder = runs / INPUTS / parcel.digest[:16]
    if not folder.exists():
        part = folder.with_name(f"{folder.name}-{os.getpid()}{PARTIAL}")
        _write(part, parcel.files)
        try:
            part.rename(folder)
        except OSError:  # another task of this node was faster: the content is the same
            if not folder.is_dir():
                raise
    return folder / Path(name).expanduser().name


def relocated(value: Any, places: Mapping[str, str]) -> Any:
    """Plain JSON with every text that is one of these paths replaced by where it lies on this node."""
    if isinstance(value, dict):
        return {key: relocated(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [relocated(part, places) for part in value]
    return places.get(value, value) if isinstance(value, str) else value


# --- bytes ----------------------------------------------------------------------------------------------------------


def _bytes_of(path: Path) -> Any:
    """A file as an array that is read when it is sent."""
    import numpy as np

    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)


def _digest(array: Any) -> str:
    return hashlib.sha256(memoryview(array)).hexdigest()


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, array in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _place(path, memoryview(array))


def _place(path: Path, content: Any) -> None:
    part = path.with_name(path.name + PARTIAL)
    with part.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)
