"""The select stage: every trace is verified, flagged where something is off with it, and kept or dropped for a reason.

Nothing is deleted: traces stay in the generate run, and beside the chosen `examples.jsonl` lie `verdicts.jsonl`,
`flags.jsonl`, `dropped.jsonl` (one reason a trace, the first that applies), `funnel.json`, and, where pyarrow is
installed, `dataset/` to load and to publish. Prompts of named evaluation sets never pass.

Verdicts that lie beside the traces already are taken over where trace, verifier, its version and the reference are the
same; `distill.teachers.reverify` makes all of them again. Traces are read three times and never held: to verify them,
to decide on each, and to write what was decided, since caps by source need the whole to be known.
"""

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from distill.config import Recipe, Select
from distill.engines import run_async
from distill.engines.recorded import NO_TRACE
from distill.errors import DataError
from distill.progress import progress, say
from distill.records import Flag, Message, Prompt, Record, Trace, Verdict, read_records, write_json
from distill.runs import PARTIAL, OpenRun, RunOptions, SealedRun, Step, open_run
from distill.verifiers import VerifierSpec, resolve
from distill.verifiers.pool import VerifierPool, check_verifier

from .assess import Assessor, Judged, beyond_caps, made_from_template
from .card import Facts, card
from .decontamination import Decontaminator
from .funnel import Funnel
from .judging import Judges, open_judges
from .training_set import MISSING, TrainingSet

AT_ONCE = 128
"""Traces that are verified side by side."""


class Dropped(Record):
    """Why a trace does not train."""

    trace_id: str
    prompt_id: str
    reason: str


class Fate(Record):
    """What was decided on a trace before caps and limit; None where it is chosen."""

    trace_id: str
    reason: str | None


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse verifiers that are not there or cannot judge; those of the user's own are tried in a process.

    Raises RecipeError.
    """
    trial = Prompt.of([Message(role="user", content="2 + 2 = ?")], gold="4")
    for spec in dict.fromkeys(resolve(source.verifier) for source in recipe.prompts):
        check_verifier(spec, trial)


def run(recipe: Recipe, step: Step, options: RunOptions) -> SealedRun:
    """Verify every trace, drop what must not train, choose examples, write funnel and data set, seal.

    Raises DataError, with the funnel, if nothing is left to train on.
    """
    inputs = Inputs.of(step)
    with open_run(step, options) as opened:
        verdicts = opened.path("verdicts.jsonl")
        verify(recipe, step, options, verdicts, stored=[inputs.verdicts, verdicts])
        return decide(recipe, step, opened)


# --- inputs ---------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Files of the upstream stages."""

    traces: Path
    failed: Path
    verdicts: Path
    """Verdicts made while the traces were; the file may be absent."""
    prompts: Path
    heldout: Path
    answered: int

    @classmethod
    def of(cls, step: Step) -> "Inputs":
        """Those of a step, their bytes checked."""
        traces, prompts = step.result("traces"), step.result("prompts")
        return cls(
            traces.path("traces.jsonl"), traces.path("failed.jsonl"), traces.path("verdicts.jsonl"),
            prompts.path("train.jsonl"), prompts.path("heldout.jsonl"), int(traces.counts["answered"]),
        )  # fmt: skip

    def pairs(self) -> Iterator[tuple[Prompt, Trace]]:
        """Each trace with its prompt; both files are in prompt order, so neither is held in memory."""
        prompts = read_records(self.prompts, Prompt)
        prompt: Prompt | None = None
        for trace in read_records(self.traces, Trace):
            while prompt is None or prompt.prompt_id != trace.prompt_id:
                prompt = next(prompts, None)
                if prompt is None:
                    raise DataError(f"{self.traces}: trace {trace.trace_id} has no prompt, in order, in {self.prompts}")
            yield prompt, trace

    def judged(self, verdicts: Path) -> Iterator[Judged]:
        """Each trace with its prompt and its verdict."""
        pairs = zip(self.pairs(), read_records(verdicts, Verdict), strict=True)
        return (Judged(prompt, trace, verdict) for (prompt, trace), verdict in pairs)


def prompts_of_sets(step: Step) -> Iterator[tuple[str, Prompt]]:
    """Every prompt of every evaluation set, with the set's name: the recipe's own held-out prompts too."""
    files = {"heldout": step.result("prompts").path("heldout.jsonl")}
    for role in step.upstream:
        if role.startswith("set:"):
            files[role.removeprefix("set:")] = step.result(role).path("heldout.jsonl")
    for name, file in files.items():
        for prompt in read_records(file, Prompt) if file.exists() else ():
            yield name, prompt


# --- verdicts -------------------------------------------------------------------------------------------------------


@contextmanager
def open_pool(recipe: Recipe, options: RunOptions) -> Iterator[tuple[VerifierPool, Judges]]:
    """The verifiers of the recipe's sources, as they are now, and the judges among them."""
    specs = specs_of(recipe)
    with (
        open_judges(specs.values(), recipe.format, options) as judges,
        VerifierPool(options.cpu_threads, by_source=specs, judging=judges.verdict) as pool,
    ):
        yield pool, judges


def specs_of(recipe: Recipe) -> dict[str, VerifierSpec]:
    """The verifier of each prompt source."""
    return {source.name: resolve(source.verifier) for source in recipe.prompts}


def verify(recipe: Recipe, step: Step, options: RunOptions, out: Path, stored: Sequence[Path] = ()) -> None:
    """Write one verdict for each trace, in the order of the traces, taking over those of `stored` that still hold."""
    inputs = Inputs.of(step)
    known = KnownVerdicts(specs_of(recipe), [StoredVerdicts(path) for path in stored])
    with (
        open_pool(recipe, options) as (pool, judges),
        written_aside(out) as (lines,),
        progress(f"{step.label}: verify", inputs.answered, options, "traces") as bar,
    ):

        async def verify_all() -> None:
            try:
                async for verdict in verdicts_of(inputs.pairs(), known, pool):
                    lines.write(verdict.to_line())
                    bar.advance()
            finally:
                await judges.close()

        run_async(verify_all())
    if known.reused:
        say(f"{step.label}: took over {known.reused} of {inputs.answered} verdicts that were made before")


async def verdicts_of(
    pairs: Iterator[tuple[Prompt, Trace]], known: "KnownVerdicts", pool: VerifierPool
) -> AsyncIterator[Verdict]:
    """One verdict a pair, in order; the pool is asked for those that are not known."""
    while together := list(islice(pairs, AT_ONCE)):
        before = [known.of(prompt, trace) for prompt, trace in together]
        asked = [pool.verify(*pair) for pair, verdict in zip(together, before) if verdict is None]
        made = iter(await asyncio.gather(*asked))
        for verdict in before:
            yield next(made) if verdict is None else verdict


class StoredVerdicts:
    """A file of verdicts in the order of the traces, read along with them; it may be absent, or lack some."""

    def __init__(self, path: Path) -> None:
        self._verdicts = read_records(path, Verdict) if path.exists() else iter(())
        self._next = next(self._verdicts, None)

    def of(self, trace_id: str) -> Iterator[Verdict]:
        """The trace's verdicts, if it is their turn."""
        while self._next is not None and self._next.trace_id == trace_id:
            verdict, self._next = self._next, next(self._verdicts, None)
            yield verdict


@dataclass
class KnownVerdicts:
    """Verdicts that were made before."""

    specs: Mapping[str, VerifierSpec]
    files: Sequence[StoredVerdicts]
    reused: int = 0

    def of(self, prompt: Prompt, trace: Trace) -> Verdict | None:
        """What this verifier, in this version, said of the trace against this reference; None where it is not known.

        A verifier that ran out of time or failed may fare better now, so that is not taken over.
        """
        label = (self.specs.get(prompt.source) or resolve(prompt.verifier)).label
        found = [verdict for file in self.files for verdict in file.of(trace.trace_id)]
        for verdict in found:
            same = (verdict.verifier, verdict.gold) == (label, prompt.gold)
            if same and verdict.outcome not in ("timeout", "error"):
                self.reused += 1
                return verdict
        return None


# --- decisions ------------------------------------------------------------------------------------------------------


def decide(recipe: Recipe, step: Step, opened: OpenRun) -> SealedRun:
    """Flag, drop and choose by the run's verdicts, writing every decision; then seal.

    Raises DataError, with the funnel, if nothing is left to train on.
    """
    inputs, funnel, sets = Inputs.of(step), Funnel(), EvaluationSets.of(recipe.select, step)
    left_out = assess(recipe.select, inputs, sets, opened, funnel)
    folder = opened.work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    with TrainingSet(folder, recipe.format) as training_set:
        write_out(recipe.select, inputs, opened, left_out, funnel, training_set)
    write_json(opened.path("funnel.json"), {"schema": 1, **funnel.counts})
    funnel.say(step.label, recipe.select)
    if funnel.examples == 0:
        raise DataError(funnel.nothing_left(step.label))
    facts = Facts(recipe, step, funnel, training_set.contents, training_set.files, sets.sizes)
    dataset = publish(facts, folder, opened.path("dataset"), step.label)
    # the card of a student that learns from these examples says who wrote them
    teachers = [teacher.model_dump() | {"examples": n} for teacher, n in training_set.contents.by_teacher]
    return opened.seal(funnel.digest, {**funnel.counts, "teachers": teachers, "dataset": dataset})


class EvaluationSets(NamedTuple):
    """The evaluation sets as far as selection asks for them."""

    prompt_ids: Mapping[str, str]
    """prompt_id -> name of its set."""
    decontaminator: Decontaminator | None
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, config: Select, step: Step) -> "EvaluationSets":
        """Read every set once."""
        texts = None if config.decontamination.action == "ignore" else Decontaminator(config.decontamination.ngrams)
        prompt_ids, sizes = dict[str, str](), Counter[str]()
        for name, prompt in prompts_of_sets(step):
            prompt_ids[prompt.prompt_id] = name
            sizes[name] += 1
            if texts is not None and not made_from_template(prompt):
                texts.add(name, prompt)
        return cls(prompt_ids, texts if sizes else None, sizes)


def assess(config: Select, inputs: Inputs, sets: EvaluationSets, opened: OpenRun, funnel: Funnel) -> set[str]:
    """Write every flag and, for the next pass, what becomes of each trace; gives the trace_ids beyond caps."""
    assessor = Assessor(config, sets.prompt_ids, sets.decontaminator)
    chosen: dict[str, list[str]] = {}
    label = f"{opened.step.label}: choose"
    with (
        written_aside(opened.path("flags.jsonl"), opened.work / "fates.jsonl") as (flags, fates),
        progress(label, inputs.answered, opened.options, "traces") as bar,
    ):
        for trace in read_records(inputs.failed, Trace):
            flag = Flag(trace_id=trace.trace_id, flag=failure(trace), detail=str(trace.error))
            funnel.flag(flag)
            flags.write(flag.to_line())
        for _, group in groupby(inputs.judged(opened.path("verdicts.jsonl")), key=lambda one: one.trace.prompt_id):
            for judged, reason in assessor.assess(list(group)):
                funnel.flag(*judged.flags)
                flags.writelines(flag.to_line() for flag in judged.flags)
                fates.write(Fate(trace_id=judged.trace.trace_id, reason=reason).to_line())
                if reason is None and config.max_per_source is not None:
                    chosen.setdefault(judged.prompt.source, []).append(judged.trace.trace_id)
                bar.advance()
    return beyond_caps(config, chosen)


def failure(trace: Trace) -> str:
    """The reason of a request that got no answer."""
    return "no-trace" if trace.error == NO_TRACE else "api-error"


def write_out(
    config: Select, inputs: Inputs, opened: OpenRun, beyond: Collection[str], funnel: Funnel, training_set: TrainingSet
) -> None:
    """Write examples and drops as decided, less those beyond caps and limit, and count them."""
    seen_prompt = ""
    with written_aside(opened.path("dropped.jsonl"), opened.path("examples.jsonl")) as (dropped, examples):

        def drop(trace: Trace, reason: str) -> None:
            line = Dropped(trace_id=trace.trace_id, prompt_id=trace.prompt_id, reason=reason).to_line()
            dropped.write(line)
            funnel.drop(trace, reason)

        for trace in read_records(inputs.failed, Trace):
            drop(trace, failure(trace))
        fates = read_records(opened.work / "fates.jsonl", Fate)
        for judged, fate in zip(inputs.judged(opened.path("verdicts.jsonl")), fates, strict=True):
            funnel.verdict(judged.prompt, judged.verdict)
            reason = fate.reason or ("source-cap" if fate.trace_id in beyond else None)
            if reason is None and config.limit is not None and funnel.examples >= config.limit:
                reason = "limit"
            if reason is not None:
                drop(judged.trace, reason)
                continue
            example = judged.example(config)
            examples.write(example.to_line())
            funnel.keep(example, another_prompt=seen_prompt != judged.trace.prompt_id)
            seen_prompt = judged.trace.prompt_id
            training_set.add(example, judged.trace, judged.verdict)
    for prompt in read_records(inputs.heldout, Prompt) if inputs.heldout.exists() else ():
        training_set.add_heldout(prompt)


def publish(facts: Facts, made: Path, folder: Path, label: str) -> dict[str, Any]:
    """Give the data set its card and its place; without pyarrow there is none, which is said. Gives its counts."""
    shutil.rmtree(folder, ignore_errors=True)
    if not facts.files:
        say(f"{label}: the folder dataset/ is left out: {MISSING}")
        return {"left_out": MISSING}
    (made / "README.md").write_text(card(facts), encoding="utf-8")
    os.replace(made, folder)
    size = sum(file.bytes for file in facts.files)
    say(f"{label}: data set of {len(facts.files)} files, {size / 1e6:,.1f} MB: {folder}")
    return {"files": len(facts.files), "bytes": size}


@contextmanager
def written_aside(*paths: Path) -> Iterator[Sequence[IO[str]]]:
    """Files that get their names, and take the place of what is there, only when all of them are whole."""
    parts = [path.with_name(path.name + PARTIAL) for path in paths]
    with ExitStack() as opened:
        files = [opened.enter_context(part.open("w", encoding="utf-8")) for part in parts]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    for part, path in zip(parts, paths):
        os.replace(part, path)
