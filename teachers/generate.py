"""The generate stage: every training prompt is answered as often as the recipe wants, and no answer is bought twice.

Owed work is what the recipe wants less what the ledger has, so a run can be killed at any byte, grow its prompts or
raise n, and asks only for what is missing. Each request is journalled before it is sent and each answer appended when
it comes. The run itself is a view of the ledger in prompt order: `traces.jsonl` for answers, `failed.jsonl` for
requests that got none.
"""

import asyncio
import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Recipe, TeacherConfig
from distill.engines import ENGINES, Completion, Engine, Request, open_engine, run_async, sample_seed, stream
from distill.errors import BudgetError, DataError, EngineError
from distill.interrupts import Stop, graceful
from distill.progress import Bar, progress, say
from distill.records import Prompt, Teacher, Trace, digest_json, read_records, write_records
from distill.runs import OpenRun, RunOptions, SealedRun, Step, open_run

from .budget import Purse, cost_usd, spent_before
from .ledger import Key, Ledger, cfg_of, now, open_ledger, sent_to_teacher

ALARM_AFTER = 20
"""Requests after which an error that most of them share is said aloud."""
STOP_POLL_S = 0.2
"""How soon a request to stop is acknowledged while answers are awaited."""


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse a teacher that cannot answer here: a missing key, package or file. Spends nothing and writes nothing.

    An engine's module may have a `preflight(teacher, format, options)` of its own; one that has none needs none.
    """
    teacher = _teacher(recipe)
    module = importlib.import_module(ENGINES[teacher.engine].partition(":")[0])
    check = getattr(module, "preflight", None)
    if check is not None:
        check(teacher, recipe.format, options)


def run(recipe: Recipe, step: Step, options: RunOptions) -> SealedRun:
    """Ask for what the ledger lacks, then write and seal this run's view of it.

    Raises EngineError where no request can succeed, BudgetError once a budget is reached, Interrupted after a signal;
    every answer that has come is kept in all three cases, and the same command goes on from there.
    """
    teacher = _teacher(recipe)
    wanted = Wanted(step.result("prompts").path("train.jsonl"), teacher)
    engine = open_engine(teacher, recipe.format, options)
    sent = sent_to_teacher(teacher, recipe.format, step.fields.get("roots", {}), engine.version)
    with open_run(step, options) as opened, open_ledger(options.runs, sent) as ledger:
        purse = Purse(teacher.budget, ledger, spent_before(opened.work / "before.json", ledger))
        owed = survey(wanted, ledger)
        _say_owed(step.label, owed, ledger)
        with progress(step.label, owed.samples, options, "traces", owed.reused) as bar, graceful() as stop:
            collection = Collection(engine, teacher, cfg_of(sent), wanted, ledger, purse, bar, stop)
            run_async(collection.run())
        _stop_at_budget(step.label, owed, collection, purse)
        return seal(opened, wanted, ledger, {**owed.counts, "asked": collection.asked, **_spent(purse)})


def _teacher(recipe: Recipe) -> TeacherConfig:
    assert recipe.teacher is not None  # a plan without a teacher has no generate step
    return recipe.teacher


# --- what is wanted and what is owed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Every sample the recipe asks for, by prompt and then by sample index, streamed from the prompts' file."""

    prompts: Path
    teacher: TeacherConfig

    def __iter__(self) -> Iterator[Request]:
        sampling = self.teacher.sampling
        for prompt in read_records(self.prompts, Prompt):
            for sample in range(sampling.n):
                seed = sample_seed(sampling.seed, prompt.prompt_id, sample)
                yield Request(prompt, sample, sampling, seed, self.teacher.system)


class Owed(NamedTuple):
    """What there is to do."""

    samples: int
    reused: int
    possibly_paid: int

    @property
    def counts(self) -> dict[str, int]:
        """For the seal."""
        return {"samples": self.samples, "reused": self.reused, "possibly_paid_twice": self.possibly_paid}


def survey(wanted: Iterable[Request], ledger: Ledger) -> Owed:
    """Count what is wanted, what the ledger has of it, and what was in flight when an earlier run died.

    Raises DataError if nothing is wanted.
    """
    samples = reused = possibly_paid = 0
    for request in wanted:
        samples += 1
        reused += ledger.answered(request.key)
        possibly_paid += ledger.possibly_paid(request.key)
    if samples == 0:
        raise DataError("there are no training prompts to answer: every prompt was held out or dropped")
    return Owed(samples, reused, possibly_paid)


def _say_owed(label: str, owed: Owed, ledger: Ledger) -> None:
    if owed.reused:
        say(f"{label}: {owed.reused} of {owed.samples} answers are in the ledger already")
    if owed.possibly_paid:
        say(
            f"{label}: asking again for {owed.possibly_paid} answers that were in flight when an earlier run stopped"
            " (possibly paid twice)"
        )
    if ledger.damaged_lines:
        say(f"{label}: {ledger.folder} has {ledger.damaged_lines} damaged lines; what they held counts as not answered")


# --- asking ---------------------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A request in flight."""

    request: Request
    attempt: int


@dataclass
class Collection:
    """One attempt at getting every wanted answer that the ledger lacks."""

    engine: Engine
    teacher: TeacherConfig
    cfg: str
    wanted: Iterable[Request]
    ledger: Ledger
    purse: Purse
    bar: Bar
    stop: Stop
    asked: int = 0
    failed: int = 0
    finished: bool = False
    """Whether everything owed has been asked for."""
    _received: int = 0
    _in_flight: dict[Key, Sent] = field(default_factory=dict)
    _errors: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        """Ask until nothing is owed, the budget is reached or a signal comes; answers in flight are waited for."""
        watcher = asyncio.create_task(self._acknowledge_stop())
        try:
            await (self._one_by_one() if self.engine.batch_size is None else self._in_batches(self.engine.batch_size))
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
            await self.engine.close()

    async def _one_by_one(self) -> None:
        """Independent requests, pulled by the engine as it has room.

        Near the limit of a budget the pull ends while others are in flight; once they are in, it is known what they
        cost, and another round takes what still fits.
        """
        owed = (request for request in self.wanted if not self.ledger.answered(request.key))
        while not (self.finished or self.stop.requested or self.purse.reached()):
            await self._receive(self._pull(owed))

    def _pull(self, owed: Iterator[Request]) -> Iterator[Request]:
        while not self.stop.requested and self.purse.fits(len(self._in_flight)):
            request = next(owed, None)
            if request is None:
                self.finished = True
                return
            self._send(request)
            yield request

    async def _in_batches(self, size: int) -> None:
        """Batches cut from everything wanted, never from what is left, so that text is equal after a resume."""
        wanted = iter(self.wanted)
        while batch := list(islice(wanted, size)):
            owed = [request for request in batch if not self.ledger.answered(request.key)]
            if self.stop.requested or (owed and self.purse.reached(len(owed))):
                return
            for request in owed:
                self._send(request)
            if owed:
                await self._receive(batch)
        self.finished = True

    def _send(self, request: Request) -> None:
        self._in_flight[request.key] = Sent(request, self.ledger.ask(request.key))
        self.asked += 1

    async def _receive(self, requests: Iterable[Request]) -> None:
        async with aclosing(self.engine.generate(stream(requests))) as completions:  # type: ignore[type-var]
            async for completion in completions:
                self._keep(completion)
        self._in_flight.clear()

    def _keep(self, completion: Completion) -> None:
        """Append an answer or a failure; a batch's members that were there already are let go."""
        sent = self._in_flight.pop(completion.key, None)
        if sent is None:
            return
        trace = trace_of(sent.request, sent.attempt, completion, self.teacher, self.engine, self.cfg)
        self.ledger.add(trace)
        if trace.error is not None:
            self.failed += 1
            self._errors[trace.error] += 1
        self._received += 1
        if self._received == ALARM_AFTER:
            self._raise_alarm()
        shown = {"failed": str(self.failed)} if self.failed else {}
        self.bar.advance(1, tokens=trace.usage.output, **shown)

    def _raise_alarm(self) -> None:
        """Say once what most of the first requests fail with."""
        for error, count in self._errors.most_common(1):
            if count > ALARM_AFTER / 2:
                say(f"{count} of the first {ALARM_AFTER} requests failed: {error}")

    async def _acknowledge_stop(self) -> None:
        while not self.stop.requested:
            await asyncio.sleep(STOP_POLL_S)
        say(f"stopping: waiting for {len(self._in_flight)} requests in flight; a second signal drops them")


def trace_of(
    request: Request, attempt: int, completion: Completion, teacher: TeacherConfig, engine: Engine, cfg: str
) -> Trace:
    """The record of one completion."""
    sampling = request.sampling.model_dump(mode="json", exclude={"n", "seed"}, exclude_none=True)
    content = completion.raw if completion.error is None else completion.error
    return Trace(
        trace_id=digest_json([cfg, *request.key, content])[:16],
        prompt_id=request.prompt.prompt_id,
        cfg=cfg,
        sample=request.sample,
        attempt=attempt,
        reasoning=completion.reasoning,
        answer=completion.answer,
        raw=completion.raw,
        think=completion.think,
        finish_reason="error" if completion.error is not None else completion.finish_reason,
        usage=completion.usage,
        cost_usd=cost_usd(teacher, completion.usage, completion.raw),
        latency_s=round(completion.latency_s, 6),
        teacher=Teacher(
            engine=engine.name,
            engine_version=engine.version,
            model=completion.model or teacher.model,
            revision=completion.revision or teacher.revision,
            licence=teacher.licence,
        ),
        sampling={**sampling, "seed": request.seed},
        token_ids=completion.token_ids,
        error=completion.error,
        timestamp=now(),
    )


def _stop_at_budget(label: str, owed: Owed, collection: Collection, purse: Purse) -> None:
    """Raise BudgetError if a limit kept owed requests from being sent."""
    left = owed.samples - owed.reused - collection.asked
    limit = purse.reached() or purse.reached(collection.engine.batch_size or 1)
    if left == 0 or limit is None:
        return
    spent = purse.spent
    raise BudgetError(
        f"{label}: teacher.budget.{limit.key} of {limit.limit:g} is reached: this run has spent ${spent.usd:.4f} and"
        f" {spent.output_tokens:,} output tokens on {spent.answers:,} answers, all kept; {left:,} of"
        f" {owed.samples:,} samples are still owed; raise it and run the same command to continue"
    )


def _spent(purse: Purse) -> dict[str, Any]:
    """What this run itself has bought, as its budget counted it."""
    tokens = {"spent_output_tokens": purse.spent.output_tokens} if purse.limits() else {}
    return {"spent_usd": round(purse.spent.usd, 6), **tokens}


# --- the run's view of the ledger -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts and the result digest of a view while it is written."""

    answered: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    usd: float = 0.0
    reasoning_lost: int = 0
    """Answers billed for reasoning that did not come with them."""
    think: Counter[str] = field(default_factory=Counter)
    finish: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    def answer(self, trace: Trace) -> Trace:
        """Count an answer and pass it on."""
        self.answered += 1
        self.input_tokens += trace.usage.input
        self.output_tokens += trace.usage.output
        self.reasoning_tokens += trace.usage.reasoning or 0
        self.usd += trace.cost_usd
        self.reasoning_lost += bool(trace.usage.reasoning) and trace.reasoning is None
        self.think[trace.think] += 1
        self.finish[trace.finish_reason] += 1
        self._add(trace.result)
        return trace

    def failure(self, trace: Trace) -> Trace:
        """Count a failure and pass it on; what is equal after a kill is that it failed, and how."""
        self.failed += 1
        self.errors[str(trace.error)] += 1
        self._add({"prompt_id": trace.prompt_id, "sample": trace.sample, "error": trace.error})
        return trace

    def _add(self, result: dict[str, Any]) -> None:
        self._hash.update(json.dumps(result, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    @property
    def digest(self) -> str:
        """The result digest of everything counted so far."""
        return self._hash.hexdigest()

    @property
    def counts(self) -> dict[str, Any]:
        """For the seal."""
        numbers = (
            "answered", "failed", "input_tokens", "output_tokens", "reasoning_tokens", "reasoning_lost",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in numbers},
            "usd": round(self.usd, 6),
            "think": dict(sorted(self.think.items())),
            "finish_reasons": dict(sorted(self.finish.items())),
        }


def seal(run: OpenRun, wanted: Wanted, ledger: Ledger, counts: dict[str, Any]) -> SealedRun:
    """Write the view of everything wanted in prompt order and seal the run.

    Raises EngineError if no sample at all has an answer, or if the engine left requests without any completion.
    """
    label = run.step.label
    missing = sum(not (ledger.answered(r.key) or ledger.failed(r.key)) for r in wanted)
    if missing:
        raise EngineError(f"{label}: the engine gave neither answer nor error to {missing} requests; run again")
    if not any(ledger.answered(request.key) for request in wanted):
        raise EngineError(f"{label}: every request failed, most often with: {_commonest_error(wanted, ledger)}")
    tally = Tally()
    answers = (tally.answer(trace) for trace in _traces(wanted, ledger, failed=False))
    write_records(run.path("traces.jsonl"), answers)
    failures = (tally.failure(trace) for trace in _traces(wanted, ledger, failed=True))
    write_records(run.path("failed.jsonl"), failures)
    _say_result(label, tally, run.folder)
    prompts = counts["samples"] // wanted.teacher.sampling.n
    return run.seal(tally.digest, {"prompts": prompts, **counts, **tally.counts}, cfg=ledger.folder.name)


def _traces(wanted: Wanted, ledger: Ledger, failed: bool) -> Iterator[Trace]:
    for request in wanted:
        if ledger.failed(request.key) == failed:
            trace = ledger.get(request.key)
            assert trace is not None  # nothing is missing
            yield trace


def _commonest_error(wanted: Wanted, ledger: Ledger) -> str:
    errors = Counter(str(trace.error) for trace in _traces(wanted, ledger, failed=True))
    return errors.most_common(1)[0][0]


def _say_result(label: str, tally: Tally, folder: Path) -> None:
    total = tally.answered + tally.failed
    if tally.failed:
        error = tally.errors.most_common(1)[0][0]
        say(f"{label}: {tally.failed} of {total} requests failed ({folder / 'failed.jsonl'}), most often with: {error}")
    if tally.reasoning_lost:
        say(
            f"{label}: {tally.reasoning_lost} of {total} answers were billed for reasoning that the server did not"
            " send; choose an endpoint that returns it (reasoning_content, reasoning or tags)"
        )
