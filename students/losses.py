"""Losses on supervised rows, computed in chunks so that the logits of all rows never exist at once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .products import product

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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` against targets, its gradients made in the forward pass.

    With p = softmax(logits) and lse = log sum exp(logits), a row of weight w, smoothing s and z-loss z has
        loss      w * ((1 - s) * (lse - logits[target]) + s * (lse - mean(logits)) + z * lse**2)
        d logits  w * (p * (1 + 2 * z * lse) - (1 - s) * onehot(target) - s / V)
    so both gradients follow from the logits of one chunk, which are then overwritten; backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        smoothing: float,
        z_loss: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_NH.device)
        nll_N = torch.empty(len(targets_N), dtype=wide, device=hidden_NH.device)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        # a frozen head (adapters) needs no gradient, which is a third of the work here
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if ctx.needs_input_grad[1] else None
        head_VH = weight_VH.detach()
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_NH[rows].detach()
            logits = product(hidden, head_VH.T)
            total += _to_gradient(logits, targets_N[rows], weights_N[rows].to(wide), smoothing, z_loss, nll_N[rows])
            grad_hidden_NH[rows] = product(logits, head_VH)
            if grad_weight_VH is not None:
                grad_weight_VH += product(logits.T, hidden)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH)
        ctx.mark_non_differentiable(nll_N)
        return total, nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        scale = grads[0]
        by_hidden = grad_hidden_NH * scale.to(grad_hidden_NH.dtype)
        by_weight = None if grad_weight_VH is None else (grad_weight_VH * scale).to(grad_hidden_NH.dtype)
        return by_hidden, by_weight, None, None, None, None, None


def _to_gradient(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, smoothing: float, z_loss: float, nll_N: Tensor
) -> Tensor:
    """Turn logits into their gradients in place and fill `nll_N`; returns the rows' summed loss."""
    wide, vocabulary = weights_N.dtype, logits_NV.shape[1]
    total = torch.zeros((), dtype=wide, device=logits_NV.device)
    band = BAND_ROWS if logits_NV.device.type == "cpu" else len(logits_NV)
    for start in range(0, len(logits_NV), max(1, band)):
        rows = slice(start, start + band)
        narrow, weights = logits_NV[rows], weights_N[rows]
        logits = narrow.to(wide, copy=True)
        chosen = targets_N[rows, None]
        lse = torch.logsumexp(logits, dim=-1)
        nll = lse - logits.gather(-1, chosen).squeeze(-1)
        loss = nll
        if smoothing:
            loss = (1 - smoothing) * nll + smoothing * (lse - logits.mean(-1))
        if z_loss:
            loss = loss + z_loss * lse.square()
        nll_N[rows] = nll
        total += (weights * loss).sum()
        gradient = logits.sub_(lse[:, None]).exp_()
        if z_loss:
            gradient.mul_((1 + 2 * z_loss * lse)[:, None])
        if smoothing:
            gradient.sub_(smoothing / vocabulary)
        gradient.scatter_add_(-1, chosen, torch.full_like(chosen, smoothing - 1, dtype=wide))
        narrow.copy_(gradient.mul_(weights[:, None]))
    return total


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
    if weights_N is None:
        weights_N = torch.ones(len(targets_N), device=hidden_NH.device)
    found = _ChunkedCrossEntropy.apply(hidden_NH, weight_VH, targets_N, weights_N, smoothing, z_loss, chunk)
    return Losses(*found)


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
