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


def different_ends(own: Any, theirs: Any) -> tuple[int, int] | None:
    """The end tokens of two tokenizers, where they differ: a base and an instruct model of one family, say."""
    ends = int(own.eos_token_id), int(theirs.eos_token_id)
    return None if ends[0] == ends[1] else ends


def exchange_(logits_NV: Any, ends: tuple[int, int] | None) -> Any:
    """Let a teacher's end token speak for the student's, in place: the two columns change places.

    Without it a teacher that ends its answers with another token would unteach the student to stop.
    """
    if ends is not None:
        logits_NV[:, list(ends)] = logits_NV[:, list(reversed(ends))]
    return logits_NV


def names_in(own: Any, theirs: Any, rows: int) -> Array:
    """For each of the first `rows` ids of another tokenizer the own id that is spelled alike, or -1; int64 [rows].

    The two end tokens count as alike whatever they are called; other special tokens never do.
    """
    mine = {spelled: number for number, spelled in sorted(spellings(own).items(), reverse=True)}
    names = np.full(rows, -1, np.int64)
    taken: set[int] = set()
    for number, spelled in sorted(spellings(theirs).items()):
        name = mine.get(spelled)
        if number < rows and name is not None and name not in taken:
            names[number] = name
            taken.add(name)
    if theirs.eos_token_id is not None and theirs.eos_token_id < rows:
        names[theirs.eos_token_id] = own.eos_token_id
    return names


def spellings(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each id stands for, special tokens left out; those of one byte in a larger character too."""
    special = set(tokenizer.all_special_ids)
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    read = _byte_level if byte_level else _sentence_piece
    return {number: read(token) for token, number in tokenizer.get_vocab().items() if number not in special}


def _byte_level(token: str) -> bytes:
    """As GPT-2 writes bytes: printable ones as themselves, the others as characters from U+0100 on."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:  # a token that was added as plain text
        return token.encode()


def _byte_table() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_table()
"""The byte that each character of a byte-level vocabulary stands for."""


def _sentence_piece(token: str) -> bytes:
    """As SentencePiece writes text: a low line block for a space, `<0x0A>` for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
