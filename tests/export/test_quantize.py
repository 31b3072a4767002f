"""GPTQ loses less than rounding does, and what the graph computes with is what was rounded."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import ExportError
from distill.export import quantize
from distill.export.graph import build_variant
from distill.export.quantize import Grid, Moments, Rounded, best_grid, compensated, gptq, packed, retargeted
from distill.export.schemes import HEAD, VARIANTS
from distill.onnx_decoding import OnnxDecoder

GPTQ = dataclasses.replace(VARIANTS["int4"], method="gptq", head_bits=8)
EXACT = dataclasses.replace(GPTQ, accuracy_level=0)
"""Without rounding activations to int8, so that the graph's products are those of its weights."""


def correlated(rows: int = 64, inputs: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [64, 96] and inputs that are far from independent, as hidden states are."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)
    return torch.randn(rows, inputs, generator=generator), torch.randn(512, inputs, generator=generator) @ mixing


def output_error(weights: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((weights - rounded) @ inputs.T).square().mean() / (weights @ inputs.T).square().mean())


def nearest(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Each weight by itself on the same grid, written out block by block."""
    out = torch.empty_like(weights)
    for row in range(len(weights)):
        for block in range(grid.scales_NB.shape[1]):
            part = slice(block * grid.block_size, (block + 1) * grid.block_size)
            scale, zero = grid.scales_NB[row, block], grid.zeros_NB[row, block]
            integers = torch.clamp(torch.round(weights[row, part] / scale) + zero, 0, 2**grid.bits - 1)
            out[row, part] = (integers - zero) * scale
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_making_up_for_errors_loses_less_than_rounding_to_the_nearest(bits: int) -> None:
    weights, inputs = correlated()
    moments = inputs.T @ inputs
    grid = best_grid(weights, moments.diagonal(), bits, 32)
    plain = output_error(weights, nearest(weights, grid), inputs)
    made_up = output_error(weights, compensated(weights, moments, grid).values, inputs)
    assert made_up < 0.5 * plain


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weights, _ = correlated()
    grid = best_grid(weights, torch.ones(96), 4, 32)
    rounded = compensated(weights, torch.eye(96), grid)
    torch.testing.assert_close(rounded.values, nearest(weights, grid))


def test_the_best_grid_is_never_worse_than_the_whole_range() -> None:
    weights, _ = correlated()
    blocks = weights.reshape(64, 3, 32)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = (high - low) / 15
    whole = Grid(4, 32, scales, (-low / scales).round())
    best = best_grid(weights, torch.ones(96), 4, 32)
    errors = [(nearest(weights, grid) - weights).reshape(blocks.shape).square().sum(-1) for grid in (best, whole)]
    assert (errors[0] <= errors[1] + 1e-6).all() and (errors[0] < errors[1]).float().mean() > 0.3


def test_zero_stays_zero_and_a_block_of_zeros_does_no_harm() -> None:
    weights = torch.zeros(2, 64)
    weights[:, 40] = 3.0
    grid = best_grid(weights, torch.ones(64), 4, 32)
    torch.testing.assert_close(compensated(weights, torch.eye(64), grid).values, weights, atol=1e-5, rtol=0)


def test_a_matrix_that_no_blocks_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="33 inputs are no multiple of a block of 32"):
        best_grid(torch.ones(2, 33), torch.ones(33), 4, 32)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_is_missing_is_made_up_for_by_least_squares(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With W x missing another matrix's D x, the one to round is W + share D, but for the damping."""
    weights, inputs = correlated()
    inputs = inputs + torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
    lost = 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    moments = inputs.T @ inputs
    monkeypatch.setattr(quantize, "MADE_UP", share)
    monkeypatch.setattr(quantize, "DAMPING", 1e-9)
    found = retargeted(weights, Moments(moments, (inputs @ lost.T).T @ inputs))
    torch.testing.assert_close(found, weights + share * lost, atol=1e-4, rtol=1e-4)
    assert retargeted(weights, Moments(moments, None)) is weights


def test_numbers_of_four_bits_share_bytes_the_lower_half_first() -> None:
    integers = torch.tensor([[float(k % 16) for k in range(96)]])
    grid = Grid(4, 32, torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
    values, scales, zeros = packed(Rounded(grid, integers))
    assert values.shape == (1, 3, 16) and values[0, 0, :2].tolist() == [0x10, 0x32]
    assert zeros.tolist() == [[0x21, 0x03]] and scales.dtype == np.float32


# --- a whole model ----------------------------------------------------------------------------------------------------


TEXTS = [[int(one) for one in np.random.default_rng(seed).integers(3, 500, 40)] for seed in range(4)]


def rounded_student(
    torch_student: Callable[..., Any], family: str, scheme: Any
) -> tuple[Any, list[dict[str, Rounded]]]:
    """The torch model with its layers' weights rounded, and the matrices that it was given."""
    model = torch_student(family)
    with torch.inference_mode(False):
        return model, list(gptq(model, TEXTS, scheme))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_graph_computes_with_the_rounded_weights(
    torch_student: Callable[..., Any], student: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    scheme = dataclasses.replace(EXACT, wide_layers=(1,))
    model, matrices = rounded_student(torch_student, family, scheme)
    build_variant(student(family), "int4", tmp_path / "a", scheme, matrices)
    found = OnnxDecoder(tmp_path / "a", threads=1, every_position=True).logits(TEXTS[0])
    plain = OnnxDecoder(built(student(family), tmp_path / "b", scheme), threads=1, every_position=True).logits(TEXTS[0])
    with torch.no_grad():
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.lm_head.weight.copy_(matrices[-1][HEAD].values)
        expected = model(torch.tensor([TEXTS[0]])).logits[0].numpy()
    assert found == pytest.approx(expected, abs=1e-4 * float(np.abs(expected).max()))
    assert np.abs(plain - expected).max() > 0.02 * np.abs(expected).max()  # the builder's own rounding is another one


def test_a_large_matrix_is_rounded_in_pieces_as_it_is_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = correlated()
    whole = quantize.nearest(weights, 8, 32)
    monkeypatch.setattr(quantize, "ROWS_AT_ONCE", 7)
    pieces = quantize.nearest(weights, 8, 32)
    assert torch.equal(whole.values, pieces.values) and torch.equal(whole.values, nearest(weights, whole.grid))
    assert (whole.values - weights).abs().max() < 0.51 * whole.grid.scales_NB.max()
    blocks = weights.reshape(-1, 32)
    step = (blocks.amax(-1) - blocks.amin(-1)) / 255
    assert (
        whole.values - weights
    ).square().mean() < 1.1 * step.square().mean() / 12  # no coarser grid than its bits give


def test_later_layers_make_up_for_what_earlier_ones_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """On texts that it was not calibrated on; without a share made up for the loss is larger."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    exact = LlamaForCausalLM(LlamaConfig(vocab_size=512, **size)).eval()
    texts = [[int(one) for one in np.random.default_rng(seed).integers(3, 500, 200)] for seed in range(17)]
    losses = []
    with torch.no_grad():
        expected = exact.model(torch.tensor(texts[:1])).last_hidden_state
        for share in (quantize.MADE_UP, 0.0):
            monkeypatch.setattr(quantize, "MADE_UP", share)
            model = copy.deepcopy(exact)
            list(gptq(model, texts[1:], GPTQ))
            losses.append(float((model.model(torch.tensor(texts[:1])).last_hidden_state - expected).square().mean()))
    assert losses[0] < 0.9 * losses[1]


def built(checkpoint: Path, folder: Path, scheme: Any) -> Path:
    build_variant(checkpoint, "int4", folder, scheme)
    return folder


def test_matrices_of_another_model_are_refused(student: Callable[..., Path], tmp_path: Path) -> None:
    grid = Grid(4, 32, torch.ones(8, 2), torch.zeros(8, 2))
    wrong = Rounded(grid, torch.zeros(8, 64))
    with pytest.raises(ExportError, match=r"has shape .* the rounded matrix gives"):
        build_variant(student(), "int4", tmp_path / "a", GPTQ, [{"/model/layers.0/attn/o_proj/MatMul": wrong}])
    with pytest.raises(ExportError, match=r"has no quantized matrix /model/layers.9"):
        build_variant(student(), "int4", tmp_path / "b", GPTQ, [{"/model/layers.9/attn/o_proj/MatMul": wrong}])
    assert not (tmp_path / "a").exists()


def test_gptq_without_texts_is_refused(torch_student: Callable[..., Any]) -> None:
    with pytest.raises(ExportError, match="needs texts to calibrate on"):
        list(gptq(torch_student(), [], GPTQ))
