"""The module that is trained: a causal language model with head and loss inside its forward pass.

Head and loss belong inside, so that whoever wraps the module (FSDP gathers weights there) sees every use of its
weights. Only supervised rows meet the head. Documents of a pack never see one another, on any attention.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.attention import PER_DOCUMENT, final_hidden
from distill.config import KdPhase, TrainingPhase
from distill.products import product

from . import divergences
from .distillation import WIDE_ROWS, Mix, Targets, distillation_loss
from .hidden import captured_by, match_of
from .kernels import fused_loss
from .losses import Losses, cross_entropy, row_losses
from .packing import Pack


class PackTensors(NamedTuple):
    """A pack on its device; fields as in `Pack`."""

    ids_BT: Tensor
    positions_BT: Tensor
    rows_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    bounds: list[int] | None

    @classmethod
    def of(cls, pack: Pack, device: Any) -> "PackTensors":
        """Copy a pack to a device."""
        ids, positions, rows, targets, weights = (
            torch.from_numpy(array).to(device)
            for array in (pack.ids_BT, pack.positions_BT, pack.rows_N, pack.targets_N, pack.weights_N)
        )
        return cls(ids, positions, rows, targets, weights, pack.bounds)


class Lesson(NamedTuple):
    """What the teachers say about a pack."""

    targets: Targets
    features: Sequence[Tensor] = ()
    """Hidden states of a teacher at the supervised rows, [N, H] each, in the order of `hidden.captured`."""


class StudentObjective(nn.Module):
    """The model and its loss; `forward` takes a pack and gives sums over its supervised rows."""

    def __init__(self, model: Any, phase: TrainingPhase) -> None:
        super().__init__()
        self.model = model
        self.phase = phase
        self.mix = mix_of(phase, 1.0) if isinstance(phase, KdPhase) else None
        """How a distilling phase weighs its losses at this step."""

    def forward(self, pack: PackTensors, lesson: Lesson | None = None) -> Losses:
        """The pack's weighted loss, summed, and the negative log-likelihood of every row.

        With a lesson the loss is the phase's divergence to the teachers, and what their hidden states add. Without
        gradients it is the weighted likelihood alone, whatever training adds, or with a lesson forward KL.
        """
        phase = self.phase
        match = match_of(self.model) if lesson is not None and lesson.features else None
        with captured_by(match, self.model) as states:
            hidden_NH = self.hidden(pack).flatten(0, 1)[pack.rows_N]
        head_VH = self.model.get_output_embeddings().weight
        if not torch.is_grad_enabled() and lesson is not None:
            kl_N = distances(hidden_NH, head_VH, lesson.targets, phase)
            return Losses((kl_N * pack.weights_N).sum(), kl_N)
        if not torch.is_grad_enabled():
            nll_N = row_losses(hidden_NH, head_VH, pack.targets_N)
            return Losses((nll_N * pack.weights_N).sum(), nll_N)
        if lesson is not None:
            assert self.mix is not None  # only such a phase has teachers
            found = distillation_loss(hidden_NH, head_VH, pack.targets_N, pack.weights_N, lesson.targets, self.mix)
            if match is None:
                return found
            own = [state_BTH.flatten(0, 1)[pack.rows_N] for state_BTH in states]
            return found._replace(total=found.total + match(own, lesson.features, pack.weights_N))
        if phase.loss_kernel != "chunked":
            return fused_loss(phase.loss_kernel, hidden_NH, head_VH, pack.targets_N)
        return cross_entropy(hidden_NH, head_VH, pack.targets_N, pack.weights_N, phase.label_smoothing, phase.z_loss)

    def hidden(self, pack: PackTensors) -> Tensor:
        """Final hidden states [B, T, H]."""
        pack = as_attended(pack, self.model.config._attn_implementation)
        given: dict[str, Any] = {"input_ids": pack.ids_BT}
        if self.model.training and self.phase.neftune_alpha is not None:
            embedded = self.model.get_input_embeddings()(pack.ids_BT)
            given = {"inputs_embeds": noisy(embedded, pack.bounds, self.phase.neftune_alpha)}
        return final_hidden(self.model, pack.positions_BT, pack.bounds, **given)


def distances(hidden_NH: Tensor, head_VH: Tensor, targets: Targets, phase: TrainingPhase) -> Tensor:
    """KL(teacher || student) of every row at the phase's temperature, in nats, [N]; a few rows' logits at a time."""
    assert isinstance(phase, KdPhase)  # only such a phase has teachers
    found = []
    for start in range(0, len(hidden_NH), WIDE_ROWS):
        some_NH = hidden_NH[start : start + WIDE_ROWS]
        logits = product(some_NH, head_VH[: targets.vocabulary].T).float() / phase.temperature
        known = targets.chunk(start, start + len(some_NH)).at(0, len(some_NH))
        found.append(known.pull_(logits.log_softmax(-1), divergences.forward_kl))
    return torch.cat(found)


def mix_of(phase: KdPhase, share: float) -> Mix:
    """The loss of a distilling phase; the teacher has `share` in the target of `taid`, if that is its divergence."""
    return Mix(measure_of(phase, share), phase.temperature, phase.kd_weight, phase.ce_weight)


def measure_of(phase: KdPhase, share: float) -> divergences.Measure:
    """The phase's divergence, as `mix_of` has it."""
    if phase.divergence == "jsd":
        return partial(divergences.jsd, beta=phase.jsd_beta)
    if phase.divergence in ("skewed_kl", "skewed_reverse_kl"):
        return partial(getattr(divergences, phase.divergence), skew=phase.skew)
    if phase.divergence == "taid":
        return partial(divergences.taid, share=share)
    return divergences.forward_kl if phase.divergence == "forward_kl" else divergences.reverse_kl


def as_attended(pack: PackTensors, attention: str) -> PackTensors:
    """The same cells as the attention takes them: ours sees rows of a padded batch as documents of one pack."""
    if pack.bounds is not None or attention != PER_DOCUMENT:
        return pack
    batch, tokens = pack.ids_BT.shape
    bounds = list(range(0, batch * tokens + 1, tokens))
    return pack._replace(ids_BT=pack.ids_BT.view(1, -1), positions_BT=pack.positions_BT.view(1, -1), bounds=bounds)


def noisy(embedded_BTH: Tensor, bounds: list[int] | None, alpha: float) -> Tensor:
    """Embeddings with uniform noise of size alpha / sqrt(tokens of the document x width) (NEFTune)."""
    batch, tokens, width = embedded_BTH.shape
    lengths_T = torch.full((tokens,), tokens, dtype=torch.float32, device=embedded_BTH.device)
    for start, end in zip(bounds or (), (bounds or ())[1:]):
        lengths_T[start:end] = end - start
    size_T1 = (alpha / (lengths_T * width).sqrt())[:, None]
    noise = torch.rand(batch, tokens, width, device=embedded_BTH.device) * 2 - 1
    return embedded_BTH + (noise * size_T1).to(embedded_BTH.dtype)
