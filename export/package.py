"""Make one artifact folder load unmodified in onnxruntime-genai, transformers.js and Optimum (transformers 4).

The builder writes for onnxruntime-genai alone. What the others need, found by reading them:

- transformers.js makes its first, empty cache from the shapes that a graph declares and takes a symbolic size for zero,
  so keys and values must declare their head size; it reads the chat template from tokenizer_config.json only, and loads
  external data only where config.json says that there is some. Its WebAssembly has no kernel for GatherBlockQuantized,
  so an embedding that shares a quantized table with the head is written out in operators that every build has.
- transformers 4 knows neither the tokenizer classes of transformers 5, nor its `rope_parameters`, nor its list of extra
  tokens.
- Each ends a text where its own settings file says, and stops at the `max_length` of that file: 20 tokens if it names
  none.

Nothing here loads torch or transformers, and no weight is rewritten.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.artifact import GENAI_CONFIG, VARIANT_FILES, data_file, variants_in
from distill.errors import ArtifactError
from distill.records import write_json
from distill.runs import PARTIAL
from distill.untrusted import LARGEST_TOKENIZER, read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4", "q4f16": "q4f16"}
"""What transformers.js calls each variant."""
HALF_CACHES = ("fp16", "q4f16")
"""Dtypes whose keys and values are float16."""
CLASSIC_TOKENIZERS = ("GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizer")
"""Tokenizer classes that all runtimes know; the last of them only where tokenizer.json is not byte-level."""
ANY_TOKENIZER = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is, by the name that transformers 4 and 5 both know."""
OWN_SETTINGS = ("backend", "is_local", "local_files_only", "name_or_path")
"""What transformers 5 writes about the machine that saved a tokenizer."""


def write_loader_files(folder: Path) -> None:
    """Complete an artifact's folder for every runtime, in place; doing it again changes nothing.

    `folder` holds genai_config.json, whose end tokens, length and default graph are what the others are made to agree
    with, the graphs below onnx/ with their external data beside them, and the checkpoint's own config.json and
    tokenizer files.
    """
    runtime = _read(folder / GENAI_CONFIG)
    for variant in variants_in(folder):
        fix_graph(folder / VARIANT_FILES[variant], runtime["model"]["decoder"]["head_size"])
    write_json(folder / CONFIG, model_config(_read(folder / CONFIG), runtime, folder))
    write_json(folder / GENERATION_CONFIG, generation_config(runtime))
    write_json(folder / TOKENIZER_CONFIG, tokenizer_config(folder))


# --- the graph --------------------------------------------------------------------------------------------------------


def fix_graph(path: Path, head_size: int) -> None:
    """Make a graph's file fit every runtime; its weights stay where they are, and it computes what it did."""
    import onnx_ir

    model = onnx_ir.load(path)
    fix_cache_shapes(model.graph, head_size)
    write_out_embedding(model.graph)
    content = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    if content != path.read_bytes():
        part = path.with_name(path.name + PARTIAL)
        part.write_bytes(content)
        os.replace(part, path)


def fix_cache_shapes(graph: Any, head_size: int) -> None:
    """Declare the size of a head in the shapes of all keys and values; batch and lengths stay symbolic."""
    import onnx_ir

    for value in (*graph.inputs, *graph.outputs):
        if value.name.startswith(("past_key_values.", "present.")):
            value.shape = onnx_ir.Shape([*value.shape[:3], head_size])


def write_out_embedding(graph: Any) -> None:
    """Replace GatherBlockQuantized by the operators it stands for; a graph without it stays as it is.

    Row i of the table is (q[i, b, :] - z[i, b]) * s[i, b] over its blocks b, with the middle of the range for z where
    there are no zero points. Rows come from the head's own table [tokens, blocks, bytes], which the builder reshapes
    first. All is computed in fp32, as the kernel does.
    """
    import onnx_ir

    old = next((node for node in graph if node.op_type == "GatherBlockQuantized"), None)
    if old is None:
        return
    bits = old.attributes["bits"].as_int()
    reshape = old.inputs[0].producer()
    table, ids, scale = reshape.inputs[0], old.inputs[1], old.inputs[2]
    zeros = old.inputs[3] if len(old.inputs) > 3 else None
    tape = onnx_ir.tape.Tape()
    last = tape.op("Constant", [], {"value_ints": [-1]})

    def rows(of: Any, bits: int = 8) -> Any:
        """The rows of a table as fp32 numbers [batch, length, ...]; two to a byte where they have 4 bits."""
        values = tape.op("Cast", [tape.op("Gather", [of, ids])], {"to": onnx_ir.DataType.FLOAT})
        return values if bits == 8 else _halves(tape, values, last, len(of.shape))

    if zeros is None:
        middle = tape.op("Constant", [], {"value_float": float(1 << (bits - 1))})
    else:
        blocks = tape.op("Constant", [], {"value_ints": [int(scale.shape[1])]})
        first, axis = (tape.op("Constant", [], {"value_ints": [one]}) for one in (0, 2))
        middle = tape.op("Unsqueeze", [tape.op("Slice", [rows(zeros, bits), first, blocks, axis]), last])
    scaled = tape.op("Mul", [tape.op("Sub", [rows(table, bits), middle]), tape.op("Unsqueeze", [rows(scale), last])])
    flat = tape.op("Reshape", [scaled, tape.op("Constant", [], {"value_ints": [0, 0, -1]})])
    embedded = tape.op("Cast", [flat], {"to": scale.dtype})
    dead = [old, reshape, reshape.inputs[1].producer()]
    onnx_ir.convenience.replace_nodes_and_values(graph, old, dead, tape.nodes, old.outputs, [embedded])


def _halves(tape: Any, values: Any, last: Any, rank: int) -> Any:
    """Bytes in the last axis as pairs of 4-bit numbers, the low half first. `rank` is that of the bytes' table."""
    sixteen = tape.op("Constant", [], {"value_float": 16.0})
    high = tape.op("Floor", [tape.op("Div", [values, sixteen])])
    low = tape.op("Sub", [values, tape.op("Mul", [high, sixteen])])
    pairs = tape.op("Concat", [tape.op("Unsqueeze", [half, last]) for half in (low, high)], {"axis": -1})
    return tape.op("Reshape", [pairs, tape.op("Constant", [], {"value_ints": [0] * rank + [-1]})])


# --- settings ---------------------------------------------------------------------------------------------------------


def model_config(config: dict[str, Any], runtime: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json as transformers 4, transformers 5 and transformers.js all read it."""
    rope = config.get("rope_parameters") or {}
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    older: dict[str, Any] = {"torch_dtype": config.get("dtype", config.get("torch_dtype"))}
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = scaled if scaled.get("rope_type", "default") != "default" else None
    ends = {"eos_token_id": runtime["model"]["eos_token_id"], "pad_token_id": runtime["model"]["pad_token_id"]}
    return config | older | ends | {"transformers.js_config": browser_config(folder, runtime)}


def browser_config(folder: Path, runtime: dict[str, Any]) -> dict[str, Any]:
    """What transformers.js must know of the graphs: which one it loads by itself, and which have external data."""
    graphs = {DTYPES[variant]: folder / VARIANT_FILES[variant] for variant in variants_in(folder)}
    default = runtime["model"]["decoder"]["filename"]
    settings: dict[str, Any] = {
        "dtype": next(dtype for dtype, graph in graphs.items() if graph == folder / default),
        "use_external_data_format": {graph.name: 1 for graph in graphs.values() if data_file(graph).is_file()},
    }
    if half := [dtype for dtype in graphs if dtype in HALF_CACHES]:
        settings["kv_cache_dtype"] = dict.fromkeys(half, "float16")
    return settings


def generation_config(runtime: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json that generates as genai_config.json does: greedily, to the same ends and length."""
    model, search = runtime["model"], runtime["search"]
    return {
        "bos_token_id": model["bos_token_id"],
        "eos_token_id": model["eos_token_id"],
        "pad_token_id": model["pad_token_id"],
        "do_sample": search["do_sample"],
        "max_length": search["max_length"],
    }


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the chat template in it, and in the terms of transformers 4.

    chat_template.jinja stays what it is and wins in transformers 5; both say the same.
    """
    settings = {key: value for key, value in _read(folder / TOKENIZER_CONFIG).items() if key not in OWN_SETTINGS}
    settings["tokenizer_class"] = tokenizer_class(settings.get("tokenizer_class"), folder / TOKENIZER)
    if (folder / TEMPLATE).is_file():
        settings["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    # left out, transformers 4 gives token types to a model that has none, which Optimum refuses
    return settings | {"model_input_names": ["input_ids", "attention_mask"]}


def tokenizer_class(name: str | None, tokenizer: Path) -> str:
    """The class by which every runtime reads tokenizer.json as transformers 5 did under the class `name`."""
    classic = (name or ANY_TOKENIZER).removesuffix("Fast")
    if classic == "LlamaTokenizer" and '"ByteLevel"' in tokenizer.read_text(encoding="utf-8"):
        return ANY_TOKENIZER
    return classic if classic in CLASSIC_TOKENIZERS else ANY_TOKENIZER


# --- end tokens -------------------------------------------------------------------------------------------------------


def lint_end_tokens(folder: Path) -> list[str]:
    """Disagreements about the tokens that end a text; none if every runtime stops at the same ones.

    Three files give ids: genai_config.json, generation_config.json and config.json. The tokenizer's own end token,
    in tokenizer_config.json, must be one of them. A file that is missing or unreadable is a disagreement.
    """
    return list(_end_token_problems(folder))


def _end_token_problems(folder: Path) -> Iterator[str]:
    try:
        files = {name: _read(folder / name) for name in (GENAI_CONFIG, GENERATION_CONFIG, CONFIG, TOKENIZER_CONFIG)}
        known = _token_ids(_read(folder / TOKENIZER))
    except (ArtifactError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"end tokens cannot be compared: {type(error).__name__}: {error}"
        return
    ends = {name: _end_ids(files[name]) for name in (GENERATION_CONFIG, CONFIG)}
    wanted = _end_ids(files[GENAI_CONFIG].get("model", {}))
    if not wanted:
        yield f"{GENAI_CONFIG} names no end token"
    for name, found in ends.items():
        if found != wanted:
            yield f"{name} ends texts with {sorted(found)}, {GENAI_CONFIG} with {sorted(wanted)}"
    token = files[TOKENIZER_CONFIG].get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if known.get(token) not in wanted:
        yield f"{TOKENIZER_CONFIG} ends texts with {token!r} ({known.get(token)}), {GENAI_CONFIG} with {sorted(wanted)}"
    if strange := sorted(wanted - set(known.values())):
        yield f"{GENAI_CONFIG} ends texts with {strange[0]}, which is no token of {TOKENIZER}"


def _end_ids(settings: dict[str, Any]) -> set[int]:
    found = settings.get("eos_token_id")
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def _token_ids(tokenizer: dict[str, Any]) -> dict[str | None, int]:
    """Every token of a tokenizer.json by its text."""
    vocabulary = tokenizer["model"]["vocab"]
    pieces = (
        vocabulary if isinstance(vocabulary, dict) else {piece: place for place, (piece, _) in enumerate(vocabulary)}
    )
    return {**pieces, **{added["content"]: added["id"] for added in tokenizer.get("added_tokens", ())}}


def _read(path: Path) -> Any:
    return read_json(path, LARGEST_TOKENIZER)
