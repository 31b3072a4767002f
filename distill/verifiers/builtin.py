"""The built-in verifiers: plain functions `verify(prompt, trace) -> Verdict` that can be called anywhere.

Each says `wrong` only where it could tell; where the reference cannot be read or compared it says `unverifiable`.
`number` and `exact` run in time linear in the answer. `math` and `reasoning_gym` call libraries that may take
arbitrarily long on hostile text, set no time limit of their own (no SIGALRM: they also run in threads) and so belong
into a `VerifierPool`; they import those libraries on their first call.
"""

import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from distill.records import Outcome, Prompt, Trace, Verdict
from distill.verifiers.answers import (
    boxes,
    has_finite_decimal,
    last_box,
    last_number,
    number_text,
    plain,
    same_number,
    whole_number,
)

MATH_TAIL_CHARACTERS = 2000
"""How much of an answer's end `math` reads where nothing is boxed."""
SHOWN_CHARACTERS = 80
"""Characters of an answer quoted in a verdict's detail."""


class Finding(NamedTuple):
    """What a verifier found, before it is filed as a verdict."""

    outcome: Outcome
    detail: str = ""


@cache
def version_of(name: str) -> str:
    """Version of a built-in verifier: ours, and that of the library which decides."""
    ours = {"number": "1", "math": "1", "exact": "1", "reasoning_gym": "1"}[name]
    library = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}.get(name)
    return ours if library is None else f"{ours}+{library}-{importlib.metadata.version(library)}"


def number(prompt: Prompt, trace: Trace) -> Verdict:
    """Whether the last boxed number, or else the last number of the answer, equals the reference exactly.

    A last box that is not one number (`5x`, `3, 4`, `12:30`) is wrong; an empty one is ignored. Units, currency and
    thousands separators are ignored, `10%` equals 10 and 0.1, nothing is rounded.
    """
    return _judge("number", prompt, trace, _number)


def math(prompt: Prompt, trace: Trace) -> Verdict:
    """Whether the last boxed expression, or else the last expression of the answer, equals the reference.

    Plain numbers and words are compared here, everything else by math-verify. Sets a process-wide log level of
    math-verify; may run for long.
    """
    return _judge("math", prompt, trace, _math)


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


def _number(prompt: Prompt, answer: str) -> Finding:
    expected = whole_number(prompt.gold or "")
    if expected is None:
        return Finding("unverifiable", f"the reference {_shown(prompt.gold or '')!r} is not a number")
    box = last_box(answer)
    if box:
        given = whole_number(box)
        if given is None:
            return Finding("wrong", f"boxed {_shown(box)!r} is not one number")
    else:
        given = last_number(answer)
        if given is None:
            return Finding("wrong", "no number")
    where = "boxed" if box else "last number"
    return Finding("correct" if same_number(given, expected) else "wrong", f"{where} {_shown(number_text(given))}")


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


# --- math -----------------------------------------------------------------------------------------------------------

_ONLY_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z .,'-]*\)?")
_BASE = re.compile(r"_\{?(\d+)\}?")
CLOSE_ENOUGH = Fraction(1, 10**6)
"""Relative difference up to which a decimal stands for a fraction that has no finite decimal."""


def _math(prompt: Prompt, answer: str) -> Finding:
    gold = last_box(prompt.gold or "") or (prompt.gold or "").strip().strip("$")
    box = last_box(answer)
    if not box:
        return _unboxed(gold, answer)
    decided = _as_numbers(gold, box) or _as_words(gold, box)
    if decided:
        return decided
    # several boxes may give one part each: `x = \boxed{2}` or `x = \boxed{3}`
    all_boxes = list(dict.fromkeys(boxes(answer)))
    readings = [box] if len(all_boxes) < 2 else [box, ", ".join(all_boxes)]
    return _as_expressions(gold, [f"\\boxed{{{reading}}}" for reading in readings], box)


def _unboxed(gold: str, answer: str) -> Finding:
    """Compare an answer in prose: what it names as its answer, else its last number, else what math-verify finds."""
    last_line = answer.strip().rpartition("\n")[2].strip()
    named = re.sub(r"\\[()]|(?<!\\)\$", "", _after_lead(last_line) or "").strip().removesuffix(".")
    decided = _as_numbers(gold, named) or _as_words(gold, named)
    if decided and decided.outcome == "correct":
        return decided
    expected, found = whole_number(gold, words=False), last_number(answer)
    if expected is not None and found is not None and same_number(found, expected):
        return Finding("correct", f"last number {_shown(number_text(found))}")
    if _is_words(gold) and re.search(rf"\b{re.escape(normalised(gold).strip('()'))}\b", normalised(last_line)):
        return Finding("unverifiable", f"not boxed: the reference stands somewhere in {_shown(last_line)!r}")
    readings = [answer[-MATH_TAIL_CHARACTERS:], *([f"\\boxed{{{named}}}"] if named else [])]
    return _as_expressions(gold, readings, named or answer[-SHOWN_CHARACTERS:])


def _as_numbers(gold: str, given: str) -> Finding | None:
    """Compare two plain numbers exactly: math-verify rounds to six decimals, so 1e-7 would equal 2e-7."""
    expected, found = whole_number(gold, words=False), whole_number(given, words=False)
    if expected is None or found is None:
        return None
    same = same_number(found, expected) or _stands_for(found.value, expected.value)
    return Finding("correct" if same else "wrong", f"answer {_shown(number_text(found))}")


def _stands_for(a: Fraction, b: Fraction) -> bool:
    endless = [value for value in (a, b) if not has_finite_decimal(value)]
    return len(endless) == 1 and abs(a - b) <= CLOSE_ENOUGH * abs(endless[0])


def _as_words(gold: str, given: str) -> Finding | None:
    """Compare two answers in words as text: as symbols `on` and `no` would be the same product."""
    expected, found = normalised(gold), normalised(given)
    if expected == found:
        return Finding("correct", f"answer {_shown(given)!r}")
    if min(len(expected), len(found)) < 2 or not (_is_words(expected) and _is_words(found)):
        return None
    same = expected.strip("()") == found.strip("()")
    return Finding("correct" if same else "wrong", f"answer {_shown(given)!r}")


def _is_words(text: str) -> bool:
    return _ONLY_WORDS.fullmatch(normalised(text)) is not None


def _as_expressions(gold: str, readings: Sequence[str], shown: str) -> Finding:
    """Let math-verify compare the reference with any of the readings of an answer."""
    where = f"answer {_shown(shown)!r}"
    expected = _parse(f"\\boxed{{{gold}}}")
    try:
        same = bool(expected) and any(_same_expression(expected, _parse(reading)) for reading in readings)
    except Exception as error:  # sympy raises whatever it likes
        return Finding("unverifiable", f"{where}: cannot be compared ({type(error).__name__})")
    if not same and all(isinstance(part, str) for part in expected):
        return Finding("unverifiable", f"math-verify cannot read the reference {_shown(gold)!r}")
    if same and _BASE.findall(gold) and _BASE.findall(shown) and _BASE.findall(gold) != _BASE.findall(shown):
        return Finding("wrong", f"{where}: another number base")  # math-verify drops the base
    return Finding("correct" if same else "wrong", where)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    _silence_math_verify()
    return list(parse(text, parsing_timeout=None))


def _same_expression(expected: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(expected, given, timeout_seconds=None, raise_on_error=True))


@cache
def _silence_math_verify() -> None:
    """math-verify warns once a process that nothing limits its time; the pool does."""
    import logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)


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
