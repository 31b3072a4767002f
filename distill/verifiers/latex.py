r"""Short answers in LaTeX: one way of writing for each, and what is better not given to a parser.

    canonical(r"x = \dfrac12\,\text{cm}")  ->  r"x = \frac{1}{2}"

`canonical` spells Unicode and plain words of mathematics in LaTeX, drops layout and a unit at the end, and writes out
what the parser would misread: mixed numbers, products without a sign (`2(3)` is 5 to it), thousands separators,
degrees. `unreadable` says why a text should not be parsed: it holds what the parser does not know and would turn into
products of letters, or what would take it long.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

LONGEST_EXPRESSION = 600
"""Characters of the longest answer that is parsed; parsing takes milliseconds a character."""
DEEPEST_NESTING = 10
"""Levels of brackets that are parsed; each level of parentheses takes a parser as long as the text inside."""
LARGEST_EXPONENT_DIGITS = 4
"""Digits of the largest exponent or factorial that is evaluated."""
LARGEST_POWER = 10**6
"""Largest power that is evaluated where powers are raised to powers."""
LONGEST_PRODUCT = 3
"""Letters of the longest run that is read as a product of variables; longer ones are words."""
MOST_ENTRIES = 60
"""Entries of the largest matrix that is parsed."""


# --- one way of writing ---------------------------------------------------------------------------------------------

_NAMES = {
    "∞": "infty", "≤": "leq", "≥": "geq", "≠": "neq", "∪": "cup", "∩": "cap", "∈": "in", "±": "pm", "·": "cdot",
    "⋅": "cdot", "×": "cdot", "∙": "cdot", "∅": "emptyset", "√": "sqrt", "≈": "approx", "∖": "setminus", "°": "degree",
}  # fmt: skip
_GREEK = {char: unicodedata.name(char).rpartition(" ")[2].lower() for char in "αβγδεζηθικλμνξπρστυφχψω"}
_CHARACTERS = str.maketrans(
    {char: f"\\{name} " for char, name in (_NAMES | _GREEK).items()}
    | dict.fromkeys("−‐‑‒–—―﹣－", "-")
    | dict.fromkeys("÷⁄", "/")
    | {char: f"^{{{digit}}}" for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {char: f"_{{{digit}}}" for digit, char in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    | {char: rf"\mathbb{{{letter}}}" for char, letter in zip("ℝℤℕℚℂ", "RZNQC")}
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")

_WORDS = "sqrt|pi|sin|cos|tan|log|ln|exp"
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm"
_TEXT = r"\\(?:text\w*|mathrm|mbox)"
_SHORT_UNITS = "mm|cm|km|ft|yd|mg|kg|oz|lb|ml|hr|sec|min"
_DEGREE = r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\^?\s*\\degree(?![A-Za-z]))"

Step = tuple[str, str | Callable[[re.Match[str]], str]]
_LAYOUT: tuple[Step, ...] = (
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    (r"(?<=[\w)}])\*\*(?=[\w({])", "^"),
    (r"\*\*|`", ""),
    (r"\\?\$|(?<!\\)\\[()\[\]]", " "),
    (r"\\\\\[[^\]]*\]", r"\\\\"),
    (r"(?<=\d)(?:\\[,;! ]|~|\{,\}\s?(?:\\!)?|,\\!)(?=\d{3}(?!\d))", ""),  # 1\,000
    (r"\{,\}", ","),
    (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])", lambda spaced: spaced[0].replace(" ", "")),
)
_SPELLING: tuple[Step, ...] = (
    (rf"\\(?:operatorname|mathrm|text|textrm)\s*\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
    (r"\\(?:mathrm|text|textit|mathit)\s*\{\s*([ei])\s*\}", r" \1 "),
    (r"\\(?:text\w*|math(?:bf|rm|sf)|mbox|boldsymbol)\s*\{\s*([-\d.,/ ]+)\s*\}", r" \1 "),
    (rf"{_TEXT}\s*\{{[\s,]*(?:and|or)[\s,]*\}}|\\(?:lor|land|vee|wedge)(?![A-Za-z])", ","),
    (r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ","),
    (r",(?:\s*,)+", ","),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:ast|times|cdotp)(?![A-Za-z])|\*", r"\\cdot "),
    (r"\\(le|ge|ne)(?![A-Za-z])", r"\\\1q "),
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\neq "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\([lr])brace(?![A-Za-z])", lambda brace: r"\{" if brace[1] == "l" else r"\}"),
    (r"\{[bBp]matrix\}|\{matrix\}", "{pmatrix}"),
    (rf"(?<![\\A-Za-z])({_WORDS})(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty "),
    (r"\s*\b(?:percent|per cent)\b|(?<!\\)%", r"\\%"),
    (r"(?<=\d)[eE]([-+]?\d+)(?![\d.])", r"\\cdot 10^{\1}"),
    (r"(?<![\w.])\.(?=\d)", "0."),
    (r"\\(frac|sqrt)\s*(\d)(?!\d)(?=\s*(?:[{\\)\]},;+\-=A-Za-z]|$))", r"\\\1{\2}"),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)(?!\d)", r"\1{\2}"),
)
_ENDS: tuple[Step, ...] = (
    (rf"({_DEGREE})\s*(?:{_TEXT}\s*\{{\s*[CF]\s*\}}|[CF](?![A-Za-z]))", r"\1"),
    (rf"^\s*(?:{_TEXT}\s*\{{[A-Za-z ]*\}}|[A-Za-z]{{4,}}[A-Za-z ]*)\s*=", ""),  # \text{Area} =
    (r"[\s.,;]+$", ""),
    (r"\s+", " "),
)
_STEPS = tuple((re.compile(pattern), replacement) for pattern, replacement in (*_LAYOUT, *_SPELLING, *_ENDS))

_UNIT = re.compile(
    rf"(?:\s*{_TEXT}\s*\{{(?!\s*(?:if|for|where|when|not|or)\b)[A-Za-z\s./()^-]*[23]?\s*\}}"
    rf"|(?:(?<=[\d)}}])|(?<=\\pi))(?:\s+[A-Za-z]{{4,}}|\s*(?:{_SHORT_UNITS}))(?:\s+[A-Za-z]{{2,}})*)"
    r"\s*(?:\^\s*(?:\{\s*\d\s*\}|\d))?[\s.]*$"
)
_MIXED = re.compile(
    r"(?<![\d.}^_])(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<![\d.}^_/])(\d+) (\d+)/(\d+)(?![\d/])"
)
_NEIGHBOURS = re.compile(
    r"(?<![\^_\d.\\A-Za-z])(\d+(?:\.\d+)?)\s*(?=\()|(\))\s*(?=[\d(]|\\frac)|(\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=[\d(]|\\frac)"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_CALL = rf"\\(?:{_FUNCTIONS})\s*(?:[\^_]\s*(?:\{{[^{{}}]*\}}|\w)\s*)*"
_ANGLE = re.compile(rf"(\d+(?:\.\d+)?)\s*{_DEGREE}")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


@lru_cache(maxsize=1024)
def spelled(text: str) -> str:
    """An answer in one way of spelling its characters and commands; one too long to be parsed is returned as it is."""
    if len(text) > LONGEST_EXPRESSION:
        return text
    text = _VULGAR.sub(_vulgar, text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    return text.strip()


_SLASH = re.compile(r"/\s*(\d+)\s*(?=[A-Za-z(]|\\(?:sqrt|pi|sin|cos|tan|log|ln))")


def readings(latex: str) -> tuple[str, ...]:
    """Canonical LaTeX as the parser reads it, and as its writer may have meant it: `1/2x` is half of x to some."""
    return (latex, _SLASH.sub(r"/\1\\cdot ", latex)) if _SLASH.search(latex) else (latex,)


@lru_cache(maxsize=1024)
def canonical(text: str) -> str:
    """A spelled answer without its unit, and with every number, root and product in full."""
    text = spelled(text)
    if len(text) > LONGEST_EXPRESSION:
        return text
    text = _bracketed(_without_unit(text), r"\\sqrt\s*", "({")
    text = _bracketed(_bracketed(text, r"\^\s*", "({"), _CALL, "{(")
    text = _ANGLE.sub(r"(\\frac{\1\\pi }{180})" if _TRIGONOMETRIC.search(text) else r"\1", text)
    text = _MIXED.sub(_mixed, _without_separators(text))
    return _NEIGHBOURS.sub(lambda factor: f"{factor[1] or factor[2] or factor[3]}\\cdot ", text).strip()


def _without_unit(text: str) -> str:
    r"""`18\pi \text{ cm}^3` without its unit; words alone are no unit of anything."""
    unit = _UNIT.search(text)
    return text[: unit.start()] if unit and re.search(r"\d|\\[a-z]|^\s*[a-z]\s*$", text[: unit.start()]) else text


def _vulgar(char: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", char[0]).partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}"


def _mixed(match: re.Match[str]) -> str:
    r"""`3\frac{1}{2}` as a sum; a product where the part is no proper fraction."""
    whole, above, below = match.groups()[:3] if match[1] else match.groups()[3:]
    part = rf"\frac{{{above}}}{{{below}}}"
    return f"({whole}+{part})" if int(above) < int(below) else rf"{whole}\cdot {part}"


def _without_separators(text: str) -> str:
    """`1,000` as 1000, unless the comma is all that parts the entries of a bracket: `(1,200)` is a pair."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        inside = sum(before.count(opening) for opening in "([") + before.count(r"\{")
        inside -= sum(before.count(closing) for closing in ")]") + before.count(r"\}")
        others = _THOUSANDS.sub("", text).count(",")
        return match[0].replace(",", ", ") if inside > 0 and not others else match[0].replace(",", "")

    return _THOUSANDS.sub(joined, text)


def _bracketed(text: str, command: str, brackets: str) -> str:
    r"""What follows a command in other brackets: `\sqrt(2)` and `x^(n+1)` with braces, `\sin{x}` with parentheses."""
    given, wanted = brackets[0], brackets[1]
    while match := re.search(rf"{command}(?=\{given})", text):
        start, end = match.end(), _closing(text, match.end())
        if end is None:
            return text
        inside = text[start + 1 : end].strip()
        if wanted == "(" and inside[:1] == "(" and _closing(inside, 0) == len(inside) - 1:
            inside = inside[1:-1]
        text = f"{text[: match.start()]}{match[0].rstrip()}{wanted}{inside}{_PAIRS[wanted]}{text[end + 1 :]}"
    return text


_PAIRS = {"(": ")", "{": "}"}


def _closing(text: str, start: int) -> int | None:
    """Where the bracket closes that opens at `start`."""
    pair = _PAIRS[text[start]]
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == text[start]) - (text[at] == pair)
        if depth == 0:
            return at
    return None


# --- what is not parsed ---------------------------------------------------------------------------------------------

_KNOWN = """
    frac sqrt pi cdot div pm infty cup cap setminus in leq geq neq approx emptyset mathbb binom begin end
    arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp max min gcd lcm lfloor rfloor lceil rceil
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi
    chi psi omega Delta Omega Gamma Lambda Sigma Theta Phi Psi overline vec mathbf angle triangle
"""
_COMMANDS = frozenset((*_KNOWN.split(), *"{}\\%"))
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_STRANGE = re.compile(r"[^\w\s\\{}()\[\]|.,;=<>+\-/^!%&]|[^\x00-\x7f]|\.\.")
_NAME = re.compile(
    r"\\(?:text|mathrm|mathbf|mathbb|vec|overline)\s*\{[A-Za-z ]{0,20}\}|\\(?:begin|end)\{pmatrix\}|\\[A-Za-z]+"
)
_RUN = re.compile(
    rf"[A-Za-z]{{{LONGEST_PRODUCT + 1},}}|(?<![A-Za-z])(?:if|or|and|no|not|is|the|for|all|any)(?![A-Za-z])"
)
_NO_VALUE = (
    (re.compile(r"(?<![\^_\d])\d+\s+\d"), "numbers side by side"),
    (re.compile(r"\d+\s*/\s*\d+\s*/\s*\d+|\d{4}-\d{1,2}-\d{1,2}"), "a date"),
    (re.compile(r"\\(?:frac|sqrt)\s*\d"), "a fraction or root of no clear extent"),
    (re.compile(r"\d_"), "a number with an index"),
    (re.compile(rf"{_CALL}(?=[^\s(])[^(){{}},+=<>-]*/"), "a function of no clear argument"),
    (re.compile(r"!\s*!"), "a double factorial"),
    (re.compile(r"\^\s*(?:\w|\\[A-Za-z]+)\s*\^"), "a power of a power without braces"),
    (re.compile(r"(?:\\(?:exp|sinh|cosh|tanh)\b.*){3}"), "too many exponentials"),
    (re.compile(r"\d{5}\s*!"), "a factorial that is too large"),
    (re.compile(r"\\binom\s*\{[^{}]*(?:\d{5}|[\^!\\])"), "a binomial that is too large"),
    (re.compile(r"\d{401}"), "a number that is too long"),
)  # fmt: skip


def unreadable(latex: str) -> str | None:
    """Why canonical LaTeX is not to be parsed; None if it may be."""
    if not latex:
        return "nothing"
    if len(latex) > LONGEST_EXPRESSION:
        return "too long"
    if not _balanced(latex):
        return "brackets that do not match, or too many of them"
    unknown = set(_COMMAND.findall(latex)) - _COMMANDS
    strange = _STRANGE.search(latex) or _RUN.search(_NAME.sub(" ", latex))
    if unknown or strange:
        return f"{', '.join(sorted(unknown)) or (strange and strange[0])!r} has no fixed meaning"
    if latex.count("&") + latex.count(r"\\") > MOST_ENTRIES:
        return "too large a matrix"
    return next((reason for pattern, reason in _NO_VALUE if pattern.search(latex)), None) or _too_large(latex)


def _balanced(latex: str) -> bool:
    """Whether braces match and no bracket is nested too deeply; `(0, 1]` is an interval."""
    plain = re.sub(r"\\[\\{}]", " ", latex)
    depth = braces = 0
    for char in plain:
        braces += (char == "{") - (char == "}")
        depth += (char in "({[") - (char in ")}]")
        if braces < 0 or depth > DEEPEST_NESTING:
            return False
    return braces == 0


def _too_large(latex: str) -> str | None:
    """Towers of powers and other exponents and factorials that would fill the memory."""
    powers = list(_powers(latex))
    if any(_large_exponent(exponent) for _, exponent in powers) or _largest_power(powers) > LARGEST_POWER:
        return "an exponent that is too large"
    return "a factorial that is too large" if any(map(_large_factorial, re.finditer(r"[)}]\s*!", latex))) else None


def _largest_power(powers: Sequence[tuple[str, str]]) -> int:
    """As if all powers of groups stood inside one another: `((2^{9})^{99})^{999}`."""
    sizes = [(base in ")}", max(map(int, re.findall(r"\d+", exponent)), default=1)) for base, exponent in powers]
    inner = max((size for of_group, size in sizes if not of_group), default=1)
    return inner * math.prod(size for of_group, size in sizes if of_group)


def _large_factorial(end: re.Match[str]) -> bool:
    """Of what ends in this bracket: `(n-2)!` is small, `((9!)!)!` is not."""
    before = end.string[: end.start()]
    inside = before[max(before.rfind("("), before.rfind("{")) :]
    return re.search(r"[)}^!]", inside) is not None or _digits(inside) > LARGEST_EXPONENT_DIGITS


def _large_exponent(exponent: str) -> bool:
    """Small numbers, variables and their small powers are no large exponents: `x^{2005}`, `e^{-x^2}`."""
    if "!" in exponent or _digits(exponent) > LARGEST_EXPONENT_DIGITS:
        return True
    return any(inner not in ("2", "3", "4") or _digits(exponent) > 3 for _, inner in _powers(exponent))


def _digits(text: str) -> int:
    return sum(map(str.isdigit, text))


def _powers(latex: str) -> Iterator[tuple[str, str]]:
    """What stands before each `^`, and its exponent."""
    for match in re.finditer(r"(\S|^)\s*\^\s*", latex):
        start = match.end()
        end = _closing(latex, start) if latex[start : start + 1] == "{" else None
        digits = re.match(r"\d*", latex[start:])
        yield match[1] or " ", latex[start + 1 : end] if end is not None else (digits[0] if digits else "")
