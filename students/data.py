"""Training documents: examples rendered and tokenized once, with everything refused that would train silently wrong.

A document is tok(prompt) + tok(completion) + EOS; the supervised positions are those after the prompt. Masks go by
position and never by token id, so a pad token that equals the end token does no harm.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.config import FormatConfig
from distill.errors import FormatError, TrainingError
from distill.format import Document, check_round_trip, encode_document, encode_prompt, render_completion, render_prompt
from distill.records import Example

MAX_LOST_SHARE = 0.5
"""Above this share of documents too long for the limit, training is refused instead of running on the rest."""


class Documents(NamedTuple):
    """Tokenized examples and what was counted while making them."""

    ids: list[np.ndarray[Any, np.dtype[np.int32]]]
    prompt_tokens: list[int]
    counts: dict[str, int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [len(ids) for ids in self.ids]

    @property
    def supervised(self) -> list[int]:
        """Supervised tokens of each document."""
        return [len(ids) - prompt for ids, prompt in zip(self.ids, self.prompt_tokens)]


def encode_examples(
    examples: Iterable[Example], tokenizer: Any, config: FormatConfig, context: int, eos_ids: Sequence[int]
) -> Documents:
    """Tokenize examples, drop and count those longer than `format.max_tokens`.

    `context` is the model's position limit in tokens, `eos_ids` the end tokens that inference stops at. Raises
    FormatError or TrainingError when a document would teach something that inference never sees: no supervised
    tokens, an end token inference does not know, a prefix that differs, a limit beyond the context.
    """
    if config.max_tokens > context:
        raise TrainingError(
            f"format.max_tokens is {config.max_tokens:,}, but the model's context is {context:,} tokens;"
            f" set format.max_tokens={context} or less"
        )
    ids, prompts, total, too_long, seams = [], [], 0, 0, 0
    for example in examples:
        total += 1
        document = encode_document(tokenizer, example.prompt.messages, example.reasoning, example.answer, config)
        if total <= 32:  # the checks below decode and re-render; a sample of them finds a wrong tokenizer
            _check_text(document, example, tokenizer, config)
        check_document(document, tokenizer, eos_ids)
        seams += document.seam_differs
        if len(document.ids) > config.max_tokens:
            too_long += 1
            continue
        ids.append(np.asarray(document.ids, dtype=np.int32))
        prompts.append(document.prompt_tokens)
    if not total:
        raise TrainingError("there are no examples to train on; look at what selection dropped: distill inspect")
    if not ids or too_long > MAX_LOST_SHARE * total:
        raise TrainingError(
            f"{too_long} of {total} documents are longer than format.max_tokens={config.max_tokens};"
            " raise it (within the model's context) or select shorter traces (select.max_chars)"
        )
    return Documents(ids, prompts, {"documents": len(ids), "too_long": too_long, "seam_differs": seams})


def check_document(document: Document, tokenizer: Any, eos_ids: Sequence[int]) -> None:
    """Refuse a document without prompt or supervised text, or whose end token inference would not stop at."""
    if document.prompt_tokens == 0:
        raise FormatError("the chat template renders an empty prompt; nothing would tell the student what to answer")
    if len(document.ids) - document.prompt_tokens <= 1:
        raise TrainingError("a document has no supervised tokens: its trace is empty; select traces with an answer")
    if document.ids[-1] != tokenizer.eos_token_id or document.ids[-1] not in eos_ids:
        raise FormatError(
            f"training ends documents with token {document.ids[-1]}, but generation stops at {list(eos_ids)};"
            " the tokenizer's eos_token and the model's generation_config disagree"
        )


def _check_text(document: Document, example: Example, tokenizer: Any, config: FormatConfig) -> None:
    """The training prefix is what inference sends, and the supervised ids say what they should."""
    prompt = render_prompt(tokenizer, example.prompt.messages, config)
    if document.ids[: document.prompt_tokens] != encode_prompt(tokenizer, prompt):
        raise FormatError("training prefix differs from the generation prefix; training would teach unseen prompts")
    check_round_trip(tokenizer, document, render_completion(example.reasoning, example.answer, prompt, config))


def check_vocabulary(documents: Documents, rows: int) -> None:
    """Refuse ids beyond a model's `rows` embeddings: the tokenizer is another model's."""
    highest = max(int(ids.max()) for ids in documents.ids)
    if highest >= rows:
        raise TrainingError(
            f"the tokenizer writes token {highest}, but the model has embeddings for {rows:,} tokens only;"
            " give the model's own tokenizer"
        )


def documents_digest(documents: Documents) -> str:
    """What a resume compares: sha256 (hex) of the ids of all documents in order and of where their prompts end."""
    digest = hashlib.sha256()
    for ids, prompt in zip(documents.ids, documents.prompt_tokens):
        digest.update(np.array([len(ids), prompt], dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.hexdigest()
