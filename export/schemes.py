"""How a variant's weights may be stored: schemes, what each weighs, and the ladder climbed until the gates hold.

Pure arithmetic over a model's configuration: bytes are known before anything is built, so a size budget is solved
rather than guessed. `graph` builds a scheme, `quantize` makes weights that the builder cannot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from distill.errors import ExportError

Method = Literal["rtn", "k_quant", "gptq"]


@dataclass(frozen=True)
class Scheme:
    """How the weights of a variant are stored. Matrices only: norms, biases and rotary tables are never quantized."""

    body_bits: int = 32
    """Bits of the decoder layers' matrices; 16 and 32 keep them floating point."""
    head_bits: int = 32
    """Bits of the output head, and of the embedding where the two are tied."""
    block_size: int = 32
    """Weights that share one scale."""
    symmetric: bool = True
    """Whether blocks have no zero point of their own."""
    accuracy_level: int = 4
    """MatMulNBits: 4 also rounds activations to int8, which is what makes it fast; 0 keeps them fp32."""
    method: Method = "rtn"
    """How weights are rounded: `rtn` to the nearest, `k_quant` with the scale that loses least, `gptq` with the error
    of each column made up for by those after it (Frantar et al. 2023), calibrated on the student's own texts."""
    wide_layers: tuple[int, ...] = ()
    """Layers whose matrices have 8 bits where the body has fewer."""
    half: bool = False
    """Whether activations, caches and what is not quantized are fp16."""

    @property
    def quantized(self) -> bool:
        """Whether any matrix is stored in fewer than 16 bits."""
        return self.body_bits < 16

    @property
    def float_bytes(self) -> int:
        """Bytes of a number that is not quantized."""
        return 2 if self.half else 4

    def layer_bits(self, layer: int) -> int:
        """Bits of one layer's matrices."""
        return 8 if layer in self.wide_layers else self.body_bits

    def __str__(self) -> str:
        """In words, as reports and cards name it."""
        if not self.quantized:
            return f"fp{self.body_bits}"
        wide = f", {len(self.wide_layers)} layers in int8" if self.wide_layers else ""
        head = "" if self.head_bits == self.body_bits else f", int{self.head_bits} head"
        exact = "" if self.accuracy_level == 4 else ", fp32 activations"
        return f"int{self.body_bits} {self.method.replace('_', '-')}{head}{wide}{exact}"


VARIANTS: dict[str, Scheme] = {
    "fp32": Scheme(),
    "fp16": Scheme(body_bits=16, head_bits=16, half=True),
    "int8": Scheme(body_bits=8, head_bits=8),
    "int4": Scheme(body_bits=4, head_bits=4, symmetric=False, method="k_quant"),
    "q4f16": Scheme(body_bits=4, head_bits=4, symmetric=False, method="k_quant", half=True),
}
"""What each variant begins with; `ladder` says what follows where a gate fails."""


def first_scheme(variant: str, config: Any) -> Scheme:
    """What a variant of this model begins with.

    The builder cannot pack the zero points of rows with an odd number of blocks: such models are rounded to symmetric
    grids, which have none.
    """
    scheme = VARIANTS[variant]
    rows = {matrix.rows // scheme.block_size for matrix in expected_matrices(config, scheme) if matrix.bits == 4}
    return replace(scheme, method="rtn", symmetric=True) if any(blocks % 2 for blocks in rows) else scheme


class Matrix(NamedTuple):
    """One weight matrix as the graph computes with it."""

    name: str
    """Node name without the quantizer's suffix: `/model/layers.0/attn/o_proj/MatMul`."""
    bits: int
    rows: int
    """K: inputs."""
    columns: int
    """N: outputs."""


HEAD = "/lm_head/MatMul"
PROJECTIONS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")


def expected_matrices(config: Any, scheme: Scheme) -> list[Matrix]:
    """Every matrix a graph of this model must have under a scheme: query, key and value are one."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = dict(
        zip(
            PROJECTIONS,
            [(hidden, queries + 2 * keys), (queries, hidden), (hidden, inner), (hidden, inner), (inner, hidden)],
            strict=True,
        )
    )
    body = [
        Matrix(f"/model/layers.{layer}/{part}/MatMul", scheme.layer_bits(layer), *shapes[part])
        for layer in range(config.num_hidden_layers)
        for part in PROJECTIONS
    ]
    return [*body, Matrix(HEAD, scheme.head_bits, hidden, config.vocab_size)]


# --- bytes ------------------------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """Bytes of a graph's weights by part."""

    head: int
    """Output head, with a tied embedding."""
    embedding: int
    """An embedding of its own."""
    body: int
    """Quantized or floating-point values of the layers' matrices."""
    scales: int
    """Scales and zero points of the layers' matrices and the head."""
    rest: int
    """Norms, biases, rotary tables."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self)


def predicted_bytes(config: Any, scheme: Scheme) -> Weight:
    """What the weights will take, from the model's configuration alone."""
    *body, head = expected_matrices(config, scheme)
    table = config.hidden_size * config.vocab_size
    return Weight(
        head=_value_bytes(head),
        embedding=0 if config.tie_word_embeddings else table * scheme.float_bytes,
        body=sum(map(_value_bytes, body)),
        scales=sum(_scale_bytes(matrix, scheme) for matrix in (*body, head)),
        rest=_rest_bytes(config, scheme),
    )


def _value_bytes(matrix: Matrix) -> int:
    return matrix.rows * matrix.columns * matrix.bits // 8


def _scale_bytes(matrix: Matrix, scheme: Scheme) -> int:
    """One scale a block; without symmetry also a zero point of as many bits as a weight, padded to bytes a column."""
    if matrix.bits >= 16:
        return 0
    blocks = -(-matrix.rows // scheme.block_size)
    zeros = 0 if scheme.symmetric else -(-blocks * matrix.bits // 8)
    return matrix.columns * (blocks * scheme.float_bytes + zeros)


def _rest_bytes(config: Any, scheme: Scheme) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = 2 * config.max_position_embeddings * (head // 2)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    if config.model_type == "qwen3":
        norms += 2 * config.num_hidden_layers * head
    biases = 0
    if config.model_type == "qwen2" or getattr(config, "attention_bias", False):
        biases = config.num_hidden_layers * (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    return (rotary + norms + biases) * scheme.float_bytes


# --- the ladder -------------------------------------------------------------------------------------------------------


def ladder(
    variant: str, config: Any, max_bytes: int | None = None, method: Method | None = None, head_bits: int | None = None
) -> list[Scheme]:
    """Schemes of a variant to try in turn, smallest first: the first that passes its gates ships.

    For four bits: an int4 head, an int8 head, GPTQ, GPTQ with half, then all of the layers' matrices in 8 bits; for
    eight, and last of all for four, activations that are not rounded to int8, which is slower and takes no bytes.
    `method` and `head_bits` keep the rungs that have them. With `max_bytes` only those that fit are kept, and the
    widest mixture of layers that fits takes the place of those that do not. Raises ExportError if none fits.
    """
    first = first_scheme(variant, config)
    rungs = [first]
    if first.quantized:
        eight = replace(VARIANTS["int8"], half=first.half)
        smaller = [rung for rung in _four_bits(first, config) if _wanted(rung, method, head_bits)]
        if first.body_bits == 4 and not smaller:
            smaller = [_asked(first, method or first.method, head_bits or first.head_bits)]
        rungs = [*smaller, eight, replace(eight, accuracy_level=0)]
    if max_bytes is None:
        return rungs
    fitting = [rung for rung in rungs if predicted_bytes(config, rung).total <= max_bytes]
    if widest := _widest(first, config, max_bytes, rungs):
        fitting = sorted({*fitting, widest}, key=lambda rung: (predicted_bytes(config, rung).total, _order(rung)))
    if not fitting:
        least = min(rungs, key=lambda rung: predicted_bytes(config, rung).total)
        raise ExportError(
            f"export.max_mb.{variant}: {max_bytes / 1e6:,.1f} MB are less than its smallest scheme takes"
            f" ({least}: {predicted_bytes(config, least).total / 1e6:,.1f} MB); raise it, or prune the student"
        )
    return fitting


def _order(scheme: Scheme) -> tuple[int, int, bool, bool]:
    """Which of two schemes of equal bytes is tried first."""
    return (len(scheme.wide_layers), scheme.head_bits, scheme.method == "gptq", scheme.accuracy_level == 0)


def _four_bits(first: Scheme, config: Any) -> Iterator[Scheme]:
    """Schemes of a body in four bits; none for a variant that begins with more."""
    if first.body_bits != 4:
        return
    layers = config.num_hidden_layers
    yield first
    wide_head = replace(first, head_bits=8)
    yield wide_head
    best = wide_head if first.symmetric else replace(wide_head, method="gptq")
    if best != wide_head:
        yield best
    if layers > 1:
        yield replace(best, wide_layers=most_sensitive(layers, layers // 2))


def most_sensitive(layers: int, count: int) -> tuple[int, ...]:
    """The `count` layers to keep in 8 bits: first the ends, where errors weigh most, then evenly between.

    The order of llama.cpp's mixtures: the first and last eighth, then every third.
    """
    eighth = max(1, layers // 8)
    ends = [layer for layer in range(layers) if layer < eighth or layer >= layers - eighth]
    thirds = [layer for layer in range(layers) if (layer - eighth) % 3 == 2]
    order = list(dict.fromkeys([*ends, *thirds, *range(layers)]))
    return tuple(sorted(order[:count]))


def _asked(first: Scheme, method: Method, head_bits: int) -> Scheme:
    """The scheme that a recipe asks for and no rung has; raises ExportError where the builder cannot make it."""
    if first.symmetric and method != "rtn":
        raise ExportError(
            f"export.four_bits.method {method}: this model has rows with an odd number of blocks of {first.block_size},"
            " whose zero points the builder cannot pack; use rtn, or leave it out"
        )
    return replace(first, method=method, head_bits=head_bits)


def _wanted(rung: Scheme, method: Method | None, head_bits: int | None) -> bool:
    return method in (None, rung.method) and head_bits in (None, rung.head_bits)


def _widest(first: Scheme, config: Any, max_bytes: int, rungs: Sequence[Scheme]) -> Scheme | None:
    """The mixture with most layers in 8 bits that the budget allows; None where all rungs fit or none can be mixed."""
    mixed = [rung for rung in rungs if rung.wide_layers]
    if not mixed or all(predicted_bytes(config, rung).total <= max_bytes for rung in rungs):
        return None
    for count in range(config.num_hidden_layers - 1, 0, -1):
        scheme = replace(mixed[0], wide_layers=most_sensitive(config.num_hidden_layers, count))
        if predicted_bytes(config, scheme).total <= max_bytes:
            return scheme
    return None
