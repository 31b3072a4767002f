"""New tokens: rows that start where the model stands, train, and are the same after saving."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import FormatConfig, SftPhase
from distill.documents import Documents, encode_examples
from distill.errors import ModelError
from distill.format import check_markers_survive
from distill.interrupts import Stop
from distill.models import find_model, load_model, load_tokenizer
from distill.records import Example, Message, Prompt
from distill.students.loop import Trainer
from distill.students.vocabulary import add_tokens

Live = Callable[..., Any]
TinyModel = Callable[[str], Path]
MARKERS = ["<think>", "</think>"]


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


def ends_of(model: Any) -> list[torch.Tensor]:
    """Copies of embedding and head."""
    return [module.weight.detach().clone() for module in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_new_row_is_the_mean_of_its_pieces_and_the_rows_before_it_stay(
    live: Live, tokenizer: Any, family: str, tied: bool
) -> None:
    model = live(family, tie_word_embeddings=tied)
    before = ends_of(model)
    assert torch.equal(*before) == tied
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in MARKERS}
    assert all(len(set(spelled)) > 1 for spelled in pieces.values())
    assert add_tokens(model, tokenizer, MARKERS) == MARKERS
    after = ends_of(model)
    assert torch.equal(*after) == tied and model.config.vocab_size == 514
    for old, new in zip(before, after):
        assert new.shape == (514, 64) and torch.equal(new[:512], old)
        for token, spelled in pieces.items():
            [row] = tokenizer(token, add_special_tokens=False)["input_ids"]
            expected = sum(old[piece].double() for piece in spelled) / len(spelled)
            torch.testing.assert_close(new[row].double(), expected, rtol=1e-6, atol=1e-7)
    parameters = dict(model.named_parameters())
    assert parameters["model.embed_tokens.weight"] is model.get_input_embeddings().weight
    assert ("lm_head.weight" in parameters) == (not tied)


def test_the_model_reads_a_new_token_as_it_would_read_the_mean_of_its_pieces(live: Live, tokenizer: Any) -> None:
    model = live("llama", attention="sdpa", tie_word_embeddings=False)
    text = tokenizer("4 + 4 = ", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor([text]))
        pieces = torch.tensor(tokenizer("<think>", add_special_tokens=False)["input_ids"])
        mean = model.get_input_embeddings()(pieces).mean(0)
        expected = model(inputs_embeds=torch.cat([embedded, mean[None, None]], 1), use_cache=False).logits
        add_tokens(model, tokenizer, ["<think>"])
        given = tokenizer("4 + 4 = <think>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        found = model(given, use_cache=False).logits
    assert given[0, -1] == 512 and found.shape[-1] == 513
    torch.testing.assert_close(found[..., :512], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[..., 512], expected[..., pieces].mean(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_padded_vocabulary_is_not_resized_and_its_spare_rows_are_taken(
    live: Live, tokenizer: Any, tied: bool
) -> None:
    model = live("qwen2", tie_word_embeddings=tied, vocab_size=520)
    before = ends_of(model)
    weight = model.get_input_embeddings().weight
    assert add_tokens(model, tokenizer, MARKERS) == MARKERS
    assert model.get_input_embeddings().weight is weight and model.config.vocab_size == 520
    for old, new in zip(before, ends_of(model)):
        changed = (new != old).any(1).nonzero().flatten().tolist()
        assert changed == [512, 513]


def test_a_vocabulary_with_too_few_spare_rows_grows_by_what_is_missing(live: Live, tokenizer: Any) -> None:
    model = live("qwen2", vocab_size=513)
    assert add_tokens(model, tokenizer, ["<think>"]) == ["<think>"]
    assert model.config.vocab_size == 513
    assert add_tokens(model, tokenizer, MARKERS) == ["</think>"]
    assert model.config.vocab_size == 514 == model.get_output_embeddings().weight.shape[0]


def test_known_tokens_are_left_alone(live: Live, tokenizer: Any) -> None:
    model = live("llama")
    known = tokenizer.convert_ids_to_tokens(300)
    backend, [embedding, _] = tokenizer.backend_tokenizer.to_str(), ends_of(model)
    assert add_tokens(model, tokenizer, ["<|im_end|>", known]) == []
    assert add_tokens(model, tokenizer, []) == []
    assert tokenizer.backend_tokenizer.to_str() == backend
    assert torch.equal(ends_of(model)[0], embedding)
    assert add_tokens(model, tokenizer, ["<|im_end|>", "<think>", "<think>"]) == ["<think>"]
    assert tokenizer.eos_token_id == 2 and len(tokenizer) == 513
    assert add_tokens(model, tokenizer, ["<think>"]) == []
    assert model.config.vocab_size == 513


def test_a_token_without_text_is_refused(live: Live, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"student\.new_tokens: '' cannot be added"):
        add_tokens(live("llama"), tokenizer, [""])


def test_new_tokens_survive_decoding_for_people(live: Live, tokenizer: Any) -> None:
    special = copy.deepcopy(tokenizer)
    add_tokens(live("llama"), tokenizer, MARKERS)
    ids = tokenizer("<think>\nAdd.</think>4<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids[0] == 512 and 513 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nAdd.</think>4"
    check_markers_survive(tokenizer, FormatConfig())
    # the negative control: special tokens do not
    special.add_special_tokens({"additional_special_tokens": MARKERS})
    with pytest.raises(ModelError, match="holds it as a special token"):
        check_markers_survive(special, FormatConfig())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_model_and_tokenizer_agree_after_saving(live: Live, tokenizer: Any, tmp_path: Path, tied: bool) -> None:
    model = live("llama", tie_word_embeddings=tied)
    add_tokens(model, tokenizer, MARKERS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    again, reader = load_model(source), load_tokenizer(source)
    text = "<think>\nAdd.\n</think>\n\n4"
    ids = reader(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] and {512, 513} <= set(ids)
    assert reader.decode(ids, skip_special_tokens=True) == text
    assert again.config.vocab_size == len(reader) == 514
    assert all(torch.equal(old, new) for old, new in zip(ends_of(model), ends_of(again), strict=True))
    assert add_tokens(again, reader, MARKERS) == []
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(*(one(torch.tensor([ids]), use_cache=False).logits for one in (model, again)))


# --- training -------------------------------------------------------------------------------------------------------


def marked_documents(tokenizer: Any) -> Documents:
    asked = Prompt.of([Message(role="user", content="2 + 2?")])
    given = Example(prompt=asked, trace_id="t", reasoning="Add.", answer="4")
    return encode_examples([given], tokenizer, FormatConfig(max_tokens=512), 512, [tokenizer.eos_token_id])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_one_step_moves_the_rows_of_new_tokens(
    live: Live, tokenizer: Any, phase: Callable[..., SftPhase], tmp_path: Path, tied: bool
) -> None:
    model = live("llama", tie_word_embeddings=tied)
    add_tokens(model, tokenizer, [*MARKERS, "<unused>"])
    documents = marked_documents(tokenizer)
    used = set(documents.ids(0).tolist())
    assert {512, 513} <= used and 514 not in used
    before = ends_of(model)
    trainer = Trainer(model, documents, phase(max_steps=1, warmup_ratio=0, step_tokens=512), "fp32", tmp_path)
    assert len(list(trainer.run(Stop()))) == 1
    embedding, head = ((new - old).abs().amax(1) for old, new in zip(before, ends_of(trainer.model)))
    assert (embedding[[512, 513]] > 1e-4).all() and (head[[512, 513]] > 1e-4).all()
    if not tied:  # the negative control: what was not read has not moved
        assert embedding[514] == 0
        assert {row for row in range(515) if embedding[row] > 0} == used
