"""Optimizers, learning rates and running means of weights."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distill.config import TrainingPhase
from distill.errors import MissingExtraError, TrainingError

from .weights import Sharded, Weights
from .zero import ZeroSharded


def learning_rate(phase: TrainingPhase, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then the phase's schedule down to its floor.

    `wsd` stays at the peak and falls as 1 - sqrt over the last `decay_ratio` of the steps (Hägele et al. 2024).
    """
    warmup = _steps(phase.warmup_ratio, total)
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    if phase.schedule == "constant":
        return phase.lr
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * _falling(phase, step, warmup, total))


def _falling(phase: TrainingPhase, step: int, warmup: int, total: int) -> float:
    """From 1 to 0 over the steps after the warm-up."""
    if phase.schedule == "wsd":
        decay = min(_steps(phase.decay_ratio, total), total - warmup)
        return 1 - math.sqrt(max(0, step - (total - decay)) / max(1, decay))
    progress = (step - warmup) / max(1, total - warmup)
    return (1 + math.cos(math.pi * progress)) / 2 if phase.schedule == "cosine" else 1 - progress


def _steps(share: float, total: int) -> int:
    return math.ceil(share * total - 1e-9)  # 0.07 * 100 is a little above 7


def make_optimizer(weights: Weights, phase: TrainingPhase) -> Optimizer:
    """The phase's optimizer on fp32 weights; decay on matrices only.

    AdamW is torch's fused one. Raises MissingExtraError for `adamw_8bit` without bitsandbytes, TrainingError for what
    cannot work on shards.
    """
    matrices = [p for p in weights.params if p.ndim >= 2]
    vectors = [p for p in weights.params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (phase.beta1, phase.beta2)
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=phase.lr, betas=betas, fused=not isinstance(weights, Sharded))
    if isinstance(weights, Sharded | ZeroSharded):
        raise TrainingError(f"optimizer {phase.optimizer} does not work on shards; take adamw, or student.parallel=ddp")
    if phase.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=phase.lr)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "gpu")
    import bitsandbytes

    made: Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=phase.lr, betas=betas)
    return made


def optimizer_state(optimizer: Optimizer, weights: Weights) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name, whole and on the CPU."""
    if isinstance(weights, ZeroSharded):
        return weights.optimizer_state(optimizer)
    return {
        name: {key: weights.whole(v) if isinstance(v, Tensor) else v for key, v in optimizer.state[p].items()}
        for name, p in zip(weights.names, weights.params)
        if p in optimizer.state
    }


def load_optimizer_state(optimizer: Optimizer, weights: Weights, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Take over a state that `optimizer_state` gave, of any number of processes."""
    if isinstance(weights, ZeroSharded):
        weights.load_optimizer_state(optimizer, state)
        return
    for name, p in zip(weights.names, weights.params):
        if name in state:
            optimizer.state[p] = {
                key: weights.like(v.clone(), p) if isinstance(v, Tensor) else v for key, v in state[name].items()
            }


class RunningMean:
    """An exponential moving average of the weights in fp32, corrected for its start (Kingma and Ba 2015, section 3).

    After t updates it is (1 - d) / (1 - d**t) * sum over i of d**(t - i) * weights_i.
    """

    def __init__(self, params: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.means = [torch.zeros_like(p, requires_grad=False) for p in params]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor]) -> None:
        """Take the weights of one more step in."""
        self.updates += 1
        # the corrected mean moves by (1 - d) / (1 - d**t) of its distance to the weights
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        torch._foreach_lerp_(self.means, [p.detach() for p in params], share)
