"""What speaks against training on a text, found in the text alone: pure functions, no verdict and no other trace.

Each gives a short detail for people where it finds something, else None. They are cautious: mathematics is full of
repetition and of long numbers, so what they name is meant to be right nearly always, and what they miss is more. A
secret or a person's data is never repeated in a detail, only its kind, its first characters and its length.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from distill.config import Action, LanguageMix, Loops, Refusals, Select
from distill.records import Example

PHRASE_WORDS = 20
"""Words of a phrase whose return, word for word, is no accident."""
WINDOW_WORDS = 300
"""Stretch of text that is looked at for repeated phrases; a shorter text has fewer of them to show."""
WINDOW_CHARS = 3000
"""Stretch of text that is compressed; for repetition that has no words."""
LETTERED_WORDS = 5
"""Words with letters that a phrase must have."""


def findings(example: Example, config: Select) -> Iterator[tuple[str, str]]:
    """(flag, detail) for everything found in what would train, where the recipe looks for it."""
    asked = "\n".join(message.content for message in example.prompt.messages)
    answered = f"{example.reasoning or ''}\n{example.answer}"
    whole = f"{asked}\n{answered}"
    looks: dict[str, tuple[Action, Callable[[], str | None]]] = {
        "refusal": (config.refusals.action, lambda: refusal(example.answer, config.refusals)),
        "loop": (config.loops.action, lambda: loop(answered, config.loops)),
        "language-mix": (config.language_mix.action, lambda: language_mix(asked, answered, config.language_mix)),
        "secret": (config.secrets, lambda: secret(whole)),
        "personal-data": (config.personal_data, lambda: personal_data(whole)),
    }
    for flag, (action, look) in looks.items():
        if action != "ignore" and (detail := look()) is not None:
            yield flag, detail


# --- loops ----------------------------------------------------------------------------------------------------------


def loop(text: str, config: Loops) -> str | None:
    """Whether a text goes in circles: one stretch of it is made of phrases that stand in it again and again.

    Working through cases repeats words, but not 20 of them in the same order with the same numbers; columns of digits
    may well be equal, so what has no letters is not looked at. Text without spaces is caught by how far a stretch of it
    can be compressed.
    """
    share = repeated_share(text.split(), config.repeats)
    if share > config.max_share:
        return f"{share:.0%} of {WINDOW_WORDS} words are phrases that stand {config.repeats} times or more"
    ratio = smallest_compression(text)
    if ratio < config.min_compression:
        return f"{WINDOW_CHARS} characters shrink to {ratio:.1%}"
    return None


def repeated_share(words: Sequence[str], repeats: int) -> float:
    """Largest share of any `WINDOW_WORDS` words that lie in a phrase standing at least `repeats` times in the text."""
    if len(words) < PHRASE_WORDS:
        return 0.0
    phrases = [tuple(words[start : start + PHRASE_WORDS]) for start in range(len(words) - PHRASE_WORDS + 1)]
    again = {phrase for phrase, count in Counter(phrases).items() if count >= repeats and _has_words(phrase)}
    covered, covered_to = [False] * len(words), 0
    for start, phrase in enumerate(phrases):
        if phrase in again:
            fresh, covered_to = max(start, covered_to), start + PHRASE_WORDS
            covered[fresh:covered_to] = [True] * (covered_to - fresh)
    sums = [0, *accumulate(covered)]
    return max(sum_to - sums[max(0, end - WINDOW_WORDS)] for end, sum_to in enumerate(sums)) / WINDOW_WORDS


def _has_words(phrase: Sequence[str]) -> bool:
    """Whether a phrase says something beside numbers and signs."""
    return sum(any(map(str.isalpha, word)) for word in phrase) >= LETTERED_WORDS


def smallest_compression(text: str) -> float:
    """Compressed size over size, of the stretch of `WINDOW_CHARS` that compresses best; 1 for a shorter text."""
    starts = range(0, len(text) - WINDOW_CHARS + 1, WINDOW_CHARS // 2)
    return min((_compression(text[start : start + WINDOW_CHARS]) for start in starts), default=1.0)


def _compression(text: str) -> float:
    data = text.encode(errors="replace")
    lettered = sum(map(str.isalpha, text[::7])) > len(text) / 50  # a seventh of the characters, a seventh of the work
    return len(zlib.compress(data)) / len(data) if lettered else 1.0


# --- languages ------------------------------------------------------------------------------------------------------

_BEYOND_GREEK = re.compile(
    "[\u0400-\u1dbf\u2c00-\ua6ff\ua840-\uabff\uac00-\ud7ff\uf900-\ufaff\ufb13-\ufdff\ufe70-\uffdc"
    "\U00010800-\U00016fff\U0001b000-\U0001b2ff\U00020000-\U0003ffff]"
)
"""Characters of scripts other than Latin and Greek; letters made for mathematics are not among them."""
_QUOTED = re.compile(
    "\"[^\"\n]{1,120}\"|(?<!\\w)'[^'\n]{1,120}'(?!\\w)|`[^`\n]{1,120}`|“[^”\n]{1,120}”|‘[^’\n]{1,120}’"
    "|«[^»\n]{1,120}»|「[^」\n]{1,120}」|『[^』\n]{1,120}』|《[^》\n]{1,120}》|\\([^()\n]{1,40}\\)"
)
"""Text that is cited or glossed rather than written in."""
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "KATAKANA-HIRAGANA")


def language_mix(asked: str, text: str, config: LanguageMix) -> str | None:
    """Whether a text slips into a script that its prompt does not have."""
    if text.isascii() or not _BEYOND_GREEK.search(text):
        return None
    at_home = scripts(asked).keys()
    found = scripts(_QUOTED.sub(" ", text))
    foreign = {script: count for script, count in found.most_common() if script not in at_home}
    if sum(foreign.values()) <= config.max_letters:
        return None
    return ", ".join(f"{count} letters of {script}" for script, count in foreign.items())


def scripts(text: str) -> Counter[str]:
    """Letters of a text by script, Latin and Greek left out."""
    letters = (char for char in _BEYOND_GREEK.findall(text) if char.isalpha())
    return Counter(_script(char) for char in letters)


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "unknown").partition(" ")[0]
    return "Chinese or Japanese" if first in _EAST_ASIAN else first.capitalize()


# --- refusals -------------------------------------------------------------------------------------------------------

_CANNOT = (
    r"i(?:'m not able to|'m unable to| can't| cannot| can not| am not able to| am unable to| won't| will not"
    r"| must decline to)"
)
_SORRY = r"(?:i'm |i am )?(?:very |so |really )?(?:sorry|my apologies|i apologi[sz]e|unfortunately)"
_REFUSAL = re.compile(
    rf"{_SORRY}\b.{{0,80}}?\b{_CANNOT}"
    r" (?:help|assist|answer|comply|fulfil|provide|discuss|engage|respond|do that|create|generate|share|write|support)"
    rf"|{_CANNOT} (?:help|assist|comply|fulfil|discuss|engage|participate|support)\b.{{0,20}}"
    r"\b(?:with|in|that|this|your|such|the)\b"
    rf"|as an ai\b.{{0,80}}\b{_CANNOT}"
    r"|(?:非常|很)?(?:抱歉|对不起).{0,20}(?:无法|不能)"
)


def refusal(answer: str, config: Refusals) -> str | None:
    """Whether a short answer opens by declining; that a problem has no solution is no refusal."""
    plain = " ".join(answer.replace("’", "'").split()).lower()
    if len(plain) > config.max_chars or not _REFUSAL.match(plain):
        return None
    return f"{plain[:60]}…" if len(plain) > 60 else plain


# --- secrets and personal data ---------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How something that must not be shown looks, and what of it may be."""

    pattern: re.Pattern[str]
    shown: int
    """First characters that all of its kind have, or that tell nothing."""
    holds: Callable[[re.Match[str]], bool]
    """Whether a match is one."""
    signs: Sequence[str] = ("",)
    """Texts of which a match has one: most texts have none and need no further look."""


def secret(text: str) -> str | None:
    """A credential in a text: its kind and a masked form."""
    return _first(text, SECRETS)


def personal_data(text: str) -> str | None:
    """A person's address or number in a text: its kind and a masked form."""
    return _first(text, PERSONAL_DATA)


def _first(text: str, kinds: Mapping[str, Kind]) -> str | None:
    for name, kind in kinds.items():
        signs = any(sign in text for sign in kind.signs)
        if signs and (found := next(filter(kind.holds, kind.pattern.finditer(text)), None)):
            return f"{name} {found[0][: kind.shown]}… ({len(found[0])} characters)"
    return None


_PLACEHOLDER = re.compile(r"example|sample|x{4}|your|placeholder|redacted|dummy|12345|abcdef|test[-_]", re.IGNORECASE)


def _random(match: re.Match[str]) -> bool:
    """Letters and digits mixed as a generator does, and no word that stands for a key."""
    token = match[0]
    return bool(re.search(r"\d", token) and re.search(r"[A-Za-z]{2}", token[4:]) and not _PLACEHOLDER.search(token))


def _real_mailbox(match: re.Match[str]) -> bool:
    """Not one of the domains that are set aside for examples."""
    return not re.search(r"(?:^|[.@])(?:example|test|invalid|localhost|domain|email)\.", match["domain"], re.IGNORECASE)


def _dialled(match: re.Match[str]) -> bool:
    """A number with the digits of a telephone's, and no term of a sum or number grouped in thousands."""
    groups = re.findall(r"\d+", match[0])
    before, after = match.string[: match.start()].rstrip(" ")[-1:], match.string[match.end() :].lstrip(" ")[:1]
    if (before and before in "0123456789)]}=*/^+-$\\×·") or (after and after in "=+*/^×·%"):
        return False
    fictional = groups[-1].startswith("01") and groups[-2] == "555"
    return 9 <= sum(map(len, groups)) <= 15 and set(map(len, groups[1:])) != {3} and not fictional


def _named_phone(match: re.Match[str]) -> bool:
    """A national number that the text calls one, or that has its area code in parentheses."""
    fictional = "555-01" in match[0] or "555 01" in match[0]
    named = re.search(r"(?i)\b(?:call|phone|tel|telephone|mobile|cell|fax|dial|whatsapp)\b\W", _before(match))
    return not fictional and (match[0].startswith("(") or bool(named))


def _before(match: re.Match[str], characters: int = 40) -> str:
    return match.string[max(0, match.start() - characters) : match.start()]


def _iban(match: re.Match[str]) -> bool:
    """Length by country and remainder 1 by 97 (ISO 13616)."""
    code = match[0].replace(" ", "")
    if len(code) != IBAN_LENGTHS.get(code[:2]):
        return False
    return int("".join(str(int(char, 36)) for char in code[4:] + code[:4])) % 97 == 1


def _card(match: re.Match[str]) -> bool:
    """Grouped as on a card or called one, with an issuer's first digits and Luhn's check digit."""
    digits = re.sub(r"\D", "", match[0])
    grouped = re.fullmatch(r"\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5}", match[0])
    called = re.search(r"(?i)\bcard\b", _before(match))
    issued = re.match(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|5)", digits)
    return bool((grouped or called) and issued) and _luhn(digits) and len(set(digits)) > 3


def _luhn(digits: str) -> bool:
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(number - 9 * (number > 9) for number in doubled) % 10 == 0


SECRETS: Mapping[str, Kind] = {
    "Anthropic key": Kind(re.compile(r"\bsk-ant-[\w-]{20,}"), 7, _random, ["sk-ant-"]),
    "OpenAI key": Kind(re.compile(r"\bsk-(?!ant-)[\w-]{20,}"), 3, _random, ["sk-"]),
    "AWS access key": Kind(re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), 4, _random, ["AKIA", "ASIA"]),
    "GitHub token": Kind(re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"), 4, _random, ["gh"]),
    "GitLab token": Kind(re.compile(r"\bglpat-[\w-]{20,}"), 6, _random, ["glpat-"]),
    "Hugging Face token": Kind(re.compile(r"\bhf_[A-Za-z0-9]{30,}"), 3, _random, ["hf_"]),
    "Slack token": Kind(re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"), 5, _random, ["xox"]),
    "Google API key": Kind(re.compile(r"\bAIza[\w-]{35}"), 4, _random, ["AIza"]),
    "Stripe key": Kind(re.compile(r"\b[rs]k_live_[A-Za-z0-9]{20,}"), 8, _random, ["k_live_"]),
    "JSON web token": Kind(re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), 3, bool, ["eyJ"]),
    "private key": Kind(
        re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----\s+[\w+/=: -]{16}"), 0, bool, ["PRIVATE KEY"]
    ),
}
"""Credentials that can be told by their form."""

PERSONAL_DATA: Mapping[str, Kind] = {
    "e-mail address": Kind(
        re.compile(
            r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{1,63}@(?P<domain>(?:[A-Za-z0-9-]{1,63}\.)+"
            r"(?:[a-z]{2}|com|org|net|edu|gov|mil|info|biz|name|app|dev|cloud|online|xyz))\b"
        ),
        1,
        _real_mailbox,
        ["@"],
    ),
    "telephone number": Kind(
        re.compile(r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]\d{1,5}){2,6}(?!\w)"), 1, _dialled, ["+"]
    ),
    "telephone number (North America)": Kind(
        re.compile(r"(?<![\w.)-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"), 0, _named_phone
    ),
    "bank account (IBAN)": Kind(re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), 2, _iban),
    "card number": Kind(re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])"), 1, _card),
}
"""Data of persons that can be told by its form."""

IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24,
    "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "XK": 20,
}  # fmt: skip
"""Characters of an account number by country."""
