"""Existing traces as a teacher: rows of files or of the hub, in whatever dialect they were saved.

A row belongs to the prompt whose question has the same text (Unicode NFC, white space folded). A prompt's samples are
ordered by a hash of their content, so neither the order of rows nor rows that stand twice change anything. What is no
answer at all (a saved API error, an empty text) comes back as a failed completion, after the prompt's real answers.
"""

import re
import unicodedata
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from operator import attrgetter
from typing import NamedTuple

from distill.config import FormatConfig, RecordedTraces, TeacherConfig
from distill.engines import Completion, Request
from distill.errors import DataError, RecipeError
from distill.format import parse_completion, parse_fields
from distill.records import Prompt, digest_json
from distill.rows import Row, check_file, hub_root, read_hub, read_rows, require_columns
from distill.runs import DigestCache, RunOptions

VERSION = "1"
NO_TRACE = "no recorded trace"


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """What identifies the recorded traces: the sha256 of each file in order, or the data set's commit.

    Raises DataError for a missing file.
    """
    recorded = _section(teacher)
    found = {"recorded": VERSION}
    for index, path in enumerate(recorded.files):
        check_file(path)
        found[f"recorded.{index}"] = cache.of(path)
    if recorded.hub is not None:
        found["recorded.hub"] = hub_root(recorded.hub, cache)
    return found


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse files without the columns that the recipe names, by the first row of each; writes nothing.

    Raises DataError naming file, column and the columns that are there.
    """
    recorded = _section(teacher)
    sources = [recorded.model_copy(update={"files": [path]}) for path in recorded.files] or [recorded]
    for source in sources:
        first = next(_rows(source), None)
        if first is None:
            raise DataError(f"{source.files[0] if source.files else 'teacher.recorded.hub'}: no traces in it")
        _text_of(first, recorded.question_column)
        _samples(first, recorded, format)


class Sample(NamedTuple):
    """One saved answer as it lies in its row: one text, or reasoning and answer apart."""

    reasoning: str | None
    response: str | None
    separate: bool
    """Whether the reasoning has a column of its own."""
    problem: str | None
    """Why this is no answer, if it is none."""

    @property
    def rank(self) -> tuple[bool, str]:
        """Real answers first, then by content."""
        return (self.problem is not None, digest_json([self.reasoning, self.response]))


class RecordedEngine:
    """Answers with what was recorded: sample i of a prompt is the i-th distinct answer that was saved for it."""

    name = "recorded"
    version = VERSION
    batch_size: int | None = None

    def __init__(self, samples: dict[str, list[Sample]], format: FormatConfig, opened: bool, model: str = "") -> None:
        self.samples = samples
        self.format = format
        self.opened = opened
        self.model = model

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "RecordedEngine":
        """Read every row and index it by its question.

        Raises DataError naming file and line for rows that cannot be read.
        """
        recorded = _section(teacher)
        found: dict[str, set[Sample]] = {}
        for row in _rows(recorded):
            question = normalised(_text_of(row, recorded.question_column))
            found.setdefault(question, set()).update(_samples(row, recorded, format))
        samples = {question: sorted(of_question, key=attrgetter("rank")) for question, of_question in found.items()}
        return cls(samples, format, _opened_by_prompt(samples, format), teacher.model)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """The recorded answer of each request, or a failed completion where there is none."""
        async for request in requests:
            yield self.answer(request)

    def answer(self, request: Request) -> Completion:
        """One request's recorded answer."""
        samples = self.samples.get(normalised(question_of(request.prompt)), [])
        if request.sample >= len(samples):
            return Completion(request.key, error=NO_TRACE)
        sample = samples[request.sample]
        raw = self._raw(sample)
        if sample.problem is not None:
            return Completion(request.key, raw=raw, finish_reason="error", error=sample.problem)
        opening, closing = self.format.open_marker, self.format.close_marker
        if sample.separate:
            parsed = parse_fields(sample.reasoning, sample.response, open_marker=opening, close_marker=closing)
        else:
            parsed = parse_completion(sample.response or "", opening, closing, opened=self.opened)
        return Completion(request.key, parsed.reasoning, parsed.answer, raw, parsed.think, model=self.model or None)

    async def close(self) -> None:
        """Forget the rows."""
        self.samples = {}

    def _raw(self, sample: Sample) -> str:
        """The text as it came; reasoning from a column of its own is rejoined in markers."""
        if not sample.separate or not sample.reasoning:
            return sample.response or ""
        opening, closing = self.format.open_marker, self.format.close_marker
        return f"{opening}\n{sample.reasoning}\n{closing}\n\n{sample.response or ''}"


def normalised(question: str) -> str:
    """A question as it is compared: NFC, white space folded."""
    return " ".join(unicodedata.normalize("NFC", question).split())


def question_of(prompt: Prompt) -> str:
    """The bare problem of a prompt, without the recipe's template around it."""
    return str(prompt.row.get("question") or prompt.text)


def _section(teacher: TeacherConfig) -> RecordedTraces:
    if teacher.recorded is None:
        raise RecipeError("teacher.recorded is missing; say where the recorded traces lie")
    return teacher.recorded


# --- rows to samples ------------------------------------------------------------------------------------------------


def _rows(recorded: RecordedTraces) -> Iterator[Row]:
    if recorded.hub is not None:
        yield from read_hub(recorded.hub)
    for path in recorded.files:
        yield from read_rows(path, recorded.records_path if path.suffix.lower() == ".json" else None)


def _samples(row: Row, recorded: RecordedTraces, format: FormatConfig) -> list[Sample]:
    """The answers of one row: one, or as many as its columns are long."""
    columns = [name for name in (recorded.reasoning_column, recorded.response_column) if name is not None]
    if not columns:
        raise RecipeError("teacher.recorded: give response_column, reasoning_column or both")
    require_columns(row, columns)
    reasonings = _values(row, recorded.reasoning_column)
    responses = _values(row, recorded.response_column)
    if reasonings is None or responses is None:
        values = reasonings if responses is None else responses
        return [_sample(None, value, recorded, format) for value in values or []]
    if len(reasonings) != len(responses):
        raise DataError(
            f"{row.where}: {len(reasonings)} values in column {recorded.reasoning_column!r}, but {len(responses)} in"
            f" {recorded.response_column!r}; each answer needs its reasoning"
        )
    return [_sample(*pair, recorded, format) for pair in zip(reasonings, responses)]


def _values(row: Row, column: str | None) -> list[str | None] | None:
    """A column's texts: one, or a list of them; None where no column is asked for."""
    if column is None:
        return None
    value = row.values[column]
    values = value if isinstance(value, list) else [value]
    for one in values:
        if one is not None and not isinstance(one, str):
            raise DataError(f"{row.where}: column {column!r} holds {type(one).__name__}; it must be text or texts")
    return values


def _text_of(row: Row, column: str) -> str:
    require_columns(row, [column])
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: column {column!r} holds no text; it must be the question")
    return value


def _sample(reasoning: str | None, response: str | None, recorded: RecordedTraces, format: FormatConfig) -> Sample:
    separate = recorded.reasoning_column is not None
    if separate and recorded.response_column is None:
        # the one column is the reasoning's: there is no answer beside it
        reasoning, response = response, None
    if recorded.strip_prompt and response:
        before, marker, after = response.partition(format.open_marker)
        response = marker + after if marker else before
    return Sample(reasoning, response, separate, no_answer(f"{reasoning or ''}{response or ''}", format.close_marker))


# --- what is no answer ----------------------------------------------------------------------------------------------

LONGEST_ERROR = 1500
"""Characters of the longest text that is taken for a saved error."""
_ERROR_OPENING = re.compile(
    r"""\W{0,3}(?:
        (?:[a-z]+\s)?error\b | exception\b | traceback\s\(most\srecent | failed\b | failure\b | request\b
        | rate\s?limit | internal\sserver | service\sunavailable | bad\sgateway | gateway\stime | too\smany\srequests
        | connection\s | time(?:d\s|-)?out\b | [\w.]+(?:error|exception)\b | http[/\s]?\d | <!doctype\shtml | <html
        | [45]\d\d\s(?:internal|bad|too|service|gateway|unauthorized|forbidden|error)\b
        | \{\s?["'](?:error|detail|message|code|status)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_ERROR_SIGN = re.compile(
    r"""\b(?:error\scode | status(?:\scode)?\W{1,3}[45]\d\d | http\W{0,2}(?:\d\.\d\s)?[45]\d\d
        | [45]\d\d\s(?:error|server)
        | internal\sserver\serror | service\sunavailable | bad\sgateway | gateway\stime-?\s?out | too\smany\srequests
        | rate\s?limit | quota | timed\sout | time-?out\serror | connection\s(?:error|reset|refused|aborted)
        | api\s?(?:error|key|connection|timeout) | invalid_request | insufficient | overloaded | max\s?retries
        | error\safter\s\d+
    )\b | ["']error["']\s?: | (?:openai|httpx|requests|aiohttp|urllib3|anthropic)\.""",
    re.IGNORECASE | re.VERBOSE,
)


def no_answer(text: str, close_marker: str) -> str | None:
    """Why a saved text is no answer: it is empty, or an API error that was written where the answer belongs; else None.

    Only short texts without a closing marker that open like an error *and* carry a sign of one are taken for errors.
    """
    text = text.strip()
    if not text:
        return "empty answer"
    if len(text) > LONGEST_ERROR or close_marker in text:
        return None
    if _ERROR_OPENING.match(text) and _ERROR_SIGN.search(text):
        return f"saved API error: {' '.join(text.split())[:200]}"
    return None


def _opened_by_prompt(samples: dict[str, list[Sample]], format: FormatConfig) -> bool:
    """Whether these traces come from a template that opens the reasoning itself: closing markers without opening ones.

    Then a text without a closing marker is reasoning that was cut off, not an answer.
    """
    closed = [s.response for of_question in samples.values() for s in of_question if s.response and not s.separate]
    closed = [text for text in closed if format.close_marker in text]
    unopened = sum(format.open_marker not in text for text in closed)
    return unopened * 2 > len(closed)
