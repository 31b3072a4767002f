r"""The verifier `math`: whether the mathematics of an answer is that of the reference.

    from distill.verifiers import math
    math(prompt, trace).outcome

Two answers are compared as the plainest thing that both are: the same text, letters of a choice, amounts with units,
numbers (exactly), words, times and ratios. Only the rest is parsed, by the LaTeX parser of math-verify, and compared by
`distill.verifiers.equality`; math-verify itself decides on inequalities. Its own way of reading an answer (the last
thing in it that parses, rounded to six decimals, letters dropped as units, words multiplied) calls wrong answers right
too often to train on.

What cannot be read, or can be read in two ways of which one is right, is `unverifiable`, never `wrong`. Text that would
take a parser or an evaluation long is not parsed; what is slow all the same is the business of a `VerifierPool`.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

from distill.records import Outcome, Prompt
from distill.verifiers.answers import (
    AnswerBoxes,
    answer_boxes,
    boxes,
    has_finite_decimal,
    last_box,
    rounds_to,
    same_number,
    whole_number,
)
from distill.verifiers.builtin import (
    NUMBER_WORD,
    Finding,
    _after_lead,
    _shown,
    could_be_number,
    normalised,
    number_in_prose,
)
from distill.verifiers.equality import CLOSE_ENOUGH, LONGEST_LIST, same
from distill.verifiers.latex import LONGEST_EXPRESSION, LONGEST_PRODUCT, canonical, readings, spelled, unreadable
from distill.verifiers.quantities import compare_quantities


def find(prompt: Prompt, answer: str) -> Finding:
    """What an answer is worth against the prompt's reference."""
    gold = last_box(prompt.gold or "") or (prompt.gold or "").strip().strip("$")
    found = answer_boxes(answer)
    if found is None:
        return _unboxed(gold, answer)
    if _is_option(found.last, prompt.text) and _letter(gold) is None:
        return Finding("unverifiable", f"answer {_shown(found.last)!r} names a choice, the reference does not")
    return _boxed(gold, found, list(dict.fromkeys(boxes(answer))))


def _boxed(gold: str, found: AnswerBoxes, everywhere: Sequence[str]) -> Finding:
    finding = compare(gold, found.last)
    others = [compare(gold, box).outcome for box in found.listed]
    if any(outcome != "correct" for outcome in others):
        return compare(gold, ", ".join((*found.listed, found.last)))
    if finding.outcome == "wrong" and any(compare(gold, box).outcome == "correct" for box in found.nearby):
        return Finding("unverifiable", f"answer {_shown(found.last)!r}, and the reference in another box beside it")
    if finding.outcome == "wrong" and "," in gold and 1 < len(everywhere) <= LONGEST_LIST:
        together = compare(gold, ", ".join(everywhere))  # each part may have been boxed where it was found
        return together if together.outcome == "correct" else finding
    return finding


def _unboxed(gold: str, answer: str) -> Finding:
    """Compare an answer in prose: what it names as its answer, else what its last line ends in."""
    last_line = answer.strip().rpartition("\n")[2].strip()
    findings = [compare(gold, statement) for statement in _statements(last_line)]
    for finding in findings:
        if finding.outcome == "correct":
            return finding
    number = whole_number(gold, words=False)
    if number is not None:
        return number_in_prose(number, answer)
    if findings and (_after_lead(last_line) or findings[0].outcome == "unverifiable"):
        return findings[0]
    return Finding("unverifiable", f"not boxed: no answer can be read in {_shown(last_line)!r}")


_FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_VERB = re.compile(r"\b(?:is|are|equals)\b")


def _statements(line: str) -> Iterator[str]:
    """Where a line states its answer: after `answer:`, in its last formula, after its last `is`."""
    line = line.replace("**", "").strip().rstrip(".")
    if named := _after_lead(line):
        yield named.strip()
    if formulas := _FORMULA.findall(line):
        yield "".join(formulas[-1])
    if verbs := [verb.end() for verb in _VERB.finditer(line)]:
        yield line[verbs[-1] :].strip()


# --- the plainest thing that both are -------------------------------------------------------------------------------


def compare(gold: str, given: str) -> Finding:
    """A reference and an answer, both bare of boxes and prose."""
    shown = f"answer {_shown(given)!r}"
    if gold and _squeezed(spelled(gold)) == _squeezed(spelled(given)):
        return Finding("correct", shown)
    for judge in (_as_choices, compare_quantities, _as_numbers, _as_words, _as_clocks_or_ratios, _in_bases):
        outcome = judge(gold, given)
        if outcome is not None:
            return Finding(outcome, shown)
    return _as_expressions(canonical(gold), canonical(given), shown)


def _squeezed(text: str) -> str:
    return text.replace(" ", "")


_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(([A-J])\)|([A-J])")
_LETTER_AND_TEXT = re.compile(r"\(([A-J])\).*|([A-J])(?:[.:)].*)?", re.DOTALL)


def _letter(text: str, pattern: re.Pattern[str] = _LETTER_AND_TEXT) -> str | None:
    """The letter of a choice, alone or in front of what it stands for: `C`, `(C)`, `(C) Plane`, `C. Plane`."""
    match = pattern.fullmatch(_TEXT.sub(r"\1", text).strip(" *.$"))
    return (match[1] or match[2]) if match else None


def _is_option(text: str, question: str) -> bool:
    """Whether a text is the bare letter of one of the question's options."""
    letter = _letter(text, _LETTER)
    return letter is not None and re.search(rf"\({letter}\)|(?m:^\s*){letter}[.):]\s", question) is not None


def _as_choices(gold: str, given: str) -> Outcome | None:
    expected, found = _letter(gold, _LETTER), _letter(given)
    if expected is None or found is None:
        return None
    return "correct" if expected == found else "wrong"


def _as_numbers(gold: str, given: str) -> Outcome | None:
    """Plain numbers, exactly; six digits may stand for a fraction without a finite decimal."""
    expected, found = whole_number(gold, words=False), whole_number(given, words=False)
    if expected is None:
        return None
    if found is None:
        found = whole_number(canonical(given), words=False)  # without its unit
    if found is None:
        return "unverifiable" if "=" not in given and could_be_number(given, expected) else None
    if same_number(found, expected) or _stands_for(found.value, expected.value):
        return "correct"
    rounded = not has_finite_decimal(found.value) and rounds_to(found.value, expected.value)
    return "unverifiable" if rounded else "wrong"


def _stands_for(a: Fraction, b: Fraction) -> bool:
    endless = [value for value in (a, b) if not has_finite_decimal(value)]
    return len(endless) == 1 and abs(a - b) <= CLOSE_ENOUGH * abs(endless[0])


_ONLY_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z .,'-]*\)?")
_SYNONYMS = (frozenset(("yes", "true", "correct")), frozenset(("no", "false", "incorrect")))


def _as_words(gold: str, given: str) -> Outcome | None:
    """Answers in words as text: as symbols `on` and `no` would be the same product."""
    expected, found = normalised(gold), normalised(given)
    if expected == found:
        return "correct"
    if _is_words(expected) and _is_words(found) and min(len(expected), len(found)) > 1:
        if expected.strip("()") == found.strip("()"):
            return "correct"
        return "unverifiable" if any({expected, found} <= synonyms for synonyms in _SYNONYMS) else "wrong"
    if not any(_is_words(text) and len(text) > LONGEST_PRODUCT for text in (expected, found)):
        return None
    number = whole_number(gold, words=False) or whole_number(given, words=False)
    return "unverifiable" if number is None or NUMBER_WORD.search(expected) else "wrong"


def _is_words(text: str) -> bool:
    return _ONLY_WORDS.fullmatch(text) is not None


# --- times, ratios, number bases ------------------------------------------------------------------------------------

_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_BASED = re.compile(r"\(?([0-9A-Z]+)\)?_\{?(\d{1,2})\}?")


def _as_clocks_or_ratios(gold: str, given: str) -> Outcome | None:
    """`2:30 p.m.` and `1:2`: a parser would take both for quotients."""
    one, other = (_TEXT.sub(r"\1", text).strip() for text in (gold, given))
    if ":" not in one + other:
        return None
    clocks = _CLOCK.fullmatch(one), _CLOCK.fullmatch(other)
    if clocks[0] and clocks[1]:
        return _same_clock(clocks[0], clocks[1])
    first, second = _parts(one), _parts(other)
    if not first or not second:
        return "unverifiable"
    if len(first) != len(second) or any(a * second[0] != b * first[0] for a, b in zip(first, second)):
        return "wrong"
    return "unverifiable" if any(clocks) else "correct"


def _same_clock(gold: re.Match[str], given: re.Match[str]) -> Outcome:
    """Times of day; where one side has no a.m. or p.m., the other's counts."""
    times = [[int(part or 0) for part in match.groups()[:3]] for match in (gold, given)]
    halves = {(match[4] or "").lower() for match in (gold, given)} - {""}
    if times[0] == times[1]:
        return "wrong" if len(halves) > 1 else "correct"
    same_minute = times[0][1:] == times[1][1:] and abs(times[0][0] - times[1][0]) == 12
    return "unverifiable" if same_minute else "wrong"


def _parts(text: str) -> list[Fraction]:
    """The parts of a ratio; those of a number are its numerator and denominator."""
    if _RATIO.fullmatch(text):
        return [Fraction(part.strip()) for part in text.split(":")]
    number = whole_number(text, words=False)
    return [] if number is None else [Fraction(number.value.numerator), Fraction(number.value.denominator)]


def _in_bases(gold: str, given: str) -> Outcome | None:
    """`1204_9`: the parser drops the base. Without one on one side, the other's counts."""
    one, other = (_squeezed(_TEXT.sub(r"\1", text)) for text in (gold, given))
    bases = _BASED.fullmatch(one), _BASED.fullmatch(other)
    if bases[0] and bases[1]:
        values = [_in_base(*match.groups()) for match in bases if match]
        return "unverifiable" if None in values else "correct" if values[0] == values[1] else "wrong"
    based = bases[0] or bases[1]
    plain = other if bases[0] else one
    if based is None or not plain.isdecimal():
        return None
    if plain == based[1]:
        return "correct"
    return "unverifiable" if int(plain[:LONGEST_EXPRESSION]) == _in_base(*based.groups()) else "wrong"


def _in_base(digits: str, base: str) -> int | None:
    try:
        return int(digits, int(base))
    except ValueError:  # a digit or a base that there is not
        return None


# --- expressions ----------------------------------------------------------------------------------------------------


def _as_expressions(gold: str, given: str, shown: str) -> Finding:
    if problem := unreadable(gold):
        return Finding("unverifiable", f"{shown}: the reference {_shown(gold)!r} cannot be read: {problem}")
    if problem := unreadable(given):
        return Finding("unverifiable", f"{shown} cannot be read: {problem}")
    if _squeezed(gold) == _squeezed(given):
        return Finding("correct", shown)
    try:
        equal = _same_in_all_readings(gold, given)
    except Exception as error:  # the parser and sympy raise whatever they like
        return Finding("unverifiable", f"{shown}: cannot be compared ({type(error).__name__})")
    if equal is None:
        return Finding("unverifiable", f"{shown} may be the reference {_shown(gold)!r} or not")
    return Finding("correct" if equal else "wrong", shown)


def _same_in_all_readings(gold: str, given: str) -> bool | None:
    lower = not _mixed_case(gold) and not _mixed_case(given)
    pairs = itertools.product(readings(gold), readings(given))
    found = {same(_parse(one, lower), _parse(other, lower)) for one, other in pairs}
    return found.pop() if len(found) == 1 else None


def _mixed_case(latex: str) -> bool:
    """Whether a letter is used in both cases, as in `R - r`."""
    letters = set(re.sub(r"\\[A-Za-z]+", " ", latex))
    return any(letter.isupper() and letter.lower() in letters for letter in letters)


@lru_cache(maxsize=256)
def _parse(latex: str, lower: bool) -> Any:
    """What math-verify's parser makes of canonical LaTeX; raises whatever it does."""
    return latex2sympy(
        latex, is_real=True, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=lower)
    )
