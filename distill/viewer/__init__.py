"""The trace viewer: one self-contained HTML page of everything `distill inspect` knows about the traces of a target.

    distill inspect recipe.yaml --html traces.html          distill.api.write_viewer("recipe.yaml", "traces.html")

The page opens from the disk, asks the network for nothing and says so to the browser. `data` makes what it holds, an
index and the records in compressed parts; `page` is its frame, `style` its look, and `script` what it does in the
browser. Records are read one after the other; only the index is held in memory. Equal records give equal bytes.
"""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, NamedTuple

from distill.errors import RecipeError, storage_errors
from distill.inspection import Shown
from distill.runs import PARTIAL

from .data import Index, pack, parts
from .page import CLOSING, opening, part_element

HELD_BYTES = 1 << 26
"""Packed records kept in memory until the index, which stands before them, is known; more go to a temporary file."""


class Written(NamedTuple):
    """A page that was written."""

    path: Path
    traces: int
    bytes: int


def write_page(shown: Iterable[Shown], out: Path, title: str, note: str = "") -> Written:
    """Write the traces as one page; `note` says, in words, which of a target's traces were asked for.

    A page is complete or not there: it is written aside and moved into place. Raises RecipeError if `out` is not named
    like a page, StorageError if the disk refuses, and whatever reading the traces raises, before anything is written.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise RecipeError(f"{out}: a page is a file that ends in .html; name one, as in --html {out.stem}.html")
    index = Index()
    with SpooledTemporaryFile(max_size=HELD_BYTES) as held:
        for number, part in enumerate(parts(shown, index)):
            with storage_errors(f"cannot write {out}"):
                held.write(part_element(number, part).encode())
        held.seek(0)
        with storage_errors(f"cannot write {out}"):
            size = _move_into_place(out, opening(title, note, pack(index.document())), held, CLOSING)
    return Written(out, len(index), size)


def _move_into_place(out: Path, head: str, held: IO[bytes], tail: str) -> int:
    """Write head, parts and tail aside, then give them their name; returns the size in bytes."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
    part = out.with_name(out.name + PARTIAL)
    try:
        with part.open("wb") as file:
            file.write(head.encode())
            shutil.copyfileobj(held, file)
            file.write(tail.encode())
            size = file.tell()
        os.replace(part, out)
        return size
    except BaseException:
        part.unlink(missing_ok=True)
        raise
