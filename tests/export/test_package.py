"""One folder, read as each runtime reads it; what each of them needs is taken away once, to see that it is needed."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from distill.artifact import VARIANT_FILES, locate
from distill.export.package import DTYPES, lint_end_tokens, tokenizer_class, tokenizer_config, write_loader_files
from distill.export.runtimes import RUNTIMES, Answer, BrokenError, Case, Question, stops_rightly
from distill.onnx_decoding import OnnxDecoder

Artifact = Callable[..., Path]
FAMILIES = ("llama", "qwen2", "qwen3")
MESSAGES = [{"role": "user", "content": "What is 7 + 8? Über 12345 naïve\n\n  x"}]
CASE = Case(MESSAGES, "", [], [5, 6, 7, 300, 2, 44], range(1), [0])
NEW_TOKENS = 24


def ask(runtime: str, folder: Path, variant: str = "fp32") -> Answer:
    question = Question(locate(folder, variant), [CASE], NEW_TOKENS, threads=1, timeout_s=200)
    return RUNTIMES[runtime](question)[1][0]


def copy_of(folder: Path, target: Path, name: str = "config.json", **changes: Any) -> Path:
    """A copy of an artifact with values of one JSON file changed (None removes a key)."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text()) | changes
    (target / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return target


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


# --- the same answers from every library ------------------------------------------------------------------------------


@pytest.mark.usefixtures("node_home")
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_node_writes_the_text_that_onnxruntime_genai_writes(artifact: Artifact, family: str, tied: bool) -> None:
    variants = tuple(VARIANT_FILES) if family == "qwen3" else ("fp32", "int8", "int4")
    folder = artifact(family, variants, tied=tied)
    for variant in variants:
        genai, node = ask("genai", folder, variant), ask("node", folder, variant)
        assert (genai.prompt, genai.prompt_ids) == (node.prompt, node.prompt_ids), variant
        assert genai.top1 == node.top1, variant
        if variant == "fp32":
            assert len(genai.written) == NEW_TOKENS and genai.written == node.written


@pytest.mark.full
@pytest.mark.usefixtures("node_home", "optimum_home")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runtime", ["node", "browser", "optimum"])
def test_every_library_writes_the_text_that_onnxruntime_genai_writes(
    artifact: Artifact, runtime: str, family: str, tied: bool
) -> None:
    folder = artifact(family, tuple(VARIANT_FILES), tied=tied)
    for variant in VARIANT_FILES:
        genai, other = ask("genai", folder, variant), ask(runtime, folder, variant)
        assert (genai.prompt, genai.prompt_ids) == (other.prompt, other.prompt_ids), variant
        assert stops_rightly(other.written, (2,), NEW_TOKENS)
        if variant == "fp32":
            assert genai.written == other.written and genai.top1 == other.top1


# --- what each of them needs ------------------------------------------------------------------------------------------


def symbolic(graph: Path) -> None:
    """Undo what makes the head size of the caches a number."""
    model = onnx.load(graph, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if ".key" in value.name or ".value" in value.name:
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    graph.write_bytes(model.SerializeToString())


@pytest.mark.usefixtures("node_home")
def test_transformers_js_needs_a_head_size_in_the_graph(artifact: Artifact, tmp_path: Path) -> None:
    folder = copy_of(artifact(), tmp_path / "copy")
    symbolic(folder / "onnx" / "model.onnx")
    with pytest.raises(BrokenError, match="past_key"):
        ask("node", folder)


@pytest.mark.usefixtures("node_home")
def test_transformers_js_needs_the_template_in_tokenizer_config(artifact: Artifact, tmp_path: Path) -> None:
    folder = copy_of(artifact(), tmp_path / "copy", "tokenizer_config.json", chat_template=None)
    assert (folder / "chat_template.jinja").is_file()
    with pytest.raises(BrokenError, match="chat_template is not set"):
        ask("node", folder)


@pytest.mark.full
@pytest.mark.usefixtures("node_home")
def test_a_browser_needs_the_external_data_declared(artifact: Artifact, tmp_path: Path) -> None:
    settings = read(artifact(), "config.json")["transformers.js_config"] | {"use_external_data_format": {}}
    folder = copy_of(artifact(), tmp_path / "copy", **{"transformers.js_config": settings})
    with pytest.raises(BrokenError, match=r"model\.onnx_data"):
        ask("browser", folder)


@pytest.mark.full
@pytest.mark.usefixtures("node_home")
def test_a_browser_has_no_kernel_for_the_builders_own_embedding(
    artifact: Artifact, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_of(artifact(), tmp_path / "copy")
    built = exported(variant="int8", tied=True) / VARIANT_FILES["int8"]
    shutil.copyfile(built, folder / VARIANT_FILES["int8"])
    with pytest.raises(BrokenError, match="GatherBlockQuantized"):
        ask("browser", folder, "int8")


@pytest.mark.full
@pytest.mark.usefixtures("optimum_home")
@pytest.mark.parametrize("change", [{"tokenizer_class": "TokenizersBackend"}, {"extra_special_tokens": ["<|x|>"]}])
def test_transformers_4_needs_its_own_terms(artifact: Artifact, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = copy_of(artifact(), tmp_path / "copy", "tokenizer_config.json", **change)
    with pytest.raises(BrokenError):
        ask("optimum", folder)


@pytest.mark.full
@pytest.mark.usefixtures("optimum_home")
def test_optimum_takes_a_wide_head_only_when_it_is_told(artifact: Artifact, optimum_home: Path) -> None:
    folder = artifact("qwen3", head_dim=32)
    told = "m.embed_size_per_head = m.config.head_dim\n"
    script = (
        "import sys, torch\nfrom optimum.onnxruntime import ORTModelForCausalLM\n"
        "m = ORTModelForCausalLM.from_pretrained(sys.argv[1])\n{}"
        "print(m.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3).long(), max_new_tokens=4))"
    )
    codes = [
        subprocess.run(
            [optimum_home / "bin" / "python", "-c", script.format(line), folder], capture_output=True, check=False
        ).returncode
        for line in ("", told)
    ]
    assert codes == [1, 0], "Optimum has learnt it: drop the exception in ask_optimum"


# --- the files --------------------------------------------------------------------------------------------------------


def test_writing_the_loaders_files_again_changes_nothing(artifact: Artifact, tmp_path: Path) -> None:
    folder = copy_of(artifact(), tmp_path / "copy", "config.json")
    shutil.copyfile(artifact() / "config.json", folder / "config.json")
    write_loader_files(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (artifact() / path.relative_to(folder)).read_bytes(), path


@pytest.mark.parametrize("hidden_size", [64, 96], ids=["even", "odd"])
@pytest.mark.parametrize("variant", VARIANT_FILES)
def test_a_graph_computes_what_the_builders_graph_computes(
    artifact: Artifact, exported: Callable[..., Path], variant: str, hidden_size: int
) -> None:
    """Odd: three blocks a row, so that the last byte of its 4-bit zero points is half empty."""
    ids = [5, 300, 2, 44, 511, 0, 17]
    folders = exported(variant=variant, hidden_size=hidden_size), artifact(variants=(variant,), hidden_size=hidden_size)
    before, after = (OnnxDecoder(folder, threads=1, every_position=True).logits(ids) for folder in folders)
    assert np.array_equal(before, after)


def test_no_graph_keeps_the_operator_that_browsers_lack(artifact: Artifact) -> None:
    folder = artifact(variants=("int8", "int4"))
    for file in ("model_quantized.onnx", "model_q4.onnx"):
        nodes = onnx.load(folder / "onnx" / file, load_external_data=False).graph.node
        assert "GatherBlockQuantized" not in {node.op_type for node in nodes}


def test_keys_and_values_declare_their_head_and_nothing_else_is_fixed(artifact: Artifact) -> None:
    model = onnx.load(artifact() / "onnx" / "model_q4.onnx", load_external_data=False)
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["present.0.key"] == ["batch_size", 2, "total_sequence_length", 16]
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    used = {name for node in model.graph.node for name in node.input} | set(shapes)
    assert {tensor.name for tensor in model.graph.initializer} <= used, "no weight is left over"
    assert all(used & set(node.output) for node in model.graph.node), "and no node"


def test_settings_say_the_same_to_every_library(artifact: Artifact) -> None:
    folder = artifact("qwen3")
    config, generation, runtime = (
        read(folder, name) for name in ("config.json", "generation_config.json", "genai_config.json")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert generation["max_length"] == runtime["search"]["max_length"] == 512
    assert generation["eos_token_id"] == config["eos_token_id"] == runtime["model"]["eos_token_id"]
    assert config["transformers.js_config"] == {
        "dtype": "q4",
        "use_external_data_format": {"model.onnx": 1, "model_quantized.onnx": 1, "model_q4.onnx": 1},
    }
    assert set(DTYPES) == set(VARIANT_FILES)
    half = read(artifact(variants=("fp32", "q4f16")), "config.json")["transformers.js_config"]
    assert half["dtype"] == "q4f16" and half["kv_cache_dtype"] == {"q4f16": "float16"}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_5_reads_what_the_checkpoint_said(
    artifact: Artifact, student: Callable[..., Path], family: str
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    paths = (artifact(family), student(family))
    ours, theirs = (AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""} for path in paths)
    assert {key: ours[key] for key in theirs} == theirs
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in paths]
    assert type(tokenizers[0]) is type(tokenizers[1])
    rendered = [one.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] for one in tokenizers]
    assert rendered[0] == rendered[1]


def test_both_generations_of_transformers_get_the_rotary_scaling_in_their_words(
    artifact: Artifact, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = copy_of(artifact(), tmp_path / "copy", rope_parameters=rope)
    write_loader_files(folder)
    config = read(folder, "config.json")
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert AutoConfig.from_pretrained(folder).rope_parameters == rope


@pytest.mark.parametrize(
    ("name", "byte_level", "written"),
    [
        ("TokenizersBackend", True, "PreTrainedTokenizerFast"),
        (None, True, "PreTrainedTokenizerFast"),
        ("Qwen2Tokenizer", True, "Qwen2Tokenizer"),
        ("Qwen2TokenizerFast", True, "Qwen2Tokenizer"),
        ("GPT2Tokenizer", True, "GPT2Tokenizer"),
        ("LlamaTokenizer", False, "LlamaTokenizer"),
        ("LlamaTokenizerFast", True, "PreTrainedTokenizerFast"),
        ("SomeNewTokenizer", True, "PreTrainedTokenizerFast"),
    ],
)
def test_tokenizer_classes_are_classic_ones(name: str | None, byte_level: bool, written: str, tmp_path: Path) -> None:
    kind = "ByteLevel" if byte_level else "Metaspace"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"type": kind}}))
    assert tokenizer_class(name, tmp_path / "tokenizer.json") == written


def test_a_list_of_extra_tokens_gets_the_name_it_had(artifact: Artifact, tmp_path: Path) -> None:
    changes = {"extra_special_tokens": ["<|a|>"], "is_local": True}
    settings = tokenizer_config(copy_of(artifact(), tmp_path / "copy", "tokenizer_config.json", **changes))
    assert settings["additional_special_tokens"] == ["<|a|>"]
    assert not {"extra_special_tokens", "is_local"} & settings.keys()


# --- end tokens -------------------------------------------------------------------------------------------------------


def test_a_sound_artifact_has_no_disagreement(artifact: Artifact) -> None:
    for family in FAMILIES:
        assert lint_end_tokens(artifact(family)) == []


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("generation_config.json", {"eos_token_id": 7}, "generation_config.json ends texts with [7]"),
        ("generation_config.json", {"eos_token_id": [2, 7]}, "generation_config.json ends texts with [2, 7]"),
        ("config.json", {"eos_token_id": None}, "config.json ends texts with []"),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}, "ends texts with '<|endoftext|>' (0)"),
        ("tokenizer_config.json", {"eos_token": {"content": "<|nowhere|>"}}, "'<|nowhere|>' (None)"),
        ("genai_config.json", {"model": {"eos_token_id": 9999}}, "ends texts with 9999, which is no token"),
        ("genai_config.json", {"model": {}}, "genai_config.json names no end token"),
    ],
)
def test_the_lint_finds_a_file_that_ends_texts_otherwise(
    artifact: Artifact, tmp_path: Path, name: str, changes: dict[str, Any], complaint: str
) -> None:
    problems = lint_end_tokens(copy_of(artifact(), tmp_path / "copy", name, **changes))
    assert any(complaint in problem for problem in problems), problems


def test_the_lint_names_a_file_that_is_missing(artifact: Artifact, tmp_path: Path) -> None:
    folder = copy_of(artifact(), tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    assert "generation_config.json" in lint_end_tokens(folder)[0]
