"""Matrix products by the faster of torch's two libraries.

On x86 torch multiplies fp32 matrices by MKL, which leaves AVX-512 unused on processors that Intel did not make. There
oneDNN's fp32 product, which torch carries too and takes for bf16, is about twice as fast and rounds no worse. The
choice follows from the processor's maker alone, never from a measurement, so a resumed training makes the same one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INTEL = "GenuineIntel"


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products on this processor belong to oneDNN: AVX-512, not by Intel."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() not in (INTEL, None)


def _maker(listing: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's maker as Linux names it; None where it does not say."""
    try:
        lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def _by_onednn(a: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # torch.compile chooses for itself
    return a.device.type == "cpu" and a.dtype == torch.float32 and onednn_is_faster()


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b for two matrices without gradients, in any layout."""
    if not _by_onednn(a_MK) or 0 in (*a_MK.shape, *b_KN.shape):
        return a_MK @ b_KN
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.T, None, "none", [], "")


def batched_product(a_NMK: Tensor, b_NKL: Tensor) -> Tensor:
    """torch's `bmm`, without gradients, in any layout."""
    if not _by_onednn(a_NMK) or 0 in (*a_NMK.shape, *b_NKL.shape):
        return torch.bmm(a_NMK, b_NKL)
    out = a_NMK.new_empty(len(a_NMK), a_NMK.shape[1], b_NKL.shape[2])
    for number, (a_MK, b_KL) in enumerate(zip(a_NMK, b_NKL)):
        out[number] = product(a_MK, b_KL)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's `linear`, with its gradients."""
    return _Linear.apply(x, weight, bias) if _by_onednn(x) else F.linear(x, weight, bias)


@contextmanager
def faster_linears(model: nn.Module) -> Iterator[None]:
    """Let a model's plain fp32 linear layers multiply by `linear` inside the block, where that is faster."""
    plain = [
        module
        for module in (model.modules() if onednn_is_faster() else ())
        # somebody (a hook, a block outside this one) may have put a forward there
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and "forward" not in vars(module)
    ]
    for module in plain:
        module.forward = functools.partial(_forward, module)
    try:
        yield
    finally:
        for module in plain:
            del module.forward


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = product(x.flatten(0, -2), weight.T)
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = grads[0].flatten(0, -2)
        by_x = product(gradient, weight).view_as(x) if ctx.needs_input_grad[0] else None
        by_weight = product(gradient.T, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        by_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return by_x, by_weight, by_bias
