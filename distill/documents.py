"""Training documents: examples rendered and tokenized once, with everything refused that would train silently wrong.

A document is tok(prompt) + tok(completion) + EOS, every token with its segment (prompt, think, answer, eos). Masks go
by position and never by token id, so a pad token that equals the end token does no harm. `Documents` is an index over
token arrays that may lie in memory or be mapped from the files that `token_store` writes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from distill.config import FormatConfig
from distill.errors import FormatError, TrainingError
from distill.format import (
    ANSWER,
    EOS,
    PROMPT,
    Document,
    Turn,
    check_round_trip,
    encode_document,
    encode_prompt,
    encode_turns,
    render_completion,
    render_prompt,
)
from distill.records import Example

MAX_LOST_SHARE = 0.5
"""Above this share of documents too long for the limit, training is refused instead of running on the rest."""
CHECKED = 32
"""Documents of a part whose text is decoded and rendered again; a sample of them finds a wrong tokenizer."""

Array = np.ndarray[Any, np.dtype[Any]]


class Arrays(NamedTuple):
    """Documents laid end to end: ids int32 [T], segments uint8 [T], bounds int64 [documents + 1]."""

    ids_T: Array
    segments_T: Array
    bounds: Array


@dataclass(frozen=True)
class Documents:
    """Tokenized documents by number, over one or many arrays; taking a subset copies no tokens."""

    parts: Sequence[Arrays]
    part: Array
    """Which array each document lies in, int32 [N]."""
    row: Array
    """Which document of that array it is, int64 [N]."""
    lengths: Array
    """Tokens of each document, int64 [N]."""
    digest: str
    """sha256 (hex) of what they hold, in order: what a resume compares."""
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> Array:
        """Token ids of a document, int32 [length]."""
        arrays, start, end = self._place(index)
        return arrays.ids_T[start:end]

    def segments(self, index: int) -> Array:
        """Segment of each of its tokens, uint8 [length]."""
        arrays, start, end = self._place(index)
        return arrays.segments_T[start:end]

    def supervised(self, index: int) -> Array:
        """Positions of a document's supervised tokens: all that are not of a prompt."""
        return np.flatnonzero(self.segments(index) != PROMPT)

    @property
    def highest(self) -> int:
        """The highest token id in the arrays; 0 where they are empty."""
        return max((int(arrays.ids_T.max()) for arrays in self.parts if len(arrays.ids_T)), default=0)

    def _place(self, index: int) -> tuple[Arrays, int, int]:
        arrays = self.parts[self.part[index]]
        row = self.row[index]
        return arrays, int(arrays.bounds[row]), int(arrays.bounds[row + 1])

    def subset(self, indices: Sequence[int] | Array) -> "Documents":
        """Some of the documents, in the given order."""
        chosen = np.asarray(indices, dtype=np.int64)
        digest = hashlib.sha256(self.digest.encode() + chosen.tobytes()).hexdigest()
        return Documents(
            self.parts, self.part[chosen], self.row[chosen], self.lengths[chosen], digest, {"documents": len(chosen)}
        )

    @classmethod
    def over(cls, parts: Sequence[Arrays], digest: str, counts: Mapping[str, int]) -> "Documents":
        """All documents of some arrays, in order."""
        sizes = [len(arrays.bounds) - 1 for arrays in parts]
        part = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        row = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]) if parts else np.zeros(0, np.int64)
        lengths = np.concatenate([np.diff(arrays.bounds) for arrays in parts]) if parts else np.zeros(0, np.int64)
        return cls(parts, part, row, lengths, digest, counts)

    @classmethod
    def of(cls, documents: Iterable[Document], counts: Mapping[str, int] | None = None) -> "Documents":
        """Documents held in memory."""
        arrays = lay_end_to_end(documents)
        return cls.over([arrays], arrays_digest(arrays), counts or {"documents": len(arrays.bounds) - 1})


def joined(sets: Sequence[Documents]) -> Documents:
    """Several sets as one, in order."""
    if len(sets) == 1:
        return sets[0]
    first = np.cumsum([0, *(len(one.parts) for one in sets)])
    return Documents(
        [arrays for one in sets for arrays in one.parts],
        np.concatenate([one.part + offset for one, offset in zip(sets, first)]).astype(np.int32),
        np.concatenate([one.row for one in sets]),
        np.concatenate([one.lengths for one in sets]),
        hashlib.sha256("".join(one.digest for one in sets).encode()).hexdigest(),
        {"documents": sum(map(len, sets))},
    )


def lay_end_to_end(documents: Iterable[Document]) -> Arrays:
    """Token ids and segments of documents as flat arrays."""
    ids, segments, bounds = [], [], [0]
    for document in documents:
        ids.append(np.asarray(document.ids, dtype=np.int32))
        segments.append(np.frombuffer(document.segments, dtype=np.uint8))
        bounds.append(bounds[-1] + len(document.ids))
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    kinds = np.concatenate(segments) if segments else np.zeros(0, np.uint8)
    return Arrays(flat, kinds, np.asarray(bounds, dtype=np.int64))


def arrays_digest(arrays: Arrays) -> str:
    """sha256 (hex) of the ids, the segments and where documents end."""
    digest = hashlib.sha256()
    for array in (arrays.bounds, arrays.ids_T, arrays.segments_T):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# --- making and checking them ---------------------------------------------------------------------------------------


class Encoder:
    """Turns examples and chats into documents, refusing what would teach something that inference never sees.

    `end_ids` are the end tokens that inference stops at. `counts` says what was seen: documents, too_long,
    seam_differs.
    """

    COUNTED = ("documents", "too_long", "seam_differs")

    def __init__(self, tokenizer: Any, config: FormatConfig, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.end_ids = list(end_ids)
        self.counts = dict.fromkeys(self.COUNTED, 0)
        self._checked = 0

    def examples(self, examples: Iterable[Example]) -> Iterator[Document]:
        """The documents of examples, those longer than `format.max_tokens` left out and counted.

        Raises FormatError or TrainingError for a document without supervised tokens, with an end token that inference
        does not know, with a prefix that differs from what inference sends.
        """
        for example in examples:
            messages = example.prompt.messages
            document = encode_document(self.tokenizer, messages, example.reasoning, example.answer, self.config)
            if self._checked < CHECKED:
                self._checked += 1
                turn = Turn(messages, example.reasoning, example.answer)
                check_text(document, turn, self.tokenizer, self.config)
            yield from self._fitting([document])

    def chats(self, chats: Iterable[Sequence[Turn]]) -> Iterator[Document]:
        """The documents of chats whose assistant turns are all supervised."""
        for turns in chats:
            yield from self._fitting(encode_turns(self.tokenizer, turns, self.config))

    def _fitting(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            check_document(document, self.tokenizer, self.end_ids)
            self.counts["seam_differs"] += document.seam_differs
            if len(document.ids) > self.config.max_tokens:
                self.counts["too_long"] += 1
            else:
                self.counts["documents"] += 1
                yield document


def encode_examples(
    examples: Iterable[Example], tokenizer: Any, config: FormatConfig, context: int, end_ids: Sequence[int]
) -> Documents:
    """Tokenize examples into memory: `Encoder.examples` with the checks of a whole set (see `check_counts`)."""
    check_context(config, context)
    encoder = Encoder(tokenizer, config, end_ids)
    documents = list(encoder.examples(examples))
    check_counts(encoder.counts, config, "examples")
    return Documents.of(documents, encoder.counts)


def check_context(config: FormatConfig, context: int) -> None:
    """Refuse a limit beyond the model's position limit, `context` tokens."""
    if config.max_tokens > context:
        raise TrainingError(
            f"format.max_tokens is {config.max_tokens:,}, but the model's context is {context:,} tokens;"
            f" set format.max_tokens={context} or less"
        )


def check_counts(counts: Mapping[str, int], config: FormatConfig, what: str) -> None:
    """Refuse a set with nothing in it, or of which most was too long."""
    total = counts["documents"] + counts["too_long"]
    if not total:
        raise TrainingError(f"there are no {what} to train on; look at what selection dropped: distill inspect")
    if not counts["documents"] or counts["too_long"] > MAX_LOST_SHARE * total:
        raise TrainingError(
            f"{counts['too_long']} of {total} documents are longer than format.max_tokens={config.max_tokens};"
            " raise it (within the model's context) or select shorter traces (select.max_chars)"
        )


def check_document(document: Document, tokenizer: Any, end_ids: Sequence[int]) -> None:
    """Refuse a document without prompt or supervised text, or whose end token inference would not stop at."""
    if document.segments[0] != PROMPT:
        raise FormatError("the chat template renders an empty prompt; nothing would tell the student what to answer")
    if document.prompt_tokens >= len(document.ids) - 1:
        raise TrainingError("a document has no supervised tokens: its trace is empty; select traces with an answer")
    last = document.ids[-1]
    if document.segments[-1] != EOS or last != tokenizer.eos_token_id or last not in end_ids:
        raise FormatError(
            f"training ends documents with token {last}, but generation stops at {list(end_ids)};"
            " the tokenizer's eos_token and the model's generation_config disagree"
        )


def check_text(document: Document, turn: Turn, tokenizer: Any, config: FormatConfig) -> None:
    """The training prefix is what inference sends, and the supervised ids say what they should."""
    prompt = render_prompt(tokenizer, turn.messages, config)
    if document.ids[: document.prompt_tokens] != encode_prompt(tokenizer, prompt):
        raise FormatError("training prefix differs from the generation prefix; training would teach unseen prompts")
    check_round_trip(tokenizer, document, render_completion(turn.reasoning, turn.answer, prompt, config))
    if turn.answer and document.text(tokenizer, ANSWER).strip() != turn.answer.strip():
        raise FormatError(
            f"the segment map takes {document.text(tokenizer, ANSWER)[:60]!r} for the answer {turn.answer[:60]!r};"
            " the tokenizer's offsets are not those of its text"
        )


def check_vocabulary(documents: Documents, rows: int) -> None:
    """Refuse ids beyond a model's `rows` embeddings: the tokenizer is another model's."""
    if (highest := documents.highest) >= rows:
        raise TrainingError(
            f"the tokenizer writes token {highest}, but the model has embeddings for {rows:,} tokens only;"
            " give the model's own tokenizer"
        )
