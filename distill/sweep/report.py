"""Writing a sweep's report: the page, and beside it the same as JSON and a table of trials as CSV."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import storage_errors
from distill.runs import PARTIAL

from .page import Sheet, render
from .record import Record
from .results import Results, read_results, results_json
from .trials import arguments_of


class Written(NamedTuple):
    """The files of a report."""

    html: Path
    json: Path
    csv: Path


def write_report(record: Record, out: Path | None = None) -> Written:
    """Write the report of a sweep, finished or not; by default into its folder. Returns the files.

    Raises RunError where a finished stage's file is not the one that was sealed, StorageError if the disk refuses.
    """
    results = read_results(record)
    path = out or record.folder / "report.html"
    files = Written(path, path.with_suffix(".json"), path.with_suffix(".csv"))
    page = render(sheet_of(record, results))
    with storage_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(files.html, page)
        _write(files.json, json.dumps(results_json(results), indent=2, ensure_ascii=False, default=str) + "\n")
        _write(files.csv, trials_csv(results))
    return files


def sheet_of(record: Record, results: Results) -> Sheet:
    """What the page needs beside the results."""
    fixed = arguments_of(record.sweep.fixed)
    return Sheet(results, str(record.document["file"]), str(record.document["base_path"]), str(record.runs), fixed)


def trials_csv(results: Results) -> str:
    """One row a trial: number, state, what it changes, what it came to."""
    keys = list(dict.fromkeys(key for one in results.trials for key in one.trial.overrides))
    titles = [one.title for one in results.objectives]
    intervals = [title for title in titles if any(one.measures[title].low is not None for one in results.trials)]
    bounds = [f"{title}_{end}" for title in intervals for end in ("low", "high")]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["trial", "state", *keys, *titles, *bounds, "error"])
    for one in results.trials:
        values = [_cell(one.measures[title].value) for title in titles]
        ends = [_cell(end) for title in intervals for end in (one.measures[title].low, one.measures[title].high)]
        changed = [_cell(one.trial.overrides.get(key)) for key in keys]
        writer.writerow([one.number, one.state, *changed, *values, *ends, one.error])
    return out.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else value if isinstance(value, str | int | float) else json.dumps(value)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + PARTIAL)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
