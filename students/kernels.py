"""Loss kernels of CUDA libraries, each held against our own loss before it trains anything.

Liger and cut-cross-entropy fuse head and loss on a GPU. They are thin switches: imported when asked for, refused where
there is no CUDA device, and compared with `losses.cross_entropy` on random rows of the model's own width first.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from distill.errors import MissingExtraError, TrainingError

from .losses import Losses, cross_entropy

PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "cut_cross_entropy": ("cut_cross_entropy", "cut-cross-entropy")}
"""Module and distribution of each kernel's library."""
TOLERANCE = 0.02
"""Largest relative difference of loss and gradients in bf16."""


def fused_loss(kernel: str, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Losses:
    """Summed cross-entropy by a library's kernel; the rows' own values are not given by these."""
    total = _call(kernel, hidden_NH, weight_VH, targets_N)
    return Losses(total, (total.detach() / max(1, len(targets_N))).expand(len(targets_N)))


def _call(kernel: str, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    if kernel == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found = liger_fused_linear_cross_entropy(hidden_NH, weight_VH, targets_N, reduction="sum")
        return found[0] if isinstance(found, tuple) else found
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_NH, weight_VH, targets_N, reduction="sum")


def check_kernel(kernel: str, model: Any) -> None:
    """Refuse a kernel that is not installed, has no device, or gives another loss than ours.

    Raises MissingExtraError or TrainingError.
    """
    if kernel == "chunked":
        return
    module, distribution = PACKAGES[kernel]
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(distribution, "gpu")
    if model.device.type != "cuda":
        raise TrainingError(f"loss_kernel: {kernel} needs a CUDA device, not {model.device}; take loss_kernel: chunked")
    worst = kernel_difference(kernel, model.get_output_embeddings().weight)
    if worst > TOLERANCE:
        raise TrainingError(
            f"loss_kernel: {kernel} differs from our loss by {worst:.2%} (at most {TOLERANCE:.0%});"
            " take loss_kernel: chunked, or another version of the library"
        )


def kernel_difference(kernel: str, weight_VH: Tensor, rows: int = 256) -> float:
    """Largest relative difference of loss and gradients between a kernel and ours, on random rows."""
    generator = torch.Generator(device=weight_VH.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": weight_VH.device}
    hidden = torch.randn(rows, weight_VH.shape[1], **options).to(weight_VH.dtype).requires_grad_()
    targets = torch.randint(0, weight_VH.shape[0], (rows,), **options)
    head = weight_VH.detach().clone().requires_grad_()
    found = []
    for total in (_call(kernel, hidden, head, targets), cross_entropy(hidden, head, targets).total):
        found.append((total.detach(), *torch.autograd.grad(total, (hidden, head))))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found))
