"""Positions of two tokenizers that are about the same text, and tokens of two vocabularies that say the same."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.attention import PER_DOCUMENT
from distill.config import FormatConfig, Logprobs
from distill.documents import Documents
from distill.format import encode_document
from distill.logprobs import SPANS, Facts, document_key, empty_rows
from distill.models import find_model, load_model, load_tokenizer
from distill.records import Example, Message, Prompt, write_records
from distill.teachers.alignment import Reading, Readings, SpansScorer, aligned, read, spread
from distill.vocabularies import BYTES, exchange_, names_in, shared_vocabulary, spellings

NewModel = Callable[..., Path]
TEXTS = ["a ≤ b ∑ π", "2  +  2\n= 4 😀 done", "漢字 and kana", "plain words"]


@pytest.fixture(scope="module")
def tokenizers(new_model: NewModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folders = [new_model(tmp_path_factory.mktemp(f"t{tokens}"), "llama", tokens=tokens) for tokens in (400, 512)]
    own, theirs = (load_tokenizer(find_model(str(folder))) for folder in folders)
    return own, theirs


def test_where_a_character_takes_several_tokens_only_the_first_is_aligned() -> None:
    assert aligned([9, 7, 7, 4, 0], [9, 7, 7, 3, 0]) == [(0, 0), (1, 1), (4, 4)]
    assert aligned([5, 5], [5]) == [(0, 0)] and aligned([], []) == []


@pytest.mark.parametrize("text", TEXTS)
def test_both_have_read_the_same_text_at_every_pair(text: str, tokenizers: tuple[Any, Any], tmp_path: Path) -> None:
    own, theirs = tokenizers
    prompt = Prompt.of([Message(role="user", content="Say it.")])
    example = Example(prompt=prompt, trace_id="t", reasoning=text, answer="1")
    path = tmp_path / "examples.jsonl"
    write_records(path, [example])
    [(key, reading)] = list(read(path, own, theirs, FormatConfig()))
    mine, other = (encode_document(t, prompt.messages, text, "1", FormatConfig()) for t in (own, theirs))
    assert key == document_key(mine.ids) and reading.ids.tolist() == other.ids
    assert len(reading.rows) == len(reading.places) > 3
    for row, place in zip(reading.rows, reading.places):
        before = own.decode(mine.ids[mine.prompt_tokens : mine.prompt_tokens + row])
        assert before == theirs.decode(other.ids[other.prompt_tokens : place]), (row, place)


def test_readings_come_back_as_they_were_written_and_memory_holds_one_pass_of_them(
    new_model: NewModel, tokenizers: tuple[Any, Any], tmp_path: Path
) -> None:
    """Scored in passes of many documents they are what each alone would be, within rounding."""
    own, theirs = tokenizers
    documents, alive, found = spans_of(own, tmp_path), [], []
    model = load_model(find_model(str(new_model(tmp_path / "model", "llama", tokens=512))), attention=PER_DOCUMENT)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(12)
    model.get_input_embeddings().register_forward_hook(  # in every pass of the teacher
        lambda *given: alive.append(sum(type(thing) is Reading for thing in gc.get_objects()))
    )
    names = torch.from_numpy(names_in(own, theirs, 512))
    facts = Facts("topk", 5, 0, 1.0, 0, 400, "t" * 64, SPANS)
    given = dict(read(tmp_path / "examples.jsonl", own, theirs, FormatConfig()))
    readings = Readings(tmp_path / "readings.bin", given.items())
    assert readings.longest == max(len(one.ids) for one in given.values())
    for key, one in given.items():
        assert all(np.array_equal(*parts) for parts in zip(readings[key], one, strict=True))
        assert readings.entry(key)[1:] == (len(one.ids), len(one.rows))
    del one
    given.clear()
    for budget in (1, 300):
        logprobs = Logprobs(teachers=[{"name": "t", "model": "m"}], micro_batch_tokens=budget)
        scorer = SpansScorer(model, documents, readings, names, facts, logprobs)
        found.append(dict(scorer(range(len(documents)))))
    assert alive[:20] == [1] * 20 and 2 < len(alive[20:]) < 12 and max(alive[20:]) < 10 and sum(alive[20:]) == 20
    for index in range(20):
        alone, together = (rows[index] for rows in found)
        assert np.array_equal(alone.seen, together.seen) and alone.seen.any()
        assert (alone.head_ids == together.head_ids).mean() > 0.98
        assert np.allclose(alone.head_log_p, together.head_log_p, atol=1e-4)
        assert np.allclose(alone.tail_log_p, together.tail_log_p, atol=1e-4)


def spans_of(tokenizer: Any, folder: Path) -> Documents:
    """Twenty documents of growing length in a tokenizer's tokens; their examples are in examples.jsonl."""
    prompt = Prompt.of([Message(role="user", content="Say it.")])
    texts = [" ".join(TEXTS[: 1 + number % 4]) + f" {number}" for number in range(20)]
    examples = [Example(prompt=prompt, trace_id=text, reasoning=text, answer="1") for text in texts]
    write_records(folder / "examples.jsonl", examples)
    return Documents.of(encode_document(tokenizer, prompt.messages, text, "1", FormatConfig()) for text in texts)


def test_rows_that_nothing_was_said_about_are_marked() -> None:
    rows = empty_rows(2, 3)
    whole = spread(rows, np.array([1, 3]), 5)
    assert whole.number == 5 and whole.seen.tolist() == [False, True, False, True, False]


# --- vocabularies ---------------------------------------------------------------------------------------------------


def test_every_byte_has_one_character() -> None:
    assert sorted(BYTES.values()) == list(range(256)) and BYTES["Ġ"] == 32 and BYTES["Ċ"] == 10


def test_tokens_are_named_by_what_they_spell(tokenizers: tuple[Any, Any]) -> None:
    own, theirs = tokenizers
    names = names_in(own, theirs, 512)
    mine, other = spellings(own), spellings(theirs)
    named = [number for number in range(512) if names[number] >= 0]
    assert len(named) > 390 and len({names[number] for number in named}) == len(named)
    assert all(other[n] == mine[int(names[n])] for n in named if n != theirs.eos_token_id)
    assert names[theirs.eos_token_id] == own.eos_token_id and names[theirs.bos_token_id] == -1
    for byte in (b"\n", b" ", b"7"):
        number = next(n for n, spelled in other.items() if spelled == byte)
        assert mine[int(names[number])] == byte


def test_tokens_of_sentence_piece_and_of_bytes_meet() -> None:
    class Pieces:
        """A vocabulary as SentencePiece writes it."""

        all_special_ids = [0]
        eos_token_id = 0
        backend_tokenizer = type("Backend", (), {"to_str": lambda self: '{"decoder": {"type": "Sequence"}}'})()

        def get_vocab(self) -> dict[str, int]:
            return {"</s>": 0, "▁the": 1, "<0x0A>": 2, "é": 3}

    class Bytes(Pieces):
        """The same tokens as a byte-level vocabulary has them."""

        backend_tokenizer = type("Backend", (), {"to_str": lambda self: '{"decoder": {"type": "ByteLevel"}}'})()

        def get_vocab(self) -> dict[str, int]:
            return {"<end>": 0, "Ã©": 1, "Ġthe": 2, "Ċ": 3}

    assert names_in(Pieces(), Bytes(), 4).tolist() == [0, 3, 1, 2]


def test_ids_after_the_first_that_differs_are_not_shared(tokenizers: tuple[Any, Any]) -> None:
    own = tokenizers[1]
    more = copy.deepcopy(own)
    more.add_tokens(["<tool>"])
    assert shared_vocabulary(own, more, "big") == 512 == shared_vocabulary(more, own, "big")


def test_end_tokens_change_places_and_back() -> None:
    logits = torch.arange(6.0)[None]
    assert exchange_(logits.clone(), (1, 4)).tolist() == [[0, 4, 2, 3, 1, 5]]
    assert torch.equal(exchange_(exchange_(logits.clone(), (1, 4)), (1, 4)), logits)
    assert exchange_(logits, None) is logits
