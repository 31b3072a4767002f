"""The module that is trained: a causal language model with head and loss inside its forward pass.

Head and loss belong inside, so that whoever wraps the module (FSDP gathers weights there) sees every use of its
weights. Only supervised rows meet the head. Documents of a pack never see one another, on any attention.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.attention import PER_DOCUMENT
from distill.config import SftPhase

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


class StudentObjective(nn.Module):
    """The model and its loss; `forward` takes a pack and gives sums over its supervised rows."""

    def __init__(self, model: Any, phase: SftPhase) -> None:
        super().__init__()
        self.model = model
        self.phase = phase

    def forward(self, pack: PackTensors) -> Losses:
        """The pack's weighted loss, summed, and the negative log-likelihood of every row.

        Without gradients the loss is the weighted likelihood alone, whatever smoothing and z-loss training adds.
        """
        phase = self.phase
        hidden_NH = self.hidden(pack).flatten(0, 1)[pack.rows_N]
        head_VH = self.model.get_output_embeddings().weight
        if not torch.is_grad_enabled():
            nll_N = row_losses(hidden_NH, head_VH, pack.targets_N)
            return Losses((nll_N * pack.weights_N).sum(), nll_N)
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
        found = decoder_of(self.model)(
            **given, position_ids=pack.positions_BT, use_cache=False, **boundaries(self.model, pack)
        )
        hidden_BTH: Tensor = found.last_hidden_state
        return hidden_BTH


def as_attended(pack: PackTensors, attention: str) -> PackTensors:
    """The same cells as the attention takes them: ours sees rows of a padded batch as documents of one pack."""
    if pack.bounds is not None or attention != PER_DOCUMENT:
        return pack
    batch, tokens = pack.ids_BT.shape
    bounds = list(range(0, batch * tokens + 1, tokens))
    return pack._replace(ids_BT=pack.ids_BT.view(1, -1), positions_BT=pack.positions_BT.view(1, -1), bounds=bounds)


def decoder_of(model: Any) -> Any:
    """The decoder below the head, inside adapters too."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


def noisy(embedded_BTH: Tensor, bounds: list[int] | None, alpha: float) -> Tensor:
    """Embeddings with uniform noise of size alpha / sqrt(tokens of the document x width) (NEFTune)."""
    batch, tokens, width = embedded_BTH.shape
    lengths_T = torch.full((tokens,), tokens, dtype=torch.float32, device=embedded_BTH.device)
    for start, end in zip(bounds or (), (bounds or ())[1:]):
        lengths_T[start:end] = end - start
    size_T1 = (alpha / (lengths_T * width).sqrt())[:, None]
    noise = torch.rand(batch, tokens, width, device=embedded_BTH.device) * 2 - 1
    return embedded_BTH + (noise * size_T1).to(embedded_BTH.dtype)


def boundaries(model: Any, pack: PackTensors) -> dict[str, Any]:
    """Document boundaries as the model's attention takes them."""
    bounds, kind = pack.bounds, model.config._attn_implementation
    if bounds is None:
        return {}  # plain causal attention: rows are padded on the right, where no query looks
    if kind == PER_DOCUMENT:
        return {"cu_seq_lens_q": bounds}
    if kind in ("sdpa", "eager"):
        return {"attention_mask": block_mask(bounds, model.dtype, model.device)}
    lengths = torch.tensor(bounds, dtype=torch.int32, device=model.device)
    longest = max(end - start for start, end in zip(bounds, bounds[1:]))
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


def block_mask(bounds: list[int], dtype: torch.dtype, device: Any) -> Tensor:
    """A mask to add to scores, [1, 1, T, T]: 0 inside a document up to the query, the dtype's minimum elsewhere."""
    lengths = torch.tensor([end - start for start, end in zip(bounds, bounds[1:])], device=device)
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    allowed_TT = (document_T[:, None] == document_T[None]).tril()
    mask_TT = torch.zeros(allowed_TT.shape, dtype=dtype, device=device)
    return mask_TT.masked_fill_(~allowed_TT, torch.finfo(dtype).min)[None, None]
