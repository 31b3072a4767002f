"""Verifying stored traces again, with the verifiers as they are now: `distill select --reverify`.

A verifier's version is part of a selection's identity, so a newer one makes a new select run: then this is that run,
with every verdict made anew. A select run that is sealed keeps its verdicts and its examples; what they would be now is
only compared. Either way `runs/reverified/<run>/reverified.jsonl` lists every trace whose verdict changed.

Compared is with the verdicts that were in force: the run's own where it was sealed, else those of the newest select run
of the same traces (or, of other traces, of the same recipe), else those made while the traces were.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from distill import pipeline
from distill.config import Recipe
from distill.errors import storage_errors
from distill.plan import make_plan
from distill.progress import say
from distill.records import Outcome, Record, Verdict, read_records, write_records
from distill.runs import STAGE_FILE, RunOptions, Step, locked, open_run

from .select import Inputs, decide, preflight, verify

FOLDER = "reverified"
REPORT = "reverified.jsonl"


class Reverified(Record):
    """A trace whose verdict is another one now."""

    trace_id: str
    prompt_id: str
    before: Outcome
    now: Outcome
    verifier_before: str
    verifier_now: str
    detail: str = ""
    """What the verifier says now."""


class Before(NamedTuple):
    """Verdicts to compare with."""

    path: Path | None
    """Where they lie; None if there are none."""
    verdicts: Mapping[str, Verdict]

    @classmethod
    def read(cls, path: Path | None) -> "Before":
        """All of a file, by trace."""
        found = read_records(path, Verdict) if path is not None else ()
        return cls(path, {verdict.trace_id: verdict.model_copy(update={"detail": ""}) for verdict in found})


@dataclass(frozen=True)
class Comparison:
    """What verifying again has changed."""

    compared_with: Path | None
    """The verdicts that were in force; None if there were none."""
    report: Path
    counts: Mapping[tuple[Outcome, Outcome], int]
    """Traces by the outcome before and now."""
    new: int
    """Traces without a verdict before."""

    @property
    def changed(self) -> int:
        """Traces whose outcome is another one."""
        return sum(count for (before, now), count in self.counts.items() if before != now)

    @property
    def rows(self) -> list[tuple[str, str, int]]:
        """(before, now, traces), what changed first."""
        changed_first = sorted(self.counts.items(), key=lambda found: (found[0][0] == found[0][1], -found[1], found[0]))
        rows: list[tuple[str, str, int]] = [(before, now, count) for (before, now), count in changed_first]
        return [*rows, ("not judged", "judged", self.new)] if self.new else rows

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "compared_with": str(self.compared_with) if self.compared_with else None,
            "report": str(self.report),
            "changed": self.changed,
            "outcomes": [{"before": before, "now": now, "traces": count} for before, now, count in self.rows],
        }


def reverify(recipe: Recipe, options: RunOptions) -> Comparison:
    """Run the verifiers on every stored trace of a recipe; see above for what is written. No teacher is asked.

    Raises IncompleteError or EngineError if the ledger lacks answers, DataError, with the funnel, if a new run has
    nothing left to train on.
    """
    options = replace(options, ask=False)
    plan = make_plan(recipe, options)
    *before, step = plan.until("select")
    if not all(other.sealed for other in before):
        # a verifier's file is an input of the prompts too: they and the view of the ledger are made again
        for stage in ("prompts", "generate"):
            pipeline.run_recipe(recipe, options, stage)
    comparison = verify_again(recipe, step, options)
    pipeline.record(plan, options)
    return comparison


def verify_again(recipe: Recipe, step: Step, options: RunOptions) -> Comparison:
    """The same for a select step whose upstream is sealed."""
    preflight(recipe, step, options)
    before = Before.read(verdicts_in_force(step))
    folder = options.runs / FOLDER / step.folder.name
    again = _compare_only if step.sealed else _select_anew
    with storage_errors(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"{step.label} is being verified again"):
            return again(recipe, step, options, before, folder)


def _compare_only(recipe: Recipe, step: Step, options: RunOptions, before: Before, folder: Path) -> Comparison:
    """The run stays what it is."""
    now = folder / "verdicts.jsonl"
    try:
        verify(recipe, step, options, now)
        comparison = compare(before, now, step, folder / REPORT)
    finally:
        now.unlink(missing_ok=True)
    _say(step, comparison)
    if comparison.changed:
        say(
            f"{step.label}: the run is sealed and keeps its training set; to choose anew, delete {step.folder} and what"
            " was trained on it, and run distill select --reverify again"
        )
    return comparison


def _select_anew(recipe: Recipe, step: Step, options: RunOptions, before: Before, folder: Path) -> Comparison:
    """Make the run, with every verdict made now."""
    with open_run(step, options) as opened:
        now = opened.path("verdicts.jsonl")
        verify(recipe, step, options, now)
        comparison = compare(before, now, step, folder / REPORT)
        _say(step, comparison)
        decide(recipe, step, opened)
    return comparison


def verdicts_in_force(step: Step) -> Path | None:
    """The file of verdicts that hold before verifying again; None if there is none."""
    if step.sealed:
        return step.folder / "verdicts.jsonl"
    earlier = [folder / "verdicts.jsonl" for folder in _earlier_runs(step)]
    beside = Inputs.of(step).verdicts
    found = [*earlier, *([beside] if beside.exists() and beside.stat().st_size else [])]
    return found[0] if found else None


def _earlier_runs(step: Step) -> Iterator[Path]:
    """Sealed select runs of the same traces, newest first; then those of the same recipe."""
    same, other = list[tuple[str, Path]](), list[tuple[str, Path]]()
    for path in (step.runs / step.stage).glob(f"*/{STAGE_FILE}"):
        document = json.loads(path.read_text(encoding="utf-8"))
        entry = (str(document["finished"]), path.parent)
        if document["upstream"].get("traces") == step.upstream["traces"].identity:
            same.append(entry)
        elif document["name"] == step.name:
            other.append(entry)
    yield from (folder for found in (same, other) for _, folder in sorted(found, reverse=True))


def compare(before: Before, now: Path, step: Step, report: Path) -> Comparison:
    """Write the report and count."""
    counts = Counter[tuple[Outcome, Outcome]]()
    new = 0

    def changes() -> Iterator[Reverified]:
        nonlocal new
        prompt_ids = (trace.prompt_id for _, trace in Inputs.of(step).pairs())
        for verdict, prompt_id in zip(read_records(now, Verdict), prompt_ids, strict=True):
            old = before.verdicts.get(verdict.trace_id)
            if old is None:
                new += 1
                continue
            counts[old.outcome, verdict.outcome] += 1
            if old.outcome != verdict.outcome:
                yield Reverified(
                    trace_id=verdict.trace_id, prompt_id=prompt_id, before=old.outcome, now=verdict.outcome,
                    verifier_before=old.verifier, verifier_now=verdict.verifier, detail=verdict.detail,
                )  # fmt: skip

    write_records(report, changes())
    return Comparison(before.path, report, counts, new)


def _say(step: Step, comparison: Comparison) -> None:
    against, total = comparison.compared_with, sum(comparison.counts.values())
    if against is None:
        say(f"{step.label}: verified {comparison.new} traces; there were no verdicts to compare with")
    else:
        say(f"{step.label}: {comparison.changed} of {total} verdicts changed against {against}: {comparison.report}")
