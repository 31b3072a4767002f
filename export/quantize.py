"""Weights in few bits that the graph builder cannot make: GPTQ over the student's own texts, put into a built graph.

GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization", algorithm 1) rounds a matrix column by column,
and moves each column's rounding error onto those not yet rounded, by the second moments of the matrix's inputs. Layers
are rounded in order, so that each sees what the rounded ones before it really pass on, and each is first moved to make
up for a part of what those have lost (`retargeted`). The grid of every block is chosen next, by the least error
weighted with those moments; columns with the largest moments are rounded first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import ExportError
from distill.products import faster_linears, product

from .schemes import HEAD, Scheme

DAMPING = 0.01
"""Share of the moments' mean diagonal that is added to it: hardly used inputs must not make the inverse explode."""
MADE_UP = 0.4
"""Share of an earlier loss that a matrix is to make up for: more of it fits the calibration texts too closely."""
COLUMNS_AT_ONCE = 128
"""Columns rounded before their errors are moved onto all that follow; a matter of speed only."""
ROWS_AT_ONCE = 4096
"""Rows of a head that are rounded together; a matter of memory only."""
SHRINKS = tuple(1 - 0.05 * step for step in range(8))
"""Shares of a block's range that are tried: clipping its extremes may lose less than a coarse grid does."""
GROUPS = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/o_proj": ("self_attn.o_proj",),
    "mlp/gate_proj": ("mlp.gate_proj",),
    "mlp/up_proj": ("mlp.up_proj",),
    "mlp/down_proj": ("mlp.down_proj",),
}
"""The graph's matrices and the modules of a transformers layer that they are made of, outputs joined in this order."""


WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Modules whose outputs are added to the residual stream."""
AFTER_ATTENTION = "post_attention_layernorm"
"""The module that reads the residual stream between them."""


class Grid(NamedTuple):
    """Values that the blocks of a matrix [N, K] may take: (integer - zero) * scale, integers from 0 to 2**bits - 1."""

    bits: int
    block_size: int
    scales_NB: Tensor
    zeros_NB: Tensor
    """Integers that stand for zero, as floats."""


class Rounded(NamedTuple):
    """A matrix as integers on a grid."""

    grid: Grid
    integers_NK: Tensor
    """As floats, or as bytes."""

    @property
    def values(self) -> Tensor:
        """The matrix that the graph computes with; [N, K]."""
        grid = self.grid
        blocks_NBW = self.integers_NK.reshape(len(self.integers_NK), -1, grid.block_size)
        return _values(blocks_NBW, grid.scales_NB[..., None], grid.zeros_NB[..., None]).reshape(self.integers_NK.shape)


def _integers(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return (weights / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)


def _values(integers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (integers - zeros).mul_(scales)


# --- grids and rounding -----------------------------------------------------------------------------------------------


def best_grid(weights_NK: Tensor, importance_K: Tensor, bits: int, block_size: int) -> Grid:
    """For every block the grid of least squared error weighted by its inputs' `importance_K`, among `SHRINKS`.

    K must be a multiple of `block_size`, or ValueError. Every grid can say exactly zero.
    """
    outputs, inputs = weights_NK.shape
    if inputs % block_size:
        raise ValueError(f"{inputs} inputs are no multiple of a block of {block_size}")
    blocks_NBW = weights_NK.reshape(outputs, -1, block_size)
    importance_BW = importance_K.reshape(-1, block_size)
    low_NB, high_NB = blocks_NBW.amin(-1).clamp(max=0), blocks_NBW.amax(-1).clamp(min=0)
    least_NB = torch.full_like(low_NB, torch.inf)
    best_scales_NB, best_zeros_NB = torch.ones_like(low_NB), torch.zeros_like(low_NB)
    for keep_low, keep_high in _kept_shares():
        scales_NB = (high_NB * keep_high - low_NB * keep_low) / (2**bits - 1)
        scales_NB = torch.where(scales_NB > 0, scales_NB, 1.0)
        zeros_NB = (-low_NB * keep_low / scales_NB).round().clamp(0, 2**bits - 1)
        wide = scales_NB[..., None], zeros_NB[..., None]
        errors_NBW = _values(_integers(blocks_NBW, *wide, bits), *wide).sub_(blocks_NBW)
        error_NB = torch.einsum("nbw,bw->nb", errors_NBW.square_(), importance_BW)
        better_NB = error_NB < least_NB
        least_NB = torch.where(better_NB, error_NB, least_NB)
        best_scales_NB = torch.where(better_NB, scales_NB, best_scales_NB)
        best_zeros_NB = torch.where(better_NB, zeros_NB, best_zeros_NB)
    return Grid(bits, block_size, best_scales_NB, best_zeros_NB)


def nearest(weights_NK: Tensor, bits: int, block_size: int) -> Rounded:
    """Round a matrix to the nearest values of its best grids, `ROWS_AT_ONCE` rows at a time."""
    outputs, inputs = weights_NK.shape
    integers_NK = torch.empty(outputs, inputs, dtype=torch.uint8)
    grids = []
    for start in range(0, outputs, ROWS_AT_ONCE):
        rows = weights_NK[start : start + ROWS_AT_ONCE]
        grids.append(best_grid(rows, torch.ones(inputs), bits, block_size))
        wide = grids[-1].scales_NB[..., None], grids[-1].zeros_NB[..., None]
        blocks_NBW = rows.reshape(len(rows), -1, block_size)
        integers_NK[start : start + len(rows)] = _integers(blocks_NBW, *wide, bits).reshape(rows.shape)
    scales, zeros = (torch.cat([getattr(grid, name) for grid in grids]) for name in ("scales_NB", "zeros_NB"))
    return Rounded(Grid(bits, block_size, scales, zeros), integers_NK)


def _kept_shares() -> list[tuple[float, float]]:
    """How much of the range below and above zero is kept: all, both shrunk alike, or either shrunk alone."""
    return list(dict.fromkeys(pair for share in SHRINKS for pair in ((share, share), (1.0, share), (share, 1.0))))


def compensated(weights_NK: Tensor, moments_KK: Tensor, grid: Grid) -> Rounded:
    """Round a matrix to a grid with GPTQ: each column's error is made up for by the columns not yet rounded.

    `moments_KK` is the sum of x x^T over the matrix's inputs, positive semi-definite; the result minimises, greedily,
    the squared error of the matrix's outputs over those inputs.
    """
    order_K = moments_KK.diagonal().argsort(descending=True)
    inverse_KK = _inverse_factor(moments_KK[order_K][:, order_K])
    # columns are walked one by one, so each lies in memory in one piece
    rest_KN = weights_NK.T[order_K].contiguous()
    block_K = order_K // grid.block_size
    scales_KN, zeros_KN = grid.scales_NB.T[block_K], grid.zeros_NB.T[block_K]
    integers_KN = torch.empty_like(rest_KN)
    for start in range(0, len(rest_KN), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(rest_KN))
        errors_CN = torch.empty_like(rest_KN[start:end])
        for k in range(start, end):
            integers_KN[k] = _integers(rest_KN[k], scales_KN[k], zeros_KN[k], grid.bits)
            error_N = (rest_KN[k] - _values(integers_KN[k], scales_KN[k], zeros_KN[k])) / inverse_KK[k, k]
            errors_CN[k - start] = error_N
            rest_KN[k + 1 : end].addr_(inverse_KK[k, k + 1 : end], error_N, alpha=-1)
        rest_KN[end:].addmm_(inverse_KK[start:end, end:].T, errors_CN, alpha=-1)
    found_NK = torch.empty_like(weights_NK)
    found_NK[:, order_K] = integers_KN.T
    return Rounded(grid, found_NK)


class Moments(NamedTuple):
    """Sums over a matrix's inputs x, as the rounded layers before it pass them on."""

    own_KK: Tensor
    """Of x x^T."""
    missing_NK: Tensor | None
    """Of (y' - y) x^T, where the matrix writes into the residual stream: y' is what stands there behind it where
    nothing is rounded, y what stands there now."""


def retargeted(weights_NK: Tensor, moments: Moments) -> Tensor:
    """The matrix to round: one that also makes up for what rounded layers before it have lost from the residual stream.

    W + `MADE_UP` M (H + d I)^-1, the least squares of the missing outputs over the inputs (moments M and H, damping d).
    Li et al. 2025 ("GPTAQ") correct every matrix for its own inputs; only those that write into the stream can stop
    losses from adding up, and those that read it are left alone.
    """
    if moments.missing_NK is None:
        return weights_NK
    factor_KK = torch.linalg.cholesky(_damped(moments.own_KK))
    return weights_NK + MADE_UP * torch.cholesky_solve(moments.missing_NK.double().T, factor_KK).T.float()


def _damped(moments_KK: Tensor) -> Tensor:
    moments = moments_KK.double()
    unused_K = moments.diagonal() <= 0
    moments[unused_K, unused_K] = 1.0
    return moments + torch.eye(len(moments)) * (DAMPING * moments.diagonal().mean())


def _inverse_factor(moments_KK: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments, whose rows say how an error spreads."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(moments_KK)))
    return torch.linalg.cholesky(inverse, upper=True).float()


# --- a whole model ----------------------------------------------------------------------------------------------------


def gptq(model: Any, documents: Sequence[Sequence[int]], scheme: Scheme) -> Iterator[dict[str, Rounded]]:
    """Round the layers of a transformers model (Llama, Qwen2, Qwen3; fp32) one by one, as the graph's matrices.

    Yields for each layer its matrices by node name, with the last one's the head's, whose errors meet no later column:
    a tied one is the embedding too, so its values are the nearest of their grids. `documents` are token ids to
    calibrate on. The model's weights become the rounded ones on the way, the head's excepted. Layers of
    `scheme.wide_layers` take 8 bits. Raises ExportError without documents.
    """
    if not documents:
        raise ExportError("GPTQ needs texts to calibrate on, and there are none")
    with torch.inference_mode(), faster_linears(model):
        exact = inputs = _layer_inputs(model, documents)
        for number, layer in enumerate(model.model.layers):
            moments, exact = _moments(layer, exact, inputs)
            bits = scheme.layer_bits(number)
            rounded = {
                f"/model/layers.{number}/{part}/MatMul": _round_modules(layer, names, moments[names[0]], bits, scheme)
                for part, names in GROUPS.items()
            }
            if layer is model.model.layers[-1]:
                rounded[HEAD] = nearest(model.lm_head.weight, scheme.head_bits, scheme.block_size)
            yield rounded
            inputs = [(_first(layer(hidden, **context)), context) for hidden, context in inputs]


def _round_modules(layer: Any, names: Sequence[str], moments: Moments, bits: int, scheme: Scheme) -> Rounded:
    """Round modules that read the same inputs as one matrix, and put its values into them."""
    modules = [layer.get_submodule(name) for name in names]
    weights_NK = retargeted(torch.cat([module.weight for module in modules]), moments)
    grid = best_grid(weights_NK, moments.own_KK.diagonal().clamp(min=1e-12), bits, scheme.block_size)
    rounded = compensated(weights_NK, moments.own_KK, grid)
    for module, values_NK in zip(modules, rounded.values.split([len(m.weight) for m in modules]), strict=True):
        module.weight.copy_(values_NK)
    return rounded


class _Caught(Exception):  # noqa: N818  # it ends a forward pass; it is no error
    """What the first layer was called with."""


Inputs = tuple[Tensor, dict[str, Any]]
"""What a layer is given for one document: hidden states [1, T, hidden], and masks and positions."""


def _layer_inputs(model: Any, documents: Sequence[Sequence[int]]) -> list[Inputs]:
    """What the first layer is given for each document."""
    caught: list[Inputs] = []

    def catch(module: Any, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        caught.append((arguments[0] if arguments else named.pop("hidden_states"), named))
        raise _Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for ids in documents:
            try:
                model.model(torch.tensor([list(ids)]), use_cache=False)
            except _Caught:
                continue
    finally:
        hook.remove()
    return caught


def _moments(layer: Any, exact: Sequence[Inputs], inputs: Sequence[Inputs]) -> tuple[dict[str, Moments], list[Inputs]]:
    """The moments of each module of `GROUPS` over all tokens, and what the layer passes on where nothing is rounded.

    `exact` are the layer's inputs there, `inputs` those that rounded layers pass on. Modules that read the same share.
    """
    readers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    moments = {name: _no_moments(layer.get_submodule(name), name in WRITERS) for name in readers}
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, arguments: seen.update({name: arguments[0].flatten(0, -2).float()})

    hooks = [layer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in (*readers, AFTER_ATTENTION)]
    passed_on: list[Inputs] = []
    for (hidden, context), (rounded, _) in zip(exact, inputs, strict=True):
        passed_on.append((_first(layer(hidden, **context)), context))
        after_attention_TN = seen[AFTER_ATTENTION]
        missing_TN = (passed_on[-1][0] - _first(layer(rounded, **context))).flatten(0, -2)
        missing = dict(zip(WRITERS, (after_attention_TN - seen[AFTER_ATTENTION], missing_TN), strict=True))
        for name, (own_KK, missing_NK) in moments.items():
            own_KK.add_(product(seen[name].T, seen[name]))
            if missing_NK is not None:
                missing_NK.add_(product(missing[name].T, seen[name]))
    for hook in hooks:
        hook.remove()
    return moments | {"mlp.up_proj": moments["mlp.gate_proj"]}, passed_on


def _no_moments(module: Any, writes: bool) -> Moments:
    outputs, inputs = module.weight.shape
    return Moments(torch.zeros(inputs, inputs), torch.zeros(outputs, inputs) if writes else None)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# --- into the graph ---------------------------------------------------------------------------------------------------


def write_weights(graph: Path, data: Path, matrices: Mapping[str, Rounded]) -> None:
    """Replace the integers, scales and zero points of a built graph's MatMulNBits nodes, in place.

    Sizes do not change, so each tensor is written over the old one, in the external data or in the graph itself. Raises
    ExportError where the graph has no such node or another shape.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name.rsplit("_Q", 1)[0]: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    with data.open("r+b") as file:
        for name, rounded in matrices.items():
            if name not in nodes:
                raise ExportError(f"{graph}: has no quantized matrix {name}")
            arrays: Sequence[NDArray[Any]] = packed(rounded)
            for tensor_name, array in zip(nodes[name].input[1:4], arrays, strict=True):
                _overwrite(tensors[tensor_name], array, file)
    graph.write_bytes(model.SerializeToString(deterministic=True))


def packed(rounded: Rounded) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Integers, scales and zero points as MatMulNBits stores them: 4-bit numbers two a byte, the lower half first."""
    grid = rounded.grid
    integers = rounded.integers_NK.to(torch.uint8).numpy()
    blocks = integers.reshape(len(integers), -1, grid.block_size)
    zeros = grid.zeros_NB.to(torch.uint8).numpy()
    scales = grid.scales_NB.numpy().astype(np.float32)
    if grid.bits == 8:
        return blocks, scales, zeros
    return _pairs_of_halves(blocks), scales, _pairs_of_halves(zeros)


def _pairs_of_halves(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], -1)
    return np.asarray(numbers[..., ::2] | (numbers[..., 1::2] << 4))


def _overwrite(tensor: Any, array: NDArray[Any], file: Any) -> None:
    import onnx

    array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if array.size != np.prod(tensor.dims):
        raise ExportError(f"{tensor.name}: has shape {list(tensor.dims)}, the rounded matrix gives {list(array.shape)}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in tensor.external_data}
        file.seek(int(place.get("offset", 0)))
        file.write(array.tobytes())
    else:
        tensor.raw_data = array.tobytes()
