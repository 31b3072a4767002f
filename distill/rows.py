"""Rows of other people's files: JSON Lines, JSON, CSV, Parquet and data sets of the hub.

A row is a plain dict that knows where it came from, so that every complaint about it can name file and line. Nothing
here knows what a prompt or a trace is.
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import HubSource
from distill.errors import DataError, MissingExtraError
from distill.models import hub_commit
from distill.runs import DigestCache

LONGEST_CSV_FIELD = 1 << 28
"""Characters a CSV field may have; Python's default of 131,072 is shorter than many reasoning traces."""
PARQUET_BUFFER = 1 << 20
"""Bytes of a Parquet column that are read at once."""


class Row(NamedTuple):
    """One row and where it stands, as `file:line`."""

    where: str
    values: dict[str, Any]


def read_rows(path: Path, records_path: str | None = None) -> Iterator[Row]:
    """Stream the rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file.

    `records_path` names the list inside a `.json` object (dots descend); without it the object's only list of rows is
    taken. Only a `.json` document is held in memory as a whole: save millions of rows as `.jsonl`. Raises DataError
    with file and line if the file is missing, empty, of another kind or damaged.
    """
    check_file(path)
    rows = READERS[path.suffix.lower()](path, records_path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: no rows in it; give a file with at least one row")
    return chain([first], rows)


def check_file(path: Path) -> None:
    """Refuse a file that is not there or of a kind that cannot be read.

    Raises DataError.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: files of rows are {', '.join(READERS)}; convert it to one of them")
    if not path.exists():
        raise DataError(f"{path}: no such file{_nearest_file(path)}; relative paths are taken from the recipe's folder")
    if not path.is_file():
        raise DataError(f"{path}: a folder, not a file; give one of {', '.join(READERS)}")


def require_columns(row: Row, columns: Iterable[str]) -> None:
    """Refuse a row that lacks a column.

    Raises DataError naming the row, the column, the columns that exist and the nearest one.
    """
    for column in columns:
        if column not in row.values:
            existing = ", ".join(row.values) or "none"
            raise DataError(f"{row.where}: no column {column!r}{nearest(column, row.values)}; columns here: {existing}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest allowed name, or nothing."""
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor its folder {path.parent})"
    return nearest(path.name, [other.name for other in path.parent.iterdir()])


# --- one reader a kind of file --------------------------------------------------------------------------------------


def _read_jsonl(path: Path, records_path: str | None) -> Iterator[Row]:
    # bytes are split at newlines only: text mode would also split at a lone carriage return inside a value
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield _object(_parse(line.removeprefix(b"\xef\xbb\xbf"), where), where)


def _read_json(path: Path, records_path: str | None) -> Iterator[Row]:
    document = _parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    for number, value in enumerate(_list_in(document, path, records_path), 1):
        yield _object(value, f"{path}: row {number}")


def _parse(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair (an escape \\ud800 to \\udfff) is no text; remove it"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        if not data.strip():
            raise DataError(f"{where}: no rows in it; the file is empty") from error
        hint = "; is it JSON Lines? Then name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be a row") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row is a JSON object with named columns; given: {type(value).__name__}")
    return Row(where, value)


def _list_in(document: Any, path: Path, records_path: str | None) -> list[Any]:
    """The list of rows of a JSON document."""
    if records_path is not None:
        return _list_at(document, path, records_path)
    if isinstance(document, list):
        return document
    lists = {key: value for key, value in _items(document) if isinstance(value, list) and _are_objects(value)}
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise DataError(
            f"{path}: a .json file is a list of rows, or an object with one list of rows in it (found: {found});"
            " name the list with records_path, or save the rows as .jsonl"
        )
    return next(iter(lists.values()))


def _list_at(document: Any, path: Path, records_path: str) -> list[Any]:
    found = document
    for key in records_path.split("."):
        if not isinstance(found, dict) or key not in found:
            keys = [name for name, _ in _items(found)]
            existing = ", ".join(keys) or "none"
            hint = nearest(key, keys)
            raise DataError(f"{path}: records_path {records_path!r}: no key {key!r}{hint}; keys there: {existing}")
        found = found[key]
    if not isinstance(found, list):
        raise DataError(f"{path}: records_path {records_path!r} is a {type(found).__name__}, not a list of rows")
    return found


def _items(document: Any) -> list[tuple[str, Any]]:
    return list(document.items()) if isinstance(document, dict) else []


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _read_csv(path: Path, records_path: str | None) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CSV_FIELD))
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            names = list(reader.fieldnames or [])
            if twice := {name for name in names if names.count(name) > 1}:
                raise DataError(f"{path}:1: two columns are called {sorted(twice)[0]!r}; names must differ")
            for values in reader:
                where = f"{path}:{reader.line_num}"
                if None in values or None in values.values():
                    raise DataError(f"{where}: the row has not {len(names)} fields as the header has; check its quotes")
                yield Row(where, dict(values))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _read_parquet(path: Path, records_path: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train") from error
    try:
        number = 0
        # by default the compressed columns of a whole row group, often of the whole file, are read ahead
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a whole Parquet file: {first}") from error


READERS: Mapping[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""How each kind of file is read, by suffix."""


# --- the hub --------------------------------------------------------------------------------------------------------


def read_hub(source: HubSource) -> Iterator[Row]:
    """The rows of a data set of the hub, of a folder saved by `datasets`, or of a folder of data files.

    `HF_HUB_OFFLINE` is honoured: then only the local cache is read. Raises DataError if the data set cannot be
    reached or has no such configuration or split, MissingExtraError without the `datasets` package.
    """
    split = _load_split(source)
    for number, values in enumerate(split, 1):
        yield Row(f"{source.id} ({source.split}): row {number}", dict(values))


def hub_root(source: HubSource, cache: DigestCache) -> str:
    """What identifies a data set's content: the resolved commit, or a digest of a local folder."""
    folder = Path(source.id)
    if folder.exists():
        return cache.of(folder)
    return f"{source.id}@{hub_commit(source.id, source.revision, kind='dataset')}"


def _load_split(source: HubSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    try:
        if _saved_to_disk(Path(source.id)):
            return _choose_split(datasets.load_from_disk(source.id), source)
        revision = None if Path(source.id).exists() else _reachable_commit(source, offline)
        return datasets.load_dataset(source.id, source.config, split=source.split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # datasets raises the trees of fsspec, requests, pyarrow and its own
        raise DataError(_why_unreachable(source, error, offline)) from error


def _reachable_commit(source: HubSource, offline: bool) -> str:
    """The commit to read, so that what is read is what the identity says; asked first, since `datasets` alone would
    try an unreachable hub for half a minute.
    """
    commit = hub_commit(source.id, source.revision, kind="dataset")
    if commit.startswith("unresolved:"):
        if not offline:
            raise ConnectionError("no answer; with HF_HUB_OFFLINE=1 the local cache is read")
        return source.revision
    return commit


def _saved_to_disk(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _choose_split(loaded: Any, source: HubSource) -> Any:
    if not hasattr(loaded, "keys"):
        return loaded
    if source.split not in loaded:
        existing = ", ".join(loaded.keys())
        hint = nearest(source.split, loaded.keys())
        raise DataError(f"{source.id}: no split {source.split!r}{hint}; splits there: {existing}")
    return loaded[source.split]


def _why_unreachable(source: HubSource, error: Exception, offline: bool) -> str:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    asked = f"{source.id} (config {source.config or 'default'}, split {source.split}, revision {source.revision})"
    if isinstance(error, ValueError) and ("split" in first.lower() or "config" in first.lower()):
        return f"hub data set {asked}: {first}"
    state = "HF_HUB_OFFLINE is set and it is not in the local cache" if offline else "it cannot be reached"
    return (
        f"hub data set {asked}: {state}, or there is no such data set; check the id, the network and HF_TOKEN, or give"
        f" a local file instead ({type(error).__name__}: {first})"
    )
