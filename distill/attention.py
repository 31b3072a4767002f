"""Attention that never crosses a document, registered with transformers as `per_document`.

Packed documents are attended each by itself, from the boundaries (`cu_seq_lens_q`) that the trainer passes, the same
way that flash-attention's variable-length kernel takes them. On a CPU it is computed block by block with batched
matrix products, which keep no scores for the backward pass and are several times faster than torch's own kernel in
bf16; elsewhere, and with dropout, torch's SDPA does the work. Importing this loads torch.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distill.products import batched_product

PER_DOCUMENT = "per_document"

SPREAD = 1.25
"""How much longer than its shortest document a group of documents may be padded."""
ALONE = 128
"""Documents longer than this are attended each by itself: they fill a block, and need no padding."""
ROWS = 384
"""Rows of scores (query heads of a key head x queries) that a block aims at."""
BLOCK = (64, 256)
"""Fewest and most queries of a block."""


def register_attention() -> None:
    """Make `per_document` known to transformers, with no mask of its own (idempotent)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PER_DOCUMENT, per_document_attention)
    AttentionMaskInterface.register(PER_DOCUMENT, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def per_document_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Any = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed document.

    query [1, heads, tokens, head_dim]; key and value [1, kv_heads, tokens, head_dim]; `cu_seq_lens_q` holds the
    documents' boundaries as Python ints or a 1-d tensor, 0 first and the number of tokens last. Returns
    [1, tokens, heads, head_dim]. Documents of like length are laid side by side, padded on the right, and attended
    together: no query sees the padding, since it comes after all it may see. Raises ValueError without boundaries,
    since attending across documents must never be the silent fallback, and for a document longer than the model's
    sliding window.
    """
    if cu_seq_lens_q is None:
        raise ValueError("per_document attention takes cu_seq_lens_q: the boundaries of the packed documents")
    bounds = tuple(cu_seq_lens_q) if isinstance(cu_seq_lens_q, list) else tuple(cu_seq_lens_q.tolist())
    groups = _groups(bounds, query.device)
    longest = max(group.longest for group in groups)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"per_document attention has no sliding window; documents may have {sliding_window} tokens")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.device.type == "cpu" and dropout == 0.0:
        return _BlockAttention.apply(query_THD, key_TGD, value_TGD, groups, scale)[None], None
    return _torch_attention(query_THD, key_TGD, value_TGD, groups, scale, dropout)[None], None


class Group(NamedTuple):
    """Documents of like length, side by side: a grid of `documents` rows, each `longest` cells."""

    documents: int
    longest: int
    tokens: Any
    """Where the group's tokens stand in the pack: a slice for one document, else an index tensor."""
    cells: Any
    """Where they stand in the grid; None where the grid has no padding."""

    def spread(self, x_THD: Tensor) -> Tensor:
        """The group's tokens as a grid [documents, longest, heads, dim]; padding is zero."""
        rows = x_THD[self.tokens]
        if self.cells is not None:
            grid = rows.new_zeros(self.documents * self.longest, *rows.shape[1:])
            rows = grid.index_copy_(0, self.cells, rows)
        return rows.unflatten(0, (self.documents, self.longest))

    def gather(self, grid_NLHD: Tensor, out_THD: Tensor) -> None:
        """Write a grid back to where its tokens stand in the pack."""
        rows = grid_NLHD.reshape(-1, *grid_NLHD.shape[2:])
        out_THD[self.tokens] = rows if self.cells is None else rows[self.cells]


@functools.lru_cache(maxsize=64)
def _groups(bounds: tuple[int, ...], device: Any) -> tuple[Group, ...]:
    """Documents in groups of like length. Every layer of every pass over a pack asks for the same tables."""
    by_length = sorted(zip(bounds, bounds[1:]), key=lambda document: document[1] - document[0])
    grouped: list[list[tuple[int, int]]] = []
    for start, end in by_length:
        if not grouped or end - start > ALONE or end - start > SPREAD * (grouped[-1][0][1] - grouped[-1][0][0]):
            grouped.append([])
        grouped[-1].append((start, end))
    with torch.inference_mode(False):  # a table made while evaluating must serve training too
        return tuple(_group(documents, device) for documents in grouped)


def _group(documents: list[tuple[int, int]], device: Any) -> Group:
    longest = max(end - start for start, end in documents)
    if len(documents) == 1:
        return Group(1, longest, slice(*documents[0]), None)
    tokens = torch.cat([torch.arange(start, end) for start, end in documents]).to(device)
    cells = torch.cat([torch.arange(end - start) + row * longest for row, (start, end) in enumerate(documents)])
    padded = len(cells) < len(documents) * longest
    return Group(len(documents), longest, tokens, cells.to(device) if padded else None)


# --- torch's own kernels --------------------------------------------------------------------------------------------


def _torch_attention(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, groups: tuple[Group, ...], scale: float, dropout: float
) -> Tensor:
    """One call of SDPA a group; [tokens, heads, dim]."""
    parts = []
    for group in groups:
        query, key, value = (group.spread(x).transpose(1, 2) for x in (query_THD, key_TGD, value_TGD))
        gqa = query.shape[1] != key.shape[1]
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=gqa
        )
        rows = attended.transpose(1, 2).flatten(0, 1)
        parts.append(rows if group.cells is None else rows[group.cells])
    if len(groups) == 1 and isinstance(groups[0].tokens, slice):
        return parts[0]
    places = [torch.arange(query_THD.shape[0], device=query_THD.device)[group.tokens] for group in groups]
    return torch.cat(parts)[torch.argsort(torch.cat(places))]


# --- block by block -------------------------------------------------------------------------------------------------


class _Heads(NamedTuple):
    """A group's queries, keys and values, a batch entry for each document and key head.

    query [batch, longest x shared, dim], scaled: the heads that share a key head are neighbouring rows of a token, so
    that a run of tokens is a run of rows. key and value [batch, longest, dim].
    """

    query_NMD: Tensor
    key_NLD: Tensor
    value_NLD: Tensor

    @classmethod
    def of(cls, group: Group, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float) -> "_Heads":
        query, key, value = (_heads_first(group.spread(x), key_TGD.shape[1]) for x in (query_THD, key_TGD, value_TGD))
        return cls(query.mul_(scale), key, value)

    @property
    def shared(self) -> int:
        """Query heads of each key head."""
        return int(self.query_NMD.shape[1] // self.key_NLD.shape[1])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Runs of tokens that are attended at once."""
        longest = int(self.key_NLD.shape[1])
        size = min(max(BLOCK[0], ROWS // self.shared), BLOCK[1])
        yield from ((start, min(start + size, longest)) for start in range(0, longest, size))

    def weights(self, start: int, end: int) -> Tensor:
        """Attention weights of the queries from `start` to `end` over the keys before `end`."""
        query = self.query_NMD[:, start * self.shared : end * self.shared]
        scores = batched_product(query, self.key_NLD[:, :end].transpose(1, 2))
        tile = scores.unflatten(1, (end - start, -1))[..., start:]
        tile.add_(_ahead(end - start, scores.dtype))
        return torch.softmax(scores, -1)


@functools.lru_cache(maxsize=64)
def _ahead(size: int, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a key is ahead of a query, [queries, 1, keys]."""
    with torch.inference_mode(False):
        return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)[:, None]


def _heads_first(x_NLHD: Tensor, key_heads: int) -> Tensor:
    """[documents, longest, heads, dim] as [documents x key heads, longest x heads of each, dim], a copy."""
    documents, _, heads, dim = x_NLHD.shape
    grouped = x_NLHD.unflatten(2, (key_heads, heads // key_heads)).transpose(1, 2)
    return grouped.clone(memory_format=torch.contiguous_format).view(documents * key_heads, -1, dim)


def _tokens_first(x_NMD: Tensor, documents: int, longest: int) -> Tensor:
    """The way back of `_heads_first`: [documents, longest, heads, dim]."""
    return x_NMD.view(documents, -1, longest, x_NMD.shape[1] // longest, x_NMD.shape[2]).transpose(1, 2).flatten(2, 3)


class _BlockAttention(torch.autograd.Function):
    """Softmax attention in blocks of queries; the backward pass makes the weights anew instead of keeping them.

    d scores = weights * (d weights - sum(d weights * weights)), the softmax's own derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, groups: tuple[Group, ...], scale: float
    ) -> Tensor:
        out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
        kept: list[Tensor] = []
        for group in groups:
            heads = _Heads.of(group, query_THD, key_TGD, value_TGD, scale)
            attended = torch.empty_like(heads.query_NMD)
            for start, end in heads.blocks():
                rows = slice(start * heads.shared, end * heads.shared)
                attended[:, rows] = batched_product(heads.weights(start, end), heads.value_NLD[:, :end])
            group.gather(_tokens_first(attended, group.documents, group.longest), out_THD)
            kept += heads
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.scale, ctx.shapes = groups, scale, (query_THD.shape, key_TGD.shape, value_TGD.shape)
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        kept = iter(ctx.saved_tensors)
        by_query, by_key, by_value = (torch.empty(shape, dtype=grads[0].dtype) for shape in ctx.shapes)
        for group in ctx.groups:
            heads = _Heads(next(kept), next(kept), next(kept))
            found = _backward(heads, _heads_first(group.spread(grads[0]), ctx.shapes[1][1]))
            found.query_NMD.mul_(ctx.scale)
            for one, out in zip(found, (by_query, by_key, by_value)):
                group.gather(_tokens_first(one, group.documents, group.longest), out)
        return by_query, by_key, by_value, None, None


def _backward(heads: _Heads, gradient_NMD: Tensor) -> _Heads:
    """Gradients of a group; those of keys and values are summed over blocks in fp32 at least."""
    dtype = heads.key_NLD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    by_query = torch.empty_like(heads.query_NMD)
    by_key, by_value = (torch.zeros(x.shape, dtype=wide) for x in (heads.key_NLD, heads.value_NLD))
    for start, end in heads.blocks():
        rows = slice(start * heads.shared, end * heads.shared)
        weights, gradient = heads.weights(start, end), gradient_NMD[:, rows]
        by_value[:, :end] += batched_product(weights.transpose(1, 2), gradient)
        by_weights = batched_product(gradient, heads.value_NLD[:, :end].transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, dtype)
        by_query[:, rows] = batched_product(by_scores, heads.key_NLD[:, :end])
        by_key[:, :end] += batched_product(by_scores.transpose(1, 2), heads.query_NMD[:, rows])
    return _Heads(by_query, by_key.to(dtype), by_value.to(dtype))


# --- models that read packed documents --------------------------------------------------------------------------------


def decoder_of(model: Any) -> Any:
    """The decoder below the head of a causal language model, inside adapters too."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


@contextmanager
def attending_by(model: Any, kind: str) -> Iterator[None]:
    """Let a model attend in another way inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def boundaries(model: Any, bounds: list[int] | None) -> dict[str, Any]:
    """Document boundaries (0 first, the number of tokens last) as the model's attention takes them."""
    kind = model.config._attn_implementation
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


def final_hidden(model: Any, positions_BT: Tensor, bounds: list[int] | None, **cells: Tensor) -> Tensor:
    """Final hidden states [B, T, H] of a causal language model over packed documents (or rows, without bounds).

    `cells` is what stands there: `input_ids` [B, T], or `inputs_embeds` [B, T, H].
    """
    found = decoder_of(model)(**cells, position_ids=positions_BT, use_cache=False, **boundaries(model, bounds))
    hidden_BTH: Tensor = found.last_hidden_state
    return hidden_BTH
