"""The report: one self-contained HTML file, or the same as plain values, of everything a pipeline measured.

    distill report recipe.yaml          distill.write_report("recipe.yaml")

The page opens offline and runs no script: charts are HTML and SVG with their numbers in tables beside them. It reads
the run store and changes nothing in it but its own file; it says what is missing, and works on pipelines that are not
finished. `lineage` finds the stages, `facts` and `scores` read them, `page` and its parts write them down.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.errors import storage_errors
from distill.runs import PARTIAL, RunOptions

from .content import read_report
from .lineage import find_pipeline
from .page import render

REPORTS = "reports"
"""Folder of the run store in which reports lie unless another place is given."""


def write_report(target: Recipe | Path, options: RunOptions, out: Path | None = None) -> Path:
    """Write the HTML report of a recipe, a pipeline's record or a stage's folder; returns its path.

    Without `out` it is written to `reports/` in the run store, under the pipeline's name and identity. Raises RunError
    if nothing of the pipeline has run or a finished stage was changed, DataError if the target is no such thing, all
    before anything is written; StorageError if the disk refuses.
    """
    pipeline = find_pipeline(target, options)
    path = out or pipeline.runs / REPORTS / f"{pipeline.name}-{pipeline.identity}.html"
    page = render(read_report(pipeline))
    with storage_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PARTIAL)
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    return path


def report_data(target: Recipe | Path, options: RunOptions) -> dict[str, Any]:
    """What the report says, as plain JSON values: the machine form. Accuracies and rates are shares of one.

    Raises what `write_report` raises.
    """
    return {"schema": 1, **asdict(read_report(find_pipeline(target, options)))}
