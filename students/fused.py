"""Lean forms of a decoder's small operations: less memory kept for the backward pass, fewer passes over it.

The same mathematics as transformers' own modules, with gradients written out. `lean(model)` puts them into modules that
have exactly the known form, for as long as it is open; every other architecture, and adapters inside a module, keep
their own code. Linear layers change only where another library multiplies faster (`products`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.products import faster_linears, linear, product

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
FEED_FORWARDS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP")
ACTIVATIONS = ("SiLU", "SiLUActivation")
"""torch's and transformers' own."""


@contextmanager
def lean(model: nn.Module, wanted: bool = True) -> Iterator[int]:
    """Let the model's norms and feed-forwards compute in lean form inside the block; yields how many do."""
    changed = []
    for module in model.modules() if wanted else ():
        form = _form_of(module)
        if form is not None:
            module.forward = functools.partial(form, module)
            changed.append(module)
    try:
        with faster_linears(model) if wanted else nullcontext():
            yield len(changed)
    finally:
        for module in changed:
            del module.forward


def _form_of(module: nn.Module) -> Any:
    kind = type(module).__name__
    if "forward" in vars(module):
        return None  # somebody (a hook, a `lean` outside this one) has put one there
    if kind in NORMS:
        return _norm_forward
    if kind in FEED_FORWARDS and _is_plain(module):
        return _feed_forward
    return None


def _is_plain(feed_forward: Any) -> bool:
    """Whether it is SwiGLU with nothing (an adapter, other numbers than floats) on its last projection."""
    return type(feed_forward.act_fn).__name__ in ACTIVATIONS and type(feed_forward.down_proj) is nn.Linear


def _norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    down = module.down_proj
    return swiglu_down(module.gate_proj(x), module.up_proj(x), down.weight, down.bias)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x**2) + epsilon) over the last dimension, in fp32 at least (Zhang and Sennrich 2019).

    Rounds x / rms to x's dtype before the weight is applied, as Llama does. Keeps x and one number a row.
    """
    return _RmsNorm.apply(x, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # with n = x * scale: d x = scale * (g - n * mean(g * n)), g the gradient of n
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype, copy=True).mul_(scale)
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grads[0] * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = grads[0].to(scale.dtype, copy=True).mul_(weight)
        mean = (gradient * normed).mean(-1, keepdim=True)
        by_x = gradient.sub_(normed.mul_(mean)).mul_(scale)
        return by_x.to(x.dtype), by_weight, None


def swiglu_down(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(silu(gate) * up, weight, bias); keeps gate and up, and makes their product anew in the backward pass."""
    return _SwigluDown.apply(gate, up, weight, bias)


class _SwigluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.biased = bias is not None
        return linear(F.silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        gradient = grads[0].flatten(0, -2)
        active = F.silu(gate)
        by_weight = by_bias = None
        if ctx.needs_input_grad[2]:
            by_weight = product(gradient.T, (active * up).flatten(0, -2))
        if ctx.biased:
            by_bias = gradient.sum(0)
        by_product = product(gradient, weight).view_as(gate)
        by_up = active.mul_(by_product)
        by_gate = torch.ops.aten.silu_backward(by_product.mul_(up), gate)
        return by_gate, by_up, by_weight, by_bias
