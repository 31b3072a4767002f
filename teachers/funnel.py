"""The funnel: why traces do not train, in which order reasons count, and what helps where nothing is left.

Every trace ends in exactly one place: it trains, or it is dropped for the first reason that applies to it. Flags are
counted beside that: a trace may have several, and one that the recipe only counts drops nothing.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distill.config import Action, Select
from distill.progress import say
from distill.records import Example, Flag, Prompt, Trace, Verdict

REASONS = {
    "api-error": "the request failed",
    "no-trace": "no answer was recorded for the prompt",
    "truncated": "cut off at the token limit",
    "unclosed": "the reasoning was never closed",
    "absent": "no reasoning",
    "empty": "empty reasoning",
    "multiple": "more than one block of reasoning",
    "refusal": "the answer declines to answer",
    "loop": "the text goes in circles",
    "language-mix": "slips into a script that the prompt does not have",
    "secret": "holds a key or a token",
    "personal-data": "holds a person's address or number",
    "too-short": "shorter than select.min_chars",
    "too-long": "longer than select.max_chars",
    "contaminated-by": "the prompt is part of an evaluation set",
    "overlaps": "the prompt's text overlaps an evaluation problem",
    "wrong": "answer did not match the reference",
    "unverifiable": "answer could not be compared with the reference",
    "timeout": "the verifier ran out of time",
    "error": "the verifier failed",
    "correct": "answer is right, which select.outcomes leaves out",
    "duplicate-of": "same text as an earlier answer to the prompt",
    "near-duplicate-prompt": "the prompt is nearly that of an earlier one",
    "near-duplicate-trace": "nearly the same text as an earlier answer",
    "not-chosen": "another answer to the prompt was chosen",
    "source-cap": "beyond select.max_per_source",
    "limit": "beyond select.limit",
}
"""Why a trace does not train, in the order in which reasons are looked for: the funnel."""

ADVICE = {
    "api-error": "read failed.jsonl of the generate run, mend the teacher and generate again",
    "no-trace": "check teacher.recorded.question_column: its texts must be the prompts' own questions",
    "truncated": "raise teacher.sampling.max_new_tokens, or set teacher.escalate",
    "unclosed": "raise teacher.sampling.max_new_tokens, or check format.open_marker and format.close_marker",
    "absent": "check that the endpoint returns reasoning and that format has its markers, or set select.reasoning=none",
    "empty": "set select.reasoning=none to train on answers alone",
    "multiple": "check format.open_marker and format.close_marker, or set select.reasoning=none",
    "refusal": "read some (`distill inspect`); set select.refusals.action=flag if they are answers",
    "loop": "read some (`distill inspect`), raise teacher.sampling.temperature, or set select.loops.action=flag",
    "language-mix": "read some (`distill inspect`); set select.language_mix.action=flag if they belong there",
    "secret": "see flags.jsonl for their kinds; set select.secrets=flag if they are none",
    "personal-data": "see flags.jsonl for their kinds; set select.personal_data=flag if they are none",
    "too-short": "lower select.min_chars",
    "too-long": "raise select.max_chars",
    "contaminated-by": "the training prompts are those of an evaluation set; take other ones",
    "overlaps": "see flags.jsonl for the matched text; take other prompts, or set select.decontamination.action=flag"
    " if it is wording that all problems share",
    "wrong": "look at some (`distill inspect --wrong`): the gold rule or the verifier may not fit the answers",
    "unverifiable": "check the prompts' gold column, gold rule and verifier",
    "timeout": "raise the verifier's timeout_s, or verify again on a quieter machine: distill select --reverify",
    "error": "read verdicts.jsonl for what the verifier said",
    "correct": "add correct to select.outcomes",
    "source-cap": "select.max_per_source gives shares that the sources with examples cannot fill; raise them",
}
"""What helps where one reason leaves nothing to train on; the reasons not named here always leave something."""

THINK_STATES = {
    "required": {"closed"},
    "optional": {"closed", "absent"},
    "none": {"closed", "absent", "empty", "multiple"},
}
"""States of the reasoning that each `select.reasoning` lets through; an unclosed one has no answer behind it."""


def actions(config: Select) -> dict[str, Action]:
    """What becomes of a trace with a flag, for the flags that leave it to the recipe; all others drop."""
    return {
        "refusal": config.refusals.action,
        "loop": config.loops.action,
        "language-mix": config.language_mix.action,
        "secret": config.secrets,
        "personal-data": config.personal_data,
        "overlaps": config.decontamination.action,
        "near-duplicate-prompt": config.near_duplicates.prompts,
        "near-duplicate-trace": config.near_duplicates.traces,
    }


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

    def flag(self, *flags: Flag) -> None:
        """Something noticed, whether it drops the trace or not."""
        self.flags.update(flag.flag for flag in flags)

    def verdict(self, prompt: Prompt, verdict: Verdict) -> None:
        """One answered trace."""
        self.samples += 1
        self.outcomes.setdefault(prompt.source, Counter())[verdict.outcome] += 1
        self._note("verdict", verdict.trace_id, verdict.verifier, verdict.outcome)

    def drop(self, trace: Trace, reason: str) -> None:
        """A trace that does not train; a failed request is a sample that no verifier has seen."""
        self.samples += trace.failed
        self.dropped[reason] += 1
        self._note("dropped", trace.trace_id, reason)

    def keep(self, example: Example, another_prompt: bool) -> None:
        """A trace that trains."""
        self.examples += 1
        self.prompts += another_prompt
        self._note("example", example.model_dump(mode="json"))

    def _note(self, *result: Any) -> None:
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

    def say(self, label: str, config: Select) -> None:
        """Every decision in one line."""
        for step in self.steps:
            say(f"{label}: dropped {step['dropped']} of {self.samples} traces: {step['why']}")
        for flag, action in actions(config).items():
            if action == "flag" and self.flags[flag]:
                say(f"{label}: flagged {self.flags[flag]} of {self.samples} traces and let them pass: {REASONS[flag]}")
        say(f"{label}: {self.examples} examples from {self.prompts} prompts")

    def nothing_left(self, label: str) -> str:
        """Why there is nothing to train on, and what helps against the reason that took most."""
        drops = "; ".join(f"{step['dropped']} {step['why']}" for step in self.steps)
        reason = max(self.dropped, key=self.dropped.__getitem__, default="")
        advice = ADVICE.get(reason, "look at dropped.jsonl and select")
        return f"{label}: none of {self.samples} traces can train ({drops}); {advice}"
