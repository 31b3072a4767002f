"""What a runtime would follow out of a folder, or could not parse, is refused before it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.artifact import Graph, refuse_unsafe
from distill.errors import ArtifactError
from distill.untrusted import (
    DEEPEST_JSON,
    LARGEST_CONFIG,
    bad_name,
    external_data,
    file_in,
    read_json,
    read_runtime_config,
    refuse_unsafe_configs,
    refuse_unsafe_graph,
)

RUNTIME: dict[str, Any] = {
    "model": {
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"log_id": "a", "provider_options": []},
            "inputs": {"past_key_names": "past_key_values.%d.key"},
        },
        "eos_token_id": [2, 0],
    },
    "search": {"do_sample": False},
}


def tensor(location: str | None = None, **entries: str) -> Any:
    from onnx import TensorProto

    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    if location is None:
        made.raw_data = bytes(8)
        return made
    made.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        made.external_data.add(key=key, value=value)
    return made


def graph(*initializers: Any, nodes: Any = ()) -> Any:
    from onnx import helper

    return helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers))


def save(folder: Path, content: Any) -> Path:
    from onnx import helper

    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(content).SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that a runtime may load: a graph with its data, and two configurations."""
    made = tmp_path / "artifact"
    made.mkdir()
    (tmp_path / "outside").write_bytes(bytes(64))
    (made / "genai_config.json").write_text(json.dumps(RUNTIME))
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model.onnx.data").write_bytes(bytes(64))
    save(made, graph(tensor("model.onnx.data", offset="32", length="32")))
    refuse_unsafe(Graph(made, "model", "model.onnx"))
    return made


# --- names and links --------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abcXYZ019._- é", min_size=1, max_size=8), min_size=1, max_size=4))
def test_a_name_is_good_just_when_it_stays_below_its_folder(parts: list[str]) -> None:
    assert (bad_name("/".join(parts)) is None) == all(part not in (".", "..") for part in parts)


def test_a_link_that_stays_inside_is_followed_and_one_that_leaves_is_not(folder: Path) -> None:
    (folder / "inside").symlink_to("model.onnx.data")
    assert file_in(folder, "inside") == folder / "inside"
    (folder / "out").symlink_to("../outside")
    (folder / "sub").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    for name in ("out", "sub/outside"):
        with pytest.raises(ArtifactError, match=f"{name} is a link that leads out of the folder"):
            file_in(folder, name)
    with pytest.raises(ArtifactError, match="loop is a link to no file"):
        file_in(folder, "loop")
    with pytest.raises(ArtifactError, match="nothing is missing"):
        file_in(folder, "nothing")


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is not a JSON document"),
        (b"\xff\xfe{}", "is not a JSON document"),
        (b'{"a": 1, "a": 2}', "a key appears twice"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b"[" * (DEEPEST_JSON + 1) + b"]" * (DEEPEST_JSON + 1), "nested too deeply; 64 levels"),
        (b"[" * 500_000, "nested too deeply|not a JSON document"),
    ],
    ids=["empty", "utf-16", "twice", "infinity", "deep", "deeper than the stack"],
)
def test_json_that_parsers_read_differently_or_not_at_all_is_refused(
    tmp_path: Path, text: bytes, complaint: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_is_read_up_to_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"[" * DEEPEST_JSON + b"]" * DEEPEST_JSON)
    read_json(path)
    with pytest.raises(ArtifactError, match="has 128 bytes; such a file has at most 127"):
        read_json(path, 127)


# --- configurations ---------------------------------------------------------------------------------------------------


def change(folder: Path, *keys: str, to: Any) -> None:
    content = json.loads(json.dumps(RUNTIME))
    inner = content
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = to
    (folder / "genai_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("model", "decoder", "filename"), "../outside", "'../outside' leads out of the folder"),
        (("model", "decoder", "filename"), "/etc/passwd", "leads out of the folder"),
        (("model", "decoder", "filename"), "other.onnx", "other.onnx is missing"),
        (("model", "vision", "filename"), "..\\outside", "characters that a portable name has not"),
        (("model", "decoder", "pipeline"), [{"a": {"filename": "../outside"}}], "leads out of the folder"),
        (("model", "speech", "config_filename"), "x.json", "names no file but its graph"),
        (("model", "decoder", "session_options", "custom_ops_library"), "x.so", "'custom_ops_library' is not allowed"),
        (
            ("model", "decoder", "session_options", "session.model_external_initializers_file_folder_path"),
            "x",
            "is not allowed; allowed: ",
        ),
        (
            ("model", "decoder", "session_options", "provider_options"),
            [{"qnn": {"backend_path": "x.so"}}],
            "names no file but its graph",
        ),
        (("search", "hint"), "C:\\x", "names no file but its graph"),
        (("search", "hint"), "a/../../x", "names no file but its graph"),
        (("model", "decoder", "session_options"), "x", "session_options is not an object"),
    ],
)
def test_a_runtime_configuration_that_leads_elsewhere_is_refused(
    folder: Path, keys: tuple[str, ...], value: Any, complaint: str
) -> None:
    change(folder, *keys, to=value)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        read_runtime_config(folder / "genai_config.json")
    assert "\n" not in str(caught.value)


def test_a_configuration_that_names_code_is_huge_or_a_link_out_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text('{"auto_map": {"AutoTokenizer": "x.T"}}')
    with pytest.raises(ArtifactError, match="names code to be run"):
        refuse_unsafe_configs(folder)
    path.write_bytes(b" " * (LARGEST_CONFIG + 1))
    with pytest.raises(ArtifactError, match="such a file has at most 16,777,216"):
        refuse_unsafe_configs(folder)
    path.unlink()
    path.symlink_to("../outside")
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        refuse_unsafe_configs(folder)


# --- graphs -----------------------------------------------------------------------------------------------------------


def in_constant(inner: Any) -> Any:
    from onnx import helper

    return graph(nodes=[helper.make_node("Constant", [], ["c"], value=inner)])


def in_branch(inner: Any) -> Any:
    from onnx import helper

    branch = helper.make_node("If", ["b"], ["o"], then_branch=graph(inner), else_branch=graph(tensor()))
    return graph(nodes=[branch])


def in_sparse(inner: Any) -> Any:
    content = graph()
    content.sparse_initializer.add().values.CopyFrom(inner)
    return content


@pytest.mark.parametrize("place", [graph, in_constant, in_branch, in_sparse])
@pytest.mark.parametrize("location", ["../outside", "/etc/passwd", "sub/data", "..\\outside", "./model.onnx.data"])
def test_weights_that_lie_elsewhere_are_refused_wherever_the_graph_names_them(
    folder: Path, place: Callable[[Any], Any], location: str
) -> None:
    save(folder, place(tensor(location)))
    with pytest.raises(ArtifactError, match="they must be in a file beside it"):
        refuse_unsafe_graph(folder, "model.onnx")


def test_weights_named_by_a_function_of_the_graph_are_seen(folder: Path) -> None:
    from onnx import helper

    node = helper.make_node("Constant", [], ["c"], value=tensor("../outside"))
    function = helper.make_function("own", "f", [], ["c"], [node], [helper.make_opsetid("", 20)])
    model = helper.make_model(graph(), functions=[function])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert external_data(folder / "model.onnx") == {"../outside": 0}


def test_weights_beside_the_graph_must_be_there_whole_and_not_lead_out(folder: Path) -> None:
    save(folder, graph(tensor("model.onnx.data", offset="32", length="33")))
    with pytest.raises(ArtifactError, match=r"model.onnx.data: has 64 bytes; model.onnx needs 65 of it"):
        refuse_unsafe_graph(folder, "model.onnx")
    save(folder, graph(tensor("model.onnx.data", length="-1")))
    with pytest.raises(ArtifactError, match="has 64 bytes"):
        refuse_unsafe_graph(folder, "model.onnx")
    save(folder, graph(tensor("model.onnx.data")))
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx.data is missing"):
        refuse_unsafe_graph(folder, "model.onnx")
    (folder / "model.onnx.data").symlink_to("../outside")
    with pytest.raises(ArtifactError, match=r"model.onnx.data is a link that leads out of the folder"):
        refuse_unsafe_graph(folder, "model.onnx")


def test_a_location_given_twice_is_refused(folder: Path) -> None:
    twice = tensor("model.onnx.data")
    twice.external_data.add(key="location", value="../outside")
    save(folder, graph(twice))
    with pytest.raises(ArtifactError, match="does not say plainly where its data is"):
        refuse_unsafe_graph(folder, "model.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"ORTM" * 9, b"\x08\x0a"])
def test_a_file_that_is_no_graph_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="is not an ONNX graph"):
        refuse_unsafe_graph(folder, "model.onnx")
