"""Asking judges: verifiers that are language models, each with a ledger, so that no verdict is bought twice.

A judge is asked like a teacher, through the same engine and with the same journal; what it is asked contains the rubric
and the answer to judge, so a changed rubric or another judge has answers of its own. What judges cost counts against
the budget of the run that asks them.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from distill.config import FormatConfig, JudgeVerifier, Sampling, TeacherConfig
from distill.engines import Completion, Engine, Request, open_engine, sample_seed
from distill.errors import EngineError
from distill.records import Prompt, Trace, Verdict
from distill.runs import RunOptions
from distill.verifiers import JUDGE, VerifierSpec
from distill.verifiers.judging import judge_prompt, unasked, verdict_on

from .collection import trace_of
from .ledger import Key, Ledger, cfg_of, open_ledger, sent_to_teacher


@dataclass
class Judge:
    """One judging model, its ledger, and the requests on their way to it."""

    label: str
    section: JudgeVerifier
    teacher: TeacherConfig
    engine: Engine
    ledger: Ledger
    cfg: str
    _queue: asyncio.Queue[Request] = field(default_factory=asyncio.Queue)
    _waiting: dict[Key, asyncio.Future[Trace]] = field(default_factory=dict)
    _attempts: dict[Key, tuple[Request, int]] = field(default_factory=dict)
    _server: asyncio.Task[None] | None = None
    _ended: EngineError | None = None
    """Why this judge cannot be asked any more."""

    async def verdict(self, prompt: Prompt, trace: Trace) -> Verdict:
        """What the judge says of a trace; asks only where the ledger has no reply."""
        if (known := unasked(self.label, self.section, prompt, trace)) is not None:
            return known
        asked = judge_prompt(self.section, prompt, trace)
        key = (asked.prompt_id, 0)
        reply = self.ledger.get(key) if self.ledger.answered(key) else await self._reply(asked, key)
        assert reply is not None  # it is answered
        return verdict_on(self.label, prompt, trace, reply)

    async def _reply(self, asked: Prompt, key: Key) -> Trace:
        if self._ended is not None:
            raise self._ended  # nobody reads the queue now: a request in it would wait for ever
        if self._server is None:
            self._server = asyncio.create_task(self._serve())
        if key not in self._waiting:
            self._waiting[key] = asyncio.get_running_loop().create_future()
            sampling = self.teacher.sampling
            self._queue.put_nowait(Request(asked, 0, sampling, sample_seed(0, *key), self.teacher.system))
        return await asyncio.shield(self._waiting[key])

    async def _serve(self) -> None:
        """Answer what is waiting until the event loop ends; an engine that cannot go on ends every wait."""
        try:
            async for completion in self.engine.generate(self._requests()):
                self._keep(completion)
        except EngineError as error:
            self._ended = EngineError(f"verifier {self.label}: {error}")
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(self._ended)

    async def _requests(self) -> AsyncIterator[Request]:
        while True:
            request = await self._queue.get()
            self._attempts[request.key] = (request, self.ledger.ask(request.key))
            yield request

    def _keep(self, completion: Completion) -> None:
        request, attempt = self._attempts.pop(completion.key)
        reply = trace_of(request, attempt, completion, self.teacher, self.engine, self.cfg)
        self.ledger.add(reply)
        waiting = self._waiting.pop(completion.key)
        if not waiting.done():
            waiting.set_result(reply)

    async def close(self) -> None:
        """Stop asking; what has come is in the ledger."""
        if self._server is not None:
            self._server.cancel()
            with suppress(asyncio.CancelledError):
                await self._server
            self._server = None
        await self.engine.close()


@dataclass(frozen=True)
class Judges:
    """The judges of a recipe by their label."""

    by_label: dict[str, Judge]

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """Their ledgers by cfg: what they cost is part of a run's budget."""
        return {judge.cfg: judge.ledger for judge in self.by_label.values()}

    async def verdict(self, spec: VerifierSpec, prompt: Prompt, trace: Trace) -> Verdict:
        """What a judge says of a trace. Raises EngineError where it cannot be asked at all."""
        return await self.by_label[spec.label].verdict(prompt, trace)

    async def close(self) -> None:
        """Stop asking, in the event loop that asked."""
        for judge in self.by_label.values():
            await judge.close()


def judges_among(specs: Iterable[VerifierSpec]) -> list[VerifierSpec]:
    """The verifiers, parts of combinations included, that are language models."""
    leaves = (leaf for spec in specs for leaf in spec.leaves() if leaf.name == JUDGE)
    return list({leaf.label: leaf for leaf in leaves}.values())


def teacher_of(section: JudgeVerifier) -> TeacherConfig:
    """A judge as the engine and the ledger know it."""
    return TeacherConfig(
        engine="openai",
        model=section.model,
        sampling=Sampling(temperature=section.temperature, max_new_tokens=section.max_new_tokens),
        endpoint=section.endpoint,
        prices=section.prices,
    )


@contextmanager
def open_judges(specs: Iterable[VerifierSpec], format: FormatConfig, options: RunOptions) -> Iterator[Judges]:
    """Hold the engines and ledgers of every judge among these verifiers; close them in their event loop first.

    Raises EngineError for an address or key that cannot work, LockedError if another process asks the same judge.
    """
    with ExitStack() as held:
        judges = {}
        for spec in judges_among(specs):
            section: JudgeVerifier = spec.section
            teacher = teacher_of(section)
            engine = open_engine(teacher, format, options)
            sent = sent_to_teacher(teacher, format, {}, engine.version)
            ledger = held.enter_context(open_ledger(options.runs, sent, options.shard))
            judges[spec.label] = Judge(spec.label, section, teacher, engine, ledger, cfg_of(sent))
        yield Judges(judges)
