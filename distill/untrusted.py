"""Folders that came from elsewhere: nothing in one is opened before its name, its size and what it names were checked.

An artifact may have been made or changed by anybody, and the runtimes that load it follow what its files say: other
files by path, libraries by name, JSON nested as deep as their stack. Every loader of ours checks first, by
`refuse_unsafe` of `distill.artifact`; `distill verify` does too. Weights are not read, and no runtime is loaded.
"""

import json
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from distill.errors import ArtifactError, MissingExtraError

LARGEST_CONFIG = 16 << 20
"""Bytes of a configuration, a manifest or a template that are read at most."""
LARGEST_TOKENIZER = 256 << 20
"""The same of tokenizer.json, which holds a vocabulary and its merges."""
LARGEST_GRAPH = 2 << 30
"""Bytes of one ONNX file: no protobuf message can be larger."""
DEEPEST_JSON = 64
"""Objects and lists within one another: far more than any configuration has, far less than overflows a parser."""
SESSION_OPTIONS = frozenset(
    [
        *("log_id", "provider_options", "intra_op_num_threads", "inter_op_num_threads", "log_severity_level"),
        *("graph_optimization_level", "enable_cpu_mem_arena", "enable_mem_pattern", "use_env_allocators"),
    ]
)
"""What a runtime's settings may set of a session; others load libraries, write files or look for weights elsewhere."""
_NAMES_A_FILE = re.compile(r"(^|_)(filename|file|path|dir|folder|library)$")


# --- names and links ------------------------------------------------------------------------------------------------


def bad_name(name: str) -> str | None:
    """What is wrong with a relative file name; None for one that means the same inside any folder on any system."""
    if not name or any(ord(c) < 32 or c in '\\:*?"<>|' for c in name):
        return "has characters that a portable name has not"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "leads out of the folder"
    if str(path) != name or name == ".":
        return "is not in its plain form"
    return None


def file_in(folder: Path, name: str) -> Path:
    """The regular file that `name` means in `folder`, itself or by links that stay within the folder.

    Raises ArtifactError for a name that is not portable or leads elsewhere, for a link out of the folder, and where
    there is no such file.
    """
    if reason := bad_name(name):
        raise ArtifactError(f"{folder}: file name {name[:120]!r} {reason}")
    path = folder / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        raise ArtifactError(f"{folder}: {name} is a link to no file") from error
    if not target.is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{folder}: {name} is a link that leads out of the folder (a hub's cache is made of such links: download"
            " into a folder of its own instead)"
        )
    if not target.is_file():
        raise ArtifactError(f"{folder}: {name} is " + ("a link to no file" if path.is_symlink() else "missing"))
    return path


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> Any:
    """The content of a JSON file.

    Raises ArtifactError, in one line, for what is no regular file, has more than `largest` bytes or is refused by
    `parse_json`; FileNotFoundError where nothing is.
    """
    return parse_json(path, read_bounded(path, largest))


def read_bounded(path: Path, largest: int = LARGEST_CONFIG) -> bytes:
    """All bytes of a regular file of at most `largest`; raises as `read_json`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: is not a regular file")
    if status.st_size > largest:
        raise ArtifactError(f"{path}: has {status.st_size:,} bytes; such a file has at most {largest:,}")
    return path.read_bytes()


def parse_json(path: Path, text: bytes) -> Any:
    """The value of a JSON text; `path` is for messages.

    Raises ArtifactError for what is not JSON by the letter (NaN, a key twice in one object) and for what is nested
    deeper than `DEEPEST_JSON`.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise ArtifactError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: is not a JSON document: {error}") from error
    level, depth = [content], 0
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ArtifactError(f"{path}: is nested too deeply; {DEEPEST_JSON} levels are allowed")
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
    return content


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return content


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


# --- what a folder's files say --------------------------------------------------------------------------------------


def refuse_unsafe_configs(folder: Path) -> None:
    """Raise ArtifactError unless all configurations and templates at the top of `folder` are safe to parse.

    None may be a link out of the folder, huge, malformed or deeply nested, and none may name code to be run.
    """
    for name in sorted(path.name for path in folder.iterdir()):
        largest = LARGEST_TOKENIZER if name == "tokenizer.json" else LARGEST_CONFIG
        if name.endswith(".json"):
            content = read_json(file_in(folder, name), largest)
            if isinstance(content, dict) and "auto_map" in content:
                raise ArtifactError(f"{folder}: {name} names code to be run (auto_map); an artifact has none")
        elif name.endswith((".jinja", ".txt")):
            read_bounded(file_in(folder, name), largest)


def read_runtime_config(path: Path) -> dict[str, Any]:
    """The content of a folder's genai_config.json, once it is known to name files of that folder alone.

    Raises ArtifactError for a file name that leads out of the folder or to no file, for a library to be loaded, and
    for session options that are not known to be harmless; FileNotFoundError where there is no such configuration.
    """
    folder = path.parent
    path.lstat()
    content = read_json(file_in(folder, path.name))
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: is not a JSON object")
    for key, value in _entries(content):
        if key == "session_options":
            _refuse_options(path, value)
        if isinstance(value, str) and key == "filename":
            file_in(folder, value)
        elif isinstance(value, str) and (_NAMES_A_FILE.search(key) or _leads_elsewhere(value)):
            raise ArtifactError(f"{path}: {key[:80]} is {value[:120]!r}; a configuration names no file but its graph")
    return content


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object in a JSON value with what it holds; the parts of a list go by the list's key."""
    waiting = [("", value)]
    while waiting:
        key, one = waiting.pop()
        yield key, one
        if isinstance(one, dict):
            waiting += one.items()
        elif isinstance(one, list):
            waiting += [(key, part) for part in one]


def _refuse_options(path: Path, options: Any) -> None:
    if not isinstance(options, dict):
        raise ArtifactError(f"{path}: session_options is not an object")
    if unknown := sorted(options.keys() - SESSION_OPTIONS):
        raise ArtifactError(
            f"{path}: session option {unknown[0][:80]!r} is not allowed; allowed: {', '.join(sorted(SESSION_OPTIONS))}"
        )


def _leads_elsewhere(text: str) -> bool:
    windows, posix = PureWindowsPath(text), PurePosixPath(text)
    return bool(windows.drive or windows.root) or posix.is_absolute() or ".." in (*windows.parts, *posix.parts)


# --- graphs ---------------------------------------------------------------------------------------------------------


def refuse_unsafe_graph(folder: Path, name: str) -> None:
    """Raise ArtifactError unless all weights of the graph `name` lie in it or whole in files beside it.

    The weights are not read. Raises MissingExtraError without onnx.
    """
    path = file_in(folder, name)
    beside = path.parent
    for location, end in sorted(external_data(path).items()):
        if bad_name(location) or "/" in location:
            raise ArtifactError(f"{path}: keeps weights in {location[:120]!r}; they must be in a file beside it")
        data = file_in(folder, (beside / location).relative_to(folder).as_posix())
        if data.stat().st_size < end:
            raise ArtifactError(f"{data}: has {data.stat().st_size:,} bytes; {path.name} needs {end:,} of it")


def external_data(path: Path) -> dict[str, int]:
    """The files that an ONNX graph keeps weights in, as it names them, and how many bytes of each it needs at least.

    Raises ArtifactError for what is no ONNX graph, MissingExtraError without onnx.
    """
    model = _parse_graph(path)
    found: dict[str, int] = {}
    for tensor in _tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        # a key given twice could mean one file here and another one to a runtime
        if len(entries) != len(tensor.external_data) or (entries and "location" not in entries):
            raise ArtifactError(f"{path}: weight {tensor.name[:80]!r} does not say plainly where its data is")
        if entries:
            end = _number(entries.get("offset", "0")) + _number(entries.get("length", "0"))
            found[entries["location"]] = max(end, found.get(entries["location"], 0))
    return found


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 1 << 63  # what is no number fits into no file


def _parse_graph(path: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from onnx import ModelProto
    except ImportError as error:
        raise MissingExtraError("onnx", "export") from error
    try:
        model = ModelProto.FromString(read_bounded(path, LARGEST_GRAPH))
    except DecodeError as error:
        raise ArtifactError(f"{path}: is not an ONNX graph: {error}") from error
    if not model.HasField("graph"):
        raise ArtifactError(f"{path}: is not an ONNX graph")
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model: in its graphs, in the graphs within nodes, in its functions."""
    graphs = [model.graph, *(graph for one in model.training_info for graph in (one.initialization, one.algorithm))]
    attributes = [one for function in model.functions for one in function.attribute_proto]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes or attributes:
        for graph in graphs:
            yield from graph.initializer
            yield from _of_sparse(graph.sparse_initializer)
        attributes += [one for graph in graphs for node in graph.node for one in node.attribute]
        attributes += [one for node in nodes for one in node.attribute]
        for one in attributes:
            yield from (one.t, *one.tensors)
            yield from _of_sparse((one.sparse_tensor, *one.sparse_tensors))
        graphs = [graph for one in attributes for graph in ([one.g] if one.HasField("g") else []) + list(one.graphs)]
        nodes, attributes = [], []


def _of_sparse(tensors: Iterable[Any]) -> Iterator[Any]:
    for tensor in tensors:
        yield from (tensor.values, tensor.indices)
