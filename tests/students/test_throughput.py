"""FLOPs by hand, and a peak that this machine was measured to have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.config import Lora
from distill.students import throughput
from distill.students.adapters import with_adapters
from distill.students.throughput import Shape, peak_flops, peak_memory_mb, shape_of

Live = Callable[..., Any]
TinyModel = Callable[[str], Path]

# hidden 64, feed-forward 128, 2 layers, 4 heads of 16, 2 key heads of 16, vocabulary 512
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64
FEED_FORWARD = 3 * 64 * 128
BODY = 2 * (ATTENTION + FEED_FORWARD + 2 * 64) + 64
HEAD = 512 * 64


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "more"), [("llama", 0), ("qwen2", 2 * (64 + 32 + 32)), ("qwen3", 2 * 2 * 16)])
def test_the_shape_of_a_tiny_model_by_hand(live: Live, family: str, more: int, tied: bool) -> None:
    """Qwen2 has biases on queries, keys and values, Qwen3 norms of queries and keys."""
    assert shape_of(live(family, tie_word_embeddings=tied)) == Shape(BODY + more, HEAD, 2 * 4 * 16)


@pytest.mark.parametrize("saved", [[], ["lm_head", "embed_tokens"], ["norm"]])
def test_adapters_do_not_change_the_shape(live: Live, saved: list[str]) -> None:
    model = live(tie_word_embeddings=False)
    before = shape_of(model)
    assert shape_of(with_adapters(model, Lora(rank=4, modules_to_save=saved), 0)) == before


def test_flops_by_hand() -> None:
    shape = Shape(body=1000, head=200, attention=30)
    # 6 x 1000 x (3 + 5) + 6 x 200 x 4 + 6 x 30 x (9 + 25)
    assert shape.flops([3, 5], 4) == 48_000 + 4_800 + 6_120
    assert shape.flops([8], 4) - shape.flops([3, 5], 4) == 6 * 30 * (64 - 34), "one document sees more than two"


def test_flops_are_what_torch_counts_for_the_matrix_products(live: Live) -> None:
    model = live("llama", attention="eager", tie_word_embeddings=False)
    length = 40
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + length)[None], use_cache=False).logits.sum().backward()
    shape = shape_of(model)
    vectors = 5 * 64
    products = shape._replace(body=shape.body - vectors).flops([length], length)
    # eager attention also computes the half above the diagonal
    assert counter.get_total_flops() == pytest.approx(products + shape.flops([length], 0) - 6 * shape.body * length)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_positive_and_measured_once(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "PEAK_SIZES", (64, 128))
    peak_flops.cache_clear()
    try:
        peak = peak_flops(precision, "cpu", 1)
        assert 1e6 < peak < 1e15
        assert peak_flops(precision, "cpu", 1) is peak
    finally:
        peak_flops.cache_clear()


def test_memory_is_that_of_this_process_and_never_falls() -> None:
    before = peak_memory_mb("cpu")
    block = torch.ones(50_000_000, dtype=torch.uint8)
    after = peak_memory_mb("cpu")
    del block
    assert 50 < before <= after < 1e6 and peak_memory_mb("cpu") >= after
