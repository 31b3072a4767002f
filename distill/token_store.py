"""Tokenized data on disk: made once, in parallel, mapped into memory ever after.

`runs/tokens/<fingerprint>/` holds flat arrays of token ids, segments and document bounds as `.npy` files, and a
manifest that is written last. The fingerprint is a hash of the rows, the tokenizer with its template and the format, so
phases and recipes that agree on these share a folder. Parts of the rows are made in parallel and joined at the end; a
part that is there is never made again, so a killed tokenization goes on, and the result does not depend on how many
processes made it. Training reads through memory maps: a million traces take the memory of their index.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.config import FormatConfig, hashed_fields
from distill.documents import Arrays, Documents, Encoder, arrays_digest, check_counts, lay_end_to_end
from distill.errors import DataError, FormatError
from distill.format import NO_OFFSETS, Turn
from distill.progress import progress
from distill.records import Example, Message, digest_json, write_json
from distill.runs import PARTIAL, DigestCache, RunOptions, locked

VERSION = 1
"""Bumped when the same rows would give other documents."""
PART_BYTES = 8 << 20
"""Bytes of rows that one part is made of."""
MANIFEST = "manifest.json"


class Work(NamedTuple):
    """One part to make, as plain values that a worker process takes."""

    rows: Path
    start: int
    end: int
    kind: str
    """`examples` (Example records) or `chats` (lists of supervised turns)."""
    tokenizer: Path
    format: str
    """The FormatConfig as JSON."""
    end_ids: tuple[int, ...]
    stem: Path


def tokenize(
    rows: Path, kind: str, tokenizer: Any, config: FormatConfig, end_ids: Sequence[int], options: RunOptions, label: str
) -> Documents:
    """The documents of a JSON Lines file of examples or chats, from the store or made now.

    Raises what `Encoder` raises, TrainingError for a set that is empty or mostly too long.
    """
    root = options.runs / "tokens"
    folder = root / _fingerprint(rows, kind, tokenizer, config, end_ids)
    manifest = folder / MANIFEST
    if not manifest.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"{label} is being tokenized"):
            if not manifest.exists():
                _make(folder, rows, kind, tokenizer, config, end_ids, options, label)
    return _open(folder, config, label)


def _fingerprint(rows: Path, kind: str, tokenizer: Any, config: FormatConfig, end_ids: Sequence[int]) -> str:
    return digest_json(
        {
            "version": VERSION,
            "rows": DigestCache().of(rows),
            "kind": kind,
            "tokenizer": tokenizer_digest(tokenizer),
            # a template file enters by its text, which the tokenizer has, and not by its path
            "format": hashed_fields(config.model_copy(update={"template": "keep"})),
            "ends": sorted(end_ids),
        }
    )[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of what decides a tokenizer's ids: its model, its special tokens and its chat template.

    Raises FormatError for a tokenizer without a tokenizer.json.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise FormatError(NO_OFFSETS)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # what the last call with padding or a limit left behind; the next call sets its own
    backend |= {"padding": None, "truncation": None}
    return digest_json([backend, tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token])


# --- making ---------------------------------------------------------------------------------------------------------


def _make(
    folder: Path,
    rows: Path,
    kind: str,
    tokenizer: Any,
    config: FormatConfig,
    end_ids: Sequence[int],
    options: RunOptions,
    label: str,
) -> None:
    parts = folder / "parts"
    tokenizer.save_pretrained(parts / "tokenizer")
    given = (kind, parts / "tokenizer", config.model_dump_json(), tuple(end_ids))
    work = [Work(rows, start, end, *given, parts / f"{start}-{end}") for start, end in _spans(rows)]
    owed = [one for one in work if not _record(one.stem).exists()]
    done = sum(one.end - one.start for one in work if one not in owed)
    with progress(f"tokenize {label}", rows.stat().st_size, options, unit="bytes", done=done) as bar:
        for one in _each(owed, tokenizer, options.cpu_threads):
            bar.advance(one.end - one.start)
    records = [json.loads(_record(one.stem).read_text()) for one in work]
    counts = {key: sum(record["counts"][key] for record in records) for key in Encoder.COUNTED}
    _join(folder, [one.stem for one in work])
    digest = hashlib.sha256("".join(record["digest"] for record in records).encode()).hexdigest()
    write_json(folder / MANIFEST, {"schema": 1, "kind": kind, "digest": digest, "counts": counts})
    shutil.rmtree(parts)


def _join(folder: Path, stems: Sequence[Path]) -> None:
    """Write the arrays of all parts as one set, reading one part at a time."""
    loaded = [Arrays(*(np.load(_array(stem, name), mmap_mode="r") for name in Arrays._fields)) for stem in stems]
    total = sum(len(arrays.ids_T) for arrays in loaded)
    for name in ("ids_T", "segments_T"):
        dtype = np.int32 if name == "ids_T" else np.uint8
        path = folder / f"{name}.npy"
        part = path.with_name(path.name + PARTIAL)
        out = np.lib.format.open_memmap(part, "w+", dtype, (total,))
        at = 0
        for arrays in loaded:
            values = getattr(arrays, name)
            out[at : at + len(values)] = values
            at += len(values)
        out.flush()
        del out
        os.replace(part, path)
    lengths = [np.diff(arrays.bounds) for arrays in loaded]
    _write_array(folder / "bounds.npy", np.concatenate([[0], *lengths]).cumsum())


def _spans(rows: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines, about PART_BYTES each; they depend on the file alone."""
    size = rows.stat().st_size
    start = 0
    with rows.open("rb") as file:
        while start < size:
            file.seek(min(start + PART_BYTES, size))
            file.readline()
            end = file.tell()
            yield start, end
            start = end


def _each(owed: Sequence[Work], tokenizer: Any, processes: int) -> Iterator[Work]:
    """Make parts, in this process where there is one only, else in several; yields each when it is done."""
    if len(owed) <= 1 or processes <= 1:
        for one in owed:
            make_part(one, tokenizer)
            yield one
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(owed)), mp_context=context, initializer=_end_with_parent) as pool:
        yield from pool.map(make_part, owed)


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: it would wait for its next part forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_part(work: Work, tokenizer: Any = None) -> Work:
    """Tokenize one part and write its arrays, then its record."""
    config = FormatConfig.model_validate_json(work.format)
    encoder = Encoder(tokenizer or _own_tokenizer(work.tokenizer), config, work.end_ids)
    lines = _lines(work)
    if work.kind == "examples":
        documents = encoder.examples(Example.model_validate_json(line) for line in lines)
    else:
        documents = encoder.chats(turns_of(json.loads(line)) for line in lines)
    arrays = lay_end_to_end(documents)
    for name, array in zip(Arrays._fields, arrays):
        _write_array(_array(work.stem, name), array)
    write_json(_record(work.stem), {"stem": work.stem.name, "digest": arrays_digest(arrays), "counts": encoder.counts})
    return work


@functools.lru_cache(maxsize=1)
def _own_tokenizer(folder: Path) -> Any:
    """A worker's tokenizer, loaded once; the part of the work is its own, so it takes one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def turns_of(plain: Iterable[Any]) -> list[Turn]:
    """The turns of one line of chats."""
    return [Turn([Message(**m) for m in messages], reasoning, answer) for messages, reasoning, answer in plain]


def _lines(work: Work) -> Iterator[bytes]:
    with work.rows.open("rb") as file:
        file.seek(work.start)
        while file.tell() < work.end:
            yield file.readline()


def _array(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}-{name}.npy")


def _record(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        np.save(out, array)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)


# --- reading --------------------------------------------------------------------------------------------------------


def _open(folder: Path, config: FormatConfig, label: str) -> Documents:
    try:
        document = json.loads((folder / MANIFEST).read_text())
        arrays = Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Arrays._fields))
        if not arrays.bounds[-1] == len(arrays.ids_T) == len(arrays.segments_T):
            raise ValueError("its arrays do not belong together")
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{folder}: cannot be read; delete the folder and run again ({error})") from error
    check_counts(document["counts"], config, label)
    return Documents.over([arrays], document["digest"], document["counts"])
