"""Build the ONNX graph of a checkpoint: an artifact's folder with one variant, which onnxruntime-genai loads by itself.

onnxruntime-genai's model builder makes the graph, behind the one function `run_builder`. It ignores what it does not
know, so nothing it was asked for is believed: `check_graph` reads the graph that came out (kernels, bits, block size,
attention, shared embedding) and refuses any other. The builder's own copies of tokenizer and generation settings are
replaced by the checkpoint's, so that all files agree on the vocabulary and on the tokens that end a text.
Nothing here runs the graph: see `parity` and `distill.onnx_decoding`.
"""

import contextlib
import gc
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.artifact import GENAI_CONFIG, VARIANT_FILES, data_file
from distill.errors import ExportError, MissingExtraError
from distill.models import find_model, load_config, load_tokenizer, return_freed_memory
from distill.onnx_decoding import EVERY_POSITION
from distill.records import write_json
from distill.runs import PARTIAL, library_versions

from .last_position import keep_last_position
from .quantize import Rounded, write_weights
from .schemes import VARIANTS, Matrix, Scheme, Weight, expected_matrices, first_scheme

BUILDER_GRAPH = "model.onnx"
BUILDER_OPTIONS = ["hf_token=false", "fuse_qk_norm_gqa=false"]
"""No hub; and Qwen3's norms of queries and keys stay apart, since no CPU kernel takes them inside attention."""
GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHECKPOINT_FILES = (
    "config.json",
    GENERATION_FILE,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a variant takes over from the checkpoint unchanged, where it is there."""

LONGEST_DEFAULT = 8192
"""Default `max_length`: the runtime reserves its key/value cache for it, which a context of 128k would not survive."""

ROPE_TYPES = {"llama": ("default", "llama3"), "qwen2": ("default",), "qwen3": ("default",)}
"""Rotary scalings that the builder really carries over, by family; it drops others without a word."""


def build_variant(
    checkpoint: Path,
    variant: str,
    folder: Path,
    scheme: Scheme | None = None,
    rounded: Iterable[Mapping[str, Rounded]] = (),
) -> None:
    """Export a transformers checkpoint as an artifact's folder with this one variant.

    The checkpoint is a Llama, Qwen2 or Qwen3 with its tokenizer, in fp32 or bf16 safetensors. `folder` gets the graph
    with its external data below onnx/ (`VARIANT_FILES`), genai_config.json, config.json, generation_config.json and the
    tokenizer's files; it appears complete or not at all (a build in progress lies in `folder.part`). Needs no network.
    `scheme` is the variant's first one unless given; `rounded` are matrices by node name that replace the builder's.
    Raises ExportError if the variant or the model is not supported, the checkpoint's files disagree on the end
    tokens, or the graph that came out is not the one asked for; ModelError if the checkpoint cannot be read.
    """
    if variant not in VARIANTS:
        raise ExportError(f"variant {variant!r} is not known; choose from {', '.join(VARIANTS)}")
    if folder.exists() and any(folder.iterdir()):
        raise ExportError(f"{folder}: is there already; remove it to build {variant} again")
    source = find_model(str(checkpoint))
    config = load_config(source)
    scheme = scheme or first_scheme(variant, config)
    refuse_unsupported(config, str(checkpoint))
    end_ids = end_token_ids(checkpoint, config, load_tokenizer(source).eos_token_id)
    part = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(part, ignore_errors=True)
    run_builder(checkpoint, config, scheme, part)
    gc.collect()  # its graph, with all weights, is a knot of cycles
    return_freed_memory()
    check_graph(part / BUILDER_GRAPH, config, scheme)
    _rewrite(part / BUILDER_GRAPH)
    check_graph(part / BUILDER_GRAPH, config, scheme)
    for matrices in rounded:
        write_weights(part / BUILDER_GRAPH, part / f"{BUILDER_GRAPH}.data", matrices)
    place_graph(part, VARIANT_FILES[variant])
    take_over_files(checkpoint, part, config)
    write_runtime_config(part, config, end_ids, VARIANT_FILES[variant])
    os.replace(part, folder)


# --- the builder ------------------------------------------------------------------------------------------------------


def refuse_unsupported(config: Any, name: str) -> None:
    """Raise ExportError for what the builder would drop silently: other rotary scalings, sliding windows."""
    rope = dict(config.rope_parameters or {})
    known = ROPE_TYPES[config.model_type]
    if rope.get("rope_type", "default") not in known:
        raise ExportError(
            f"{name}: rotary scaling {rope['rope_type']!r} of a {config.model_type} model is not exported;"
            f" supported: {', '.join(known)}"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ExportError(f"{name}: sliding-window attention is not exported; set use_sliding_window to false")
    if config.hidden_act != "silu":
        raise ExportError(f"{name}: activation {config.hidden_act!r} is not exported; supported: silu")


def run_builder(checkpoint: Path, config: Any, scheme: Scheme, folder: Path) -> None:
    """Let onnxruntime-genai's builder write graph, weights and its configuration for the CPU into `folder`.

    Raises ExportError with the builder's last words if it fails.
    """
    builder = _import_builder()
    precision, target = (
        ("int4", {"quant_config": _quantization(config, scheme)}) if scheme.quantized else (str(scheme), None)
    )
    # The builder fuses attention in fp16 for GPUs only; the graph is the same for all of them, and runs on a CPU too.
    provider = "webgpu" if scheme.half else "cpu"
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, _quietly(log):
        fixed = (None, str(checkpoint), str(folder), precision, provider, cache)
        try:
            options = builder.parse_extra_options(*fixed, BUILDER_OPTIONS, target_options=target)
            builder.create_model(*fixed, **options)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            words = str(error) or (log.getvalue().strip().splitlines() or [""])[-1]
            raise ExportError(
                f"{checkpoint}: onnxruntime-genai's builder failed: {type(error).__name__}: {words}"
            ) from error


def _rewrite(path: Path) -> None:
    """Let a built graph's file predict after the last token only; its weights stay where they are."""
    import onnx_ir

    model = onnx_ir.load(path)
    keep_last_position(model.graph)
    path.write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))


def place_graph(folder: Path, file: str) -> None:
    """Move the builder's graph and its weights to `file`, a relative path in `folder`.

    Weights go to one file beside it, which the graph then names. The builder's own version becomes the graph's
    producer: it adds the git commit of whatever working directory it runs in, which is none of the artifact's
    business and would make equal exports differ.
    """
    import onnx

    source, target = folder / BUILDER_GRAPH, folder / file
    model = onnx.load(source, load_external_data=False)
    model.producer_version = library_versions(["onnxruntime-genai"]).get("onnxruntime-genai", "")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data_file(target).name
    target.parent.mkdir()
    target.write_bytes(model.SerializeToString(deterministic=True))
    source.unlink()
    (folder / f"{BUILDER_GRAPH}.data").rename(data_file(target))


def _import_builder() -> Any:
    # Telemetry is on by default in these wheels and is decided at import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with _quietly(io.StringIO()):
            from onnxruntime_genai.models import builder
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime-genai", "export") from error
    return builder


def _quantization(config: Any, scheme: Scheme) -> dict[str, Any]:
    """The builder's structured quantization options for a scheme.

    The base type is always 4 bits, with matrices of more bits named one by one: only then does the builder let a
    tied embedding share the head's quantized table (its own int8 keeps a second, fp32 copy of it).
    """
    overrides = [
        {"match": {"name": matrix.name}, "type": f"int{matrix.bits}"}
        for matrix in expected_matrices(config, scheme)
        if matrix.bits != 4
    ]
    weights = {
        "type": "int4" if scheme.symmetric else "uint4",
        "symmetric": scheme.symmetric,
        "block_size": scheme.block_size,
        "accuracy_level": scheme.accuracy_level,
        # GPTQ's matrices are written over what the builder rounds.
        "method": "rtn" if scheme.method == "gptq" else scheme.method,
        # Gather is the embedding. Untied, it stays fp32: the quantizer knows no 8-bit rows of its own.
        "op_types": ["MatMul", "Gather"] if config.tie_word_embeddings else ["MatMul"],
        "overrides": overrides,
    }
    return {"io_dtype": "fp16" if scheme.half else "fp32", "weights": weights}


@contextlib.contextmanager
def _quietly(log: io.StringIO) -> Iterator[None]:
    """Keep the builder's prints, bars, warnings and its logging set-up away from the program that calls it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)


# --- what came out ----------------------------------------------------------------------------------------------------


def check_graph(path: Path, config: Any, scheme: Scheme) -> None:
    """Raise ExportError unless the file is the graph of this model under this scheme, naming the first difference.

    Checked: every matrix with its bits, block size, accuracy level and shape; one fused GroupQueryAttention a layer
    with its heads, rotary embedding and no window; one table for tied embedding and head; no weight unused; inputs
    and outputs that the runtime feeds. Weights are not read.
    """
    import onnx_ir

    graph = onnx_ir.load(path).graph
    nodes = list(graph)
    _check_matrices([_matrix(node, scheme) for node in nodes if _is_weight_product(node)], config, scheme)
    _check_attention([node for node in nodes if node.op_type == "GroupQueryAttention"], config)
    _check_embedding([node for node in nodes if node.op_type in ("Gather", "GatherBlockQuantized")], config, scheme)
    unused = sorted(name for name, value in graph.initializers.items() if not value.uses())
    if unused:
        raise ExportError(f"{path}: {len(unused)} weights are in the file but not in the graph, first {unused[0]}")
    _check_interface({v.name for v in graph.inputs}, {v.name for v in graph.outputs}, config)


def _is_weight_product(node: Any) -> bool:
    if node.op_type == "MatMul":
        return node.inputs[1].const_value is not None
    return node.op_type in ("MatMulNBits", "Gemm", "MatMulInteger", "QMoE", "MatMulBnb4")


def _matrix(node: Any, scheme: Scheme) -> Matrix:
    """A product with a weight as `Matrix`; raises ExportError for kernels and settings that were not asked for."""
    name = node.name
    if node.op_type == "MatMul":
        rows, columns = node.inputs[1].shape
        return Matrix(name, 8 * node.inputs[1].dtype.itemsize, int(rows), int(columns))
    if node.op_type != "MatMulNBits":
        raise ExportError(f"{name}: is a {node.op_type}; expected MatMul or MatMulNBits")
    for key, wanted in (("block_size", scheme.block_size), ("accuracy_level", scheme.accuracy_level)):
        found = _integer(node, key)
        if found != wanted:
            raise ExportError(f"{name}: has {key} {found}, asked for {wanted}: the builder ignored the option")
    bits = _integer(node, "bits")
    return Matrix(name.removesuffix(f"_Q{bits}"), bits, _integer(node, "K"), _integer(node, "N"))


def _integer(node: Any, key: str) -> int:
    attribute = node.attributes.get(key)
    return attribute.as_int() if attribute is not None else 0


def _check_matrices(found: list[Matrix], config: Any, scheme: Scheme) -> None:
    wanted = {matrix.name: matrix for matrix in expected_matrices(config, scheme)}
    for matrix in found:
        if wanted.get(matrix.name) != matrix:
            raise ExportError(
                f"{matrix.name}: came out as {_described(matrix)}, expected {_described(wanted.get(matrix.name))}"
            )
    if missing := sorted(wanted.keys() - {matrix.name for matrix in found}):
        raise ExportError(f"{missing[0]}: is missing from the graph ({len(missing)} of {len(wanted)} matrices are)")


def _described(matrix: Matrix | None) -> str:
    return f"{matrix.rows}x{matrix.columns} in {matrix.bits} bits" if matrix else "nothing of that name"


def _check_attention(found: list[Any], config: Any) -> None:
    if len(found) != config.num_hidden_layers:
        raise ExportError(
            f"attention is fused in {len(found)} of {config.num_hidden_layers} layers (GroupQueryAttention nodes)"
        )
    wanted = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads, "do_rotary": 1}
    for node in found:
        for key, value in wanted.items():
            if _integer(node, key) != value:
                raise ExportError(f"{node.name}: has {key} {_integer(node, key)}, expected {value}")
        if _integer(node, "local_window_size") > 0:
            raise ExportError(f"{node.name}: attends to a window of {_integer(node, 'local_window_size')} tokens only")


def _check_embedding(gathers: list[Any], config: Any, scheme: Scheme) -> None:
    """A tied model has one table: the embedding reads the head's weights, at the head's bits."""
    found = [node for node in gathers if node.name.startswith("/model/embed_tokens/")]
    if len(found) != 1:
        raise ExportError(f"{len(found)} embedding lookups in the graph; expected one")
    plain = 8 * scheme.float_bytes
    bits = _integer(found[0], "bits") if found[0].op_type == "GatherBlockQuantized" else plain
    wanted = scheme.head_bits if config.tie_word_embeddings else plain
    if bits != wanted:
        raise ExportError(f"{found[0].name}: the embedding has {bits} bits, expected {wanted}")
    if not config.tie_word_embeddings:
        return
    table = found[0].inputs[0]
    while table.const_value is None and table.producer() is not None:
        table = table.producer().inputs[0]
    if not str(table.name).startswith("lm_head."):
        raise ExportError(f"{found[0].name}: reads its own table {table.name}; a tied model shares the head's")


def _check_interface(inputs: set[str | None], outputs: set[str | None], config: Any) -> None:
    caches = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    wanted_inputs = {"input_ids", "attention_mask", *(f"past_key_values.{cache}" for cache in caches)}
    wanted_outputs = {"logits", *(f"present.{cache}" for cache in caches)}
    for what, found, wanted in (("inputs", inputs, wanted_inputs), ("outputs", outputs, wanted_outputs)):
        if found != wanted:
            raise ExportError(
                f"the graph's {what} differ from what the runtime feeds: {sorted(map(str, found ^ wanted))}"
            )


# --- files beside the graph -------------------------------------------------------------------------------------------


def end_token_ids(checkpoint: Path, config: Any, tokenizer_end: int | None) -> list[int]:
    """The ids that end a text, as generation_config.json says (config.json where there is none).

    Raises ExportError if there are none, or if the tokenizer's own end token is not among them: one runtime would
    then stop where another goes on.
    """
    path = checkpoint / GENERATION_FILE
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    given = config.eos_token_id if given is None else given
    if given is None:
        raise ExportError(f"{checkpoint}: names no end token; set eos_token_id in {GENERATION_FILE}")
    ids = [int(one) for one in (given if isinstance(given, list) else [given])]
    if tokenizer_end is not None and tokenizer_end not in ids:
        raise ExportError(
            f"{checkpoint}: the tokenizer ends texts with id {tokenizer_end}, {GENERATION_FILE} with {ids};"
            " make eos_token_id name both"
        )
    return ids


def take_over_files(checkpoint: Path, folder: Path, config: Any) -> None:
    """Put the checkpoint's own tokenizer and configuration beside the graph, byte for byte.

    One value changes: a tokenizer's `model_max_length` of 1e30 ("no limit") becomes the model's context. A
    checkpoint without generation_config.json gets one with its special tokens.
    """
    for name in CHECKPOINT_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if (folder / TOKENIZER_CONFIG).is_file():
        settings = _read_json(folder / TOKENIZER_CONFIG)
        limit = min(settings.get("model_max_length") or config.max_position_embeddings, config.max_position_embeddings)
        write_json(folder / TOKENIZER_CONFIG, settings | {"model_max_length": int(limit)})
    if not (folder / GENERATION_FILE).is_file():
        ids = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / GENERATION_FILE, {key: value for key, value in ids.items() if value is not None})


def write_runtime_config(folder: Path, config: Any, end_ids: list[int], file: str) -> None:
    """Make genai_config.json agree with the checkpoint: same end ids, greedy by default, a bounded length; and name
    the graph that onnxruntime-genai loads.

    Threads and providers are left out on purpose: they belong to the machine that loads the artifact.
    """
    settings = _read_json(folder / GENAI_CONFIG)
    settings["model"]["decoder"]["filename"] = file
    settings["model"]["decoder"]["session_options"]["provider_options"] = []
    settings["model"]["eos_token_id"] = end_ids if len(end_ids) > 1 else end_ids[0]
    settings["search"] |= {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_length": min(config.max_position_embeddings, LONGEST_DEFAULT),
    }
    write_json(folder / GENAI_CONFIG, settings)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Checked(NamedTuple):
    """What a graph has."""

    matrices: int
    """Products with a weight."""
    layers: int
    """Fused attentions."""


def check_weights(path: Path) -> Checked:
    """Raise ExportError if a weight of the graph is zero throughout; what the graph has otherwise.

    A matrix in few bits is zero where its scales are.
    """
    import onnx_ir

    graph = onnx_ir.load(path).graph
    nodes = list(graph)
    products = [node for node in nodes if _is_weight_product(node)]
    for node in products:
        values = node.inputs[1] if node.op_type == "MatMul" else node.inputs[2]
        if not values.const_value.numpy().any():
            raise ExportError(f"{path}: {node.name}: its weights are all zero")
    for name, value in graph.initializers.items():
        if name.endswith("layernorm.weight") and not value.const_value.numpy().any():
            raise ExportError(f"{path}: {name}: is all zero")
    return Checked(len(products), sum(node.op_type == "GroupQueryAttention" for node in nodes))


def weight_bytes(path: Path) -> Weight:
    """Bytes of a graph's weights by part, as the file has them."""
    import onnx_ir

    sizes = dict.fromkeys(Weight._fields, 0)
    for name, value in onnx_ir.load(path).graph.initializers.items():
        if value.const_value is not None and name != EVERY_POSITION:
            sizes[_part_of(name)] += value.const_value.nbytes
    return Weight(**sizes)


def _part_of(name: str) -> str:
    if name.endswith(("_scale", "_zp")):
        return "scales"
    if name.startswith("lm_head."):
        return "head"
    if name.startswith("model.embed_tokens."):
        return "embedding"
    return "body" if ".MatMul." in name else "rest"
