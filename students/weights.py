"""The weights that an optimizer works on, whatever the model computes in and wherever they lie.

`Replica` keeps fp32 master weights beside a model that computes in bf16 (or is the model itself in fp32), whole in
every process. `Sharded` leaves them to FSDP2: fp32 shards, gathered and rounded layer by layer; `zero.ZeroSharded` to
DeepSpeed. All turn sums of gradients into means, hand out and take whole tensors by parameter name, and so share
checkpoints with any number of processes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from distill.errors import TrainingError

from .distributed import World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Weights(Protocol):
    """What the loop asks of the weights."""

    lockstep: bool
    """Whether all processes have to make each pass together, those without a pack too."""
    scattered: bool
    """Whether the model itself is in shards, so that it can only answer when gathered."""
    names: list[str]
    params: list[Tensor]
    """What the optimizer works on, in the order of `names` (where DeepSpeed joins it, the model's parameters)."""

    def engage(self, objective: Any, optimizer: Optimizer) -> Any:
        """Take both into service, before the first pass; returns what to call in the objective's place."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pass's summed loss up."""

    def step(self, optimizer: Optimizer, weight: float, clip: float) -> float:
        """Step with the mean gradient over `weight`, of norm `clip` at most, and clear it; returns the norm before.

        Where that is not finite, nothing is stepped.
        """

    def publish(self) -> None:
        """Let the model compute with what the optimizer has made."""

    def state(self) -> dict[str, Tensor]:
        """Whole fp32 weights by name, on the CPU; every process must ask."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over whole weights."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A whole CPU copy of a tensor that is laid out like a parameter."""

    def like(self, tensor: Tensor, param: Tensor) -> Tensor:
        """The way back of `whole`."""


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


class Replica:
    """fp32 weights and their gradients, beside a model that computes in bf16 (or being the model itself in fp32).

    Takes an fp32 model and turns its weights to `dtype` in place, so the masters keep what rounding would lose.
    Buffers stay as they are: the rotary frequencies are fp32 in inference, whatever the weights are. With several
    processes each adds up its own gradients, and the sums meet once a step, in fp32.
    """

    lockstep = scattered = False

    def __init__(self, model: nn.Module, dtype: torch.dtype, world: World | None = None) -> None:
        self.world = world or World()
        self.names = trained_names(model)
        self.model_params = [p for p in model.parameters() if p.requires_grad]
        self.separate = dtype not in (torch.float32, torch.float64)
        self.params: list[Tensor] = list(self.model_params)
        if self.separate:
            self.params = [p.detach().clone().requires_grad_() for p in self.model_params]
            for own in model.parameters():
                if own.is_floating_point():
                    own.data = own.data.to(dtype)
            for own, master in zip(self.model_params, self.params):
                own.register_post_accumulate_grad_hook(self._collect(master))

    @staticmethod
    def _collect(master: Tensor) -> Callable[[Tensor], None]:
        """Move a bf16 gradient into the master's fp32 one as soon as it exists, so sums are never kept in bf16."""

        def hook(own: Tensor) -> None:
            assert own.grad is not None
            if master.grad is None:
                master.grad = own.grad.float()
            else:
                master.grad.add_(own.grad)
            own.grad = None

        return hook

    def engage(self, objective: Any, optimizer: Optimizer) -> Any:
        """See `Weights`."""
        return objective

    def backward(self, loss: Tensor) -> None:
        """See `Weights`."""
        loss.backward()

    def step(self, optimizer: Optimizer, weight: float, clip: float) -> float:
        """See `Weights`."""
        return _step(self, optimizer, weight, clip)

    @torch.no_grad()
    def average(self, weight: float, clip: float) -> float:
        """Turn summed gradients into means over `weight`, of norm `clip` at most; returns the norm before.

        Done here, once a step and in fp32: scaling the loss would round 1 / weight to bf16.
        """
        gradients = self._gradients()
        self.world.sum_(gradients)
        norm = float(get_total_norm(gradients)) / weight
        factor = min(1.0, clip / (norm + 1e-6)) / weight
        torch._foreach_mul_(gradients, factor)
        return norm

    def _gradients(self) -> list[Tensor]:
        """All gradients; with several processes zeros where this one had no pack, since the sums take turns."""
        if self.world.size > 1:
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in self.params if p.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's weights."""
        if self.separate:
            torch._foreach_copy_(self.model_params, self.params)

    def state(self) -> dict[str, Tensor]:
        """See `Weights`."""
        return {name: self.whole(p) for name, p in zip(self.names, self.params)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Weights`."""
        for name, master in zip(self.names, self.params):
            master.copy_(state[name])
        self.publish()

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Weights`."""
        return tensor.detach().to("cpu", copy=True)

    def like(self, tensor: Tensor, param: Tensor) -> Tensor:
        """See `Weights`."""
        return tensor.to(param.device)


class Sharded:
    """fp32 weights in shards over all processes by FSDP2 (`fully_shard`), computing in `dtype`.

    Every layer is a unit; head, embedding and final norm belong to the objective itself. Gradients are added up over
    processes in fp32 at every pass.
    """

    lockstep = scattered = True

    def __init__(self, objective: nn.Module, dtype: torch.dtype, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from distill.attention import decoder_of

        model: Any = objective.model
        mesh = init_device_mesh(model.device.type, (world.size,))
        rounded = dtype not in (torch.float32, torch.float64)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if rounded else None,
            reduce_dtype=torch.float32 if rounded else None,
            cast_forward_inputs=False,
        )
        for layer in decoder_of(model).layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=policy)
        for module in objective.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                # sums over processes, not means; gloo knows no other sum than the plain one
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.names = trained_names(model)
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]

    def engage(self, objective: Any, optimizer: Optimizer) -> Any:
        """See `Weights`."""
        return objective

    def backward(self, loss: Tensor) -> None:
        """See `Weights`."""
        loss.backward()

    def step(self, optimizer: Optimizer, weight: float, clip: float) -> float:
        """See `Weights`."""
        return _step(self, optimizer, weight, clip)

    @torch.no_grad()
    def average(self, weight: float, clip: float) -> float:
        """As `Replica.average`."""
        gradients = [p.grad for p in self.params if p.grad is not None]
        norm = float(_full(get_total_norm(gradients))) / weight
        factor = min(1.0, clip / (norm + 1e-6)) / weight
        torch._foreach_mul_(gradients, factor)
        return norm

    def publish(self) -> None:
        """FSDP rounds the shards whenever it gathers a layer."""

    def state(self) -> dict[str, Tensor]:
        """See `Weights`."""
        return {name: self.whole(p) for name, p in zip(self.names, self.params)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Weights`."""
        for name, param in zip(self.names, self.params):
            param.copy_(self.like(state[name], param))

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Weights`."""
        return _full(tensor.detach()).to("cpu", copy=True)

    def like(self, tensor: Tensor, param: Tensor) -> Tensor:
        """See `Weights`."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(param, DTensor) or tensor.shape != param.shape:
            return tensor
        return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements)


def _step(weights: Replica | Sharded, optimizer: Optimizer, weight: float, clip: float) -> float:
    """`Weights.step` where gradients and optimizer are torch's own."""
    norm = weights.average(weight, clip)
    if math.isfinite(norm):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.publish()
    return norm


def _full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def make_weights(objective: Any, precision: str, parallel: str, world: World) -> Weights:
    """The weights of an objective as `student.parallel` says.

    Raises TrainingError for `fsdp` in a single process, and for what DeepSpeed cannot do (see `zero.check_zero`).
    """
    from .zero import STAGES, ZeroSharded, check_zero

    check_zero(parallel, objective.phase, world.size)
    if parallel in STAGES:
        return ZeroSharded(objective.model, DTYPES[precision], world, STAGES[parallel])
    if parallel != "fsdp":
        return Replica(objective.model, DTYPES[precision], world)
    if world.size == 1:
        raise TrainingError(
            "student.parallel is fsdp, but this is the only process; start it with torchrun --nproc-per-node N -m"
            " distill train …, or set student.parallel=auto"
        )
    return Sharded(objective, DTYPES[precision], world)
