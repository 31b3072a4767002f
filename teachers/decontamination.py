r"""Decontamination: does a training prompt hold a problem of an evaluation set?

A prompt is met in two ways. *Exact*: the whole problem stands in it, from the beginning of a sentence or line to the
end of one; this is the rule that short problems have. *n-gram*: n tokens in a row are those of the problem. Short
n-grams count words and numbers; from `symbols_from` on symbols count too, because two formulas share eight symbols in a
row all the time and thirteen seldom (bench/decontamination.py prints the curve that the defaults come from).

Problems of one set are often worded alike. Four tokens in a row that more than fifteen problems of a set share, and
more than one in twenty, are a stock phrase; an n-gram counts only if over half of its tokens lie outside stock phrases.

Case, white space, Unicode forms and the layout of LaTeX (`$`, `\left`, `\,`, `\dfrac` for `\frac`) make no difference.
Paraphrases and translations are not found: what is compared is the wording. A reference answer plays no part: it is a
number or a letter, which says nothing of where a problem comes from.
"""

import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from distill.errors import RecipeError
from distill.records import Prompt

NGRAMS = (8, 13)
"""Lengths of the n-grams looked for."""
SYMBOLS_FROM = 12
"""The shortest n-gram that counts symbols: of shorter ones, too many mismatched problems have one in common."""

CONTAINED_TOKENS = 3
"""A problem of fewer tokens ("Why?") has to be the whole text; one sentence of it says nothing."""
EXACT = "exact"


class Stock(NamedTuple):
    """What makes a stock phrase of the problems of one set."""

    tokens: int = 4
    """Its length."""
    problems: int = 15
    """It is in more than so many different problems of the set."""
    share: float = 0.05
    """And in more than this share of them."""

    def phrases(self, problems: Collection[str]) -> frozenset[str]:
        """The stock phrases of a set's problems, given and returned as letters (see `Alphabet`)."""
        counts = Counter(phrase for letters in problems for phrase in set(slices(letters, self.tokens)))
        limit = max(self.problems, self.share * len(problems))
        return frozenset(phrase for phrase, count in counts.items() if count > limit)


STOCK = Stock()


class Hit(NamedTuple):
    """A problem of an evaluation set, and where it was met."""

    set: str
    """Name of the evaluation set."""
    prompt_id: str
    """The evaluation prompt."""
    span: str
    """The matched part as it stands in the examined text."""
    rule: str
    """`exact`, or `8-gram`, `13-gram`, …; the span is then as long as n-grams of the problem follow one another."""
    start: int
    end: int
    """Character offsets of the span in the examined text."""

    def detail(self) -> str:
        """One line for a flag."""
        span = " ".join(self.span.split())
        shown = span if len(span) <= 160 else f"{span[:159]}…"
        return f'{self.set} {self.prompt_id}: {self.rule} "{shown}"'


# --- tokens ---------------------------------------------------------------------------------------------------------

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
_LETTER = rf"[^\W\d_{_IDEOGRAPHS}]"
_LAYOUT = "left|right|[Bb]igg?[lrm]?|displaystyle|textstyle|limits|quad|qquad"
_TOKEN = re.compile(
    rf"(?<!\\)\\(?:[()\[\],;:!\s]|(?=[$%&\#])|(?:{_LAYOUT})(?![A-Za-z]))"  # layout of LaTeX, and `\` of `\%`
    r"|[$~\u00ad\u200b-\u200f\u2060\ufeff]"  # and characters that show nothing
    r"|("  # what remains is a token:
    r"\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+(?!\d)|\d+"  # a number, with commas or without
    rf"|{_LETTER}(?:{_LETTER}|[\u0300-\u036f])*"  # a word
    rf"|[{_IDEOGRAPHS}]"  # in scripts without spaces, a character
    r"|[^\w\s]|_)"  # a symbol
)
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne", "ldots": "dots",
    "cdots": "dots", "’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-",
}  # fmt: skip
"""Tokens that are written in several ways."""
_STOP = re.compile(r"[.?!:;](?!\w)|[。？！：；]|\n")
"""Where a sentence or a line ends."""
_STOPS = frozenset(".?!:;。")


class Tokens(NamedTuple):
    """The tokens of a text, normalised, with the offsets of the characters that each was made from."""

    texts: list[str]
    starts: list[int]
    ends: list[int]


def tokenize(text: str) -> Tokens:
    r"""Words, numbers and symbols; white space and layout are dropped, case and Unicode compatibility forms folded.

    `\frac{1}{2}` is eight tokens: `\`, `frac`, `{`, `1`, `}`, `{`, `2`, `}`; `1,000` is one. Characters of Chinese and
    Japanese are a token each.
    """
    texts: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for match in _TOKEN.finditer(text):
        if (raw := match[1]) is None:
            continue
        for token in (raw.lower(),) if raw.isascii() else _folded(raw):
            texts.append(_SAME.get(token) or (re.sub(r"\D", "", token) if "," in token[1:] else token))
            starts.append(match.start(1))
            ends.append(match.end(1))
    return Tokens(texts, starts, ends)


def _folded(raw: str) -> list[str]:
    """A token with characters beyond ASCII, which may become several (`½`, `x²`)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", raw).casefold())
    return [token for token in _TOKEN.findall(folded) if token]


def is_word(token: str) -> bool:
    """Whether a token is a word or a number, which short n-grams are made of."""
    return token[0].isalnum() and (token.isascii() or _IDEOGRAPH.match(token) is None)


def problem_text(prompt: Prompt) -> str:
    """The problem itself: the question of the row that the prompt was made from, or else all that the user says.

    What a template puts around it, such as an instruction, is the same in every prompt and no part of the problem.
    """
    question = prompt.row.get("question")
    if isinstance(question, str) and question.strip():
        return question
    return "\n".join(message.content for message in prompt.messages if message.role == "user")


# --- the index ------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """One problem of an evaluation set."""

    set: str
    prompt_id: str
    text: str


class Span(NamedTuple):
    """Tokens of the examined text, from `first` up to and with `last`, that are those of a problem."""

    problem: int
    rule: str
    first: int
    last: int


class Alphabet:
    """Writes tokens as characters, one a token, so that n-grams are slices of strings."""

    UNKNOWN = "\0"

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def learn(self, tokens: Sequence[str]) -> str:
        """The tokens of a problem, each of which gets a character."""
        letters = self._letters
        return "".join([letters.setdefault(token, chr(len(letters) + 1)) for token in tokens])

    def write(self, tokens: Sequence[str]) -> str:
        """The tokens of an examined text; those that are in no problem are all `UNKNOWN`."""
        return "".join([self._letters.get(token, self.UNKNOWN) for token in tokens])


class Grams:
    """The n-grams of all problems, and the problems that each is in."""

    def __init__(self, n: int, symbols: bool) -> None:
        self.n = n
        self.symbols = symbols
        self._owners: dict[str, tuple[int, ...]] = {}

    def learn(self, written: Mapping[int, str], stock: Stock) -> None:
        """Add the problems of one set; n-grams that are mostly stock phrases are left out."""
        phrases = stock.phrases(set(written.values()))
        for problem, letters in written.items():
            own = [0, *accumulate(own_tokens(letters, phrases, stock.tokens))]
            for at, gram in enumerate(slices(letters, self.n)):
                if 2 * (own[at + self.n] - own[at]) > self.n:
                    owners = self._owners.get(gram, ())
                    if owners[-1:] != (problem,):
                        self._owners[gram] = (*owners, problem)

    def runs(self, letters: str) -> Iterator[Span]:
        """For each problem met, the stretches of the text in which its n-grams follow one another."""
        if self._owners.keys().isdisjoint(slices(letters, self.n)):
            return
        met: dict[int, list[int]] = defaultdict(list)
        for at, gram in enumerate(slices(letters, self.n)):
            for problem in self._owners.get(gram, ()):
                met[problem].append(at)
        for problem, places in met.items():
            breaks = [i for i, (at, after) in enumerate(zip(places, places[1:]), 1) if after != at + 1]
            for begin, end in zip([0, *breaks], [*breaks, len(places)]):
                yield Span(problem, f"{self.n}-gram", places[begin], places[end - 1] + self.n - 1)


def slices(letters: str, n: int) -> Iterator[str]:
    """All n-grams, in order."""
    return (letters[at : at + n] for at in range(len(letters) - n + 1))


def own_tokens(letters: str, stock: Collection[str], phrase_tokens: int) -> list[bool]:
    """For each token of a problem, whether it lies outside all stock phrases."""
    own = [True] * len(letters)
    for at, phrase in enumerate(slices(letters, phrase_tokens)):
        if phrase in stock:
            own[at : at + phrase_tokens] = [False] * phrase_tokens
    return own


class Index:
    """Everything that is looked up; made once from all problems, so the order in which they came is of no account."""

    def __init__(self, problems: Iterable[Problem], ngrams: Sequence[int], symbols_from: int, stock: Stock) -> None:
        self.problems = sorted(set(problems))
        self._alphabet = Alphabet()
        self._grams = [Grams(n, symbols=n >= symbols_from) for n in ngrams]
        self._whole: dict[str, list[int]] = defaultdict(list)
        by_set: dict[str, dict[int, list[str]]] = defaultdict(dict)
        for number, problem in enumerate(self.problems):
            tokens = tokenize(problem.text).texts
            by_set[problem.set][number] = tokens
            if tokens:
                self._whole[self._alphabet.learn(without_stops(tokens))].append(number)
        for grams in self._grams:
            for of_set in by_set.values():
                written = {n: self._alphabet.learn(counted(tokens, grams.symbols)) for n, tokens in of_set.items()}
                grams.learn(written, stock)
        self._lengths = frozenset(map(len, self._whole))
        self._longest = max(self._lengths, default=0)

    def spans(self, text: str, tokens: Tokens) -> Iterator[Span]:
        """All places of a text where a problem is met; one problem may be met at several."""
        yield from self._exact(text, tokens)
        for grams in self._grams:
            yield from self._runs(grams, tokens.texts)

    def _runs(self, grams: Grams, tokens: Sequence[str]) -> Iterator[Span]:
        if grams.symbols:
            yield from grams.runs(self._alphabet.write(tokens))
            return
        words = [at for at, token in enumerate(tokens) if is_word(token)]
        for span in grams.runs(self._alphabet.write([tokens[at] for at in words])):
            yield span._replace(first=words[span.first], last=words[span.last])

    def _exact(self, text: str, tokens: Tokens) -> Iterator[Span]:
        letters = self._alphabet.write(tokens.texts)
        whole = len(without_stops(tokens.texts))
        stops = [(bisect_left(tokens.starts, stop.start()), stop.end()) for stop in _STOP.finditer(text)]
        begins = sorted({0, *(bisect_left(tokens.starts, after) for _, after in stops)})
        ends = sorted({whole, len(letters), *(end for end, _ in stops)})
        for begin in begins:
            for end in ends[bisect_left(ends, begin + 1) : bisect_left(ends, begin + self._longest + 1)]:
                if end - begin in self._lengths and (end - begin >= CONTAINED_TOKENS or (begin, end) == (0, whole)):
                    for problem in self._whole.get(letters[begin:end], ()):
                        yield Span(problem, EXACT, begin, end - 1)


def counted(tokens: Sequence[str], symbols: bool) -> Sequence[str]:
    """The tokens that an n-gram counts."""
    return tokens if symbols else [token for token in tokens if is_word(token)]


def without_stops(tokens: Sequence[str]) -> Sequence[str]:
    """Without the punctuation at its end, unless there is nothing else."""
    end = len(tokens)
    while end and tokens[end - 1] in _STOPS:
        end -= 1
    return tokens[:end] if end else tokens


# --- decontamination ------------------------------------------------------------------------------------------------


class Decontaminator:
    """Finds the problems of evaluation sets in training prompts.

    Usage: `add` every problem, then ask for the `hit` of each training prompt's `problem_text`.

    `ngrams`: lengths of the n-grams, each at least 4 tokens; without any, only whole problems are met, which is what
    suits problems that a generator makes from the template of the training prompts. `symbols_from`: the length from
    which on n-grams count symbols as well as words and numbers. Raises RecipeError for shorter n-grams.
    """

    version = "1"
    """Changes when the same problems and prompts give other hits."""

    def __init__(self, ngrams: Sequence[int] = NGRAMS, symbols_from: int = SYMBOLS_FROM, stock: Stock = STOCK) -> None:
        if any(n < 4 for n in ngrams):
            raise RecipeError(f"n-grams of {min(ngrams)} tokens meet every text; give lengths from 4, such as {NGRAMS}")
        self._ngrams = sorted(set(ngrams), reverse=True)  # of equal spans the longer n-gram is named
        self._symbols_from = symbols_from
        self._stock = stock
        self._problems: set[Problem] = set()
        self._made: Index | None = None

    def add(self, set: str, prompt: Prompt) -> None:
        """A problem of an evaluation set; the order of problems changes nothing."""
        self._problems.add(Problem(set, prompt.prompt_id, problem_text(prompt)))
        self._made = None

    def hit(self, text: str) -> Hit | None:
        """The strongest hit of a training prompt's text; None if it is clean."""
        return next(iter(self.hits(text)), None)

    def hits(self, text: str) -> list[Hit]:
        """All evaluation problems met, each by its strongest hit, strongest first: whole problems, then long spans."""
        tokens = tokenize(text)
        found: dict[int, Hit] = {}
        for span in self._index.spans(text, tokens):
            start, end = tokens.starts[span.first], tokens.ends[span.last]
            problem = self._index.problems[span.problem]
            hit = Hit(problem.set, problem.prompt_id, text[start:end], span.rule, start, end)
            found[span.problem] = min(found.get(span.problem, hit), hit, key=_weakness)
        return sorted(found.values(), key=_weakness)

    @property
    def _index(self) -> Index:
        if self._made is None:
            self._made = Index(self._problems, self._ngrams, self._symbols_from, self._stock)
        return self._made


def _weakness(hit: Hit) -> tuple[bool, int, str, str, int]:
    """Orders hits, strongest first, in one way only."""
    return hit.rule != EXACT, hit.start - hit.end, hit.set, hit.prompt_id, hit.start
