"""The decoder says what torch and onnxruntime-genai say, whatever shares its batch."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.artifact import VARIANT_FILES, data_file, locate
from distill.errors import ArtifactError, EngineError
from distill.export.graph import build_variant
from distill.onnx_batching import PREFILL_CHUNK, Cache, choose, nucleus
from distill.onnx_decoding import EVERY_POSITION, GenaiDecoder, OnnxDecoder, read_shape

FAMILIES = ("llama", "qwen2", "qwen3")
LENGTHS = (5, 300, 17, 1, 44, 257, 9)
PAD, START, END = 0, 1, 2  # the tiny tokenizer's special tokens


def some_ids(length: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng([seed, length]).integers(0, 512, length)]


PROMPTS = [some_ids(length) for length in LENGTHS]
CHAT = [[START, 90, END, START, 91, 92, PAD, 93, END, START, 94], [START, 95, END, END, PAD, 96], [END]]
"""Prompts that contain the pad and the end token, as chat prompts do."""


def torch_logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def torch_greedy(model: Any, prompt: list[int], max_new_tokens: int, end: int) -> list[int]:
    """Greedy decoding written out: the whole text through the model for every token, no cache, no padding."""
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and end not in tokens:
        tokens.append(int(torch_logits(model, prompt + tokens)[-1].argmax()))
    return tokens


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_are_torchs_on_prefill_and_on_cached_steps(
    exported: Callable[..., Path], torch_student: Callable[..., Any], family: str, tied: bool
) -> None:
    ids = some_ids(PREFILL_CHUNK + 60)
    expected = torch_logits(torch_student(family, tied=tied), ids)
    decoder = OnnxDecoder(exported(family, "fp32", tied=tied), threads=2, every_position=True)
    scale = np.abs(expected).max()
    assert scale > 1
    shipped = OnnxDecoder(exported(family, "fp32", tied=tied), threads=2)
    for found, wanted in (
        (decoder.logits(ids), expected),
        (decoder.cached_decode_logits(ids, len(ids) - 40), expected[-41:]),
        (shipped.cached_decode_logits(ids, len(ids) - 40), expected[-41:]),
        (shipped.cached_decode_logits(ids, len(ids)), expected[-1:]),
    ):
        assert found.shape == wanted.shape and found.dtype == np.float32
        assert np.abs(found - wanted).max() < 1e-5 * scale


def test_a_bf16_checkpoint_is_exported_at_its_own_values(
    exported: Callable[..., Path], torch_student: Callable[..., Any]
) -> None:
    ids = some_ids(50)
    expected = torch_logits(torch_student("qwen2", dtype="bfloat16"), ids)
    found = OnnxDecoder(exported("qwen2", "fp32", dtype="bfloat16"), threads=2, every_position=True).logits(ids)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_logits_are_near_and_eight_bits_are_nearer_than_four(
    exported: Callable[..., Path], torch_student: Callable[..., Any], family: str
) -> None:
    ids = some_ids(100)
    expected = torch_logits(torch_student(family), ids)
    error = {}
    for variant in ("fp32", "int8", "int4"):
        found = OnnxDecoder(exported(family, variant), threads=2, every_position=True).logits(ids)
        error[variant] = float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())
    assert error["fp32"] < 1e-5 < error["int8"] < 0.05 < error["int4"] < 0.5


def test_cached_steps_give_a_quantized_variant_the_same_logits_as_its_prefill(exported: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(exported(variant="int8"), threads=2, every_position=True)
    ids = some_ids(64)
    whole, stepwise = decoder.logits(ids), decoder.cached_decode_logits(ids, 1)
    assert stepwise.shape == whole.shape
    # not to fp32's precision: where the two differ by a rounding, an activation may fall on the other int8 step
    assert np.abs(whole - stepwise).max() < 1e-2 * np.abs(whole).max()
    assert np.median(np.abs(whole - stepwise)) < 1e-6 * np.abs(whole).max()


@pytest.mark.parametrize(("length", "prefill"), [(4, 0), (4, 5), (0, 0), (513, 1)])
def test_logits_of_a_text_that_cannot_be_run_are_refused(
    exported: Callable[..., Path], length: int, prefill: int
) -> None:
    decoder = OnnxDecoder(exported(), threads=1, every_position=True)
    with pytest.raises(ValueError, match=f"{length} tokens with a prefill of {prefill}"):
        decoder.cached_decode_logits(some_ids(length), prefill)


def test_a_graph_as_it_ships_has_the_last_logits_alone_and_says_so(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="every_position=True"):
        OnnxDecoder(exported(), threads=1).logits(some_ids(5))
    # a graph of another maker, which has no such switch
    folder = Path(shutil.copytree(exported(), tmp_path / "copy"))
    path = folder / VARIANT_FILES["fp32"]
    path.write_bytes(path.read_bytes().replace(EVERY_POSITION.encode(), b"very_position_"))
    with pytest.raises(EngineError, match="after the last token alone"):
        OnnxDecoder(folder, threads=1, every_position=True).logits(some_ids(5))


def test_a_graph_that_has_always_given_all_logits_still_does(
    student: Callable[..., Path], exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.export.graph.keep_last_position", lambda graph: None)
    build_variant(student(), "fp32", tmp_path / "older")
    ids = some_ids(50)
    expected = OnnxDecoder(exported(), threads=1, every_position=True).logits(ids)
    for every in (False, True):
        older = OnnxDecoder(tmp_path / "older", threads=1, every_position=every)
        assert np.abs(older.logits(ids) - expected).max() < 1e-5 * np.abs(expected).max()
    assert older.generate(PROMPTS, 12) == OnnxDecoder(exported(), threads=1).generate(PROMPTS, 12)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_torchs_for_unequal_prompts_in_one_batch(
    exported: Callable[..., Path], torch_student: Callable[..., Any], family: str
) -> None:
    model = torch_student(family)
    expected = [torch_greedy(model, prompt, 12, END) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) == len(PROMPTS)
    assert OnnxDecoder(exported(family), threads=2).generate(PROMPTS, 12) == expected


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_a_batch_of_unequal_prompts_says_what_each_says_alone(exported: Callable[..., Path], variant: str) -> None:
    decoder = OnnxDecoder(exported("qwen3", variant), threads=2)
    prompts = PROMPTS + CHAT
    alone = [decoder.generate([prompt], 20)[0] for prompt in prompts]
    assert decoder.generate(prompts, 20) == alone


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_onnxruntime_genai_loads_the_folder_unmodified_and_says_the_same(
    exported: Callable[..., Path], variant: str
) -> None:
    folder = exported("qwen2", variant)
    genai, ours = GenaiDecoder(folder, threads=2), OnnxDecoder(folder, threads=2)
    for prompt in [*PROMPTS[:5], *CHAT]:
        assert genai.greedy(prompt, 20) == ours.generate([prompt], 20)[0]


def test_texts_end_at_their_end_token_and_make_room_for_the_next_prompt(exported: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(exported(), threads=2, max_batch=3)
    free = decoder.generate(PROMPTS, 25, eos_ids=[])
    assert all(len(text) == 25 for text in free)
    ends = {free[0][3], free[2][10], free[4][0]}
    cut = [next((text[: n + 1] for n, token in enumerate(text) if token in ends), text) for text in free]
    assert len({len(text) for text in cut}) > 3
    assert decoder.generate(PROMPTS, 25, eos_ids=list(ends)) == cut
    arrived = list(decoder.completions(PROMPTS, 25, eos_ids=list(ends)))
    assert sorted(arrived) == list(enumerate(cut))
    assert [place for place, _ in arrived] != list(range(len(cut)))


def test_a_text_stops_at_the_models_context(exported: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(exported(), threads=2)
    texts = decoder.generate([some_ids(505), some_ids(3)], 20, eos_ids=[])
    assert [len(text) for text in texts] == [512 - 505, 20]


def test_no_prompts_give_no_texts(exported: Callable[..., Path]) -> None:
    assert OnnxDecoder(exported(), threads=1).generate([], 5) == []


@pytest.mark.parametrize(
    ("prompts", "count", "complaint"),
    [([[1], []], 5, "prompt 1 has 0 tokens"), ([[1] * 512], 5, "has 512 tokens"), ([[1]], 0, "max_new_tokens is 0")],
)
def test_prompts_that_cannot_be_continued_are_refused(
    exported: Callable[..., Path], prompts: list[list[int]], count: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        OnnxDecoder(exported(), threads=1).generate(prompts, count)


def test_rows_are_limited_by_the_memory_their_cache_may_take(exported: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(exported(), threads=1, max_batch=16)
    assert decoder.shape.bytes_a_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, fp32
    assert decoder._places(prompts=100, capacity=512) == 16
    assert decoder._places(prompts=5, capacity=512) == 5
    decoder.cache_bytes = 3 * 512 * decoder.shape.bytes_a_token
    assert decoder._places(prompts=100, capacity=512) == 3
    decoder.cache_bytes = 1
    assert decoder._places(prompts=100, capacity=512) == 1


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_seed_and_place_and_not_on_its_neighbours(exported: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(exported(), threads=2)
    together = decoder.generate(PROMPTS, 15, temperature=1.0, top_p=0.95, seed=3)
    decoder.max_batch = 2
    assert decoder.generate(PROMPTS, 15, temperature=1.0, top_p=0.95, seed=3) == together
    assert decoder.generate(PROMPTS, 15, temperature=1.0, top_p=0.95, seed=4) != together
    assert decoder.generate(PROMPTS[:1] * 2, 15, temperature=1.0, seed=[8, 8])[0:1] * 2 == decoder.generate(
        PROMPTS[:1] * 2, 15, temperature=1.0, seed=[8, 8]
    )


def test_a_tiny_nucleus_is_greedy(exported: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(exported(), threads=2)
    assert decoder.generate(PROMPTS, 10, temperature=0.7, top_p=1e-6) == decoder.generate(PROMPTS, 10)


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p() -> None:
    probabilities = np.array([0.05, 0.5, 0.15, 0.3])
    assert nucleus(probabilities, 0.4).tolist() == [1]
    assert nucleus(probabilities, 0.6).tolist() == [1, 3]
    assert nucleus(probabilities, 0.9).tolist() == [1, 3, 2]
    assert nucleus(probabilities, 0.999).tolist() == [1, 3, 2, 0]


def test_a_nucleus_wider_than_the_first_guess_is_the_same_as_a_full_sort() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5000))
    by_hand = np.argsort(-probabilities, kind="stable")
    count = int((probabilities[by_hand].cumsum() < 0.9).sum()) + 1
    assert count > 256
    assert nucleus(probabilities, 0.9).tolist() == by_hand[:count].tolist()


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    # exp(log(w) / 0.5) = w**2: weights 1, 2, 3 are drawn as 1 : 4 : 9
    logits = np.log(np.array([1.0, 2.0, 3.0])).astype(np.float32)
    rng = np.random.default_rng(5)
    drawn = Counter(choose(logits, 0.5, 1.0, rng) for _ in range(14_000))
    for token, expected in enumerate((1000, 4000, 9000)):
        assert abs(drawn[token] - expected) < 5 * np.sqrt(expected)


# --- folders that cannot be used --------------------------------------------------------------------------------------


def test_a_folder_that_is_no_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"genai_config.json: cannot be used \(FileNotFoundError"):
        OnnxDecoder(tmp_path, threads=1)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(EngineError, match=r"cannot be used \(KeyError"):
        read_shape(tmp_path)
    with pytest.raises(EngineError, match="give an artifact's folder"):
        GenaiDecoder(tmp_path / "nowhere", threads=1)


def test_a_variant_that_is_not_there_names_those_that_are(exported: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=r"model_q4.onnx: there is no such graph; choose from fp32"):
        OnnxDecoder(exported(), threads=1, variant="int4")
    with pytest.raises(EngineError, match=r"no variant is called 'int5'; choose from fp32"):
        GenaiDecoder(exported(), threads=1, variant="int5")
    assert OnnxDecoder(exported() / VARIANT_FILES["fp32"], threads=1).graph == locate(exported(), "fp32")


def test_a_variant_without_its_weights_is_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    shutil.copytree(exported(variant="int8"), folder)
    (folder / "onnx" / "model_quantized.onnx_data").unlink()
    for loader in (OnnxDecoder, GenaiDecoder):
        with pytest.raises(ArtifactError, match=r"onnx/model_quantized.onnx_data is missing"):
            loader(folder, threads=1)


def test_damaged_weights_do_not_become_text(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "fp32"
    shutil.copytree(exported(), folder)
    data = data_file(folder / VARIANT_FILES["fp32"])
    data.write_bytes(np.full(data.stat().st_size // 4, np.nan, np.float32).tobytes())
    with pytest.raises(EngineError, match="logits are not finite"):
        OnnxDecoder(folder, threads=1).generate([[5, 6]], 3)


def test_copying_a_row_keeps_its_tokens_and_nobody_elses(exported: Callable[..., Path]) -> None:
    cache = Cache(read_shape(exported()), rows=3, capacity=8)
    for number, array in enumerate(cache.arrays.values()):
        array[:] = np.arange(3)[:, None, None, None] + 10 * number
    cache.copy(source=2, target=0, length=5)
    for number, array in enumerate(cache.arrays.values()):
        assert (array[0, :, :5] == 10 * number + 2).all()
        assert (array[0, :, 5:] == 10 * number).all()
        assert (array[1] == 10 * number + 1).all()
