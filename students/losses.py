"""Losses on supervised rows, computed in chunks so that the logits of all rows never exist at once."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.products import product

CHUNK_ROWS = 1024
"""Rows whose logits exist at the same time; 1,024 x 49,152 logits take 100 MB in bf16."""
BAND_ROWS = 64
"""Rows that are reduced together in fp32, so that what is wide stays in the processor's cache."""


class Losses(NamedTuple):
    """What a pass gives, in float32 (or float64)."""

    total: Tensor
    """What is minimised, summed over rows; the only one with a gradient."""
    nll_N: Tensor
    """Negative log-likelihood of each row in nats, without weights, smoothing and z-loss."""


ToGradient = Callable[[Tensor, int], Tensor]
"""Turns logits of rows (from the given one on) into their gradients in place; returns the rows' summed loss."""


def chunked(hidden_NH: Tensor, weight_VH: Tensor, to_gradient: ToGradient, chunk: int = CHUNK_ROWS) -> Tensor:
    """A loss that is summed over rows of logits `hidden @ weight.T`, of which no more than `chunk` ever exist."""
    total: Tensor = _Chunked.apply(hidden_NH, weight_VH, to_gradient, chunk)
    return total


class _Chunked(torch.autograd.Function):
    """Both gradients follow from one chunk's logits, so they are made in the forward pass; backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, to_gradient: ToGradient, chunk: int) -> Tensor:
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_NH.device)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        # a frozen head (adapters) needs no gradient, which is a third of the work here
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if ctx.needs_input_grad[1] else None
        head_VH = weight_VH.detach()
        for start in range(0, len(hidden_NH), chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_NH[rows].detach()
            logits = product(hidden, head_VH.T)
            total += to_gradient(logits, start)
            grad_hidden_NH[rows] = product(logits, head_VH)
            if grad_weight_VH is not None:
                grad_weight_VH += product(logits.T, hidden)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        scale = grads[0]
        by_hidden = grad_hidden_NH * scale.to(grad_hidden_NH.dtype)
        by_weight = None if grad_weight_VH is None else (grad_weight_VH * scale).to(grad_hidden_NH.dtype)
        return by_hidden, by_weight, None, None


def bands(logits_NV: Tensor, most: int = CHUNK_ROWS) -> Iterator[slice]:
    """Rows that are reduced together: few on a CPU, up to `most` elsewhere."""
    size = BAND_ROWS if logits_NV.device.type == "cpu" else most
    for start in range(0, len(logits_NV), size):
        yield slice(start, min(start + size, len(logits_NV)))


def nll_to_gradient(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row; turns the logits into its gradients, softmax - onehot, in place."""
    lse = torch.logsumexp(logits_NV, dim=-1)
    nll = lse - logits_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    less_onehot_(logits_NV.sub_(lse[:, None]).exp_(), targets_N)
    return nll


def less_onehot_(q_NV: Tensor, targets_N: Tensor, weight: float = 1.0) -> Tensor:
    """q - weight * onehot(target), in place: with weight 1 the gradient of cross-entropy."""
    chosen = targets_N[:, None]
    return q_NV.scatter_add_(-1, chosen, torch.full_like(chosen, -weight, dtype=q_NV.dtype))


def cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = CHUNK_ROWS,
) -> Losses:
    """The sum over rows of weight * -log softmax(hidden @ weight.T)[target], in nats, and each row's own.

    hidden [N, H] are the final hidden states of supervised rows only, weight [V, H] the output head, targets int64
    [N], weights [N] (ones where not given). `smoothing` spreads that share of the target evenly over the vocabulary
    (Szegedy et al. 2016); `z_loss` adds that much of the squared log-normaliser (Chowdhery et al. 2022, section 5).
    Reductions are in fp32 at least, whatever the inputs' dtype; no more than `chunk` rows of logits ever exist, and
    neither result nor gradients depend on `chunk` beyond rounding.
    """
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    nll_N = torch.empty(len(targets_N), dtype=wide, device=hidden_NH.device)
    if weights_N is None:
        weights_N = torch.ones(len(targets_N), device=hidden_NH.device)
    weights = weights_N.to(wide)

    def to_gradient(logits_NV: Tensor, start: int) -> Tensor:
        total = torch.zeros((), dtype=wide, device=logits_NV.device)
        for band in bands(logits_NV):
            rows = slice(start + band.start, start + band.stop)
            total += _band_to_gradient(logits_NV[band], targets_N[rows], weights[rows], smoothing, z_loss, nll_N[rows])
        return total

    return Losses(chunked(hidden_NH, weight_VH, to_gradient, chunk), nll_N)


def _band_to_gradient(
    narrow_NV: Tensor, targets_N: Tensor, weights_N: Tensor, smoothing: float, z_loss: float, nll_N: Tensor
) -> Tensor:
    """Turn a few rows of logits into their gradients in place and fill `nll_N`; returns their summed loss.

    With p = softmax(logits) and lse = log sum exp(logits), a row of weight w, smoothing s and z-loss z has
        loss      w * ((1 - s) * (lse - logits[target]) + s * (lse - mean(logits)) + z * lse**2)
        d logits  w * (p * (1 + 2 * z * lse) - (1 - s) * onehot(target) - s / V)
    """
    vocabulary = narrow_NV.shape[1]
    logits = narrow_NV.to(weights_N.dtype, copy=True)
    lse = torch.logsumexp(logits, dim=-1)
    nll = lse - logits.gather(-1, targets_N[:, None]).squeeze(-1)
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (lse - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    nll_N.copy_(nll)
    gradient = logits.sub_(lse[:, None]).exp_()
    if z_loss:
        gradient.mul_((1 + 2 * z_loss * lse)[:, None])
    if smoothing:
        gradient.sub_(smoothing / vocabulary)
    less_onehot_(gradient, targets_N, 1 - smoothing)
    narrow_NV.copy_(gradient.mul_(weights_N[:, None]))
    return (weights_N * loss).sum()


@torch.no_grad()
def row_losses(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk: int = CHUNK_ROWS) -> Tensor:
    """Negative log-likelihood of each row in nats, [N] in fp32 at least; no gradients are made."""
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    nll_N = torch.empty(len(targets_N), dtype=wide, device=hidden_NH.device)
    for start in range(0, len(targets_N), chunk):
        rows = slice(start, start + chunk)
        logits = product(hidden_NH[rows], weight_VH.T).to(wide)
        chosen = logits.gather(-1, targets_N[rows, None]).squeeze(-1)
        nll_N[rows] = torch.logsumexp(logits, dim=-1) - chosen
    return nll_N
