"""What is remembered of batches between processes: one small file a batch, and the results that were downloaded.

A batch is written down before it is created, with everything needed to find it again, and its id as soon as there is
one. Requests are known by their custom id, `prompt_id:sample:max_new_tokens`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from distill.engines import Request
from distill.errors import RunError
from distill.records import Record, write_json

FOLDER = "batches"
SHARDS = "shards"


def custom_id(request: Request) -> str:
    """What a request is called at the server; a sample that is asked again with another limit is another request."""
    return f"{request.prompt.prompt_id}:{request.sample}:{request.sampling.max_new_tokens}"


class HandedIn(Record):
    """A batch that was handed in, or was about to be."""

    name: str
    """Chosen by us, unlike any other; the batch carries it at the server."""
    url: str
    """The server."""
    input_file_id: str
    handed_in: float
    """Seconds since the epoch, before it was created."""
    items: tuple[str, ...]
    """Custom ids of its requests."""
    batch_id: str | None = None
    """None as long as it is not known whether it was created."""
    ended: str | None = None
    """How it ended; its results then lie beside this file."""


class ItemResponse(BaseModel):
    """The server's answer to one request."""

    status_code: int
    body: Any = None


class ItemResult(BaseModel):
    """A line of a file of results."""

    custom_id: str
    response: ItemResponse | None = None
    error: Any = None


class BatchFolder:
    """Batches of one ledger: those of this process's own part, and those of others, which are only read."""

    def __init__(self, ledger: Path) -> None:
        self.folder = ledger / FOLDER
        whole = ledger.parent.parent if ledger.parent.name == SHARDS else ledger
        self.folders = [whole / FOLDER, *sorted(whole.glob(f"{SHARDS}/*/{FOLDER}"))]

    def read(self) -> Iterator[tuple[Path, HandedIn]]:
        """Every batch and the file it is remembered in, oldest first. Raises RunError for a damaged file."""
        found = []
        for path in (path for folder in self.folders for path in folder.glob("*.json")):
            try:
                found.append((path, HandedIn.model_validate_json(path.read_bytes())))
            except ValidationError as error:
                first = error.errors()[0]["msg"]
                raise RunError(
                    f"{path}: damaged ({first}); it says which batch holds which requests: restore it, or delete it and"
                    " they are asked again"
                ) from error
        yield from sorted(found, key=lambda pair: pair[1].handed_in)

    def path(self, name: str) -> Path:
        """Where a new batch is remembered."""
        self.folder.mkdir(exist_ok=True)
        return self.folder / f"{name}.json"


@dataclass(eq=False)
class Held:
    """A batch while this process deals with it."""

    path: Path
    record: HandedIn
    waiting: dict[str, Request] = field(default_factory=dict)
    """Requests whose answer is awaited from it, by custom id."""
    results: "Results | None" = None

    def remember(self, **changes: Any) -> None:
        """Write down what has changed before anything else happens."""
        self.record = self.record.model_copy(update=changes)
        write_json(self.path, self.record.model_dump(mode="json", by_alias=True))

    def forget(self) -> None:
        """It was never created."""
        self.path.unlink(missing_ok=True)

    @property
    def files(self) -> tuple[Path, Path]:
        """Where answers and failures are downloaded to."""
        return self.path.with_suffix(".answers.jsonl"), self.path.with_suffix(".failures.jsonl")

    def result(self, item: str) -> ItemResult | None:
        """What came of a request, once the batch has ended."""
        if self.results is None:
            self.results = Results(self.files)
        return self.results.get(item)


class Results:
    """Lines of files of results, found by custom id; they stay on the disk."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        for path in files:
            for offset, line in _lines(path):
                if (read := _result(line)) is not None:
                    self._places.setdefault(read.custom_id, (path, offset))

    def get(self, item: str) -> ItemResult | None:
        """The result of a request, if there is one."""
        if item not in self._places:
            return None
        path, offset = self._places[item]
        with path.open("rb") as lines:
            lines.seek(offset)
            return _result(lines.readline())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            yield offset, line
            offset += len(line)


def _result(line: bytes) -> ItemResult | None:
    try:
        return ItemResult.model_validate(json.loads(line))
    except ValueError:
        return None  # a line that is no result answers nothing: its request counts as failed
