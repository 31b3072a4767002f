"""The built-in verifiers: plain functions `verify(prompt, trace) -> Verdict` that can be called anywhere.

Each says `wrong` only where it could tell; where the reference cannot be read or compared it says `unverifiable`.
`number` and `exact` run in time linear in the answer. `math` and `reasoning_gym` call libraries that may take
arbitrarily long on hostile text, set no time limit of their own (no SIGALRM: they also run in threads) and so belong
into a `VerifierPool`; they import those libraries on their first call.
"""

import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from distill.records import Outcome, Prompt, Trace, Verdict
from distill.verifiers.answers import (
    AnswerBoxes,
    Number,
    answer_boxes,
    has_finite_decimal,
    last_box,
    last_number,
    number_text,
    numbers_in,
    plain,
    rounds_to,
    same_number,
    whole_number,
)
from distill.verifiers.quantities import compare_quantities

SHOWN_CHARACTERS = 80
"""Characters of an answer quoted in a verdict's detail."""
LONGEST_STATEMENT = 300
"""How much of an answer's last line is read for what it states."""


class Finding(NamedTuple):
    """What a verifier found, before it is filed as a verdict."""

    outcome: Outcome
    detail: str = ""


@cache
def version_of(name: str) -> str:
    """Version of a built-in verifier: ours, and those of the libraries that decide."""
    ours = {"number": "2", "math": "2", "exact": "1", "reasoning_gym": "1"}[name]
    libraries = {"math": ("math-verify", "latex2sympy2-extended"), "reasoning_gym": ("reasoning-gym",)}.get(name, ())
    return "+".join([ours, *(f"{library}-{importlib.metadata.version(library)}" for library in libraries)])


def number(prompt: Prompt, trace: Trace) -> Verdict:
    """Whether the last boxed number, or else the last number of the answer, equals the reference exactly.

    A last box that is not one number (`5x`, `3, 4`, `12:30`) is wrong, and so is one of several that are boxed as
    alternatives; an empty one is ignored. Currency and thousands separators are ignored, `10%` equals 10 and 0.1,
    nothing is rounded. Known units count: `3 \\text{ hours}` is 3, and could be a reference of 180; others are ignored.
    """
    return _judge("number", prompt, trace, _number)


def math(prompt: Prompt, trace: Trace) -> Verdict:
    """Whether the last boxed expression, or else the last expression of the answer, equals the reference.

    See `distill.verifiers.mathematics`; may run for long.
    """
    from distill.verifiers.mathematics import find  # which builds on this module

    return _judge("math", prompt, trace, find)


def exact(prompt: Prompt, trace: Trace) -> Verdict:
    r"""Whether the boxed content, or else the answer or its last line, is the reference.

    Equality is of characters after normalisation: Unicode NFC, letter case, white space, `\text{}`, dollar and
    emphasis marks around it and a final full stop do not count.
    """
    return _judge("exact", prompt, trace, _exact)


def reasoning_gym(prompt: Prompt, trace: Trace) -> Verdict:
    """The score of the reasoning-gym task that made the prompt; correct at a full score only.

    Reads `row["task"]`, `row["params"]` and `row["entry"]` of the prompt.
    """
    return _judge("reasoning_gym", prompt, trace, _reasoning_gym, needs_gold=False)


def verdict_of(prompt: Prompt, trace: Trace, outcome: Outcome, detail: str = "", verifier: str = "custom") -> Verdict:
    """A verdict on this trace: what a verifier of your own returns."""
    return Verdict(trace_id=trace.trace_id, gold=prompt.gold, verifier=verifier, outcome=outcome, detail=detail)


def _judge(
    name: str, prompt: Prompt, trace: Trace, find: Callable[[Prompt, str], Finding], needs_gold: bool = True
) -> Verdict:
    if trace.failed:
        found = Finding("error", f"no answer to judge: {trace.error}")
    elif needs_gold and not (prompt.gold or "").strip():
        found = Finding("unverifiable", "the prompt has no reference answer")
    elif not trace.answer.strip():
        found = Finding("wrong", f"no answer (reasoning {trace.think})")
    else:
        found = find(prompt, trace.answer)
    return verdict_of(prompt, trace, found.outcome, found.detail, f"{name}@{version_of(name)}")


def _shown(text: str) -> str:
    folded = " ".join(text.split())
    return folded if len(folded) <= SHOWN_CHARACTERS else f"{folded[: SHOWN_CHARACTERS - 1]}…"


# --- number ---------------------------------------------------------------------------------------------------------

NUMBER_WORD = re.compile(
    r"\b(?:zero|none|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|half|third|quarter)s?\b",
    re.IGNORECASE,
)
_DECIMAL_COMMA = re.compile(r"\s*(-?\d+),(\d+)\s*")
_OR = re.compile(r"\W*(?:[A-Za-z]+\W+)?or\W+(?:(?:even|maybe|perhaps|possibly)\W+)?")


def _number(prompt: Prompt, answer: str) -> Finding:
    gold = prompt.gold or ""
    expected = whole_number(gold)
    if expected is None:
        return Finding("unverifiable", f"the reference {_shown(gold)!r} is not a number")
    found = answer_boxes(answer)
    return number_in_prose(expected, answer) if found is None else _boxed_number(gold, expected, found)


def _boxed_number(gold: str, expected: Number, found: AnswerBoxes) -> Finding:
    finding = _one_box(gold, expected, found.last)
    others = [_one_box(gold, expected, box).outcome for box in found.listed]
    if finding.outcome == "correct" and any(outcome != "correct" for outcome in others):
        return Finding("wrong", f"boxed {_shown(', '.join((*found.listed, found.last)))!r}: more than one answer")
    nearby = [_one_box(gold, expected, box).outcome for box in found.nearby]
    if finding.outcome == "wrong" and "correct" in nearby:
        return Finding("unverifiable", f"boxed {_shown(found.last)!r}, and the reference in another box beside it")
    return finding


def _one_box(gold: str, expected: Number, box: str) -> Finding:
    outcome = compare_quantities(gold, box)
    if outcome is not None:
        return Finding(outcome, f"boxed {_shown(box)!r}")
    given = whole_number(box)
    if given is not None:
        return Finding(_same_outcome(given, expected), f"boxed {_shown(number_text(given))}")
    if could_be_number(box, expected):
        return Finding("unverifiable", f"boxed {_shown(box)!r} can be read as the reference")
    return Finding("wrong", f"boxed {_shown(box)!r} is not one number")


def _same_outcome(given: Number, expected: Number) -> Outcome:
    if same_number(given, expected):
        return "correct"
    rounded = not has_finite_decimal(given.value) and rounds_to(given.value, expected.value)
    return "unverifiable" if rounded else "wrong"


def could_be_number(text: str, expected: Number) -> bool:
    """Whether a text that is no number may still mean this one: `3,14`, `2x = 10`, `at least 5`, `five`."""
    text = plain(text)
    comma = _DECIMAL_COMMA.fullmatch(text)
    if comma:
        return Fraction(f"{comma[1]}.{comma[2]}") == expected.value
    before, _, after = text.rpartition("=")
    numbers = numbers_in(after)
    if before.rstrip().endswith(("<", ">", "!")):
        return False
    if len(numbers) == 1 and re.search(r"(?<![\\A-Za-z])[A-Za-z]{2}|=", text):
        return same_number(numbers[0], expected)
    return NUMBER_WORD.search(text) is not None


def number_in_prose(expected: Number, answer: str) -> Finding:
    """The last number decides; where the reference is another one of the last statement, it cannot be told."""
    given = last_number(answer)
    if given is None:
        return Finding("wrong", "no number")
    last_line = answer.strip().rpartition("\n")[2]
    statement = plain((_after_lead(last_line) or last_line)[-LONGEST_STATEMENT:]).rpartition("=")[2]
    outcome = compare_quantities(str(expected.value), statement.strip())
    if outcome is not None:
        return Finding(outcome, f"not boxed: {_shown(statement)!r}")
    stated = numbers_in(statement)
    if same_number(given, expected):
        if any(_OR.fullmatch(statement[one.end : other.start]) for one, other in zip(stated[-2:], stated[-1:])):
            return Finding("unverifiable", f"not boxed, and more than one answer: {_shown(statement)!r}")
        return Finding("correct", f"last number {_shown(number_text(given))}")
    if any(same_number(one, expected) for one in stated):
        return Finding("unverifiable", f"not boxed: the reference stands somewhere in {_shown(statement)!r}")
    return Finding("wrong", f"last number {_shown(number_text(given))}")


# --- exact ----------------------------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"\\(?:text\w*|math\w+|mbox)\s?\{([^{}]*)\}")
_ANSWER_IS = re.compile(r"(?:final )?answer(?: is)?\s?:?\s", re.IGNORECASE)


def normalised(text: str) -> str:
    """The characters of a short answer that count."""
    text = _WRAPPED.sub(r"\1", unicodedata.normalize("NFC", text))
    text = " ".join(text.split()).strip("*`$\"' ")
    return text.removesuffix(".").strip("*`$\"' ").casefold()


def _exact(prompt: Prompt, answer: str) -> Finding:
    expected = normalised(prompt.gold or "")
    given = list(_short_answers(answer))
    outcome: Outcome = "correct" if any(normalised(text) == expected for text in given) else "wrong"
    return Finding(outcome, f"answer {_shown(given[-1])!r}")


def _short_answers(answer: str) -> Iterator[str]:
    """Where a short answer may stand: the last box alone; else the whole answer, its last line, what follows `answer:`
    in that line.
    """
    if box := last_box(answer):
        yield box
        return
    yield answer.strip()
    last_line = answer.strip().rpartition("\n")[2].strip()
    yield last_line
    if after := _after_lead(last_line):
        yield after


def _after_lead(line: str) -> str | None:
    """What follows the last `answer:` or `the answer is` of a line."""
    unmarked = line.replace("**", "")
    ends = [lead.end() for lead in _ANSWER_IS.finditer(unmarked)]
    return unmarked[ends[-1] :].strip() or None if ends else None


# --- reasoning-gym --------------------------------------------------------------------------------------------------

NO_ANSWER = "no answer at all (control)"
"""Scored beside every full score: a scorer that likes this too accepts anything."""
TUPLE_TASKS = ("arc_agi", "rearc")
"""Tasks whose scorers compare with tuples, which JSON turned into lists."""


def _reasoning_gym(prompt: Prompt, answer: str) -> Finding:
    if "task" not in prompt.row or "entry" not in prompt.row:
        return Finding("unverifiable", "the prompt was not made by reasoning-gym: its row has no task and entry")
    score = _scorer(prompt)
    best, problem = 0.0, ""
    for text in _task_answers(prompt, answer):
        try:
            best = max(best, score(text))
        except Exception as error:  # scorers trust the answer's form
            problem = f"{type(error).__name__}: {error}"
        if best >= 1.0:
            return _checked(prompt, answer, score)
    if problem and not best and not _scores_reference(prompt, score):
        return Finding("error", f"the task's scorer failed: {_shown(problem)}")
    unread = f"; the scorer could not read it ({_shown(problem)})" if problem else ""
    return Finding("wrong", f"score {best:g}{unread}")


def _scorer(prompt: Prompt) -> Callable[[str], float]:
    """The task's own `score_answer` on this prompt's entry."""
    entry = {"question": prompt.row.get("question", ""), **prompt.row["entry"]}
    if prompt.row["task"] in TUPLE_TASKS:
        entry["metadata"] = _with_tuples(entry["metadata"])
    dataset = _dataset(prompt.row["task"], prompt.row.get("params", {}))
    return lambda text: float(dataset.score_answer(text, entry))


_datasets: dict[str, Any] = {}


def _dataset(task: str, params: Mapping[str, Any]) -> Any:
    """The task's data set object, made once for its parameters."""
    from reasoning_gym import create_dataset

    key = repr((task, sorted(params.items())))
    if key not in _datasets:
        _datasets[key] = create_dataset(task, seed=0, size=1, **params)
    return _datasets[key]


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_with_tuples(part) for part in value)
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    return value


def _task_answers(prompt: Prompt, answer: str) -> Iterator[str]:
    """Texts to score: the box, or else the answer, its last block or line, and its last number for numeric tasks."""
    box = last_box(answer)
    for text in _short_answers(answer):
        yield text
        yield plain(text).strip(" *`\"'")
        yield text.strip(" *`\"'").removesuffix(".")
    if box:
        return
    fences = answer.split("```")
    if len(fences) > 2:
        yield fences[-2].partition("\n")[2].rstrip()
    found = last_number(answer)
    if found is not None and found.value.denominator == 1 and whole_number(prompt.gold or "") is not None:
        yield str(found.value)


def _checked(prompt: Prompt, answer: str, score: Callable[[str], float]) -> Finding:
    """A full score counts if the scorer can also refuse; otherwise the reference decides."""
    try:
        accepts_anything = score(NO_ANSWER) >= 1.0
    except Exception:  # it refuses, in its way
        accepts_anything = False
    if not accepts_anything:
        return Finding("correct", "score 1")
    if not (prompt.gold or "").strip():
        return Finding("unverifiable", "the task's scorer accepts any answer")
    return Finding(_exact(prompt, answer).outcome, "the task's scorer accepts any answer; compared with the reference")


def _scores_reference(prompt: Prompt, score: Callable[[str], float]) -> bool:
    """Whether the scorer works at all: it gives its own reference a full score."""
    try:
        return score(prompt.row["entry"]["answer"]) >= 1.0
    except Exception:
        return False
