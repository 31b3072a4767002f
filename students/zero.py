"""Weights that DeepSpeed shards: ZeRO stages 1, 2 and 3 behind the contract of `Replica` and `Sharded`.

DeepSpeed makes the passes, adds gradients up in fp32 over passes and processes, keeps fp32 masters beside bf16 weights
and steps the optimizer on this process's share of them. What decides a training stays ours: right before the optimizer
takes gradients, they become means over the step's weight, clipped; rates, plan, seeds, the guard against numbers that
are not finite and checkpoints of whole tensors are the loop's as ever.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.config import TrainingPhase
from distill.errors import MissingExtraError, TrainingError

from .distributed import BUCKET, World
from .weights import trained_names

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
"""What each stage shards, beyond the one before: optimizer state and masters, gradients, weights."""
OLDEST = (0, 19, 8)
"""The oldest version whose source was read for what is relied on here."""


def check_zero(parallel: str, phase: TrainingPhase, processes: int) -> None:
    """Refuse, before any work, what DeepSpeed cannot do here; other values of `parallel` pass.

    Raises TrainingError with the reason and the remedy, MissingExtraError without DeepSpeed.
    """
    if parallel not in STAGES:
        return
    if processes == 1:
        raise TrainingError(
            f"{parallel} shards over several processes, but this is the only one; start it with accelerate launch"
            f" --use_deepspeed --zero_stage {STAGES[parallel]} --num_processes N -m distill train …, or set"
            " student.parallel=auto and launch without DeepSpeed"
        )
    refused = {
        f"optimizer {phase.optimizer} does not work on flat shards; take adamw": phase.optimizer != "adamw",
        "ema_decay needs the masters of each parameter, which DeepSpeed joins and cuts; remove it": phase.ema_decay,
        "compile is not DeepSpeed's own, whose hooks it would trace; set compile=false": phase.compile,
        "lora.quantize nf4 leaves weights that are no floats; set lora.quantize=none": _is_quantized(phase),
        "a monitor has the whole model answer, of which lora trains a part; remove monitor.sets and lm_eval": (
            STAGES[parallel] == 3 and phase.lora and phase.monitor and (phase.monitor.sets or phase.monitor.lm_eval)
        ),
    }
    for reason, found in refused.items():
        if found:
            raise TrainingError(f"{parallel} (DeepSpeed): {reason}, or set student.parallel=ddp and launch without it")
    _check_installed()


def _check_installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed")
    found = importlib.metadata.version("deepspeed")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise TrainingError(
            f"deepspeed {found} is installed, which would pass over settings that sums and steps depend on; upgrade it"
            f" with: pip install 'deepspeed>={oldest}'"
        )


def _is_quantized(phase: TrainingPhase) -> bool:
    return phase.lora is not None and phase.lora.quantize != "none"


class ZeroSharded:
    """fp32 weights in shards over all processes by DeepSpeed, computing in `dtype` (bf16 or fp32).

    `engage` hands model and optimizer over. DeepSpeed's own optimizer then works on joined pieces of parameters, which
    have no names; `params` stay the model's.
    """

    lockstep = True

    def __init__(self, model: nn.Module, dtype: torch.dtype, world: World, stage: int) -> None:
        self.names = trained_names(model)
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.dtype, self.world, self.stage = dtype, world, stage
        self.scattered = stage == 3
        self.averaged_over = world.size if stage == 3 else 1  # stage 3 has no sums over processes, only means
        self.engine: Any = None
        self._weight, self._clip = 1.0, 1.0

    def engage(self, objective: Any, optimizer: Optimizer) -> Any:
        """See `Weights`."""
        deepspeed = _deepspeed(objective.model.device.type)
        # the masters it makes are of weights already rounded to bf16
        exact = {name: p.detach().to("cpu", copy=True) for name, p in zip(self.names, self.params)}
        settings = configuration(self.stage, self.dtype, objective.model.config.hidden_size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory use, where results belong
            self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
        optimizer.register_step_pre_hook(self._finish_gradients)
        self.load(exact)
        return self.engine

    def backward(self, loss: Tensor) -> None:
        """See `Weights`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, optimizer: Optimizer, weight: float, clip: float) -> float:
        """See `Weights`. DeepSpeed leaves the weights alone where a gradient is not finite."""
        self._weight, self._clip = weight, clip
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) * self.averaged_over / weight

    @torch.no_grad()
    def _finish_gradients(self, optimizer: Optimizer, *given: Any) -> None:
        """Turn sums (or means over processes) into means over the weight, clipped, for the part that steps now."""
        factor = self.averaged_over / self._weight
        norm = float(self.engine.optimizer._global_grad_norm) * factor  # of all parts, known before the first steps
        factor *= min(1.0, self._clip / (norm + 1e-6))
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def publish(self) -> None:
        """DeepSpeed rounds the masters into the model's weights at every step."""

    # --- whole tensors by name ---

    def state(self) -> dict[str, Tensor]:
        """See `Weights`."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: self.whole(safe_get_full_fp32_param(p)) for name, p in zip(self.names, self.params)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Weights`."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, p in zip(self.names, self.params):
            if self.stage < 3:
                safe_set_full_fp32_param(p, state[name])
                continue
            safe_set_local_fp32_param(p, self._own_part(p, state[name]))
            with GatheredParameters([p], modifier_rank=0):
                if self.world.main:
                    p.copy_(state[name])
        if self.stage < 3:
            self.engine.optimizer.update_lp_params()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name, whole and on the CPU; every process must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not optimizer.state:
            return {}
        self._link()
        flat = next(iter(optimizer.state.values()))
        moments = [key for key, value in flat.items() if isinstance(value, Tensor) and value.ndim]
        shared = {key: self.whole(value) for key, value in flat.items() if key not in moments}
        return {
            name: {**shared, **{key: self.whole(safe_get_full_optimizer_state(p, key)) for key in moments}}
            for name, p in zip(self.names, self.params)
        }

    @torch.no_grad()
    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a state that `optimizer_state` gave, of any number of processes and any way of sharing."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not state:
            return
        self._make_room(optimizer, next(iter(state.values())))
        for name, p in zip(self.names, self.params):
            for key, value in state[name].items():
                if not value.ndim:
                    continue
                if self.stage < 3:
                    safe_set_full_optimizer_state(p, value, key)
                else:
                    safe_set_local_optimizer_state(p, self._own_part(p, value), key)

    def _make_room(self, optimizer: Optimizer, like: Mapping[str, Tensor]) -> None:
        """State for the joined pieces, which DeepSpeed leaves to the first step; what all share is set at once."""
        flats = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        for flat in flats or [p for group in optimizer.param_groups for p in group["params"]]:
            optimizer.state[flat] = {
                key: torch.zeros_like(flat, requires_grad=False) if value.ndim else value.clone().to(flat.device)
                for key, value in like.items()
            }
        self._link()

    def _link(self) -> None:
        """Let parameters find their state, which DeepSpeed does once, when only the first group has stepped."""
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _own_part(self, p: Any, value: Tensor) -> Tensor:
        """What this process keeps of a whole tensor in stage 3; its last part is filled up with zeros."""
        size = p.ds_tensor.numel()
        filled = value.new_zeros(size * self.world.size)
        filled[: value.numel()] = value.flatten()
        return filled[size * self.world.rank :][:size]

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Weights`; DeepSpeed hands out whole tensors already."""
        return tensor.detach().to("cpu", copy=True)

    def like(self, tensor: Tensor, param: Tensor) -> Tensor:
        """See `Weights`."""
        return tensor.to(param.device)


def configuration(stage: int, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """DeepSpeed's settings for a training whose loop is ours; `width` is the model's hidden size."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # it wants a number; packs are counted in tokens
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step takes as many passes as its packs
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",
        "gradient_clipping": 0.0,  # ours, of means over tokens
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET // 4,
            "allgather_bucket_size": BUCKET // 4,
            "stage3_param_persistence_threshold": 10 * width,  # norms and biases stay whole, as transformers has it
        },
    }


def _deepspeed(device: str) -> Any:
    """The package, told which device to use, its log on stderr."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device == "cpu":  # else it compiles a kernel with which processes of one machine share answers, not gradients
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed
