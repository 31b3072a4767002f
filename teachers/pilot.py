"""The pilot: a few prompts answered for real, and what all of them would then take.

The prompts are those with the lowest ids, which are hashes: a random sample that is the same every time, so the
answers of a pilot are found again by the run. Intervals are percentile bootstraps over prompts (Efron and Tibshirani
1993, ch. 13), because the samples of one prompt resemble one another.
"""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from distill.config import Recipe
from distill.errors import EngineError
from distill.records import Prompt, Trace, Verdict, read_records
from distill.runs import RunOptions, Step
from distill.statistics import wilson
from distill.verifiers import resolve
from distill.verifiers.pool import VerifierPool

from .generate import open_work

RESAMPLES = 2000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


class Row(NamedTuple):
    """What one prompt of the pilot took."""

    samples: int
    accepted: int
    input_tokens: int
    output_tokens: int
    usd: float
    latency_s: float
    truncated: int


class Pilot(NamedTuple):
    """What the pilot found, and the forecast for all prompts."""

    prompts: int
    of: int
    samples: int
    accepted: int
    truncated: int
    reasoning_missing: int
    usd: float
    in_flight: float
    """Mean requests in flight while it ran; 0 where every answer was in the ledger already."""
    yield_: Estimate
    """Accepted share of samples."""
    output_tokens: Estimate
    """Of all prompts."""
    total_usd: Estimate
    hours: Estimate | None
    """At the pilot's own number of requests in flight."""
    usd_per_accepted: Estimate | None
    tokens_per_accepted: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {key.rstrip("_"): value for key, value in self._asdict().items()}
        return {key: value._asdict() if isinstance(value, Estimate) else value for key, value in plain.items()}


def run(recipe: Recipe, step: Step, options: RunOptions, prompts: int) -> Pilot:
    """Answer and verify a few prompts through the ledger, and forecast the whole.

    Raises what the generate stage raises; nothing is sealed.
    """
    with open_work(recipe, step, options) as work:
        total = sum(1 for _ in work.wanted)
        only = frozenset(heapq.nsmallest(prompts, (prompt.prompt_id for prompt in work.wanted)))
        work.wanted = replace(work.wanted, only=only)
        owed = work.survey()
        started_s = time.monotonic()
        work.collect(owed, options.runs / "ledger" / f"pilot-{step.identity}.json")
        seconds = time.monotonic() - started_s
        work.refuse_incomplete(owed)
        asked = work.collection.progress.asked
        traces = list(work.traces())
    found = {prompt.prompt_id: prompt for prompt in read_records(work.wanted.file, Prompt) if prompt.prompt_id in only}
    pairs = [(found[trace.prompt_id], trace) for trace in traces]
    specs = {source.name: resolve(source.verifier) for source in recipe.prompts}
    with VerifierPool(options.cpu_threads, by_source=specs) as pool:
        verdicts = list(pool.verify_many(pairs))
    if not traces:
        raise EngineError("the pilot got no answer at all; look at the requests with `distill inspect --failed`")
    rows = rows_of(traces, verdicts, recipe.select.reasoning == "required")
    busy_s = sum(sorted((trace.latency_s for trace in traces), reverse=True)[:asked])
    missing = sum(trace.reasoning is None for trace in traces)
    return forecast(rows, total, missing, busy_s / seconds if asked else 0.0)


def rows_of(traces: Sequence[Trace], verdicts: Sequence[Verdict], reasoning: bool) -> list[Row]:
    """One row a prompt; a trace is accepted if it verified, is whole, and has reasoning where that is required."""
    rows: dict[str, list[Row]] = {}
    for trace, verdict in zip(traces, verdicts, strict=True):
        cut = trace.finish_reason == "length"
        accepted = verdict.correct and not cut and (trace.think == "closed" or not reasoning)
        usage = trace.usage
        row = Row(1, int(accepted), usage.input, usage.output, trace.cost_usd, trace.latency_s, int(cut))
        rows.setdefault(trace.prompt_id, []).append(row)
    return [Row(*(sum(column) for column in zip(*of_prompt))) for of_prompt in rows.values()]


def forecast(rows: Sequence[Row], prompts: int, reasoning_missing: int, in_flight: float) -> Pilot:
    """What `prompts` prompts would take if they are like the ones of the pilot."""
    table = np.array(rows, dtype=float)
    sums = table.sum(axis=0)
    dice = np.random.default_rng(0)
    resampled = np.stack(
        [table[dice.integers(0, len(table), len(table))].sum(axis=0) for _ in range(RESAMPLES)]
    )  # [RESAMPLES, columns]
    scale = prompts / len(table)
    column = {name: index for index, name in enumerate(Row._fields)}

    def of(measure: Callable[[Any], Any]) -> Estimate:
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.nanquantile(measure(resampled.T), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
            return Estimate(float(measure(sums)), float(low), float(high))

    def ratio(name: str, by: str, factor: float = 1.0) -> Estimate:
        return of(lambda total: total[column[name]] / total[column[by]] * factor)

    def all_of(name: str, factor: float = 1.0) -> Estimate:
        return of(lambda total: total[column[name]] * scale * factor)

    accepted = sums[column["accepted"]] > 0
    return Pilot(
        prompts=len(table),
        of=prompts,
        samples=int(sums[column["samples"]]),
        accepted=int(sums[column["accepted"]]),
        truncated=int(sums[column["truncated"]]),
        reasoning_missing=reasoning_missing,
        usd=float(sums[column["usd"]]),
        in_flight=round(in_flight, 1),
        yield_=_share(int(sums[column["accepted"]]), int(sums[column["samples"]]), len(table)),
        output_tokens=all_of("output_tokens"),
        total_usd=all_of("usd"),
        hours=all_of("latency_s", 1 / (3600 * in_flight)) if in_flight else None,
        usd_per_accepted=ratio("usd", "accepted") if accepted else None,
        tokens_per_accepted=ratio("output_tokens", "accepted") if accepted else None,
    )


def _share(accepted: int, samples: int, prompts: int) -> Estimate:
    """Accepted share of the samples; Wilson's interval as if there were one sample a prompt, which is cautious."""
    share = accepted / samples
    return Estimate(share, *wilson(round(share * prompts), prompts)[1:])


def as_text(pilot: Pilot) -> str:
    """The forecast as a table for people."""
    lines = [
        f"pilot: {pilot.prompts} of {pilot.of:,} prompts, {pilot.samples} samples, {pilot.accepted} accepted,"
        f" {pilot.truncated} cut off, {pilot.reasoning_missing} without reasoning, ${pilot.usd:.4f} spent",
        "forecast for all prompts (95% interval):",
    ]
    rows: list[tuple[str, Estimate | None, Callable[[float], str]]] = [
        ("accepted share", pilot.yield_, lambda x: f"{x:.1%}"),
        ("output tokens", pilot.output_tokens, lambda x: f"{x:,.0f}"),
        ("dollars", pilot.total_usd, lambda x: f"${x:,.2f}" if x >= 1 else f"${x:.4f}"),
        (f"hours at {pilot.in_flight:g} in flight", pilot.hours, lambda x: f"{x:,.2f}"),
        ("dollars per accepted trace", pilot.usd_per_accepted, lambda x: f"${x:,.5f}"),
        ("tokens per accepted trace", pilot.tokens_per_accepted, lambda x: f"{x:,.0f}"),
    ]
    for name, estimate, shown in rows:
        if estimate is None:
            lines.append(f"  {name:<28} unknown")
        else:
            lines.append(f"  {name:<28} {shown(estimate.value)} ({shown(estimate.low)} to {shown(estimate.high)})")
    return "\n".join(lines)
