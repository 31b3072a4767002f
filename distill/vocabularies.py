"""What two tokenizers have in common: ids that mean the same, or tokens that are spelled alike."""

import json
from typing import Any

import numpy as np

from distill.documents import Array
from distill.errors import ModelError


def shared_vocabulary(own: Any, theirs: Any, name: str) -> int:
    """How many ids, from 0 on, mean the same in both tokenizers.

    Models of one family have the same tokenizer, perhaps with other tokens added at the end; their heads may have more
    rows than that. Raises ModelError where the tokenizers split text differently or disagree on an id that both use.
    """
    for part in ("model", "pre_tokenizer", "normalizer"):
        if _rules(own, part) != _rules(theirs, part):
            raise ModelError(
                f"logprobs.teachers.{name}: its tokenizer is not the student's (they differ in their {part});"
                " take a teacher of the student's family, or set logprobs.alignment: spans"
            )
    mine, other = _by_id(own), _by_id(theirs)
    most = min(len(mine), len(other))
    return next((token for token in range(most) if mine[token] != other[token]), most)


def _rules(tokenizer: Any, part: str) -> Any:
    """How a tokenizer splits text: merges and vocabulary without what was added later."""
    return json.loads(tokenizer.backend_tokenizer.to_str()).get(part)


def _by_id(tokenizer: Any) -> list[str | None]:
    vocabulary = tokenizer.get_vocab()
    found: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        found[number] = token
    return found


def names_in(own: Any, theirs: Any, rows: int) -> Array:
    """For each of the first `rows` ids of another tokenizer the own id that is spelled alike, or -1; int64 [rows].

    The two end tokens count as alike whatever they are called; other special tokens never do.
    """
    mine = {_spelling(token): number for token, number in own.get_vocab().items() if number not in own.all_special_ids}
    special = set(theirs.all_special_ids)
    names = np.full(rows, -1, np.int64)
    taken: set[int] = set()
    for token, number in sorted(theirs.get_vocab().items(), key=lambda item: item[1]):
        name = mine.get(_spelling(token))
        if number < rows and number not in special and name is not None and name not in taken:
            names[number] = name
            taken.add(name)
    if theirs.eos_token_id is not None and theirs.eos_token_id < rows:
        names[theirs.eos_token_id] = own.eos_token_id
    return names


def _spelling(token: str) -> str:
    """A token's text whatever its tokenizer writes for a leading space."""
    return token.replace("\u2581", "\u0120")
