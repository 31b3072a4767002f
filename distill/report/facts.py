"""What a report says, as plain values: read from a pipeline's stages, nothing measured anew, nothing guessed.

A value that does not exist is None, and its reason stands beside it. `gather` reads everything but the evaluations,
which `scores.py` reads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.artifact import graph_bytes, variants_in
from distill.config import recipe_from
from distill.errors import RecipeError
from distill.records import Example, Prompt, Trace, read_records

from .lineage import Pipeline, StageRun, State

GateStatus = Literal["passed", "failed", "not_run"]

MEGABYTE = 1_000_000
CURVE_POINTS = 300
"""Steps drawn one by one; of longer trainings, neighbours are averaged."""
SHOWN_EXAMPLES = 3
TEXT_CHARS = 6_000
"""Longest text that a report holds whole; longer ones lose their middle."""
CHOICES = ("not-chosen", "limit")
"""Reasons for which a good trace is left out; there is nothing to see in one."""
LOST = ("api-error", "no-trace")
"""Reasons that mean no answer came."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% bounds, as shares of one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StageFact:
    """One stage of the pipeline."""

    label: str
    identity: str
    folder: str
    """Relative to the run store."""
    state: State
    seconds: float | None
    finished: str | None


@dataclass(frozen=True)
class Drop:
    """Traces that do not train for one reason."""

    reason: str
    why: str
    dropped: int
    remaining: int


@dataclass(frozen=True)
class Funnel:
    """What became of every trace that was asked for."""

    asked: int | None
    answered: int | None
    drops: tuple[Drop, ...]
    """In the order in which reasons are looked for; empty before selection."""
    examples: int | None
    prompts: int | None
    """Problems that the examples belong to."""
    outcomes: Mapping[str, Mapping[str, int]]
    """Verdicts by prompt source."""
    flags: Mapping[str, int]


@dataclass(frozen=True)
class Costs:
    """Tokens and money of the teacher's answers."""

    engine: str
    model: str
    usd: float | None
    """Price of all answers in use, those found in the ledger included; None without prices."""
    spent_usd: float | None
    """What this run itself has bought."""
    input_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    reused: int
    """Answers that the ledger had before."""
    possibly_paid_twice: int
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class CurvePoint:
    """One optimizer step, or the mean of neighbouring ones."""

    step: int
    """The last step it stands for."""
    tokens: int
    """Tokens trained on up to and with it, in this phase."""
    loss: float
    lr: float
    grad_norm: float | None


@dataclass(frozen=True)
class LookPoint:
    """What the monitor measured after a step."""

    step: int
    tokens: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    """One phase of training."""

    label: str
    kind: str
    state: State
    counts: Mapping[str, Any]
    steps: int
    """Steps in the curve; while it trains, those done so far."""
    tokens: int
    tokens_per_s: float | None
    first_loss: float | None
    last_loss: float | None
    averaged: int
    """Steps that each point of the curve stands for."""
    curve: tuple[CurvePoint, ...]
    looks: tuple[LookPoint, ...] = ()
    mfu: float | None = None
    """Mean use of the machine's matrix products, weighted by time."""


@dataclass(frozen=True)
class Gate:
    """One check of a variant against its limit; not run is never passed."""

    name: str
    variant: str
    status: GateStatus
    value: float | None
    limit: float | None
    unit: str
    detail: str


@dataclass(frozen=True)
class Variant:
    """One quantized form of the student."""

    name: str
    megabytes: float | None
    build_seconds: float | None


@dataclass(frozen=True)
class Attempt:
    """One scheme of a variant that was tried."""

    variant: str
    scheme: str
    megabytes: float
    build_seconds: float
    kl: float | None
    top1: float | None
    accuracy: float | None
    tokens_per_s: float | None
    missed: tuple[str, ...]
    """Names of the gates that it failed."""
    chosen: bool


@dataclass(frozen=True)
class Artifact:
    """What ships."""

    state: State
    folder: str
    variants: tuple[Variant, ...]
    gates: tuple[Gate, ...]
    attempts: tuple[Attempt, ...]
    """Every scheme that was tried, variant by variant in the order of trying."""
    complete: bool
    """Whether all gates have ended; before, the ones still to come stand as not run."""


@dataclass(frozen=True)
class TrainingExample:
    """A trace that trains, or one that does not and why."""

    trace_id: str
    prompt: str
    gold: str | None
    reasoning: str | None
    answer: str
    dropped: str | None = None


@dataclass(frozen=True)
class Environment:
    """What equality of results depends on, and the stages that ran in it."""

    stages: tuple[str, ...]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """A pipeline less its evaluations."""

    stages: tuple[StageFact, ...]
    prompts: Mapping[str, Any]
    funnel: Funnel | None
    costs: Costs | None
    phases: tuple[Phase, ...]
    artifact: Artifact | None
    examples: tuple[TrainingExample, ...]
    environments: tuple[Environment, ...]
    recipe_yaml: str
    """The recipe as resolved, less what has its default; empty where it is not known."""


def gather(pipeline: Pipeline) -> Facts:
    """Read everything but the evaluations.

    Raises RunError where a finished stage's file is not the one that was sealed.
    """
    prompts = pipeline.one("prompts")
    return Facts(
        stages=tuple(_stage(run, pipeline.runs) for run in pipeline.stages.values()),
        prompts=prompts.counts if prompts else {},
        funnel=funnel(pipeline),
        costs=costs(pipeline),
        phases=tuple(phase(run, pipeline) for run in pipeline.of("train") if run.state != "not run"),
        artifact=artifact(pipeline),
        examples=(*training_examples(pipeline), *dropped_examples(pipeline)),
        environments=tuple(environments(pipeline)),
        recipe_yaml=recipe_yaml(pipeline),
    )


def clip(text: str, chars: int = TEXT_CHARS) -> str:
    """A text as it is, or without its middle where it is longer than `chars`."""
    half = chars // 2
    return text if len(text) <= chars else f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def _stage(run: StageRun, runs: Path) -> StageFact:
    folder = run.folder.relative_to(runs) if run.folder.is_relative_to(runs) else run.folder
    return StageFact(run.label, run.identity, folder.as_posix(), run.state, run.seconds, run.document.get("finished"))


# --- traces ---------------------------------------------------------------------------------------------------------


def funnel(pipeline: Pipeline) -> Funnel | None:
    """From what was asked to what trains; None before anything was answered."""
    generate, select = pipeline.one("generate"), pipeline.one("select")
    counts = generate.counts if generate else {}
    selected = (select.json("funnel.json") if select else None) or {}
    if not counts and not selected:
        return None
    drops = tuple(
        Drop(**{key: step[key] for key in ("reason", "why", "dropped", "remaining")})
        for step in selected.get("funnel", ())
    )
    return Funnel(
        asked=counts.get("samples", selected.get("samples")),
        answered=counts.get("answered", _answered(drops, selected)),
        drops=drops,
        examples=selected.get("examples"),
        prompts=selected.get("prompts"),
        outcomes=selected.get("outcomes", {}),
        flags=selected.get("flags", {}),
    )


def _answered(drops: Sequence[Drop], selected: Mapping[str, Any]) -> int | None:
    lost = sum(drop.dropped for drop in drops if drop.reason in LOST)
    return selected["samples"] - lost if "samples" in selected else None


def costs(pipeline: Pipeline) -> Costs | None:
    """Money and tokens of the teacher; None before it has answered."""
    run, teacher = pipeline.one("generate"), pipeline.section("teacher")
    if run is None or not run.counts:
        return None
    counts, reasons = run.counts, {}
    priced = bool(teacher.get("prices")) or counts.get("usd", 0) > 0
    if not priced:
        reasons["usd"] = "the recipe gives the teacher no prices"
    counted = counts.get("output_tokens", 0) > 0
    if not counted:
        reasons["output_tokens"] = "the teacher's engine counts no tokens"
    return Costs(
        engine=str(teacher.get("engine", "")),
        model=str(teacher.get("model") or ""),
        usd=counts.get("usd") if priced else None,
        spent_usd=counts.get("spent_usd") if priced else None,
        input_tokens=counts.get("input_tokens") if counted else None,
        output_tokens=counts.get("output_tokens") if counted else None,
        reasoning_tokens=counts.get("reasoning_tokens") if counted else None,
        reused=counts.get("reused", 0),
        possibly_paid_twice=counts.get("possibly_paid_twice", 0),
        reasons=reasons,
    )


def training_examples(pipeline: Pipeline) -> Iterator[TrainingExample]:
    """The first examples that train."""
    select = pipeline.one("select")
    path = select.file("examples.jsonl") if select else None
    for _, example in zip(range(SHOWN_EXAMPLES), read_records(path, Example) if path else ()):
        reasoning = None if example.reasoning is None else clip(example.reasoning)
        yield TrainingExample(
            example.trace_id, clip(example.prompt.text), example.prompt.gold, reasoning, clip(example.answer)
        )


def dropped_examples(pipeline: Pipeline) -> Iterator[TrainingExample]:
    """The first trace of every reason for which something is wrong with one."""
    select = pipeline.one("select")
    sources = [pipeline.stages.get(select.upstream.get(role, "")) for role in ("traces", "prompts")] if select else []
    dropped = select.file("dropped.jsonl") if select else None
    if select is None or dropped is None or None in sources:
        return
    first: dict[str, dict[str, str]] = {}
    with dropped.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["reason"] not in CHOICES:
                first.setdefault(row["reason"], row)
    traces, prompts = sources
    assert traces is not None and prompts is not None
    found = _traces(traces, {row["trace_id"] for row in first.values()})
    asked = _prompts(prompts, {row["prompt_id"] for row in first.values()})
    for reason, row in first.items():
        if (trace := found.get(row["trace_id"])) and (prompt := asked.get(row["prompt_id"])):
            answer = trace.error if trace.error is not None else trace.answer or ("" if trace.reasoning else trace.raw)
            reasoning = clip(trace.reasoning) if trace.reasoning is not None else None
            yield TrainingExample(trace.trace_id, clip(prompt.text), prompt.gold, reasoning, clip(answer), reason)


def _traces(run: StageRun, wanted: set[str]) -> dict[str, Trace]:
    """Traces by id; reading ends as soon as all are found."""
    found: dict[str, Trace] = {}
    for path in filter(None, (run.file("traces.jsonl"), run.file("failed.jsonl"))):
        for trace in read_records(path, Trace) if wanted - found.keys() else ():
            if trace.trace_id in wanted:
                found[trace.trace_id] = trace
                if not wanted - found.keys():
                    break
    return found


def _prompts(run: StageRun, wanted: set[str]) -> dict[str, Prompt]:
    path = run.file("train.jsonl") if wanted else None
    return {
        prompt.prompt_id: prompt
        for prompt in (read_records(path, Prompt) if path else ())
        if prompt.prompt_id in wanted
    }


# --- training -------------------------------------------------------------------------------------------------------


def phase(run: StageRun, pipeline: Pipeline) -> Phase:
    """One phase with its curve; of an unfinished one, what its metrics hold so far."""
    index = int(run.label.partition(":")[2] or 0)
    phases = pipeline.section("student").get("phases", [])
    kind = phases[index].get("kind", "") if index < len(phases) else ""
    every = list(_metrics(run.file("metrics.jsonl")))
    rows = [row for row in every if "loss" in row]
    seconds, tokens = (sum(row[key] for row in rows) for key in ("seconds", "tokens"))
    averaged = -(-len(rows) // CURVE_POINTS) or 1
    return Phase(
        label=run.label,
        kind=kind,
        state=run.state,
        counts=run.counts,
        steps=len(rows),
        tokens=tokens,
        tokens_per_s=tokens / seconds if seconds else None,
        first_loss=rows[0]["loss"] if rows else None,
        last_loss=rows[-1]["loss"] if rows else None,
        averaged=averaged,
        curve=tuple(_curve(rows, averaged)),
        looks=tuple(_looks(every)),
        mfu=sum(row["mfu"] * row["seconds"] for row in rows) / seconds if seconds and "mfu" in rows[0] else None,
    )


def _looks(rows: Sequence[Mapping[str, Any]]) -> Iterator[LookPoint]:
    """The monitor's rows, with the tokens trained on before each."""
    tokens = 0
    for row in rows:
        if "loss" in row:
            tokens += row["tokens"]
        else:
            figures = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
            yield LookPoint(row["step"], tokens, figures)


def _metrics(path: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of metrics.jsonl, of steps and of looks; a line that a kill tore is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "step" in row:
            yield row


def _curve(rows: Sequence[Mapping[str, Any]], averaged: int) -> Iterator[CurvePoint]:
    """Neighbouring steps as one point: the loss is the mean over their supervised tokens."""
    done = 0
    for start in range(0, len(rows), averaged):
        group = rows[start : start + averaged]
        supervised = sum(row["supervised"] for row in group) or 1
        norms = [row["grad_norm"] for row in group if row.get("grad_norm") is not None]
        done += sum(row["tokens"] for row in group)
        yield CurvePoint(
            step=group[-1]["step"],
            tokens=done,
            loss=sum(row["loss"] * row["supervised"] for row in group) / supervised,
            lr=sum(row["lr"] for row in group) / len(group),
            grad_norm=sum(norms) / len(norms) if norms else None,
        )


# --- artifact -------------------------------------------------------------------------------------------------------


def artifact(pipeline: Pipeline) -> Artifact | None:
    """Variants with their sizes and gates; None before the export has begun."""
    run = pipeline.one("export")
    if run is None or run.state == "not run":
        return None
    names = variant_names(pipeline)
    found = run.json("gates.json")
    gates = [_gate(gate) for gate in (found["gates"] if found else _gates_so_far(run, names))]
    gates += [] if found else [_owed(name) for name in names]
    order = {name: place for place, name in enumerate(names)}
    return Artifact(
        state=run.state,
        folder=(run.folder / "artifact").as_posix(),
        variants=tuple(_variant(run, name) for name in names),
        gates=tuple(sorted(gates, key=lambda gate: order.get(gate.variant, len(order)))),
        attempts=tuple(attempt for name in names for attempt in _attempts(run, name)),
        complete=found is not None,
    )


def _attempts(run: StageRun, variant: str) -> Iterator[Attempt]:
    for tried in (run.json(f"attempts-{variant}.json") or {"attempts": ()})["attempts"]:
        values = {gate["name"]: gate.get("value") for gate in tried["gates"]}
        yield Attempt(
            variant=variant,
            scheme=tried["scheme"],
            megabytes=tried["bytes"] / MEGABYTE,
            build_seconds=tried["build_seconds"],
            kl=values.get("mean_kl"),
            top1=values.get("top1_agreement"),
            accuracy=tried.get("accuracy"),
            tokens_per_s=tried.get("tokens_per_s"),
            missed=tuple(gate["name"] for gate in tried["gates"] if gate["status"] == "failed"),
            chosen=tried["chosen"],
        )


def variant_names(pipeline: Pipeline) -> list[str]:
    """Variants in the recipe's order; those on the disk where there is no recipe."""
    named = pipeline.section("export").get("variants")
    run = pipeline.one("export")
    if named or run is None:
        return list(named or [])
    return variants_in(run.folder / "artifact")


def _gates_so_far(run: StageRun, names: Sequence[str]) -> list[dict[str, Any]]:
    documents = [run.json(f"parity-{name}.json") for name in names]
    return [gate for document in documents if document for gate in document["gates"]]


def _owed(variant: str) -> Gate:
    why = "the export is not finished; run the same command again"
    return Gate("all others", variant, "not_run", None, None, "", why)


def _gate(entry: Mapping[str, Any]) -> Gate:
    """A gate as the export wrote it."""
    texts = {key: str(entry.get(key) or "") for key in ("name", "variant", "unit", "detail")}
    return Gate(status=entry["status"], value=entry.get("value"), limit=entry.get("limit"), **texts)


def _variant(run: StageRun, name: str) -> Variant:
    note = run.json(f"build-{name}.json")
    return Variant(name, variant_megabytes(run, name), note["seconds"] if note else None)


def variant_megabytes(run: StageRun, name: str) -> float | None:
    """Size of a variant's graph and weights in MB of 10^6 bytes; None before it is built."""
    return graph_bytes(run.folder / "artifact", name) / MEGABYTE or None


def megabytes(folder: Path) -> float | None:
    """Size of all files below a folder, in MB of 10^6 bytes; None where there are none."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(sizes) / MEGABYTE if sizes else None


# --- environment ----------------------------------------------------------------------------------------------------


def environments(pipeline: Pipeline) -> Iterator[Environment]:
    """The different settings and versions that finished stages ran with."""
    stages: dict[str, list[str]] = {}
    settings: dict[str, dict[str, str]] = {}
    for run in pipeline.stages.values():
        if "environment" not in run.document:
            continue
        document = dict(run.document["environment"])
        versions = document.pop("versions", {})
        flat = {key: str(value) for key, value in {**document, **versions}.items()}
        key = json.dumps(flat, sort_keys=True)
        stages.setdefault(key, []).append(run.label)
        settings[key] = flat
    return (Environment(tuple(labels), settings[key]) for key, labels in stages.items())


def recipe_yaml(pipeline: Pipeline) -> str:
    """The resolved recipe as a file that gives the same pipeline; what has its default is left out."""
    if not pipeline.recipe:
        return ""
    try:
        recipe = recipe_from(pipeline.recipe)
        plain = {"name": recipe.name, **recipe.model_dump(mode="json", exclude_defaults=True)}
    except RecipeError:  # written by another version
        plain = dict(pipeline.recipe)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
