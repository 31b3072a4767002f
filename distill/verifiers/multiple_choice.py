r"""The `choice` verifier: which letter, A to J, an answer to a multiple-choice question settles on.

The last box decides. Without one it is the last statement of a choice (`Answer: (B)`, `C is correct`, a last line
`**B**` or `B) 21 km`), or the text of an option standing where an answer stands. A letter that is merely mentioned
(`Option A is too small`) is not a choice. Runs in time linear in the answer.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from distill.config import ChoiceVerifier
from distill.records import Prompt, Trace, Verdict
from distill.verifiers.answers import last_box
from distill.verifiers.builtin import Finding
from distill.verifiers.findings import judged, shown

OPTION_COLUMNS = ("options", "choices")
"""Columns in which data sets keep what the letters stand for."""


def version() -> str:
    """Version of our own reading; bumped whenever it judges differently."""
    return "1"


def choice(prompt: Prompt, trace: Trace, options: ChoiceVerifier = ChoiceVerifier()) -> Verdict:  # noqa: B008
    """Whether the answer settles on the letter, or the set of letters (`AC`, `A, C`), of the reference.

    Reads what the letters stand for from `row["options"]` or `row["choices"]`. An answer without a readable letter, or
    with two where the reference has one, is wrong; a reference that is no letter makes it unverifiable.
    """
    return judged(f"choice@{version()}", prompt, trace, partial(_choice, options))


def _choice(options: ChoiceVerifier, prompt: Prompt, answer: str) -> Finding:
    texts = option_texts(prompt.row)
    allowed = frozenset(options.letters) & (frozenset(texts) or frozenset(options.letters))
    expected = letters_of(prompt.gold or "")
    if expected is None or not expected <= allowed:
        given = ", ".join(sorted(allowed))
        return Finding("unverifiable", f"the reference {shown(prompt.gold or '')!r} is none of the letters {given}")
    found = chosen(answer, allowed, texts)
    if found is None:
        return Finding("wrong", "no letter")
    return Finding("correct" if found.letters == expected else "wrong", f"{found.where} {shown(found.text)!r}")


# --- what the letters stand for -------------------------------------------------------------------------------------

_LETTERED = re.compile(r"\s*\(?([A-Ja-j])\s*[).:]\s*(.*)", re.DOTALL)


def option_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The text of each letter: `["A)21", ...]`, `["21", ...]`, `{"A": "21"}` or `{"label": [...], "text": [...]}`."""
    given = next((row[column] for column in OPTION_COLUMNS if row.get(column)), None)
    if isinstance(given, Mapping) and isinstance(given.get("text"), list):
        given = dict(zip(map(str, given.get("label") or given.get("labels") or "ABCDEFGHIJ"), given["text"]))
    if isinstance(given, Mapping):
        return {str(key).upper(): str(text) for key, text in given.items() if len(str(key)) == 1 and str(key).isalpha()}
    if not isinstance(given, list):
        return {}
    lettered = [_LETTERED.fullmatch(str(text)) for text in given]
    if all(match and match[1].upper() == letter for match, letter in zip(lettered, "ABCDEFGHIJ")):
        return {match[1].upper(): match[2] for match in lettered if match}
    return {letter: str(text) for letter, text in zip("ABCDEFGHIJ", given)}


# --- reading letters ------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"\s+")
_WRAPPED = re.compile(r"\\(?:text\w*|math\w+|mbox)\s?\{([^{}]*)\}")
_MARKS = re.compile(r"\\[()\[\]]|[*_`$]+")
_SEVERAL = re.compile(r"[,;/&+]|\b(?:and|or)\b", re.IGNORECASE)
_ONE = re.compile(r"(?:option|choice)?\s?[(\[]?\s?([A-Ja-j])\s?[)\]]?[.):]?", re.IGNORECASE)
_RUN = re.compile(r"[A-J]{2,10}")
LONGEST_LETTERS = 60
"""Characters of the longest text that can be nothing but letters of options."""
LONGEST_LINE = 500
"""Characters of the longest last line that is looked at by itself."""


def letters_of(text: str) -> frozenset[str] | None:
    """The letters that a short text consists of: `B`, `(b)`, `Option B`, `AC`, `A, C`, `(A) and (C)`; else None."""
    text = _SPACE.sub(" ", plain(text)).strip().rstrip(".")
    if not text or len(text) > LONGEST_LETTERS:
        return None
    if _RUN.fullmatch(text) and len(set(text)) == len(text):
        return frozenset(text)
    found = [_ONE.fullmatch(part.strip()) for part in _SEVERAL.split(text) if part.strip()]
    return frozenset(match[1].upper() for match in found if match) if found and all(found) else None


def plain(text: str) -> str:
    r"""The text without emphasis, dollar signs, math brackets and `\text{}`."""
    return _MARKS.sub("", _WRAPPED.sub(r"\1", unicodedata.normalize("NFKC", text)))


# `I` and `A` are words too: a small letter after them shows it, unless it begins how a sentence about an option goes on
_NO_WORD = r"(?!\s++(?!(?:is|are|was|because|since|and|or|as|with|for|in)\b)[a-z])"
_END = r"[.!]*+[^\S\n]*+(?:\n|\Z)"
_LETTER = (
    r"(?:\(\s?[A-Ja-j]\s?\)|\[[A-Ja-j]\]"
    rf"|(?<![\w'’])(?:[AI](?![\w'’]){_NO_WORD}|[B-HJ](?![\w'’]))\)?"
    rf"|(?<![\w'’])[a-j](?:\)|(?={_END})))"
)
_LETTERS = (
    rf"{_LETTER}(?:\s?(?:,|;|/|&|\+|and\b|or\b)\s?(?:(?:and|or)\s)?(?:(?i:options?|choices?)\s)?{_LETTER}){{0,9}}+"
)
_LIST = rf"({_LETTERS}|(?<![\w'’])[A-J]{{2,10}}(?![\w'’]))"
_DENIED = r"(?!\s*+(?:(?i:is|are|was|were)\s+(?:not|also not|never)\b|(?i:is|are)\s+(?i:incorrect|wrong|false)))"
_LINK = r"\s*+(?:(?i:is|are|was|(?:will|would|must|should|has to)\sbe)\b\s*+|[:=>.\-–—]\s*+){0,4}+"
_FILL = (
    r"(?:(?i:therefore|thus|then|so|clearly|definitely|indeed|either|both|the|correct|best|right|final)\b[\s,:]*+)"
    r"{0,4}+"
)
_KIND = r"(?:(?i:options?|choices?|letters?|answers?)\b[\s:]*+){0,2}+"
STATEMENTS = (
    # `Answer: B`, `the answer is therefore option (B)`, `Ans. B`, `correct option B`
    re.compile(
        rf"(?<!\w)(?i:answers?|ans|(?:correct|right|best)\s(?:options?|choices?|letters?))\b{_LINK}{_FILL}{_KIND}"
        rf"{_LIST}{_DENIED}"
    ),
    # `B is correct`, `(B) is the right answer`, `A and C are the correct ones`
    re.compile(
        rf"{_LIST}\)?\s(?i:is|are)\s(?:(?i:the|therefore|thus|clearly|indeed)\s){{0,2}}+"
        r"(?i:only\s)?(?i:correct|right|best|answers?)\b"
    ),
    # `I choose option B`, `we go with (B)`
    re.compile(rf"(?<!\w)(?i:choose|chose|select|pick|go with)\s(?:(?i:the)\s)?{_KIND}{_LIST}{_DENIED}"),
    # `Hence B.`, `so it is (C)`, at the end of a line
    re.compile(
        rf"(?<!\w)(?i:hence|therefore|thus|so|it is|it['’]s|that is)\b[\s,:]*+(?:(?i:it is|it['’]s)\s)?{_KIND}{_LIST}"
        rf"(?={_END})"
    ),
)
"""How people say which option they settle on; the group holds the letters."""

_MENTION = re.compile(rf"(?<!\w)(?i:options?|choices?)\b{_LINK}{_LIST}{_DENIED}")
_LINE_OF_ONE_OPTION = re.compile(r"\(?([A-Ja-j])(?:\)[.:]?|[.:])\s?(.*)")
_LEAD = re.compile(r"(?i:answer|option|choice)s?(?:\s(?i:is))?\s?[:=]?\s?")


class Choice(NamedTuple):
    """The letters an answer settles on, and where that was read."""

    letters: frozenset[str]
    where: str
    text: str


def chosen(answer: str, allowed: frozenset[str], texts: Mapping[str, str]) -> Choice | None:
    """What an answer settles on; None where nothing readable is said."""
    if box := last_box(answer):
        return _in_box(box, allowed, texts)
    text = plain(answer).strip()
    line = text.rpartition("\n")[2].strip()
    stated = _last_statement(text, allowed)
    if len(line) > LONGEST_LINE:
        return stated
    on_last_line = _as_last_line(line, allowed, texts)
    if on_last_line and (stated is None or not _states(line)):
        return on_last_line
    return stated or _mentioned(line, allowed)


def _in_box(box: str, allowed: frozenset[str], texts: Mapping[str, str]) -> Choice:
    """What a box holds; one that is no option is a choice of nothing."""
    letters = letters_of(box) or _of_lettered(plain(box).strip(), allowed, texts) or _of_text(box, texts)
    return Choice((letters or frozenset()) & allowed if letters and letters <= allowed else frozenset(), "boxed", box)


def _last_statement(text: str, allowed: frozenset[str]) -> Choice | None:
    last: tuple[int, Choice] | None = None
    for pattern in STATEMENTS:
        for match in pattern.finditer(text):
            letters = _letters_in(match[1])
            if letters <= allowed and (last is None or match.start(1) >= last[0]):
                last = match.start(1), Choice(letters, "stated", match[0])
    return last[1] if last else None


def _states(line: str) -> bool:
    return any(pattern.search(line) for pattern in STATEMENTS)


def _as_last_line(line: str, allowed: frozenset[str], texts: Mapping[str, str]) -> Choice | None:
    """A last line that is a letter, an option, or the text of one."""
    letters = letters_of(line) or _of_lettered(line, allowed, texts)
    letters = letters or next((found for text in _ends(line) if (found := _of_text(text, texts))), None)
    return Choice(letters, "last line", line) if letters and letters <= allowed else None


def _of_lettered(line: str, allowed: frozenset[str], texts: Mapping[str, str]) -> frozenset[str] | None:
    """The letter of `B) 21 km`; where the options are known, what follows must not be the text of another."""
    match = _LINE_OF_ONE_OPTION.fullmatch(line)
    if match is None or match[1].upper() not in allowed:
        return None
    by_text = _of_text(match[2], texts)
    return None if by_text and match[1].upper() not in by_text else frozenset(match[1].upper())


def _ends(line: str) -> Iterator[str]:
    """A line, and what follows each `answer is` in it."""
    yield line
    for lead in _LEAD.finditer(line):
        yield line[lead.end() :]


def _of_text(text: str, texts: Mapping[str, str]) -> frozenset[str] | None:
    """The letter of the only option that says this."""
    given = _folded(text)
    same = [letter for letter, option in texts.items() if given and _folded(option) == given]
    return frozenset(same) if len(same) == 1 else None


def _folded(text: str) -> str:
    return "".join(plain(text).casefold().split()).strip(".,;:!\"'")


def _mentioned(line: str, allowed: frozenset[str]) -> Choice | None:
    """`Option B` in the last line, if it is the only one there."""
    found = {letters for match in _MENTION.finditer(line) if (letters := _letters_in(match[1])) <= allowed}
    return Choice(found.pop(), "last line", line) if len(found) == 1 else None


def _letters_in(text: str) -> frozenset[str]:
    """The letters of what `_LIST` matched."""
    if _RUN.fullmatch(text):
        return frozenset(text)
    return frozenset(match[1].upper() for match in re.finditer(r"(?<![^\W_])([A-Ja-j])(?![^\W_])", text))
