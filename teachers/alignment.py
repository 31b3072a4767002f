"""Scoring by a teacher with another tokenizer: what it says where both tokenizers begin a token at the same character.

Student and teacher read the same conversation, each in its own template and tokens. At a character of the answer where
a token of either begins, both are asked the same question: how does the text go on? There the teacher's distribution is
carried over to the tokens that both vocabularies spell alike; all its other mass goes into the tail, and the loss is
the divergence of that partition. Elsewhere, inside a token of one of them, nothing is compared. (Boizard et al. 2024,
ULD, compare sorted probabilities at every position instead; GOLD, Patiño et al. 2025, merges tokens of one text span.)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.config import FormatConfig, Logprobs, Recipe, TeacherModel
from distill.documents import Array, Documents
from distill.errors import DataError, ModelError
from distill.format import encode_document, render_completion, render_prompt, set_template
from distill.logprobs import SPANS, Facts, Rows, document_key, empty_rows, joined_rows
from distill.models import find_model, load_config, load_tokenizer
from distill.progress import say
from distill.records import Example, read_records
from distill.runs import RunOptions
from distill.vocabularies import names_in

from .distributions import kept
from .score import Scorer, batches, load_teacher, log_probabilities, read_packed


class Reading(NamedTuple):
    """A document in the teacher's tokens, and which rows of the student's it can speak about."""

    ids: Array
    places: Array
    """Positions of the teacher's tokens that begin where one of the student's does."""
    rows: Array
    """The student's row for each of these."""


class Entry(NamedTuple):
    """Where a reading lies in a file of them."""

    start: int
    """Bytes before it."""
    tokens: int
    aligned: int


class Readings:
    """Readings by the keys of their documents, in a file: memory holds where each lies, and what is being read."""

    def __init__(self, path: Path, readings: Iterable[tuple[bytes, Reading]]) -> None:
        """Write them all; of documents with equal keys the first counts."""
        self._path = path
        self._entries: dict[bytes, Entry] = {}
        with path.open("wb") as out:
            for key, reading in readings:
                if key not in self._entries:
                    self._entries[key] = Entry(out.tell(), len(reading.ids), len(reading.rows))
                    out.write(np.concatenate(reading).astype("<i4").tobytes())

    def entry(self, key: bytes) -> Entry:
        """How long a reading is, without reading it."""
        return self._entries[key]

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max((entry.tokens for entry in self._entries.values()), default=0)

    def __getitem__(self, key: bytes) -> Reading:
        start, tokens, aligned = self._entries[key]
        numbers = np.fromfile(self._path, "<i4", tokens + 2 * aligned, offset=start)
        return Reading(numbers[:tokens], *(part.astype(np.int64) for part in np.split(numbers[tokens:], 2)))


def spans_scorer(
    recipe: Recipe,
    teacher: TeacherModel,
    tokenizer: Any,
    digest: str,
    documents: Documents,
    examples: Path,
    spool: Path,
    options: RunOptions,
) -> tuple[Facts, Scorer, dict[str, Any]]:
    """Scores documents whose tokens are another tokenizer's; also says what share of the rows it covers.

    What the teacher reads is kept in the file `spool`.

    Raises DataError where that is below `logprobs.min_coverage`.
    """
    logprobs = recipe.logprobs
    assert logprobs is not None  # the plan has no score step without it
    theirs = load_tokenizer(find_model(teacher.model, teacher.revision))
    set_template(theirs, recipe.format)
    readings = Readings(spool, read(examples, tokenizer, theirs, recipe.format))
    source = find_model(teacher.model, teacher.revision)
    context = int(load_config(source).max_position_embeddings)
    if (longest := readings.longest) > context:
        raise ModelError(
            f"logprobs.teachers.{teacher.name}: a document has {longest:,} of its tokens, its context {context:,}; set"
            " format.max_tokens lower"
        )
    rows = [len(documents.supervised(index)) for index in range(len(documents))]
    aligned = sum(readings.entry(document_key(documents.ids(index))).aligned for index in range(len(documents)))
    coverage = aligned / max(1, sum(rows))
    if coverage < logprobs.min_coverage:
        raise DataError(
            f"logprobs.teachers.{teacher.name}: {coverage:.0%} of the supervised tokens begin where one of the"
            f" teacher's does (min_coverage is {logprobs.min_coverage:.0%}); take a teacher whose tokenizer is closer,"
            " or lower it"
        )
    model = load_teacher(teacher, options)
    tokens = max(theirs.get_vocab().values()) + 1  # a head may have more rows, which are padding
    names = torch.from_numpy(names_in(tokenizer, theirs, min(tokens, model.get_output_embeddings().weight.shape[0])))
    shared = int((names >= 0).sum())
    say(f"score {teacher.name}: {coverage:.1%} of the rows aligned, {shared:,} tokens spelled alike")
    facts = Facts.of(logprobs, max(tokenizer.get_vocab().values()) + 1, digest)._replace(
        alignment=SPANS, k=min(logprobs.k, shared)
    )
    scorer = SpansScorer(model, documents, readings, names.to(model.device), facts, logprobs)
    return facts, scorer, {"coverage": round(coverage, 4), "tokens_alike": shared}


@dataclass(frozen=True)
class SpansScorer:
    """A teacher in memory that reads documents in its own tokens, packed up to `micro_batch_tokens` a pass."""

    model: Any
    documents: Documents
    readings: Readings
    names_V: torch.Tensor
    facts: Facts
    logprobs: Logprobs

    def __call__(self, chosen: Sequence[int]) -> Iterator[tuple[int, Rows]]:
        """See `Scorer`."""
        keys = {index: document_key(self.documents.ids(index)) for index in chosen}
        lengths = {index: self.readings.entry(key).tokens for index, key in keys.items()}
        for batch in batches(lengths, chosen, self.logprobs.micro_batch_tokens):
            with torch.no_grad():
                scored = list(self._scored(batch, [self.readings[keys[index]] for index in batch]))
            yield from scored

    def _scored(self, batch: Sequence[int], readings: Sequence[Reading]) -> Iterator[tuple[int, Rows]]:
        head_VH = self.model.get_output_embeddings().weight[: len(self.names_V)]
        hidden_TH, bounds = read_packed(self.model, [reading.ids for reading in readings])
        for index, reading, start in zip(batch, readings, bounds):
            places = torch.from_numpy(start + reading.places - 1).to(hidden_TH.device)
            parts = [empty_rows(0, self.facts.k)]
            for _, log_p in log_probabilities(hidden_TH[places], head_VH, self.facts.temperature):
                parts.append(kept(log_p, None, self.facts, self.names_V))
            yield index, spread(joined_rows(parts), reading.rows, len(self.documents.supervised(index)))


def spread(rows: Rows, places: Array, count: int) -> Rows:
    """The rows at their places among `count`; the others are not seen, and say that all mass is in the tail."""
    whole = empty_rows(count, rows.head_ids.shape[1])
    whole.head_log_p[:] = -30.0
    whole.seen[:] = False
    whole.head_ids[places] = rows.head_ids
    whole.head_log_p[places] = rows.head_log_p
    whole.tail_log_p[places] = rows.tail_log_p
    whole.seen[places] = True
    return whole


def read(examples: Path, own: Any, theirs: Any, config: FormatConfig) -> Iterator[tuple[bytes, Reading]]:
    """Every example in both tokenizers' tokens, by the key of the student's document."""
    for example in read_records(examples, Example):
        given = (example.prompt.messages, example.reasoning, example.answer, config)
        mine, other = (encode_document(tokenizer, *given) for tokenizer in (own, theirs))
        starts = [from_end(tokenizer, example, config) for tokenizer in (own, theirs)]
        pairs = aligned(*starts)
        rows, numbers = (np.array(values, np.int64) for values in (zip(*pairs) if pairs else ((), ())))
        first = len(other.ids) - len(starts[1])
        yield document_key(mine.ids), Reading(np.array(other.ids, np.int32), first + numbers, rows)


def aligned(own: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers of tokens that begin at the same character, of the student and of the teacher.

    Where one character takes several tokens, all of them begin there; only the first has just the text before it.
    """
    first: dict[int, int] = {}
    for number, place in enumerate(theirs):
        first.setdefault(place, number)
    pairs, before = [], None
    for row, place in enumerate(own):
        if place in first and place != before:
            pairs.append((row, first[place]))
        before = place
    return pairs


def from_end(tokenizer: Any, example: Example, config: FormatConfig) -> list[int]:
    """How many characters before the end of the answer each supervised token begins; the end token at 0.

    Counted from the end, since a template may hold the opening marker and so shorten the beginning.
    """
    prompt = render_prompt(tokenizer, example.prompt.messages, config)
    text = render_completion(example.reasoning, example.answer, prompt, config)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [*(len(text) - start for start, _ in offsets), 0]
