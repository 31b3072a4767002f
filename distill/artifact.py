"""Where an artifact's files lie: one folder that every runtime loads, with one graph a variant below `onnx/`.

On top lie the tokenizer, the model's configuration and each runtime's settings, which all variants share. The graphs
have the names by which transformers.js finds a `dtype`; onnxruntime-genai's settings name the graph that it loads
by itself, the default variant. `locate` is how everything here that opens an artifact finds a graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import ArtifactError, EngineError
from distill.untrusted import read_runtime_config, refuse_unsafe_configs, refuse_unsafe_graph

GENAI_CONFIG = "genai_config.json"
VARIANT_FILES: dict[str, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
    "q4f16": "onnx/model_q4f16.onnx",
}
"""Graph of each variant, by its path in the folder."""
DATA_SUFFIX = "_data"
"""What the name of a graph's external data adds to the graph's own."""


class Graph(NamedTuple):
    """One variant of an artifact."""

    root: Path
    """The artifact's folder."""
    variant: str
    """Its variant; the file's stem where the file is none of ours."""
    file: str
    """Relative POSIX path of the graph."""

    @property
    def path(self) -> Path:
        """Where the graph lies."""
        return self.root / self.file


def locate(path: Path, variant: str | None = None) -> Graph:
    """The graph that `path` names: an artifact's folder (its default variant, or `variant`), or a graph in it.

    Raises EngineError if there is no such folder, settings or graph, naming the variants that are there.
    """
    if path.suffix == ".onnx" and variant is None:
        root = path.parent.parent if path.parent.name == "onnx" else path.parent
        return _existing(Graph(root, _variant_of(path.relative_to(root).as_posix()), path.relative_to(root).as_posix()))
    file = VARIANT_FILES.get(variant, "") if variant else default_file(path)
    if not file:
        raise EngineError(f"{path}: no variant is called {variant!r}; {_choice(path)}")
    return _existing(Graph(path, variant or _variant_of(file), file))


def refuse_unsafe(graph: Graph) -> None:
    """Raise ArtifactError unless a runtime may load a graph with the settings and the tokenizer that lie above it."""
    refuse_unsafe_configs(graph.root)
    read_runtime_config(graph.root / GENAI_CONFIG)
    refuse_unsafe_graph(graph.root, graph.file)


@contextmanager
def runtime_settings(folder: Path) -> Iterator[Any]:
    """The content of an artifact's genai_config.json, to be read inside the block.

    Raises EngineError if it is absent or lacks what the block asks for, ArtifactError if it is not safe to follow.
    """
    path = folder / GENAI_CONFIG
    try:
        yield read_runtime_config(path)
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path}: cannot be used ({type(error).__name__}: {error}); give an artifact's folder"
        ) from error


def default_file(folder: Path) -> str:
    """Relative path of the graph that onnxruntime-genai loads by itself; raises as `runtime_settings`."""
    with runtime_settings(folder) as settings:
        return str(settings["model"]["decoder"]["filename"])


def variants_in(folder: Path) -> list[str]:
    """Variants whose graph is in the folder, in the order of `VARIANT_FILES`."""
    return [variant for variant, file in VARIANT_FILES.items() if (folder / file).is_file()]


def graph_files(folder: Path, variant: str) -> list[Path]:
    """The graph of a variant and its external data, as far as they are there."""
    if variant not in VARIANT_FILES:
        return []
    graph = folder / VARIANT_FILES[variant]
    return [path for path in (graph, data_file(graph)) if path.is_file()]


def data_file(graph: Path) -> Path:
    """Where the external data of a graph lies."""
    return graph.with_name(graph.name + DATA_SUFFIX)


def graph_bytes(folder: Path, variant: str) -> int:
    """Bytes of a variant on disk: graph and weights, without what all variants share."""
    return sum(path.stat().st_size for path in graph_files(folder, variant))


def _variant_of(file: str) -> str:
    return next((variant for variant, known in VARIANT_FILES.items() if known == file), Path(file).stem)


def _existing(graph: Graph) -> Graph:
    if not graph.path.is_file():
        raise EngineError(f"{graph.path}: there is no such graph; {_choice(graph.root)}")
    return graph


def _choice(folder: Path) -> str:
    there = variants_in(folder)
    return f"choose from {', '.join(there)}" if there else "the folder holds no graph: give an artifact's folder"
