"""The generate stage: every training prompt is answered as often as the recipe wants, and no answer is bought twice.

Owed work is what the recipe wants less what the ledgers have, so a run can be killed at any byte, grow its prompts or
raise n, and asks only for what is missing. The run itself is a view of the ledgers in prompt order: `traces.jsonl` for
answers, `failed.jsonl` for requests that got none, `verdicts.jsonl` for verdicts that were made beside generation and
took a process of their own.
"""

import hashlib
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Recipe, TeacherConfig
from distill.engines import ENGINES, Engine, Probing, Stateful, open_engine, run_async
from distill.errors import BudgetError, DataError, EngineError, IncompleteError
from distill.interrupts import graceful
from distill.prices import listed_prices
from distill.progress import progress, say
from distill.records import Prompt, Trace, Verdict, write_records
from distill.runs import OpenRun, RunOptions, SealedRun, Step, open_run
from distill.verifiers import VerifierSpec, resolve
from distill.verifiers.pool import VerifierPool

from .budget import Purse, spent_before
from .collection import Collection, Judging
from .judging import Judges, open_judges
from .ledger import FOLDER, Key, Ledger, cfg_of, open_for_reading, open_ledger, samplings, sent_to_teacher
from .sampling import Course, Ladder, Rung, Wanted, policy_of, replay, request_of

LOST_REASONING = "reasoning:"
"""How a probe's note begins that says reasoning was billed and not sent."""


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse a teacher that cannot answer here: a missing key, package or file. Spends nothing and writes nothing.

    An engine's module may have a `preflight(teacher, format, options)` of its own; one that has none needs none.
    """
    teacher = _teacher(recipe)
    module = importlib.import_module(ENGINES[teacher.engine].partition(":")[0])
    check = getattr(module, "preflight", None)
    if check is not None and options.ask:
        check(teacher, recipe.format, options)


def run(recipe: Recipe, step: Step, options: RunOptions) -> SealedRun:
    """Ask for what the ledgers lack, then write and seal this run's view of them.

    Raises EngineError where no request can succeed, BudgetError once a budget is reached, IncompleteError if requests
    failed that may succeed later, Interrupted after a signal; every answer that has come is kept in all of these cases,
    and the same command goes on from there.
    """
    with open_run(step, options) as opened, open_work(recipe, step, options) as work:
        owed = work.survey()
        work.collect(owed, opened.work / "before.json")
        work.write_failures(opened.path("failed.jsonl"))
        if not options.accept_partial:
            work.refuse_incomplete(owed)
        return work.seal(opened, owed)


def run_shard(recipe: Recipe, step: Step, options: RunOptions) -> dict[str, Any]:
    """Ask for what the ledgers lack of one shard; nothing is sealed. Returns counts. Raises as `run` does."""
    with open_work(recipe, step, options) as work:
        owed = work.survey()
        own = work.ladder.rungs[0].ledger.folder
        work.collect(owed, own / f"before-{step.identity}.json")
        work.refuse_incomplete(owed)
        return {"shard": str(options.shard), **owed.counts, "asked": work.collection.progress.asked}


def take_over(recipe: Recipe, step: Step, options: RunOptions, others: Sequence[Path]) -> int:
    """Copy what other run stores' ledgers have for this step beyond our own; returns how many answers came.

    Raises DataError for a store that has nothing of it.
    """
    came = 0
    with open_work(recipe, step, options) as work:
        for store in others:
            found = [store / FOLDER / cfg for cfg in work.ledgers]
            if not any(folder.is_dir() for folder in found):
                raise DataError(
                    f"{store}: no answers to this recipe's teacher in it (looked for {found[0]}); give the run store"
                    " (the folder of --runs) of a run with the same teacher, sampling and format"
                )
            for cfg, ledger in work.ledgers.items():
                if not (store / FOLDER / cfg).is_dir():
                    continue
                came += _copied(store / FOLDER / cfg, ledger)
    return came


def _copied(folder: Path, ledger: Ledger) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        other = open_for_reading(folder, Path(scratch), ledger.removed)
        try:
            return ledger.take_over(other)
        finally:
            other.close()


def _teacher(recipe: Recipe) -> TeacherConfig:
    """The teacher; where the recipe gives no prices, with those of the dated list."""
    teacher = recipe.teacher
    assert teacher is not None  # a plan without a teacher has no generate step
    if teacher.prices is None and (prices := teacher.prices_at(teacher.servers[0])):
        return teacher.model_copy(update={"prices": prices})
    return teacher


# --- what is owed ---------------------------------------------------------------------------------------------------


class Owed(NamedTuple):
    """What there is to do, as far as it is known before verdicts."""

    prompts: int
    samples: int
    """Samples at most."""
    reused: int
    possibly_paid: int
    longest: Prompt | None

    @property
    def counts(self) -> dict[str, int]:
        """For the seal."""
        return {"prompts": self.prompts, "reused": self.reused, "possibly_paid_twice": self.possibly_paid}


def survey(wanted: Wanted, ladder: Ladder, tries: int) -> Owed:
    """Count what is wanted, what the ledgers have of it, and what was in flight when an earlier run died.

    Raises DataError if nothing is wanted.
    """
    prompts = reused = possibly_paid = length = 0
    longest: Prompt | None = None
    for prompt in wanted:
        prompts += 1
        for sample in range(tries):
            key = (prompt.prompt_id, sample)
            standing = ladder.standing(key)
            reused += not standing.owed
            possibly_paid += standing.owed and ladder.rungs[standing.rung].ledger.possibly_paid(key)
        if (size := sum(len(message.content) for message in prompt.messages)) > length:
            longest, length = prompt, size
    if prompts == 0 and wanted.shard is None:
        raise DataError("there are no training prompts to answer: every prompt was held out, dropped or removed")
    return Owed(prompts, prompts * tries, reused, possibly_paid, longest)


# --- the work -------------------------------------------------------------------------------------------------------


class Work:
    """Everything one attempt at the stage holds open; use `open_work`."""

    def __init__(
        self, recipe: Recipe, step: Step, options: RunOptions, engine: Engine, ladder: Ladder, judges: Judges
    ) -> None:
        self.label = step.label if options.shard is None else f"{step.label} {options.shard}"
        self.recipe = recipe
        self.options = options
        self.teacher = _teacher(recipe)
        self.policy = policy_of(self.teacher)
        self.engine = engine
        self.ladder = ladder
        self.judges = judges
        self.ledgers = {rung.cfg: rung.ledger for rung in ladder.rungs} | judges.ledgers
        removed = ladder.rungs[0].ledger.removed
        self.wanted = Wanted(step.result("prompts").path("train.jsonl"), options.shard, removed)

    @property
    def adaptive(self) -> bool:
        """Whether the number of samples depends on verdicts."""
        return self.policy.tries > self.policy.correct

    def survey(self) -> Owed:
        """What there is to do, said."""
        owed = survey(self.wanted, self.ladder, self.policy.tries)
        if owed.reused:
            say(f"{self.label}: {owed.reused} of {owed.samples} answers are in the ledger already")
        if owed.possibly_paid and self.options.ask:
            say(
                f"{self.label}: asking again for {owed.possibly_paid} answers that were in flight when an earlier run"
                " stopped (possibly paid twice)"
            )
        if self.recipe.teacher != self.teacher:
            server = self.teacher.servers[0]
            listed = listed_prices(server.base_url, server.model or self.teacher.model)
            assert listed is not None  # else there would be no difference
            say(f"{self.label}: no prices in the recipe; taking those of {listed.as_of} ({listed.source})")
        for ledger in self.ledgers.values():
            if ledger.damaged_lines:
                say(
                    f"{self.label}: {ledger.folder} has {ledger.damaged_lines} damaged lines; what they held counts as"
                    " not answered"
                )
        return owed

    def collect(self, owed: Owed, before: Path) -> None:
        """Ask until nothing is owed, a budget is reached or a signal comes."""
        total = owed.prompts if self.adaptive else owed.samples
        done = 0 if self.adaptive else owed.reused
        unit = "prompts" if self.adaptive else "traces"
        specs = specs_of(self.recipe)
        with (
            VerifierPool(self.options.cpu_threads, by_source=specs, judging=self.judges.verdict) as pool,
            progress(self.label, total, self.options, unit, done) as bar,
            graceful() as stop,
        ):
            share = self.options.shard.of if self.options.shard else 1
            self.purse = Purse(
                self.teacher.budget, self.ledgers, spent_before(before, self.ledgers), share, self.judges.ledgers
            )
            self.collection = Collection(
                self.engine,
                self.teacher,
                self.policy,
                self.ladder,
                self.wanted,
                self.purse,
                bar,
                stop,
                Judging(pool.verify, lambda prompt: spec_of(prompt, specs)),
                self.options.ask,
            )
            run_async(self._probe_and_collect(owed))

    async def _probe_and_collect(self, owed: Owed) -> None:
        """Try the servers before the work, where there is any."""
        wanted = self.options.ask and self.teacher.probe and owed.reused < owed.samples
        if wanted and isinstance(self.engine, Probing) and owed.longest is not None:
            probe = await self.engine.probe(request_of(owed.longest, 0, self.ladder.rungs[-1].sampling, self.teacher))
            self.purse.pay_probe(probe.usage, self.teacher.prices)
            for note in probe.notes:
                if note.startswith(LOST_REASONING) and self.recipe.select.reasoning == "required":
                    raise EngineError(f"{self.label}: {note}; select.reasoning is required, so no trace could train")
                say(f"{self.label}: {note}")
        try:
            await self.collection.run()
        finally:
            await self.judges.close()

    # --- what is missing ---

    def refuse_incomplete(self, owed: Owed) -> None:
        """Raise BudgetError or IncompleteError if wanted answers are missing that may still come."""
        made = self.collection.progress
        if not self.collection.finished:
            self._stop_at_budget(owed)
        if not self.options.ask and (missing := self._missing()):
            raise IncompleteError(
                f"{self.label}: {missing:,} wanted samples have no answer in the ledger yet; generate them (all"
                " shards), or go on with what is there: --accept-partial"
            )
        if made.retryable and made.retryable == made.failed and not made.answered and not owed.reused:
            raise EngineError(f"{self.label}: every request failed, most often with: {_commonest(made.errors)}")
        if made.retryable:
            raise IncompleteError(
                f"{self.label}: {made.retryable:,} requests failed for reasons that may pass, most often with:"
                f" {_commonest(made.errors)}; all other answers are kept: run the same command to ask for these again,"
                " list them with `distill inspect --failed`, or go on without them: --accept-partial"
            )

    def _missing(self) -> int:
        return sum(
            self.ladder.standing((course.prompt.prompt_id, sample)).owed
            and not self._refused((course.prompt.prompt_id, sample))
            for course in self._courses()
            for sample in range(course.begun)
        )

    def _refused(self, key: Key) -> bool:
        ledger = self.ladder.rungs[self.ladder.standing(key).rung].ledger
        return ledger.failed(key) and not ledger.retryable(key)

    def _stop_at_budget(self, owed: Owed) -> None:
        limit = self.purse.reached() or self.purse.reached(self.engine.batch_size or 1)
        if limit is None:
            return
        spent = self.purse.spent
        left = owed.samples - owed.reused - self.collection.progress.asked
        still = f"up to {left:,}" if self.adaptive else f"{left:,}"
        raise BudgetError(
            f"{self.label}: teacher.budget.{limit.key} of {limit.limit:g} is reached: this run has spent"
            f" ${spent.usd:.4f} and {spent.output_tokens:,} output tokens on {spent.answers:,} answers, all kept;"
            f" {still} of {owed.samples:,} samples are still owed; raise it and run the same command to continue, or"
            " go on with what is there: --accept-partial"
        )

    # --- the view ---

    def _courses(self) -> Iterator[Course]:
        """Each prompt with the samples that the view has of it."""
        for prompt in self.wanted:
            yield replay(prompt, self.policy, self.ladder, self.collection.correct)

    def _keys(self) -> Iterator[Key]:
        return ((course.prompt.prompt_id, sample) for course in self._courses() for sample in range(course.begun))

    def traces(self) -> Iterator[Trace]:
        """Every answer in the order of the prompts, cut-off ones before those that replaced them."""
        return (trace for key in self._keys() for trace in self.ladder.traces(key))

    def _failures(self) -> Iterator[Trace]:
        if not any(ledger.any_failed for ledger in self.ledgers.values()):
            return
        for key in self._keys():
            standing = self.ladder.standing(key)
            ledger = self.ladder.rungs[standing.rung].ledger
            if standing.owed and ledger.failed(key):
                failure = ledger.get(key)
                assert failure is not None  # it has failed
                yield failure

    def _verdicts(self) -> Iterator[Verdict]:
        """What verifiers in processes of their own said beside generation."""
        specs = specs_of(self.recipe)
        if all(spec.light for spec in specs.values()):
            return
        for course in self._courses():
            spec = spec_of(course.prompt, specs)
            if spec.light:
                continue
            for sample in range(course.begun):
                standing = self.ladder.standing((course.prompt.prompt_id, sample))
                ledger = self.ladder.rungs[standing.rung].ledger
                trace = None if standing.owed else ledger.get((course.prompt.prompt_id, sample))
                verdict = trace and ledger.verdict(trace.trace_id, spec.label, course.prompt.gold)
                if verdict:
                    yield verdict

    def write_failures(self, path: Path) -> None:
        """List the requests without an answer, also for a run that is not sealed yet."""
        write_records(path, self._failures())

    def seal(self, run: OpenRun, owed: Owed) -> SealedRun:
        """Write the view of everything wanted in prompt order and seal the run.

        Raises EngineError if no sample at all has an answer, or if the engine left requests without any completion.
        """
        if forgotten := self._forgotten():
            raise EngineError(
                f"{self.label}: the engine gave neither answer nor error to {forgotten} requests; run again"
            )
        tally = Tally()
        write_records(run.path("traces.jsonl"), (tally.answer(trace) for trace in self.traces()))
        write_records(run.path("failed.jsonl"), (tally.failure(trace) for trace in self._failures()))
        write_records(run.path("verdicts.jsonl"), self._verdicts())
        if not tally.answered:
            raise EngineError(f"{self.label}: every request failed, most often with: {_commonest(tally.errors)}")
        tally.say(self.label, run.folder)
        counts = {**owed.counts, "samples": tally.answered + tally.failed - tally.climbed, **self._spent()}
        if self.options.accept_partial:
            counts["missing"] = self._missing()
            say(f"{self.label}: sealed with {counts['missing']} wanted samples missing (--accept-partial)")
        cfgs = [rung.cfg for rung in self.ladder.rungs]
        return run.seal(tally.digest, counts | tally.counts, cfg=cfgs[0], cfgs=cfgs)

    def _forgotten(self) -> int:
        """Requests that were sent in this attempt and came back neither as an answer nor as an error."""
        made = self.collection.progress
        return made.asked - made.answered - made.failed

    def _spent(self) -> dict[str, Any]:
        """What this run itself has bought, as its budget counted it."""
        tokens = {"spent_output_tokens": self.purse.spent.output_tokens} if self.purse.limits() else {}
        made = {"asked": self.collection.progress.asked, "spent_usd": round(self.purse.spent.usd, 6), **tokens}
        return made | ({"satisfied": self._satisfied()} if self.adaptive else {})

    def _satisfied(self) -> int:
        return sum(course.correct >= self.policy.correct for course in self._courses())


@contextmanager
def open_work(recipe: Recipe, step: Step, options: RunOptions) -> Iterator[Work]:
    """Hold the ledgers of every token limit, and the engine."""
    teacher = _teacher(recipe)
    engine = open_engine(teacher, recipe.format, options)
    roots = step.fields.get("roots", {})
    with ExitStack() as held:
        rungs = []
        for sampling in samplings(teacher):
            sent = sent_to_teacher(teacher, recipe.format, roots, engine.version, sampling)
            ledger = held.enter_context(open_ledger(options.runs, sent, options.shard))
            rungs.append(Rung(sampling, cfg_of(sent), ledger))
        if isinstance(engine, Stateful):
            engine.keep_state_in(rungs[0].ledger.folder)
        judges = held.enter_context(open_judges(specs_of(recipe).values(), recipe.format, options))
        yield Work(recipe, step, options, engine, Ladder(tuple(rungs)), judges)


def specs_of(recipe: Recipe) -> dict[str, VerifierSpec]:
    """The verifier of each prompt source, as the recipe has it now."""
    return {source.name: resolve(source.verifier) for source in recipe.prompts}


def spec_of(prompt: Prompt, by_source: Mapping[str, VerifierSpec]) -> VerifierSpec:
    """The verifier of a prompt, as the recipe has it now."""
    return by_source.get(prompt.source) or resolve(prompt.verifier)


def _commonest(errors: Counter[str]) -> str:
    return errors.most_common(1)[0][0] if errors else "no error at all"


# --- counts and digest ----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts and the result digest of a view while it is written."""

    answered: int = 0
    climbed: int = 0
    """Answers that were cut off and asked again with a higher limit."""
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
    _last: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    def answer(self, trace: Trace) -> Trace:
        """Count an answer and pass it on."""
        key = (trace.prompt_id, trace.sample)
        self.climbed += key == self._last
        self._last = key
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
            **({"escalated": self.climbed} if self.climbed else {}),
            "usd": round(self.usd, 6),
            "think": dict(sorted(self.think.items())),
            "finish_reasons": dict(sorted(self.finish.items())),
        }

    def say(self, label: str, folder: Path) -> None:
        """What a person should know before the traces are used."""
        total = self.answered + self.failed
        if self.failed:
            say(
                f"{label}: {self.failed} of {total} requests failed ({folder / 'failed.jsonl'}), most often with:"
                f" {_commonest(self.errors)}"
            )
        if self.reasoning_lost:
            say(
                f"{label}: {self.reasoning_lost} of {total} answers were billed for reasoning that the server did not"
                " send; choose an endpoint that returns it (reasoning_content, reasoning or tags)"
            )
