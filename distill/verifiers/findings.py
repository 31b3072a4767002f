"""What verifiers with options share: how a finding becomes a verdict, how an answer is quoted in it, fenced blocks."""

import re
from collections.abc import Callable
from typing import NamedTuple

from distill.records import Prompt, Trace, Verdict
from distill.verifiers.builtin import Finding, verdict_of

SHOWN_CHARACTERS = 80
"""Characters of an answer quoted in a verdict's detail."""


def judged(
    label: str, prompt: Prompt, trace: Trace, find: Callable[[Prompt, str], Finding], needs_gold: bool = True
) -> Verdict:
    """The verdict on a trace: `find` is asked only where there is an answer and, if it needs one, a reference."""
    found = nothing_to_judge(prompt, trace, needs_gold) or find(prompt, trace.answer)
    return verdict_of(prompt, trace, found.outcome, found.detail, label)


def nothing_to_judge(prompt: Prompt, trace: Trace, needs_gold: bool) -> Finding | None:
    """What can be said of a trace without looking: its request failed, it is empty, or there is no reference."""
    if trace.failed:
        return Finding("error", f"no answer to judge: {trace.error}")
    if needs_gold and not (prompt.gold or "").strip():
        return Finding("unverifiable", "the prompt has no reference answer")
    if not trace.answer.strip():
        return Finding("wrong", f"no answer (reasoning {trace.think})")
    return None


def shown(text: str) -> str:
    """A text on one line, cut where it is long."""
    folded = " ".join(text.split())
    return folded if len(folded) <= SHOWN_CHARACTERS else f"{folded[: SHOWN_CHARACTERS - 1]}…"


class Block(NamedTuple):
    """A fenced block of an answer and the language it is marked with."""

    language: str
    text: str


_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def fenced_blocks(answer: str) -> list[Block]:
    """The blocks between lines of three backticks, in order; one that is never closed reaches to the end."""
    return [Block(match[1].lower(), match[2]) for match in _FENCE.finditer(answer)]
