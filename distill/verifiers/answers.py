r"""Finding the final answer in a model's text: boxed content and numbers, exactly and in linear time.

Numbers become `Fraction`s, so that nothing is rounded. Whatever is not clearly one number (`5x`, `18\pi`, `3, 4`,
`12:30`, a date) is not read as one: a wrong reading would turn into a false verdict. Every pattern here runs in time
linear in the text, since these functions run without a time limit.
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

LONGEST_NUMBER = 400
"""Characters of the longest run of digits that is read as a number."""
LARGEST_EXPONENT = 400
"""Largest power of ten (or of a number) that is computed."""
LONGEST_EXPONENT = 5
"""Characters of the longest exponent that is read at all."""
TAIL_CHARACTERS = 4000
"""How far back the last number is looked for before the whole text is read."""
LONGEST_NUMBER_TEXT = 300
"""Characters of the longest text that can be a number with its units."""


# --- boxed content --------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*+(?=[{\w$\\-])")
_BRACE = re.compile(r"\\[{}\\]|[{}]")
_SPACE = re.compile(r"\s")


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{…}`, braces inside it balanced; None where there is none.

    Of nested boxes it is the innermost. A box that the text ends in gives what is there.
    """
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    match = _BOX.match(text, at) if at >= 0 else None
    return None if match is None else _box_content(text, match.end())[0]


def boxes(text: str) -> list[str]:
    """Contents of all outermost boxes, in order."""
    return [box.content for box in _boxes_in(text)]


class _Box(NamedTuple):
    content: str
    start: int
    end: int


def _boxes_in(text: str) -> Iterator[_Box]:
    match = _BOX.search(text)
    while match:
        content, end = _box_content(text, match.end())
        yield _Box(content, match.start(), end)
        match = _BOX.search(text, end)


class AnswerBoxes(NamedTuple):
    """The last box of an answer, and the boxes before it that belong to the same statement."""

    last: str
    listed: tuple[str, ...]
    """Joined to the last one by no more than commas, `and`, `or`, `x =`: the answer is all of them."""
    nearby: tuple[str, ...]
    """In the same line with other words between: any of them may be the answer."""


_LINKS = re.compile(
    r"(?:[\s$,;.:*&]|\\[()\[\]\\,;]|\\q?quad|\\text\s?\{\s*(?:and|or|,)*\s*\}|\b(?:and|or)\b|[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=)*"
)
_DOUBT = re.compile(r"\b(?:or|maybe|perhaps|possibly|either|alternatively|could|might)\b", re.IGNORECASE)
_CORRECTION = re.compile(
    r"\b(?:wait|no|not|actually|instead|rather|correct(?:ion|ed|ing)?|mistake|wrong|sorry|hmm|oops|but)\b",
    re.IGNORECASE,
)
LONGEST_LINK = 200
"""Characters between two boxes that can belong to one statement."""


def answer_boxes(text: str) -> AnswerBoxes | None:
    """The boxes that state the answer; None where there is none or the last one is empty.

    A box that the text takes back (`\\boxed{3}, wait: \\boxed{5}`) or that stands in an earlier line is no part of it.
    """
    last = last_box(text)
    if not last:
        return None
    listed: list[str] = []
    nearby: list[str] = []
    found = list(_boxes_in(text))
    for before, after in zip(found[-2::-1], found[:0:-1]):
        between = text[before.end : after.start]
        if len(between) > LONGEST_LINK:
            break
        linked = _LINKS.fullmatch(between)
        if not linked and ("\n" in between or _CORRECTION.search(between)):
            break
        if not nearby and (linked or _DOUBT.search(between)):
            listed.append(before.content)
        else:
            nearby.append(before.content)
    return AnswerBoxes(last, tuple(reversed(listed)), tuple(reversed(nearby)))


def _box_content(text: str, start: int) -> tuple[str, int]:
    """What a box holds whose content starts at `start`, and where it ends."""
    if text[start : start + 1] != "{":  # `\boxed 72`
        end = next((space.start() for space in _SPACE.finditer(text, start)), len(text))
        return text[start:end].rstrip(".,;$"), end
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip(), brace.end()
    return text[start + 1 :].strip(), len(text)


# --- LaTeX and Unicode to plain text --------------------------------------------------------------------------------

_SUPERSCRIPTS = {"⁻": "-"} | {char: str(digit) for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–—―﹣－", "-"),
        **dict.fromkeys("×⋅·∙✕", "*"),
        **dict.fromkeys("≈≃≅", "="),
        "⁄": "/",
        "÷": "/",
        "−": "-",
    }
)
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"(?<=\d)(?:\\[,; ]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),  # 1\,000
        (r"\\[,;: ]|~|\\q?quad\b", " "),
        (r"\\[()\[\]]", " "),
        (r"\\(?:left|right|displaystyle|textstyle|limits)\b", ""),
        (r"\\(?:text\w*|math\w+|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s?\{?\s?\\(?:circ|degree)\b\s?\}?|\\(?:circ|degree)\b|°", " "),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
        (r"\\(?:approx|simeq|cong)(?![A-Za-z])", "="),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\[dtc]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)", r" \1/\2"),
        (r"(-)\s+(?=\d+/\d)", r"\1"),  # the sign of a fraction, parted from it by the lines above
        (r"\\([$%#&_])", r"\1"),
        (r"(?<=\d)\*\*(?=\d)", "^"),
        (r"\*\*|__|`", ""),
        (r"(?:US|A|C|HK|NZ)?\$|[€£¥₹₩₽¢]", ""),
    )
)


_REPEATING = re.compile(r"(?<![\d.])(\d{0,30})\.(\d{0,30})\\(?:overline|bar)\s?\{(\d{1,30})\}")


def _unrolled(text: str) -> str:
    r"""Repeating decimals as fractions: `0.1\overline{6}` is `1/6`."""
    return _REPEATING.sub(lambda digits: f" {_repeating(*digits.groups())} ", text) if "\\" in text else text


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    head = Fraction(int((whole or "0") + fixed), 10 ** len(fixed))
    return head + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def plain(text: str) -> str:
    r"""The text with LaTeX's and Unicode's ways of writing numbers made plain: `\frac{1}{2}` and `½` become `1/2`."""
    if not text.isascii():
        text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + "".join(_SUPERSCRIPTS[c] for c in run[0]), text)
        text = _VULGAR_FRACTION.sub(lambda char: " " + unicodedata.normalize("NFKC", char[0]), text)
        text = text.translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


# --- numbers --------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]}%.])[-+](?=[\d.])      # a sign touches its number and follows no operand
        |(?<=[=({])\s?-\s?(?=[\d.]))?
    (?<![A-Za-z_\d^])(?<!\d:)
    (?P<digits>\d[\d,]*+(?:\.\d++)*+|(?<![\w.])\.\d++)
    (?P<e>[eE][-+]?\d++(?![\w.]))?
    (?!:\d)
    (?:\s?\*\s?10\s?\^\s?\{?\s?(?P<ten>-?\d++)\s?\}?
        |\s?\^\s?\{?\s?(?P<power>-?\d++)\s?\}?)?
    """,
    re.VERBOSE,
)
_OVER = re.compile(r"\s?/\s?(?=[\d.])")
_PERCENT = re.compile(r"\s?(?:%|percent\b|per\s?cent\b)", re.IGNORECASE)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}")


class Number(NamedTuple):
    """A number in a text: exact value, whether a percent sign follows, where it stands."""

    value: Fraction
    percent: bool
    start: int
    end: int


def numbers_in(text: str) -> list[Number]:
    """Every number of a plain text, in order; times, dates and version numbers are none."""
    found: list[Number] = []
    at = 0
    while match := _NUMBER.search(text, at):
        numbers, at = _number_at(text, match)
        found.extend(numbers)
    return _join_mixed(text, found)


def _number_at(text: str, first: re.Match[str]) -> tuple[list[Number], int]:
    """The number, fraction or comma-separated numbers that start with `first`, and where to go on."""
    # possessive quantifiers in the pattern keep `12:30` from being read as 1, and the search linear
    parts, match = [first], first
    while (over := _OVER.match(text, match.end())) and (following := _NUMBER.match(text, over.end())):
        parts.append(following)
        match = following
    end = parts[-1].end()
    if len(parts) == 2:
        above, below = (_value(part) for part in parts)
        value = above / below if above is not None and below else None
        values = [] if value is None else [value]
    elif len(parts) == 1:
        values = _values(first)
    else:  # 3/4/2024
        values = _values(parts[-1])
    percent = _PERCENT.match(text, end)
    end = percent.end() if percent else end
    start = first.start() if len(parts) < 3 else parts[-1].start()
    return [Number(value, bool(percent), start, end) for value in values], end


def _values(match: re.Match[str]) -> list[Fraction]:
    """One number, or those of a list without spaces (`3,4`)."""
    value = _value(match)
    if value is not None or "," not in match["digits"]:
        return [] if value is None else [value]
    return [Fraction(part) for part in match["digits"].split(",") if _readable(part)]


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that one match spells; None if it is a list, a version number or far too long."""
    digits = match["digits"].rstrip(",")
    whole, point, decimals = digits.partition(".")
    if "," in whole:
        if not _THOUSANDS.fullmatch(whole):
            return None
        whole = whole.replace(",", "")
    if not _readable(whole + point + decimals):
        return None
    value = Fraction(whole + point + decimals)
    exponents = [match["ten"] or "0", (match["e"] or "e0")[1:], match["power"] or "1"]
    if max(map(len, exponents)) > LONGEST_EXPONENT:
        return None
    scale, power = int(exponents[0]) + int(exponents[1]), int(exponents[2])
    if abs(scale) > LARGEST_EXPONENT or abs(power) * len(digits) > LARGEST_EXPONENT or (value == 0 and power < 0):
        return None
    if power != 1:
        value **= power
    if scale:
        value *= Fraction(10) ** scale
    return -value if "-" in (match["sign"] or "") else value


def _readable(digits: str) -> bool:
    return len(digits) <= LONGEST_NUMBER and digits.count(".") <= 1 and any(c.isdecimal() for c in digits)


def _join_mixed(text: str, numbers: list[Number]) -> list[Number]:
    """`3 1/2` as one number."""
    joined: list[Number] = []
    for number in numbers:
        before = joined[-1] if joined else None
        if before is not None and _is_mixed(text, before, number):
            value = before.value + (number.value if before.value >= 0 else -number.value)
            joined[-1] = Number(value, number.percent, before.start, number.end)
        else:
            joined.append(number)
    return joined


def _is_mixed(text: str, whole: Number, part: Number) -> bool:
    return (
        whole.value.denominator == 1
        and not whole.percent
        and 0 < part.value < 1
        and "/" in text[part.start : part.end]
        and "." not in text[whole.start : part.end]
        and text[whole.end : part.start] == " "
        and text[whole.start : whole.end].lstrip("+-").isdigit()
    )


def last_number(text: str) -> Number | None:
    """The last number of a text as people write it; its position is not kept."""
    for tail in (text[-TAIL_CHARACTERS:], text):
        numbers = numbers_in(plain(_unrolled(tail)))
        # one at the very start of the tail may have been cut in two
        if numbers and (numbers[-1].start > 0 or len(tail) == len(text)):
            return numbers[-1]
    return None


_EXPONENT = re.compile(r"\^\s?\{?\s?-?\d+\s?\}?")
_ASIDE = re.compile(r"\([^()]*\)")
_NOT_UNITS = re.compile(r"[\\^*+<>|_=√∞±π!≤≥≠∈~]|-\s*$")
_LONE_VARIABLE = re.compile(r"(?<![A-Za-z])[xyznkie](?![A-Za-z])")
_WORD = re.compile(r"[^\W\d_]+")
_HEDGES = {
    "or",
    "and",
    "also",
    "maybe",
    "perhaps",
    "possibly",
    "alternatively",
    "about",
    "approximately",
    "i",
    "e",
    "ie",
}


_WORDS_IN_TEXT = re.compile(r"\\[A-Za-z]+\s*\{[A-Za-z\s.,]*\}|(?<=\d)[eE](?=[-+]?\d)")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_LIMIT = re.compile(
    r"\b(?:not|if|unless|otherwise|over|under|above|below|between|half|twice|squared|cubed|factorial|remainder"
    r"|at (?:least|most)|or (?:less|more|fewer)|(?:less|more|fewer|greater|larger|smaller|higher|lower) than)\b",
    re.IGNORECASE,
)
_ONLY_DIGITS = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_IN_BRACKETS = re.compile(r"[(\[{].*,.*[)\]}]")


def whole_number(text: str, words: bool = True) -> Number | None:
    r"""The number that a text is, with nothing beside it but its unit; None if it is anything else.

    Of `x = 5` it is what follows the last equals sign, unless what stands before it is no name of a value: `2x = 10`
    and `4 = 5` are no numbers, nor are `at least 5` and the pair `(1,200)`. `words=False` refuses words outside
    `\text{…}` as well, for places where letters may be variables.
    """
    if len(text) > LONGEST_NUMBER_TEXT:
        return None
    if _ONLY_DIGITS.fullmatch(text):  # most answers
        return Number(Fraction(text), False, 0, len(text))
    if not words and _LETTER.search(_WORDS_IN_TEXT.sub("", text)):
        return None
    left, equals, right = plain(_unrolled(text)).rpartition("=")
    number = _lone_number(right.strip())
    return number if number is None or not equals or _may_equal(left, number) else None


def _lone_number(text: str) -> Number | None:
    if _LIMIT.search(text) or _IN_BRACKETS.fullmatch(text):
        return None
    if text.startswith("- "):
        text = "-" + text[1:].lstrip()
    numbers = numbers_in(text)
    if len(numbers) > 1:
        text = _without_asides(text)
        numbers = numbers_in(text)
    if len(numbers) != 1:
        return _spaced_thousands(text)
    rest = text[: numbers[0].start] + " " + text[numbers[0].end :]
    rest = _EXPONENT.sub("", rest)
    if _NOT_UNITS.search(rest) or _LONE_VARIABLE.search(rest) or _free_digit(rest):
        return None
    return numbers[0]


def _without_asides(text: str) -> str:
    """The text without brackets that say it in other units; `5 (or 6)` keeps its second answer."""
    outside = {word.casefold() for word in _WORD.findall(_ASIDE.sub(" ", text))} | _HEDGES
    return _ASIDE.sub(
        lambda aside: aside[0] if {word.casefold() for word in _WORD.findall(aside[0])} <= outside else " ", text
    )


_GROUPS = re.compile(r"\([^()]*\)|_\s?(?:\{[^{}]*\}|\w)")
_FUNCTION = re.compile(r"\\(?:[dtc]?frac|sqrt|sin|cos|tan|log|ln|sum|prod|int|lim|pm|le|ge|ne|in)")
_LONG_WORD = re.compile(r"\\?[A-Za-z]{2,}")


def _may_equal(left: str, number: Number) -> bool:
    """Whether a number can be the value of what stands before its equals sign: names, and sums of numbers."""
    if left.rstrip().endswith(("<", ">", "!", "≤", "≥", "≠")):
        return False
    return all(_names_value(part, number) for part in left.split("=") if part.strip())


def _names_value(text: str, number: Number) -> bool:
    if _FUNCTION.search(text):
        return False
    rest = _LONG_WORD.sub(" ", _GROUPS.sub(" ", text))
    if re.search("[A-Za-z]", rest):
        return not re.search(r"[\d+*/^-]", rest)
    numbers = numbers_in(text)
    if len(numbers) != 1 or number.percent or numbers[0].percent or re.search("[A-Za-z]", text):
        return True
    # a number before an equals sign was rounded (`18.75 \approx 19`), or the two contradict each other
    return abs(numbers[0].value - number.value) <= max(Fraction(1, 2), abs(number.value) / 100)


def _free_digit(rest: str) -> bool:
    """Whether a digit is left that is not part of a unit such as `m2`."""
    return re.search(r"(?<![A-Za-z])\d", rest) is not None


def _spaced_thousands(text: str) -> Number | None:
    if not re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text.strip(" .")):
        return None
    return Number(Fraction(text.strip(" .").replace(" ", "")), False, 0, len(text))


def same_number(given: Number, expected: Number) -> bool:
    """Exact equality; where only one of the two has a percent sign, `10%` is both 10 and 0.1."""
    if given.value == expected.value:
        return True
    if given.percent == expected.percent:
        return False
    percent, other = (given, expected) if given.percent else (expected, given)
    return percent.value / 100 == other.value


def has_finite_decimal(value: Fraction) -> bool:
    """Whether a number can be written with finitely many decimals."""
    return _part_beside_ten(value.denominator) == 1


def _part_beside_ten(denominator: int) -> int:
    """A denominator without its factors 2 and 5."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator


def rounds_to(exact: Fraction, rounded: Fraction) -> bool:
    """Whether a value becomes this decimal of three or more digits when it is rounded to as many decimals."""
    if not has_finite_decimal(rounded) or rounded.denominator == 1:
        return False
    places = len(number_text(Number(rounded, False, 0, 0)).partition(".")[2])
    return abs(rounded) * 10**places >= 100 and round(exact, places) == rounded


def number_text(number: Number) -> str:
    """A number as people write it: `72`, `3.5`, `1/3`, `10%`."""
    value, text = number.value, str(number.value)
    if value.denominator != 1 and has_finite_decimal(value):
        places = value.denominator.bit_length()  # enough for any denominator of twos and fives
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        text = ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}".rstrip("0")
    return text + ("%" if number.percent else "")
