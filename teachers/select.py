"""The select stage: every trace is verified, flagged where something is off with it, and kept or dropped for a reason.

Nothing is deleted: traces stay in the generate run, and beside the chosen `examples.jsonl` lie `verdicts.jsonl`,
`flags.jsonl`, `dropped.jsonl` (one reason a trace, the first that applies) and `funnel.json`. Prompts of named
evaluation sets never pass.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Recipe, Select
from distill.engines.recorded import NO_TRACE
from distill.errors import DataError
from distill.progress import progress, say
from distill.records import (
    Example,
    Flag,
    Message,
    Prompt,
    Record,
    RecordLog,
    Trace,
    Verdict,
    read_records,
    write_json,
    write_records,
)
from distill.runs import PARTIAL, OpenRun, RunOptions, SealedRun, Step, open_run
from distill.verifiers import resolve
from distill.verifiers.pool import VerifierPool, check_verifier

REASONS = {
    "api-error": "the request failed",
    "no-trace": "no answer was recorded for the prompt",
    "truncated": "cut off at the token limit",
    "unclosed": "the reasoning was never closed",
    "absent": "no reasoning",
    "empty": "empty reasoning",
    "multiple": "more than one block of reasoning",
    "too-long": "longer than select.max_chars",
    "contaminated-by": "the prompt is part of an evaluation set",
    "duplicate-of": "same text as an earlier answer to the prompt",
    "wrong": "answer did not match the reference",
    "unverifiable": "answer could not be compared with the reference",
    "timeout": "the verifier ran out of time",
    "error": "the verifier failed",
    "correct": "answer is right, which select.outcomes leaves out",
    "not-chosen": "another answer to the prompt was chosen",
    "limit": "beyond select.limit",
}
"""Why a trace does not train, in the order in which reasons are looked for: the funnel."""

ADVICE = {
    "api-error": "read failed.jsonl of the generate run, mend the teacher and generate again",
    "no-trace": "check teacher.recorded.question_column: its texts must be the prompts' own questions",
    "truncated": "raise teacher.sampling.max_new_tokens",
    "unclosed": "raise teacher.sampling.max_new_tokens, or check format.open_marker and format.close_marker",
    "absent": "check that the endpoint returns reasoning and that format has its markers, or set select.reasoning=none",
    "empty": "set select.reasoning=none to train on answers alone",
    "wrong": "look at some (`distill inspect --wrong`): the gold rule or the verifier may not fit the answers",
    "unverifiable": "check the prompts' gold column, gold rule and verifier",
    "too-long": "raise select.max_chars",
    "contaminated-by": "the training prompts are those of an evaluation set; take other ones",
}
"""What helps where one reason leaves nothing to train on."""

THINK_STATES = {
    "required": {"closed"},
    "optional": {"closed", "absent"},
    "none": {"closed", "absent", "empty", "multiple"},
}
"""States of the reasoning that each `select.reasoning` lets through; an unclosed one has no answer behind it."""


class Dropped(Record):
    """Why a trace does not train."""

    trace_id: str
    prompt_id: str
    reason: str


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse verifiers that are not there or cannot judge; those of the user's own are tried in a process.

    Raises RecipeError.
    """
    trial = Prompt.of([Message(role="user", content="2 + 2 = ?")], gold="4")
    for spec in dict.fromkeys(resolve(source.verifier) for source in recipe.prompts):
        check_verifier(spec, trial)


def run(recipe: Recipe, step: Step, options: RunOptions) -> SealedRun:
    """Verify every trace, drop what must not train, choose examples, write the funnel, seal.

    Raises DataError, with the funnel, if nothing is left to train on.
    """
    traces, prompts = step.result("traces"), step.result("prompts")
    inputs = Inputs(traces.path("traces.jsonl"), traces.path("failed.jsonl"), prompts.path("train.jsonl"))
    kept_apart = prompts_of_sets(step)
    specs = {source.name: resolve(source.verifier) for source in recipe.prompts}
    with open_run(step, options) as opened:
        with VerifierPool(options.cpu_threads, by_source=specs) as pool:
            verify(pool, inputs, opened.path("verdicts.jsonl"), int(traces.counts["answered"]), step.label, options)
        funnel = select(recipe.select, inputs, kept_apart, opened)
        funnel.say(step.label)
        if funnel.examples == 0:
            raise DataError(funnel.nothing_left(step.label))
        return opened.seal(funnel.digest, funnel.counts)


# --- inputs ---------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Files of the upstream stages."""

    traces: Path
    failed: Path
    prompts: Path

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


def prompts_of_sets(step: Step) -> dict[str, str]:
    """The prompt_ids of every evaluation set, and which set each belongs to: the recipe's own held-out prompts too."""
    files = {"heldout": step.result("prompts").path("heldout.jsonl")}
    for role in step.upstream:
        if role.startswith("set:"):
            files[role.removeprefix("set:")] = step.result(role).path("heldout.jsonl")
    return {
        prompt.prompt_id: name for name, file in files.items() if file.exists() for prompt in read_records(file, Prompt)
    }


def verify(pool: VerifierPool, inputs: Inputs, out: Path, total: int, label: str, options: RunOptions) -> None:
    """Write one verdict for each trace, in the order of the traces."""
    with progress(f"{label}: verify", total, options, "traces") as bar:

        def verdicts() -> Iterator[Verdict]:
            for verdict in pool.verify_many(inputs.pairs()):
                bar.advance()
                yield verdict

        write_records(out, verdicts())


# --- flags and reasons ----------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A trace with what is known about it."""

    prompt: Prompt
    trace: Trace
    verdict: Verdict
    flags: tuple[Flag, ...] = ()

    def reason(self, config: Select) -> str | None:
        """The first reason not to train on it."""
        flagged = {flag.flag for flag in self.flags}
        first = next((reason for reason in REASONS if reason in flagged), None)
        if first is None and self.verdict.outcome not in config.outcomes:
            return self.verdict.outcome
        return first

    def example(self, config: Select) -> Example:
        """What trains."""
        reasoning = None if config.reasoning == "none" or self.trace.think == "absent" else self.trace.reasoning
        return Example(prompt=self.prompt, trace_id=self.trace.trace_id, reasoning=reasoning, answer=self.trace.answer)

    def chars(self, config: Select) -> int:
        """Length of what trains."""
        example = self.example(config)
        return len(example.reasoning or "") + len(example.answer)


def flagged(judged: Judged, config: Select, kept_apart: Mapping[str, str]) -> Judged:
    """The same with a flag for everything that speaks against it, but duplicates."""
    trace = judged.trace
    flags: list[tuple[str, str]] = []
    if trace.finish_reason == "length":
        flags.append(("truncated", f"after {trace.usage.output} tokens"))
    if trace.think not in THINK_STATES[config.reasoning]:
        flags.append((trace.think, f"select.reasoning is {config.reasoning}"))
    if config.max_chars is not None and judged.chars(config) > config.max_chars:
        flags.append(("too-long", f"{judged.chars(config)} characters"))
    if trace.prompt_id in kept_apart:
        flags.append(("contaminated-by", kept_apart[trace.prompt_id]))
    return judged._replace(flags=tuple(Flag(trace_id=trace.trace_id, flag=f, detail=d) for f, d in flags))


def without_duplicates(group: Iterable[Judged]) -> Iterator[Judged]:
    """The traces of one prompt; one whose text an earlier, unflagged trace has is flagged as its duplicate."""
    seen: dict[tuple[str | None, str], str] = {}
    for judged in group:
        text, trace_id = (judged.trace.reasoning, judged.trace.answer), judged.trace.trace_id
        if text in seen:
            flag = Flag(trace_id=trace_id, flag="duplicate-of", detail=seen[text])
            yield judged._replace(flags=(*judged.flags, flag))
        else:
            if not judged.flags:
                seen[text] = trace_id
            yield judged


def chosen(fit: Sequence[Judged], config: Select) -> list[Judged]:
    """Which of a prompt's fit traces train; ties go to the lower sample index."""
    if config.per_prompt == "shortest":
        return [min(fit, key=lambda judged: (judged.chars(config), judged.trace.sample))] if fit else []
    return list(fit[:1] if config.per_prompt == "first" else fit)


# --- the funnel -----------------------------------------------------------------------------------------------------


@dataclass
class Funnel:
    """Counts of everything dropped, by reason, and the digest of what was decided."""

    samples: int = 0
    examples: int = 0
    prompts: int = 0
    """Prompts with at least one example."""
    dropped: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """Verdicts by prompt source."""

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    def note(self, *result: Any) -> None:
        """Add to the digest."""
        self._hash.update(json.dumps(result, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    @property
    def digest(self) -> str:
        """Over verdicts, reasons and examples."""
        return self._hash.hexdigest()

    @property
    def steps(self) -> list[dict[str, Any]]:
        """(reason, dropped, remaining), in order, of the reasons that dropped anything."""
        steps, remaining = [], self.samples
        for reason, why in REASONS.items():
            if count := self.dropped[reason]:
                remaining -= count
                steps.append({"reason": reason, "why": why, "dropped": count, "remaining": remaining})
        return steps

    @property
    def counts(self) -> dict[str, Any]:
        """For the seal."""
        outcomes = {source: dict(sorted(found.items())) for source, found in sorted(self.outcomes.items())}
        return {
            "samples": self.samples,
            "examples": self.examples,
            "prompts": self.prompts,
            "dropped": self.dropped.total(),
            "correct": sum(found["correct"] for found in self.outcomes.values()),
            "funnel": self.steps,
            "outcomes": outcomes,
            "flags": dict(sorted(self.flags.items())),
        }

    def say(self, label: str) -> None:
        """Every decision in one line."""
        for step in self.steps:
            say(f"{label}: dropped {step['dropped']} of {self.samples} traces: {step['why']}")
        say(f"{label}: {self.examples} examples from {self.prompts} prompts")

    def nothing_left(self, label: str) -> str:
        """Why there is nothing to train on, and what helps."""
        drops = "; ".join(f"{step['dropped']} {step['why']}" for step in self.steps)
        reason = max(self.dropped, key=self.dropped.__getitem__, default="")
        advice = ADVICE.get(reason, "look at dropped.jsonl and select")
        return f"{label}: none of {self.samples} traces can train ({drops}); {advice}"


@dataclass
class Decisions:
    """Writes what becomes of every trace, and counts it."""

    config: Select
    flags: RecordLog
    dropped: RecordLog
    examples: RecordLog
    funnel: Funnel = field(default_factory=Funnel)

    def fail(self, trace: Trace) -> None:
        """A request that got no answer."""
        reason = "no-trace" if trace.error == NO_TRACE else "api-error"
        self.funnel.samples += 1
        self._flag(Flag(trace_id=trace.trace_id, flag=reason, detail=str(trace.error)))
        self._drop(trace, reason)

    def decide(self, group: Sequence[Judged]) -> None:
        """All answers to one prompt."""
        for judged in group:
            self._count(judged)
        reasons = {judged.trace.trace_id: judged.reason(self.config) for judged in group}
        fit = chosen([judged for judged in group if reasons[judged.trace.trace_id] is None], self.config)
        kept = fit[: self._room(len(fit))]
        for judged in kept:
            self._keep(judged.example(self.config))
        self.funnel.prompts += bool(kept)
        left_out = {judged.trace.trace_id: "limit" for judged in fit[len(kept) :]}
        kept_ids = {judged.trace.trace_id for judged in kept}
        for trace in (judged.trace for judged in group if judged.trace.trace_id not in kept_ids):
            self._drop(trace, reasons[trace.trace_id] or left_out.get(trace.trace_id, "not-chosen"))

    def _room(self, wanted: int) -> int:
        return wanted if self.config.limit is None else self.config.limit - self.funnel.examples

    def _count(self, judged: Judged) -> None:
        self.funnel.samples += 1
        self.funnel.outcomes.setdefault(judged.prompt.source, Counter())[judged.verdict.outcome] += 1
        self.funnel.note("verdict", judged.trace.trace_id, judged.verdict.verifier, judged.verdict.outcome)
        self._flag(*judged.flags)

    def _flag(self, *flags: Flag) -> None:
        self.flags.append(*flags)
        self.funnel.flags.update(flag.flag for flag in flags)

    def _drop(self, trace: Trace, reason: str) -> None:
        self.dropped.append(Dropped(trace_id=trace.trace_id, prompt_id=trace.prompt_id, reason=reason))
        self.funnel.dropped[reason] += 1

    def _keep(self, example: Example) -> None:
        self.examples.append(example)
        self.funnel.examples += 1
        self.funnel.note("example", example.model_dump(mode="json"))


def select(config: Select, inputs: Inputs, kept_apart: Mapping[str, str], run: OpenRun) -> Funnel:
    """Flag, drop and choose, writing every decision; needs the run's verdicts."""
    paths = [run.path(name) for name in ("flags.jsonl", "dropped.jsonl", "examples.jsonl")]
    with written_aside(paths) as (flags, dropped, examples):
        decisions = Decisions(config, flags, dropped, examples)
        for trace in read_records(inputs.failed, Trace):
            decisions.fail(trace)
        for group in judged_by_prompt(config, inputs, kept_apart, run.path("verdicts.jsonl")):
            decisions.decide(group)
    write_json(run.path("funnel.json"), {"schema": 1, **decisions.funnel.counts})
    return decisions.funnel


def judged_by_prompt(
    config: Select, inputs: Inputs, kept_apart: Mapping[str, str], verdicts: Path
) -> Iterator[list[Judged]]:
    """The flagged traces of one prompt after the other."""
    judged = (
        Judged(prompt, trace, verdict)
        for (prompt, trace), verdict in zip(inputs.pairs(), read_records(verdicts, Verdict), strict=True)
    )
    for _, group in groupby(judged, key=lambda one: one.trace.prompt_id):
        yield list(without_duplicates(flagged(one, config, kept_apart) for one in group))


@contextmanager
def written_aside(paths: Sequence[Path]) -> Iterator[list[RecordLog]]:
    """Logs that start empty and get their names only when all of them are whole."""
    parts = [path.with_name(path.name + PARTIAL) for path in paths]
    with ExitStack() as open_logs:
        for part in parts:
            part.unlink(missing_ok=True)
        yield [open_logs.enter_context(RecordLog(part)) for part in parts]
    for part, path in zip(parts, paths):
        os.replace(part, path)
