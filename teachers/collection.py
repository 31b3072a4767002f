"""One attempt at getting every wanted answer that the ledgers lack: asking, keeping, verifying beside it.

Engines with their own concurrency pull requests one by one, as they have room; what is asked next may wait for a
verdict. Engines that generate in batches get batches cut from everything wanted, never from what is left, so that text
is equal after a resume; adaptive sampling then goes in waves. Every request is journalled before it is sent and every
answer appended when it comes. Verdicts that take a process of their own never hold up the event loop.
"""

import asyncio
import gc
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

from distill.config import Sampling, TeacherConfig, Until
from distill.engines import Completion, Engine, Request, stream
from distill.interrupts import Stop
from distill.progress import Bar, say
from distill.records import Prompt, Teacher, Trace, Verdict, digest_json
from distill.verifiers import VerifierSpec

from .budget import Purse, cost_usd
from .ledger import Key, Ledger, now, packed
from .sampling import Course, Ladder, request_of

ALARM_AFTER = 20
"""Requests after which an error that most of them share is said aloud."""
STOP_POLL_S = 0.2
"""How soon a request to stop is acknowledged while answers are awaited."""
SYNC_EVERY_S = 1.0
"""Longest time an answer waits to be forced onto the disk; a killed process loses nothing either way."""
MOST_UNJUDGED = 1024
"""Traces that wait for a verdict before the next answer is taken: memory stays bounded."""
BREATHE_EVERY = 32
"""Answers after which other tasks get their turn, for engines that never wait."""

YOUNG_OBJECTS = 50_000
"""New objects before a garbage collection: a thousand requests in flight hold so many that Python's 700 would have them
all looked through again and again, a sixth of the processor time."""

Verify = Callable[[Prompt, Trace], Awaitable[Verdict]]


class Judging(NamedTuple):
    """How answers are verified beside generation."""

    verify: Verify
    spec_of: Callable[[Prompt], VerifierSpec]


@dataclass(frozen=True, eq=False)
class Job:
    """One sample to ask for, on one rung of the ladder."""

    course: Course
    sample: int
    rung: int

    @property
    def key(self) -> Key:
        """What its answer is filed under."""
        return (self.course.prompt.prompt_id, self.sample)


class Sent(NamedTuple):
    """A request in flight."""

    job: Job
    request: Request
    attempt: int


@dataclass
class Progress:
    """What an attempt has done so far."""

    asked: int = 0
    answered: int = 0
    failed: int = 0
    retryable: int = 0
    """Failures that may pass when asked again."""
    judged: int = 0
    accepted: int = 0
    errors: Counter[str] = field(default_factory=Counter)


@dataclass
class Collection:
    """Use `run`; afterwards `finished` says whether everything owed has been asked for."""

    engine: Engine
    teacher: TeacherConfig
    policy: Until
    ladder: Ladder
    wanted: Iterable[Prompt]
    purse: Purse
    bar: Bar
    stop: Stop
    judging: Judging | None = None
    ask: bool = True
    """Without, nothing is sent: only verdicts on what the ledgers have are made."""
    progress: Progress = field(default_factory=Progress)
    finished: bool = False
    correct: set[int] = field(default_factory=set)
    """Packed keys of samples whose final answer verified; kept where the policy is adaptive."""
    _in_flight: dict[Key, Sent] = field(default_factory=dict)
    _ready: deque[Job] = field(default_factory=deque)
    _verdicts: set[asyncio.Task[None]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _trouble: BaseException | None = None

    @property
    def adaptive(self) -> bool:
        """Whether the number of samples depends on verdicts."""
        return self.policy.tries > self.policy.correct

    @property
    def _may_grow(self) -> bool:
        """Whether an answer can call for another request."""
        return self.adaptive or len(self.ladder.rungs) > 1

    async def run(self) -> None:
        """Ask until nothing is owed, the budget is reached or a signal comes; answers in flight are waited for."""
        watchers = [asyncio.create_task(self._acknowledge_stop()), asyncio.create_task(self._sync_regularly())]
        thresholds = gc.get_threshold()
        gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
        try:
            await (self._one_by_one() if self.engine.batch_size is None else self._in_waves(self.engine.batch_size))
            await self._verdicts_in()
        finally:
            for task in (*watchers, *self._verdicts):
                task.cancel()
            await asyncio.gather(*watchers, *self._verdicts, return_exceptions=True)
            gc.set_threshold(*thresholds)
            await self.engine.close()

    # --- independent requests ---

    async def _one_by_one(self) -> None:
        await self._receive(self._requests(iter(self.wanted)))

    async def _requests(self, prompts: Iterator[Prompt]) -> AsyncIterator[Request]:
        """What is asked, as the engine has room: it waits where the next request depends on an answer or a price."""
        while not self.stop.requested and self._trouble is None:
            self._changed.clear()
            job = self._next(prompts)
            if job is not None and self.purse.fits(len(self._in_flight) + len(self._verdicts)):
                yield self._send(job)
                continue
            if job is not None:
                self._ready.appendleft(job)
            if (job is None and not self._may_grow) or not (self._in_flight or self._verdicts):
                self.finished = job is None
                return
            await self._changed.wait()

    def _next(self, prompts: Iterator[Prompt]) -> Job | None:
        """The next sample to ask for; None if there is none, or none before a verdict."""
        while not self._ready and len(self._verdicts) < MOST_UNJUDGED:
            prompt = next(prompts, None)
            if prompt is None:
                break
            self._advance(Course(prompt, self.policy))
        return self._ready.popleft() if self._ready else None

    def _advance(self, course: Course) -> None:
        """Begin the samples that a prompt surely needs; those that the ledgers have go straight to their verdict."""
        while samples := course.begin():
            for sample in samples:
                standing = self.ladder.standing((course.prompt.prompt_id, sample))
                job = Job(course, sample, standing.rung)
                if not standing.owed:
                    self._conclude_stored(job)
                elif self.ask:
                    self._ready.append(job)
                else:
                    course.stopped = True
                    course.conclude(correct=False)
        self._close(course)

    def _close(self, course: Course) -> None:
        """Count an adaptive prompt once, when it needs nothing more."""
        if self.adaptive and course.done and not course.closed:
            course.closed = True
            self.bar.advance(1)

    def _conclude_stored(self, job: Job) -> None:
        """A sample that was answered before: its verdict matters only to an adaptive policy."""
        if not self.adaptive:
            job.course.conclude(correct=False)
            return
        trace = self.ladder.rungs[job.rung].ledger.get(job.key)
        assert trace is not None  # it is answered
        self._begin_verdict(job, trace, again=True)

    # --- batches ---

    async def _in_waves(self, size: int) -> None:
        """One wave for a fixed number of samples; else one a sample index, over the prompts that still need it."""
        for wave in range(self.policy.tries if self.adaptive else 1):
            for rung in range(len(self.ladder.rungs)):
                if not await self._wave(wave, rung, size):
                    return
            await self._verdicts_in()
        self.finished = True

    async def _wave(self, wave: int, rung: int, size: int) -> bool:
        """Ask for what is owed of a wave; False if a signal or a budget ended it."""
        jobs = self._jobs_of_wave(wave, rung)
        while batch := [job for _, job in zip(range(size), jobs)]:
            owed = [job for job in batch if not self.ladder.rungs[rung].ledger.answered(job.key)]
            if self.stop.requested or (owed and self.ask and self.purse.reached(len(owed))):
                return False
            for job in batch:
                if job not in owed and not self.ladder.climbs(job.key, rung):
                    self._conclude_stored(job)
            if owed and self.ask:
                for job in owed:
                    self._send(job)
                # text depends on the whole batch, so the whole batch is generated again
                sampling = self.ladder.rungs[rung].sampling
                await self._receive(
                    stream(request_of(job.course.prompt, job.sample, sampling, self.teacher) for job in batch)
                )
        return True

    def _jobs_of_wave(self, wave: int, rung: int) -> Iterator[Job]:
        for prompt in self.wanted:
            course = Course(prompt, self.policy)
            samples = self._sample_of_wave(course, wave) if self.adaptive else course.begin()
            for sample in samples:
                job = Job(course, sample, rung)
                if rung == 0 or self._cut_off(job.key, rung - 1):
                    yield job

    def _sample_of_wave(self, course: Course, wave: int) -> range:
        """The sample of an adaptive wave, if the prompt still needs it after the waves before."""
        keys = [(course.prompt.prompt_id, sample) for sample in range(wave)]
        if any(self.ladder.standing(key).owed for key in keys):
            return range(0)  # refused, or to be asked again first
        course.correct = sum(packed(key) in self.correct for key in keys)
        course.begun, course.pending = wave + 1, 1
        return range(wave, wave + 1) if course.correct < self.policy.correct else range(0)

    def _cut_off(self, key: Key, rung: int) -> bool:
        ledger = self.ladder.rungs[rung].ledger
        return ledger.answered(key) and ledger.truncated(key)

    # --- sending and receiving ---

    def _send(self, job: Job) -> Request:
        rung = self.ladder.rungs[job.rung]
        request = request_of(job.course.prompt, job.sample, rung.sampling, self.teacher)
        self._in_flight[job.key] = Sent(job, request, rung.ledger.ask(job.key))
        self.progress.asked += 1
        return request

    async def _receive(self, requests: AsyncIterator[Request]) -> None:
        async with aclosing(self.engine.generate(requests)) as completions:  # type: ignore[type-var]
            async for completion in completions:
                self._keep(completion)
                if len(self._verdicts) >= MOST_UNJUDGED or self.progress.answered % BREATHE_EVERY == 0:
                    await asyncio.sleep(0)
                while len(self._verdicts) >= MOST_UNJUDGED:
                    await asyncio.wait(self._verdicts, return_when=asyncio.FIRST_COMPLETED)
        self._in_flight.clear()
        self._raise_trouble()

    def _raise_trouble(self) -> None:
        """Raise what keeps answers from being verified; those that were in flight have been kept by then."""
        if self._trouble is not None:
            raise self._trouble

    def _keep(self, completion: Completion) -> None:
        """Append an answer or a failure; a batch's members that were there already are let go."""
        sent = self._in_flight.pop(completion.key, None)
        if sent is None:
            return
        job, rung = sent.job, self.ladder.rungs[sent.job.rung]
        trace = trace_of(sent.request, sent.attempt, completion, self.teacher, self.engine, rung.cfg)
        rung.ledger.add(trace)
        self._count(trace)
        if trace.failed:
            self._give_up(job, trace)
        elif self.ladder.climbs(job.key, job.rung):
            if self.engine.batch_size is None:
                self._ready.appendleft(replace(job, rung=job.rung + 1))
        else:
            self._begin_verdict(job, trace)
        self._changed.set()

    def _count(self, trace: Trace) -> None:
        progress = self.progress
        progress.failed += trace.failed
        progress.answered += not trace.failed
        if trace.error is not None:
            progress.errors[trace.error] += 1
        if progress.failed + progress.answered == ALARM_AFTER:
            self._raise_alarm()
        self.bar.advance(0 if self.adaptive else 1, tokens=trace.usage.output, **self._shown())

    def _shown(self) -> dict[str, str]:
        """What the live line says beside rates."""
        progress, spent = self.progress, self.purse.spent
        shown = {"in flight": str(len(self._in_flight))}
        if progress.judged:
            shown["accepted"] = f"{progress.accepted / progress.judged:.0%}"
        if spent.usd:
            shown["spent"] = f"${spent.usd:,.2f}"
            if self.bar.total and self.bar.done:
                left = max(0.0, self.bar.total - self.bar.done) / max(1.0, self.bar.done - self.bar.done_before)
                shown["forecast"] = f"${spent.usd * (1 + left):,.2f}"
        if progress.failed:
            shown["failed"] = str(progress.failed)
        return shown

    def _give_up(self, job: Job, trace: Trace) -> None:
        """A request without an answer: one that may pass stays owed; a refused prompt gets no further sample."""
        if trace.retryable:
            self.progress.retryable += 1
            return
        job.course.stopped = True
        job.course.conclude(correct=False)
        self._advance_if_pulled(job.course)

    # --- verdicts ---

    def _begin_verdict(self, job: Job, trace: Trace, again: bool = False) -> None:
        """Verify a final answer; an adaptive course goes on only with the verdict."""
        if not self.adaptive:
            self._conclude(job, correct=False)
        if self.judging is None:
            return
        ledger = self.ladder.rungs[job.rung].ledger
        spec = self.judging.spec_of(job.course.prompt)
        stored = None if spec.light else ledger.verdict(trace.trace_id, spec.label, job.course.prompt.gold)
        if stored is not None:
            self._judged(job, stored, again)
            return
        work = self._verify(job, trace, None if spec.light else ledger, again)
        if spec.light:
            _run_through(work)
            return
        task = asyncio.create_task(work)
        self._verdicts.add(task)
        task.add_done_callback(self._verdict_done)

    async def _verify(self, job: Job, trace: Trace, ledger: Ledger | None, again: bool) -> None:
        assert self.judging is not None
        verdict = await self.judging.verify(job.course.prompt, trace)
        if ledger is not None and verdict.outcome in ("correct", "wrong", "unverifiable"):
            ledger.add_verdict(verdict)  # a time-out may not happen again
        self._judged(job, verdict, again)

    def _verdict_done(self, task: asyncio.Task[None]) -> None:
        self._verdicts.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._trouble = self._trouble or task.exception()
        self._changed.set()

    def _judged(self, job: Job, verdict: Verdict, again: bool) -> None:
        if not again:
            self.progress.judged += 1
            self.progress.accepted += verdict.correct
        if self.adaptive:
            if verdict.correct:
                self.correct.add(packed(job.key))
            self._conclude(job, verdict.correct)

    def _conclude(self, job: Job, correct: bool) -> None:
        job.course.conclude(correct)
        self._advance_if_pulled(job.course)

    def _advance_if_pulled(self, course: Course) -> None:
        """Waves begin samples themselves; else a conclusion may call for the next sample."""
        if self.engine.batch_size is None and self.adaptive:
            self._advance(course)
        else:
            self._close(course)

    async def _verdicts_in(self) -> None:
        while self._verdicts:
            await asyncio.wait(self._verdicts)
        self._raise_trouble()

    # --- beside it ---

    def _raise_alarm(self) -> None:
        """Say once what most of the first requests fail with."""
        for error, count in self.progress.errors.most_common(1):
            if count > ALARM_AFTER / 2:
                say(f"{count} of the first {ALARM_AFTER} requests failed: {error}")

    async def _acknowledge_stop(self) -> None:
        while not self.stop.requested:
            await asyncio.sleep(STOP_POLL_S)
        say(f"stopping: waiting for {len(self._in_flight)} requests in flight; a second signal drops them")
        self._changed.set()

    async def _sync_regularly(self) -> None:
        """Force answers onto the disk without holding up the others."""
        with suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(SYNC_EVERY_S)
                for rung in self.ladder.rungs:
                    await asyncio.to_thread(rung.ledger.sync)


def _run_through(work: Any) -> None:
    """Run a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise RuntimeError("a light verifier waited for something; it must not be marked as light")


@cache
def _drawn(sampling: Sampling) -> dict[str, Any]:
    """How a trace was drawn, for its record."""
    return sampling.model_dump(mode="json", exclude={"n", "seed"}, exclude_none=True)


@lru_cache(maxsize=256)
def _author(engine: str, version: str, model: str, revision: str | None, licence: str | None) -> Teacher:
    return Teacher(engine=engine, engine_version=version, model=model, revision=revision, licence=licence)


def trace_of(
    request: Request, attempt: int, completion: Completion, teacher: TeacherConfig, engine: Engine, cfg: str
) -> Trace:
    """The record of one completion."""
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
        cost_usd=cost_usd(teacher, completion),
        latency_s=round(completion.latency_s, 6),
        teacher=_author(
            engine.name,
            engine.version,
            completion.model or teacher.model,
            completion.revision or teacher.revision,
            teacher.licence,
        ),
        sampling={**_drawn(request.sampling), "seed": request.seed},
        token_ids=completion.token_ids,
        error=completion.error,
        retryable=completion.retryable,
        timestamp=now(),
    )
