"""New tokens of a student: added to the tokenizer, with rows of embedding and head that start sensibly and train."""

from collections.abc import Sequence
from typing import Any

from distill.errors import ModelError


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Add the tokens that the vocabulary lacks, in place; returns them.

    A new row is the mean of the rows of the pieces that the token was spelled with before, in embedding and head, so
    that the model starts from what it knew. They are not special tokens: decoding for people keeps them. Raises
    ModelError for a token that the tokenizer cannot take.
    """
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if not new:
        return []
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in new}
    tokenizer.add_tokens(new)
    rows = {token: tokenizer.convert_tokens_to_ids(token) for token in new}
    if unspelled := [token for token in new if not pieces[token] or rows[token] is None]:
        raise ModelError(f"student.new_tokens: {unspelled[0]!r} cannot be added to this tokenizer")
    if max(rows.values()) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(rows.values()) + 1, mean_resizing=False)
    _start_rows(model, pieces, rows)
    return new


def _start_rows(model: Any, pieces: dict[str, list[int]], rows: dict[str, int]) -> None:
    import torch

    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    with torch.no_grad():
        for weight in ends[: 1 if ends[0] is ends[1] else 2]:
            for token, row in rows.items():
                weight[row] = weight[pieces[token]].mean(0)
