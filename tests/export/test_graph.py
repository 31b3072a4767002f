"""Graphs of every family and variant come out as asked, and a graph that is not is refused."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.artifact import VARIANT_FILES, data_file
from distill.errors import ExportError
from distill.export.graph import (
    CHECKPOINT_FILES,
    build_variant,
    check_graph,
    end_token_ids,
    refuse_unsupported,
    weight_bytes,
)
from distill.export.schemes import VARIANTS, expected_matrices, predicted_bytes
from distill.models import find_model, load_config

FAMILIES = ("llama", "qwen2", "qwen3")


def graph(folder: Path, variant: str = "fp32") -> Path:
    return folder / VARIANT_FILES[variant]


def config_of(folder: Path) -> Any:
    return load_config(find_model(str(folder)))


def edited(checkpoint: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy of a checkpoint with one JSON file changed (None removes a key)."""
    shutil.copytree(checkpoint, target)
    content = json.loads((target / name).read_text()) | changes
    (target / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return target


# --- what is built ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports_to_every_variant(
    exported: Callable[..., Path], student: Callable[..., Path], family: str, tied: bool, variant: str
) -> None:
    folder = exported(family, variant, tied=tied)
    check_graph(graph(folder, variant), config_of(student(family, tied=tied)), VARIANTS[variant])
    names = {path.name for path in folder.iterdir()}
    assert names >= {"onnx", "genai_config.json", "config.json", "generation_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {*(folder / "onnx").iterdir()} == {graph(folder, variant), data_file(graph(folder, variant))}
    assert not folder.with_name(f"{variant}.part").exists()


def test_weights_take_the_bytes_that_their_bits_say(exported: Callable[..., Path]) -> None:
    hidden, inner, vocabulary, layers = 64, 128, 512, 2
    body = layers * (hidden * 128 + 64 * hidden + 3 * hidden * inner)  # qkv is 64 + 32 + 32 wide
    head = hidden * vocabulary
    found = {variant: weight_bytes(graph(exported(variant=variant), variant)) for variant in VARIANTS}
    assert (found["fp32"].body, found["fp32"].head, found["fp32"].scales) == (4 * body, 4 * head, 0)
    assert (found["fp16"].body, found["fp16"].head, found["fp16"].scales) == (2 * body, 2 * head, 0)
    # a block of 32 weights has one fp32 scale; int4 also has a zero point of as many bits as a weight
    assert (found["int8"].body, found["int8"].head) == (body, head)
    assert found["int8"].scales == 4 * (body + head) // 32
    assert (found["int4"].body, found["int4"].head) == (body // 2, head // 2)
    assert found["int4"].scales == 4 * (body + head) // 32 + (body + head) // 64
    assert found["q4f16"].scales == 2 * (body + head) // 32 + (body + head) // 64


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_known_before_anything_is_built(
    exported: Callable[..., Path], student: Callable[..., Path], family: str, tied: bool, variant: str
) -> None:
    folder = exported(family, variant, tied=tied)
    predicted = predicted_bytes(config_of(student(family, tied=tied)), VARIANTS[variant])
    assert predicted == weight_bytes(graph(folder, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tied_embedding_is_stored_once(exported: Callable[..., Path], variant: str) -> None:
    assert weight_bytes(graph(exported(variant=variant), variant)).embedding == 0
    assert weight_bytes(graph(exported(variant=variant, tied=False), variant)).embedding > 0


def test_building_twice_gives_the_same_bytes(student: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_variant(student(), "int4", tmp_path / name)
    for path in sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path.name


def test_tokenizer_and_configuration_are_the_checkpoints_own(
    exported: Callable[..., Path], student: Callable[..., Path]
) -> None:
    there = [name for name in CHECKPOINT_FILES if (student() / name).is_file() and name != "tokenizer_config.json"]
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= set(there)
    for name in there:
        assert (exported() / name).read_bytes() == (student() / name).read_bytes(), name


def test_the_runtime_settings_are_greedy_bounded_and_end_where_the_checkpoint_ends(
    student: Callable[..., Path], tmp_path: Path
) -> None:
    end = config_of(student()).eos_token_id
    checkpoint = edited(
        student(), tmp_path / "in", "generation_config.json", eos_token_id=[end, 0], do_sample=True, temperature=0.7
    )
    build_variant(checkpoint, "int8", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["filename"] == "onnx/model_quantized.onnx"
    assert settings["model"]["eos_token_id"] == [end, 0]
    assert settings["search"]["do_sample"] is False
    assert settings["search"]["max_length"] == settings["model"]["context_length"] == 512
    assert "intra_op_num_threads" not in settings["model"]["decoder"]["session_options"]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 512


def test_a_context_of_128k_does_not_become_the_default_length(student: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = student(max_position_embeddings=131072)
    build_variant(checkpoint, "int8", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert settings["model"]["context_length"] == 131072
    assert settings["search"]["max_length"] == 8192


def test_a_checkpoint_without_generation_config_gets_one(student: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "in"
    shutil.copytree(student(), checkpoint)
    (checkpoint / "generation_config.json").unlink()
    build_variant(checkpoint, "fp32", tmp_path / "out")
    config = config_of(checkpoint)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == config.eos_token_id


def test_building_prints_nothing_and_leaves_logging_alone(
    student: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    build_variant(student(), "int4", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


# --- what is refused --------------------------------------------------------------------------------------------------


INT4 = VARIANTS["int4"]


@pytest.mark.parametrize(
    ("scheme", "complaint"),
    [
        (VARIANTS["int8"], "expected 64x128 in 8 bits"),
        (VARIANTS["fp32"], "asked for|expected 64x128 in 32 bits"),
        (dataclasses.replace(INT4, block_size=64), "block_size 32, asked for 64"),
        (dataclasses.replace(INT4, accuracy_level=0), "accuracy_level 4, asked for 0"),
        (dataclasses.replace(INT4, head_bits=8), "/lm_head/MatMul: came out as 64x512 in 4 bits, expected"),
        (dataclasses.replace(INT4, wide_layers=(1,)), "layers.1/attn/qkv_proj/MatMul: came out as .* in 4 bits"),
    ],
    ids=["bits", "not quantized", "block size", "accuracy", "head", "layer"],
)
def test_a_graph_quantized_otherwise_than_asked_is_refused(
    exported: Callable[..., Path], student: Callable[..., Path], scheme: Any, complaint: str
) -> None:
    with pytest.raises(ExportError, match=complaint):
        check_graph(graph(exported(variant="int4"), "int4"), config_of(student()), scheme)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 3}, "attention is fused in 2 of 3|is missing from the graph"),
        ({"num_hidden_layers": 1}, "expected nothing of that name"),
        ({"vocab_size": 500}, "lm_head.* expected 64x500"),
        ({"tie_word_embeddings": False}, "embedding has 4 bits, expected 32"),
    ],
    ids=["layers lost", "layers more", "shape", "shared table"],
)
def test_a_graph_of_another_model_is_refused(
    exported: Callable[..., Path], student: Callable[..., Path], change: dict[str, Any], complaint: str
) -> None:
    config = config_of(student())
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ExportError, match=complaint):
        check_graph(graph(exported(variant="int4"), "int4"), config, INT4)


def test_a_second_table_for_a_tied_embedding_is_refused(
    exported: Callable[..., Path], student: Callable[..., Path]
) -> None:
    with pytest.raises(ExportError, match=r"a tied model shares the head's"):
        check_graph(graph(exported(variant="fp32", tied=False)), config_of(student()), VARIANTS["fp32"])


def test_attention_with_a_window_or_without_rotary_embedding_is_refused(
    exported: Callable[..., Path], student: Callable[..., Path], tmp_path: Path
) -> None:
    import onnx_ir

    for key, value, complaint in (("local_window_size", 8, "window of 8"), ("do_rotary", 0, "do_rotary 0")):
        folder = tmp_path / key
        shutil.copytree(exported(), folder)
        model = onnx_ir.load(graph(folder))
        next(n for n in model.graph if n.op_type == "GroupQueryAttention").attributes[key] = onnx_ir.AttrInt64(
            key, value
        )
        onnx_ir.save(model, graph(folder))
        with pytest.raises(ExportError, match=complaint):
            check_graph(graph(folder), config_of(student()), VARIANTS["fp32"])


def test_a_weight_that_no_node_reads_is_refused(
    exported: Callable[..., Path], student: Callable[..., Path], tmp_path: Path
) -> None:
    import numpy as np
    import onnx_ir

    folder = tmp_path / "fp32"
    shutil.copytree(exported(), folder)
    model = onnx_ir.load(graph(folder))
    model.graph.register_initializer(
        onnx_ir.Value(name="stray", const_value=onnx_ir.tensor(np.zeros(4, np.float32), name="stray"))
    )
    onnx_ir.save(model, graph(folder))
    with pytest.raises(ExportError, match="not in the graph, first stray"):
        check_graph(graph(folder), config_of(student()), VARIANTS["fp32"])


def test_an_unknown_variant_names_the_known_ones(student: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'int5' is not known; choose from fp32, fp16, int8, int4, q4f16"):
        build_variant(student(), "int5", tmp_path / "out")


def test_a_folder_with_something_in_it_is_not_overwritten(student: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ExportError, match="is there already"):
        build_variant(student(), "int4", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_what_a_killed_build_left_behind_is_replaced(student: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "int8.part").mkdir()
    (tmp_path / "int8.part" / "half").write_text("x")
    build_variant(student(), "int8", tmp_path / "int8")
    assert not (tmp_path / "int8" / "half").exists()


def test_a_builder_that_fails_says_why_and_leaves_no_variant(student: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = edited(student(), tmp_path / "in", "config.json", architectures=["FancyForCausalLM"])
    with pytest.raises(
        ExportError, match=r"builder failed: NotImplementedError: The .* model is not currently supported"
    ):
        build_variant(checkpoint, "fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear"])
def test_rotary_scaling_that_would_be_dropped_is_refused(student: Callable[..., Path], kind: str) -> None:
    config = config_of(student())
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ExportError, match=f"rotary scaling '{kind}' of a llama model is not exported"):
        refuse_unsupported(config, "model")


def test_sliding_windows_and_other_activations_are_refused(student: Callable[..., Path]) -> None:
    config = config_of(student("qwen2"))
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ExportError, match="sliding-window"):
        refuse_unsupported(config, "model")
    config = config_of(student())
    config.hidden_act = "gelu"
    with pytest.raises(ExportError, match="activation 'gelu'"):
        refuse_unsupported(config, "model")


def test_a_checkpoint_whose_files_disagree_on_the_end_token_is_refused(
    student: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = edited(student(), tmp_path / "in", "generation_config.json", eos_token_id=[1])
    with pytest.raises(ExportError, match=r"tokenizer ends texts with id 2, generation_config.json with \[1\]"):
        build_variant(checkpoint, "fp32", tmp_path / "out")


def test_a_checkpoint_without_an_end_token_is_refused(student: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = edited(student(), tmp_path / "in", "generation_config.json", eos_token_id=None)
    config = config_of(checkpoint)
    config.eos_token_id = None
    with pytest.raises(ExportError, match="names no end token"):
        end_token_ids(checkpoint, config, None)


def test_expected_matrices_follow_the_models_own_head_size(student: Callable[..., Path]) -> None:
    config = config_of(student("qwen3", head_dim=32))
    found = {matrix.name: matrix for matrix in expected_matrices(config, INT4)}
    assert found["/model/layers.1/attn/qkv_proj/MatMul"][2:] == (64, (4 + 2 + 2) * 32)
    assert found["/model/layers.0/attn/o_proj/MatMul"][2:] == (4 * 32, 64)
    assert found["/lm_head/MatMul"] == ("/lm_head/MatMul", 4, 64, 512)
    assert len(found) == 2 * 5 + 1


def test_the_graph_names_no_commit_of_the_folder_it_was_built_in(student: Callable[..., Path], tmp_path: Path) -> None:
    """The builder stamps graphs with the working directory's git commit; equal exports must be equal files."""
    build_variant(student(), "int8", tmp_path / "int8")
    import onnx

    model = onnx.load(graph(tmp_path / "int8", "int8"), load_external_data=False)
    assert model.producer_name == "onnxruntime-genai"
    assert re.fullmatch(r"[0-9.]+", model.producer_version)
