"""What is known about the traces of one prompt, and which of them may train.

Flags say what speaks against a trace; reasons come from flags and verdicts in the order of the funnel. Only fit traces
are compared with one another: what a trace that cannot train repeats or would have been chosen over is of no account.
Between prompts nothing is remembered but the indexes of near-duplicates.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from distill.config import Select
from distill.records import Example, Flag, Prompt, Trace, Verdict

from .decontamination import Decontaminator, problem_text
from .funnel import REASONS, THINK_STATES, actions
from .near_duplicates import NearDuplicates
from .quality import findings


class Judged(NamedTuple):
    """A trace with what is known about it."""

    prompt: Prompt
    trace: Trace
    verdict: Verdict
    flags: tuple[Flag, ...] = ()

    def flag(self, flag: str, detail: str) -> "Judged":
        """The same with one more flag."""
        return self._replace(flags=(*self.flags, Flag(trace_id=self.trace.trace_id, flag=flag, detail=detail)))

    def example(self, config: Select) -> Example:
        """What trains."""
        reasoning = None if config.reasoning == "none" or self.trace.think == "absent" else self.trace.reasoning
        return Example(prompt=self.prompt, trace_id=self.trace.trace_id, reasoning=reasoning, answer=self.trace.answer)

    def chars(self, config: Select) -> int:
        """Length of what trains."""
        example = self.example(config)
        return len(example.reasoning or "") + len(example.answer)


class Assessed(NamedTuple):
    """A trace and the first reason not to train on it; None where it is chosen."""

    judged: Judged
    reason: str | None


@dataclass
class Assessor:
    """Flags the traces of one prompt after the other and chooses among them."""

    config: Select
    kept_apart: Mapping[str, str]
    """prompt_id -> name of the evaluation set that it belongs to."""
    decontaminator: Decontaminator | None = None
    _prompts_alike: NearDuplicates | None = None
    _traces_alike: dict[str, NearDuplicates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._actions = actions(self.config)
        self._only_counted = frozenset(flag for flag, action in self._actions.items() if action == "flag")
        if self._actions["near-duplicate-prompt"] != "ignore":
            self._prompts_alike = NearDuplicates(self.config.near_duplicates.threshold)

    def assess(self, group: Sequence[Judged]) -> list[Assessed]:
        """All traces of one prompt, in their order."""
        flagged = [self._flag_text(judged) for judged in self._flag_overlap(group)]
        for look in (self._flag_duplicates, self._flag_near_prompt, self._flag_near_traces):
            flagged = list(look(flagged))
        reasons = [self._reason(judged) for judged in flagged]
        fit = [judged for judged, reason in zip(flagged, reasons) if reason is None]
        kept = {judged.trace.trace_id for judged in chosen(fit, self.config)}
        return [
            Assessed(judged, reason or (None if judged.trace.trace_id in kept else "not-chosen"))
            for judged, reason in zip(flagged, reasons)
        ]

    def _reason(self, judged: Judged) -> str | None:
        found = {flag.flag for flag in judged.flags} - self._only_counted
        if judged.verdict.outcome not in self.config.outcomes:
            found.add(judged.verdict.outcome)
        return next((reason for reason in REASONS if reason in found), None) if found else None

    def _flag_overlap(self, group: Sequence[Judged]) -> Iterable[Judged]:
        """The prompt is that of an evaluation set, or its text overlaps one."""
        prompt = group[0].prompt
        if prompt.prompt_id in self.kept_apart:
            return [judged.flag("contaminated-by", self.kept_apart[prompt.prompt_id]) for judged in group]
        hit = self.decontaminator.hit(problem_text(prompt)) if self.decontaminator else None
        return [judged.flag("overlaps", hit.detail()) for judged in group] if hit else group

    def _flag_text(self, judged: Judged) -> Judged:
        """What the trace itself shows."""
        config, trace, chars = self.config, judged.trace, judged.chars(self.config)
        if trace.finish_reason == "length":
            judged = judged.flag("truncated", f"after {trace.usage.output} tokens")
        if trace.think not in THINK_STATES[config.reasoning]:
            judged = judged.flag(trace.think, f"select.reasoning is {config.reasoning}")
        for flag, detail in findings(judged.example(config), config):
            judged = judged.flag(flag, detail)
        if config.min_chars is not None and chars < config.min_chars:
            judged = judged.flag("too-short", f"{chars} characters")
        if config.max_chars is not None and chars > config.max_chars:
            judged = judged.flag("too-long", f"{chars} characters")
        return judged

    def _flag_duplicates(self, group: Sequence[Judged]) -> Iterator[Judged]:
        """Fit traces of one prompt with the very text of an earlier one."""
        seen: dict[tuple[str | None, str], str] = {}
        for judged in group:
            if self._reason(judged) is None:
                text, trace_id = (judged.trace.reasoning, judged.trace.answer), judged.trace.trace_id
                first = seen.setdefault(text, trace_id)
                judged = judged if first == trace_id else judged.flag("duplicate-of", first)
            yield judged

    def _flag_near_prompt(self, group: Sequence[Judged]) -> Iterable[Judged]:
        """A prompt nearly that of an earlier one with fit traces."""
        prompt, fit = group[0].prompt, [self._reason(judged) is None for judged in group]
        if self._prompts_alike is None or not any(fit) or made_from_template(prompt):
            return group
        like = self._prompts_alike.first_like(f"{prompt.prompt_id} {prompt.gold}", problem_text(prompt))
        if like is None:
            return group
        prompt_id, _, gold = like[0].partition(" ")
        if gold != str(prompt.gold):  # another answer makes it another problem, however alike they are worded
            return group
        detail = f"prompt {prompt_id}, similarity {like[1]:.2f}"
        return [judged.flag("near-duplicate-prompt", detail) if ok else judged for judged, ok in zip(group, fit)]

    def _flag_near_traces(self, group: Sequence[Judged]) -> Iterator[Judged]:
        """Fit traces nearly alike; of one prompt alone only where several of its traces may train."""
        rules = self.config.near_duplicates
        if rules.traces == "ignore" or (
            rules.across == "prompt" and (self.config.per_prompt != "all" or len(group) < 2)
        ):
            yield from group
            return
        source = group[0].prompt.source if rules.across == "source" else ""
        if rules.across == "prompt" or source not in self._traces_alike:
            self._traces_alike[source] = NearDuplicates(rules.threshold)
        for judged in group:
            if self._reason(judged) is None:
                example = judged.example(self.config)
                text = f"{example.reasoning or ''}\n{example.answer}"
                if like := self._traces_alike[source].first_like(judged.trace.trace_id, text):
                    judged = judged.flag("near-duplicate-trace", f"trace {like[0]}, similarity {like[1]:.2f}")
            yield judged


def made_from_template(prompt: Prompt) -> bool:
    """Whether a generator wrote the problem: all of its problems are worded alike, so wording says nothing of them."""
    return {"task", "entry"} <= prompt.row.keys()


# --- choosing -------------------------------------------------------------------------------------------------------


def chosen(fit: Sequence[Judged], config: Select) -> Sequence[Judged]:
    """Which of a prompt's fit traces train; ties go to the lower sample index."""
    if config.per_prompt == "all" or not fit:
        return fit
    rules: dict[str, Callable[[Judged], object]] = {
        "first": lambda judged: 0,
        "shortest": lambda judged: (judged.chars(config), judged.trace.sample),
        "random": lambda judged: drawn(config.seed, judged.trace.trace_id),
    }
    return [min(fit, key=rules[config.per_prompt])]  # type: ignore[arg-type]  # keys of one rule compare


def drawn(seed: int, trace_id: str) -> bytes:
    """A trace's place in a random order that no other trace has a part in."""
    return hashlib.sha256(f"{seed} {trace_id}".encode()).digest()


def beyond_caps(config: Select, chosen_ids: Mapping[str, Sequence[str]]) -> set[str]:
    """trace_ids that `max_per_source` leaves out, of those chosen of each source."""
    room = capped(config, {source: len(ids) for source, ids in chosen_ids.items()})
    return {
        trace_id
        for source, ids in chosen_ids.items()
        for trace_id in sorted(ids, key=lambda trace_id: drawn(config.seed, trace_id))[room[source] :]
    }


def capped(config: Select, counts: Mapping[str, int]) -> dict[str, int]:
    """How many examples of each source stay, as many as the caps allow; shares are of what stays of all sources.

    Sources that have more than their share are cut to it, which makes the whole smaller and may bring others above
    theirs. What is left is rounded down, so a share is kept to within an example.
    """
    caps = {source: config.cap(source) for source in counts}
    most = {
        source: min(count, cap) if isinstance(cap := caps[source], int) else count for source, count in counts.items()
    }
    shares = {source: Fraction(str(cap)) for source, cap in caps.items() if isinstance(cap, float)}
    cut: set[str] = set()
    while True:
        given = 1 - sum(shares[source] for source in cut)
        total = sum(most[source] for source in most.keys() - cut) / given if given > 0 else Fraction(0)
        over = {source for source in shares.keys() - cut if most[source] > shares[source] * total}
        if not over:
            return most | {source: min(most[source], int(shares[source] * total)) for source in cut}
        cut |= over
