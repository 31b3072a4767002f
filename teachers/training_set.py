"""The training set as a folder that `datasets.load_dataset` reads: Parquet files and, from `card.py`, their README.

    dataset/README.md
    dataset/data/train-00000-of-00001.parquet      what trains, one row an example
    dataset/data/heldout-00000-of-00001.parquet    the held-out prompts with their references; nothing to train on

Both splits have the same columns; those that only a trace can fill are null in `heldout`. Rows are written in prompt
order with fixed settings and no time stamps, so the same input gives the same bytes under one version of pyarrow.
Training itself reads `examples.jsonl`, so without pyarrow only this folder is left out.
"""

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from distill.config import FormatConfig
from distill.format import render_completion
from distill.records import Example, Message, Prompt, Teacher, Trace, Verdict
from distill.runs import file_digest

ROWS_AT_ONCE = 200
"""Rows of a row group, and most rows in memory."""
SHARD_BYTES = 400_000_000
"""Size of a file, in bytes of its text before compression, from which on the next one is begun."""
SHOWN = 2
"""Examples that the card shows."""
MISSING = "pyarrow is not installed; it comes with: pip install 'distill[train]'"


def can_write() -> bool:
    """Whether the library that writes Parquet is here."""
    return importlib.util.find_spec("pyarrow") is not None


class DataFile(NamedTuple):
    """A Parquet file of the folder."""

    name: str
    """Relative to the folder."""
    split: str
    rows: int
    bytes: int
    sha256: str


class Contents:
    """What is in the training set, for its card."""

    def __init__(self) -> None:
        self.examples: Counter[str] = Counter()
        """Examples by prompt source."""
        self.heldout: Counter[str] = Counter()
        """Held-out prompts by source."""
        self.licences: dict[str, set[str | None]] = {}
        """Licences by source, as its prompts state them."""
        self.teachers: Counter[Teacher] = Counter()
        """Who wrote the examples."""
        self.output_tokens = 0
        self.shown: list[Example] = []

    def note(self, example: Example, trace: Trace) -> None:
        """Count an example."""
        self.examples[example.prompt.source] += 1
        self.licences.setdefault(example.prompt.source, set()).add(example.prompt.licence)
        self.teachers[trace.teacher] += 1
        self.output_tokens += trace.usage.output
        if len(self.shown) < SHOWN:
            self.shown.append(example)

    @property
    def by_teacher(self) -> list[tuple[Teacher, int]]:
        """Who wrote how many examples, most first."""
        return sorted(self.teachers.items(), key=lambda found: (-found[1], found[0].model_dump_json()))

    def note_heldout(self, prompt: Prompt) -> None:
        """Count a held-out prompt."""
        self.heldout[prompt.source] += 1
        self.licences.setdefault(prompt.source, set()).add(prompt.licence)


class TrainingSet:
    """Takes the chosen examples in order; `files` are there when it is closed. Use it as a context manager.

    Without pyarrow it only counts.
    """

    def __init__(self, folder: Path, format: FormatConfig, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.contents = Contents()
        self.files: list[DataFile] = []
        self._format = format
        self._splits = [Split(folder, name, shard_bytes) for name in ("train", "heldout")] if can_write() else []

    def add(self, example: Example, trace: Trace, verdict: Verdict) -> None:
        """An example and the trace that it was made from."""
        self.contents.note(example, trace)
        if self._splits:
            self._splits[0].add(row(example, trace, verdict, self._format))

    def add_heldout(self, prompt: Prompt) -> None:
        """A prompt that never trains."""
        self.contents.note_heldout(prompt)
        if self._splits:
            self._splits[1].add(_of_prompt(prompt))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for split in self._splits:
            if kind is None:
                self.files += split.finish()
            else:
                split.abandon()


# --- rows -----------------------------------------------------------------------------------------------------------


def row(example: Example, trace: Trace, verdict: Verdict, format: FormatConfig) -> dict[str, Any]:
    """One example. `messages` holds it as a chat for other trainers: the recipe's markers around the reasoning."""
    completion = render_completion(example.reasoning, example.answer, "", format)
    return {
        **_of_prompt(example.prompt),
        "reasoning": example.reasoning,
        "answer": example.answer,
        "messages": _chat([*example.prompt.messages, Message(role="assistant", content=completion)]),
        "trace_id": trace.trace_id,
        "verdicts": [{"verifier": verdict.verifier, "outcome": verdict.outcome}],
        "usage": trace.usage.model_dump(include={"input", "output", "reasoning"}),
        "model": trace.teacher.model,
    }


def _of_prompt(prompt: Prompt) -> dict[str, Any]:
    """The columns that a held-out prompt has too."""
    return {
        "prompt": _chat(prompt.messages),
        "gold": prompt.gold,
        "source": prompt.source,
        "licence": prompt.licence,
        "prompt_id": prompt.prompt_id,
    }


def _chat(messages: Any) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def schema() -> Any:
    """Columns and their types."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    chat = pa.list_(pa.struct([("role", text), ("content", text)]))
    return pa.schema(
        [
            ("prompt", chat),
            ("reasoning", text),
            ("answer", text),
            ("messages", chat),
            ("gold", text),
            ("source", text),
            ("licence", text),
            ("trace_id", text),
            ("prompt_id", text),
            ("verdicts", pa.list_(pa.struct([("verifier", text), ("outcome", text)]))),
            ("usage", pa.struct([("input", number), ("output", number), ("reasoning", number)])),
            ("model", text),
        ]
    )


# --- files ----------------------------------------------------------------------------------------------------------


class Split:
    """Writes the rows of one split to as many files as their size asks for."""

    def __init__(self, folder: Path, name: str, shard_bytes: int) -> None:
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self._data = folder / "data"
        self._rows: list[Mapping[str, Any]] = []
        self._counts: list[int] = []
        self._bytes = 0
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row."""
        self._rows.append(row)
        if len(self._rows) == ROWS_AT_ONCE:
            self._write()

    def abandon(self) -> None:
        """Let the open file go; what was written is of no use."""
        with suppress(OSError):
            self._close_file()

    def finish(self) -> list[DataFile]:
        """Write what is left, and give the files the names by which loaders know how many there are."""
        if self._rows:
            self._write()
        self._close_file()
        named = []
        for number, rows in enumerate(self._counts):
            final = self._data / f"{self.name}-{number:05}-of-{len(self._counts):05}.parquet"
            os.replace(self._path(number), final)
            relative = final.relative_to(self.folder).as_posix()
            named.append(DataFile(relative, self.name, rows, final.stat().st_size, file_digest(final)))
        return named

    def _path(self, number: int) -> Path:
        return self._data / f"{self.name}-{number:05}.parquet"

    def _write(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_pylist(self._rows, schema())
        if self._writer is None:
            self._open_file()
        self._writer.write_table(table, row_group_size=ROWS_AT_ONCE)
        self._counts[-1] += len(self._rows)
        self._bytes += table.nbytes
        self._rows = []
        if self._bytes >= self.shard_bytes:
            self._close_file()

    def _open_file(self) -> None:
        import pyarrow.parquet as pq

        self._data.mkdir(parents=True, exist_ok=True)
        # every setting that decides bytes is given, so that a new default changes nothing
        self._writer = pq.ParquetWriter(
            self._path(len(self._counts)),
            schema(),
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=True,
            write_statistics=True,
            write_page_index=True,
            store_schema=False,
        )
        self._counts.append(0)
        self._bytes = 0

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
