"""Losses on supervised rows, computed in chunks so that the logits of all rows never exist at once."""

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 512
"""Rows whose logits exist at the same time; 512 x 49,152 fp32 logits take 100 MB."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` against targets, its gradients made in the forward pass.

    d loss / d logits = softmax(logits) - onehot(target), so both gradients follow from the logits of one chunk, which
    are then thrown away; the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            hidden, targets = hidden_NH[rows], targets_N[rows]
            logits = (hidden @ weight_VH.T).to(grad_weight_VH.dtype)
            logsumexp = torch.logsumexp(logits, dim=-1, keepdim=True)
            total = total + (logsumexp.squeeze(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)).sum()
            gradient = logits.sub_(logsumexp).exp_()
            gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
            gradient = gradient.to(weight_VH.dtype)
            grad_hidden_NH[rows] = gradient @ weight_VH
            grad_weight_VH += gradient.T @ hidden
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        scale = grads[0]
        grads_in = (grad * scale.to(grad.dtype) for grad in (grad_hidden_NH, grad_weight_VH))
        return *grads_in, None, None


def cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk: int = CHUNK_ROWS) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], in nats; a float32 (or float64) scalar.

    hidden [N, H] are the final hidden states of supervised rows only, weight [V, H] the output head, targets int64
    [N]. The reduction is in fp32 whatever the inputs' dtype; the result and both gradients do not depend on `chunk`
    beyond rounding.
    """
    return _ChunkedCrossEntropy.apply(hidden_NH, weight_VH, targets_N, chunk)
