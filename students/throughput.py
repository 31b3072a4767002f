"""How well the hardware is used: model FLOPs of a step against the matrix products this machine can do.

FLOPs of a step = 6 x body parameters x tokens + 6 x head parameters x supervised rows + attention, where attention is
6 x heads x head size x layers x the sum of squared document lengths (forward and backward of two causal products).
Nothing that is computed twice (recomputed activations) counts. MFU is that over the step's time, over the peak.
"""

import functools
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from distill.products import product

PEAK_SIZES = (1024, 2048, 4096)
"""Sides of the square products on which the peak is measured."""
ADAPTERS = (".lora_", ".original_module.", "hidden_match.")
"""In the names of parameters beside those of the base: adapters, what peft trains as a copy, projections."""


class Shape(NamedTuple):
    """What decides a model's FLOPs."""

    body: int
    """Parameters outside embedding and head."""
    head: int
    """Parameters of the head, tied or not."""
    attention: int
    """Layers x heads x head size."""

    def flops(self, lengths: Sequence[int], supervised: int) -> float:
        """Model FLOPs of a step over documents of these lengths with so many supervised rows."""
        squares = sum(int(length) ** 2 for length in lengths)
        return 6.0 * self.body * sum(map(int, lengths)) + 6.0 * self.head * supervised + 6.0 * self.attention * squares


def shape_of(model: Any) -> Shape:
    """The shape of a causal language model (of the base, where it carries adapters)."""
    head = _size(model.get_output_embeddings().weight)
    vocabulary = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    body = sum(
        _size(p)
        for name, p in model.named_parameters()
        if id(p) not in vocabulary and not any(part in name for part in ADAPTERS)
    )
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(body, head, config.num_hidden_layers * config.num_attention_heads * size)


def _size(parameter: Any) -> int:
    """Elements of the whole, where DeepSpeed keeps a part of it too."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


@functools.cache
def peak_flops(precision: str, device: str, threads: int) -> float:
    """Best FLOP/s of square matrix products in a precision, measured now; about a second on a CPU."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    best = 0.0
    for side in PEAK_SIZES if device == "cpu" else (8192,):
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        seconds = [_timed(a, b, device) for _ in range(4 if side < max(PEAK_SIZES) else 2)]
        best = max(best, 2.0 * side**3 / min(seconds))
    return best


def _timed(a: torch.Tensor, b: torch.Tensor, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    product(a, b)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory_mb(device: str) -> float:
    """Most memory so far: of the device where it is one, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most / 1e3
