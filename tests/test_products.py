"""Products of either library against float64, and which library is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import products
from distill.products import faster_linears, linear, onednn_is_faster, product


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"], autouse=True)
def either_library(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways on every machine, whatever its processor is."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)


def drawn(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 48, 130), (0, 4, 3), (4, 0, 3)])
def test_a_product_is_that_of_float64_in_any_layout(shape: tuple[int, int, int], transposed: tuple[bool, bool]) -> None:
    rows, inner, columns = shape
    a = drawn(inner, rows).T if transposed[0] else drawn(rows, inner)
    b = drawn(columns, inner, seed=1).T if transposed[1] else drawn(inner, columns, seed=1)
    found = product(a, b)
    assert found.shape == (rows, columns) and found.dtype == torch.float32
    assert torch.allclose(found.double(), a.double() @ b.double(), rtol=0, atol=1e-4)


def test_a_product_keeps_fp32_and_is_no_bf16_one() -> None:
    a, b = drawn(64, 512), drawn(512, 64, seed=1)
    exact = a.double() @ b.double()
    error = float((product(a, b).double() - exact).norm() / exact.norm())
    rounded = float(((a.bfloat16() @ b.bfloat16()).double() - exact).norm() / exact.norm())
    assert error < 1e-6 < 1e-3 < rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_value_and_gradients_of_torchs(dtype: Any, bias: bool) -> None:
    leaves = [drawn(2, 5, 8, dtype=dtype), drawn(6, 8, seed=1, dtype=dtype)]
    leaves += [drawn(6, seed=2, dtype=dtype)] if bias else []
    readout = drawn(2, 5, 6, seed=3, dtype=dtype)

    def both(function: Callable[..., Any]) -> list[Any]:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        out = function(own[0], own[1], own[2] if bias else None)
        return [out.detach(), *torch.autograd.grad((out * readout).sum(), own)]

    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    for ours, theirs in zip(both(linear), both(F.linear), strict=True):
        assert ours.dtype == dtype and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_frozen_weight_costs_no_product() -> None:
    x, weight = drawn(4, 8).requires_grad_(), drawn(6, 8, seed=1)
    linear(x, weight, None).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_models_linear_layers_multiply_alike_inside_the_block_and_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 4).double())
    own = model[1].forward = lambda x: F.linear(x, model[1].weight)  # somebody else's
    x = drawn(2, 3, 8)
    expected = model[1](model[0](x))
    with faster_linears(model):
        taken = [number for number, module in enumerate(model) if "forward" in vars(module)]
        assert taken == ([0, 1] if products.onednn_is_faster() else [1]) and model[1].forward is own
        assert torch.allclose(model[1](model[0](x)), expected, atol=1e-6)
    assert "forward" not in vars(model[0]) and model[1].forward is own


@pytest.mark.parametrize(
    ("text", "maker"), [("vendor_id\t: AuthenticAMD\n", "AuthenticAMD"), ("Features : neon\n", None)]
)
def test_the_processors_maker_is_read_where_linux_says_it(text: str, maker: str | None, tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text(text)
    assert products._maker(listing) == maker
    assert products._maker(tmp_path / "absent") is None


def test_the_choice_is_the_same_every_time() -> None:
    onednn_is_faster.cache_clear()
    first = onednn_is_faster()
    onednn_is_faster.cache_clear()
    assert onednn_is_faster() == first
