"""An artifact checks itself, and whatever was done to it is refused: by `verify` and by every loader of ours."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.config import FormatConfig, TeacherConfig, recipe_from
from distill.engines import onnx as engine
from distill.errors import ArtifactError, DistillError
from distill.export.manifest import GoldenPrompt, read_manifest, result_digest, verify_files
from distill.export.runtime import Runtime
from distill.export.verify import Check, refuse_failed, summary, verify_artifact
from distill.onnx_decoding import GenaiDecoder, OnnxDecoder
from distill.runs import RunOptions

Tamper = Callable[[Path], Any]


@pytest.fixture(scope="session")
def exported_artifact(student: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact as the export stage makes one of a random student, in int8 and int4; never change it."""
    return export(student(), tmp_path_factory.mktemp("runs"))


def export(checkpoint: Path, runs: Path) -> Path:
    from distill import api

    limits = {"max_kl": 9.0, "min_top1": 0.0, "max_perplexity": 99.0}
    gates = {name: dict.fromkeys(("int8", "int4"), limit) for name, limit in limits.items()}
    section = {
        "model": str(checkpoint),
        "variants": ["int8", "int4"],
        "golden_prompts": 1,
        "gates": gates,
        "runtimes": ["genai"],
    }
    recipe = recipe_from({"name": "tiny", "export": section | {"licence": "llama3.2"}})
    outcome = api.export_model(recipe, runs=runs, quiet=True, threads=1)
    return outcome.results["export"].path("artifact")


@pytest.fixture
def artifact(exported_artifact: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(exported_artifact, tmp_path / "artifact")
    return tmp_path / "artifact"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- an artifact as it ships ------------------------------------------------------------------------------------------


def test_an_exported_artifact_passes_all_that_was_run_and_names_what_was_not(exported_artifact: Path) -> None:
    checks = verify_artifact(exported_artifact)
    missing = [check.name for check in checks if check.status == "not_run"]
    assert sorted(missing) == [
        *(f"gate int4 {name}" for name in ("accuracy_drop", "gain_retained", "genai_stops")),
        *(f"gate int8 {name}" for name in ("accuracy_drop", "gain_retained", "genai_stops")),
        "signature",
    ]
    assert not [check for check in checks if check.status == "failed"]
    passed = {check.name for check in checks if check.status == "passed"}
    assert {"files", "settings", "graphs", "end tokens", "bill of materials", "its schema", "card"} < passed
    assert {"golden int8", "golden int4"} < passed and len(passed) == len(checks) - 7
    assert summary(checks) == f"{len(passed)} passed, 0 failed, 7 not run ({', '.join(missing)})"
    refuse_failed(checks)
    with pytest.raises(ArtifactError, match=r"7 check\(s\) failed: signature: "):
        refuse_failed(checks, require=True)


def test_an_equal_export_has_an_equal_digest_and_an_equal_bill(
    exported_artifact: Path, student: Callable[..., Path], tmp_path: Path
) -> None:
    again = export(student(), tmp_path)
    assert result_digest(read_manifest(again)) == result_digest(read_manifest(exported_artifact))
    assert (again / "bom.cdx.json").read_bytes() == (exported_artifact / "bom.cdx.json").read_bytes()


def test_what_a_licence_asks_is_in_the_manifest_and_in_the_card(exported_artifact: Path) -> None:
    reading = read_manifest(exported_artifact).licences
    assert reading.licence == "llama3.2"
    assert [question.endswith("name begin with `Llama`.") for question in reading.questions] == [True]
    assert "name begin with `Llama`" in (exported_artifact / "README.md").read_text()


BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    sys.argv[0] = "distill"
    from distill.cli import main
    main()
"""


def test_an_artifact_is_verified_whole_where_torch_and_transformers_cannot_be_imported(exported_artifact: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, "verify", str(exported_artifact), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status = {check["name"]: check["status"] for check in json.loads(done.stdout)}
    assert status["golden int4"] == status["golden int8"] == status["its schema"] == status["files"] == "passed"


# --- tampering: everybody refuses -------------------------------------------------------------------------------------


def flip_a_bit(artifact: Path) -> None:
    path = artifact / "onnx/model_q4.onnx_data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def swap(artifact: Path) -> None:
    one, other = artifact / "onnx/model_q4.onnx_data", artifact / "onnx/model_quantized.onnx_data"
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def link_weights_out(artifact: Path) -> None:
    path = artifact / "onnx/model_q4.onnx_data"
    path.rename(artifact.parent / "weights")
    path.symlink_to("../../weights")


def link_graphs_out(artifact: Path) -> None:
    (artifact / "onnx").rename(artifact.parent / "graphs")
    (artifact / "onnx").symlink_to("../graphs")


def name_weights_elsewhere(artifact: Path) -> None:
    import onnx

    path = artifact / "onnx/model_q4.onnx"
    (artifact / "onnx/model_q4.onnx_data").rename(artifact.parent / "weights")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../weights"
    path.write_bytes(model.SerializeToString())


def name_graph_elsewhere(artifact: Path) -> None:
    shutil.copytree(artifact / "onnx", artifact.parent / "onnx")
    settings = artifact / "genai_config.json"
    edit(settings, lambda c: c["model"]["decoder"].update(filename="../onnx/model_q4.onnx"))


def load_a_library(artifact: Path) -> None:
    edit(
        artifact / "genai_config.json",
        lambda c: c["model"]["decoder"]["session_options"].update(custom_ops_library="evil.so"),
    )


def text_in(name: str, text: bytes) -> Tamper:
    return lambda artifact: (artifact / name).write_bytes(text)


UNSAFE: dict[str, tuple[Tamper, str]] = {
    "no external data": (lambda a: (a / "onnx/model_q4.onnx_data").unlink(), "model_q4.onnx_data is missing"),
    "short external data": (lambda a: (a / "onnx/model_q4.onnx_data").write_bytes(b"x"), "has 1 bytes"),
    "weights behind a link": (link_weights_out, "leads out of the folder"),
    "graphs behind a link": (link_graphs_out, "leads out of the folder"),
    "weights elsewhere": (name_weights_elsewhere, "they must be in a file beside it|is missing"),
    "graph elsewhere": (name_graph_elsewhere, "leads out of the folder|was changed"),
    "a library": (load_a_library, "custom_ops_library|was changed"),
    "settings that are no JSON": (text_in("genai_config.json", b"{"), "is not a JSON document|was changed"),
    "settings that are deep": (text_in("genai_config.json", b"[" * 99_999), "nested too deeply|was changed"),
    "settings with a key twice": (text_in("genai_config.json", b'{"model": 1, "model": 2}'), "twice|was changed"),
    "huge settings": (text_in("genai_config.json", b" " * (17 << 20)), "at most 16,777,216|was changed"),
    "no graph": (text_in("onnx/model_q4.onnx", b"\x00junk"), "is not an ONNX graph|was changed"),
}
"""What would lead a runtime astray or break it, and what is said of it."""


def open_engine(folder: Path) -> None:
    teacher = TeacherConfig(engine="onnx", model=str(folder))
    engine.preflight(teacher, FormatConfig(), RunOptions(threads=1))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "verify": lambda folder: verify_artifact(folder, golden=False),
    "onnx decoder": lambda folder: OnnxDecoder(folder, 1, variant="int4"),
    "genai decoder": lambda folder: GenaiDecoder(folder, 1, "int4"),
    "engine": open_engine,
    "runtime": lambda folder: Runtime(folder, "int4", threads=1).close(),
}


@pytest.mark.parametrize("attack", UNSAFE)
@pytest.mark.parametrize("loader", LOADERS)
def test_what_leads_a_runtime_astray_is_refused_by_all_that_open_an_artifact(
    artifact: Path, loader: str, attack: str
) -> None:
    tamper, complaint = UNSAFE[attack]
    tamper(artifact)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        LOADERS[loader](artifact)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_artifact_that_nobody_touched_is_opened_by_all(artifact: Path, loader: str) -> None:
    LOADERS[loader](artifact)


@pytest.mark.parametrize("attack", UNSAFE)
def test_a_forger_who_seals_anew_what_is_unsafe_gets_no_further(artifact: Path, artifacts: Any, attack: str) -> None:
    tamper, _ = UNSAFE[attack]
    tamper(artifact)
    with pytest.raises(DistillError):
        artifacts.reseal(artifact)  # our own writer refuses links; the others pass it
        verify_artifact(artifact, golden=False)


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (flip_a_bit, r"onnx/model_q4\.onnx_data was changed: its sha256"),
        (swap, r"onnx/model_q4\.onnx_data was changed"),
        (lambda a: (a / "config.json").write_text("{}"), r"config\.json was changed"),
        (lambda a: (a / "evil.py").write_text(""), r"evil\.py is not in the manifest"),
        (lambda a: edit(a / "manifest.json", lambda m: m["files"].pop("config.json")), "is not in the manifest"),
        (
            lambda a: edit(a / "manifest.json", lambda m: m["files"].update({"../x": m["files"]["config.json"]})),
            "'../x' leads out of the folder",
        ),
        (lambda a: edit(a / "manifest.json", lambda m: m.update(default="fp32")), "not among the variants"),
    ],
    ids=["bit", "swap", "settings", "added", "unlisted", "traversal", "default"],
)
def test_verify_refuses_any_other_byte(artifact: Path, tamper: Tamper, complaint: str) -> None:
    tamper(artifact)
    with pytest.raises(ArtifactError, match=complaint):
        verify_artifact(artifact, golden=False)


# --- tampering that keeps the hashes right ----------------------------------------------------------------------------


def failed(artifact: Path, golden: bool = False) -> dict[str, str]:
    return {check.name: check.detail for check in verify_artifact(artifact, golden) if check.status == "failed"}


def rehash(artifact: Path) -> None:
    """Hashes in the manifest made right, and nothing else: card and bill of materials stay as they were."""
    from distill.runs import file_digest

    def update(manifest: Any) -> None:
        for name, entry in manifest["files"].items():
            entry.update(sha256=file_digest(artifact / name), bytes=(artifact / name).stat().st_size)

    edit(artifact / "manifest.json", update)
    verify_files(artifact)


def test_other_weights_under_right_hashes_are_not_those_of_the_bill_nor_of_the_golden_prompts(
    artifact: Path, artifacts: Any
) -> None:
    data = artifact / "onnx/model_q4.onnx_data"
    data.write_bytes(bytes(reversed(data.read_bytes())))
    rehash(artifact)
    assert failed(artifact) == {
        "bill of materials": "bom.cdx.json onnx/model_q4.onnx_data has another sha256 than in the manifest"
    }
    artifacts.reseal(artifact)
    assert failed(artifact) == {}
    assert failed(artifact, golden=True).keys() == {"golden int4"}


def test_a_card_with_better_numbers_than_the_manifests_is_told(artifact: Path) -> None:
    card = artifact / "README.md"
    text = card.read_text()
    card.write_text(text.replace("| int4 | accuracy_drop | not run |", "| int4 | accuracy_drop | passed |"))
    assert card.read_text() != text
    rehash(artifact)
    assert failed(artifact) == {"card": "its gates are not those of the manifest"}
    card.write_bytes(b"\xff")
    rehash(artifact)
    assert failed(artifact) == {"card": "README.md is not UTF-8 text"}


def test_a_gate_that_was_edited_into_the_manifest_is_not_that_of_the_card(artifact: Path) -> None:
    edit(artifact / "manifest.json", lambda m: [gate.update(status="passed") for gate in m["gates"]])
    assert failed(artifact) == {"card": "its gates are not those of the manifest"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda c: c.update(eos_token_id=7)),
        ("generation_config.json", lambda c: c.update(eos_token_id=[2, 7])),
        ("genai_config.json", lambda c: c["model"].update(eos_token_id=[7])),
        ("tokenizer_config.json", lambda c: c.update(eos_token="<|im_start|>")),
        ("generation_config.json", lambda c: c.pop("eos_token_id")),
    ],
)
def test_files_that_end_a_text_at_different_tokens_are_told(
    artifact: Path, artifacts: Any, name: str, change: Callable[[Any], Any]
) -> None:
    edit(artifact / name, change)
    artifacts.reseal(artifact)
    assert failed(artifact).keys() == {"end tokens"}


def test_settings_that_load_another_variant_than_the_default_are_told(artifact: Path, artifacts: Any) -> None:
    edit(
        artifact / "genai_config.json",
        lambda c: c["model"]["decoder"].update(filename="onnx/model_quantized.onnx"),
    )
    artifacts.reseal(artifact)
    assert failed(artifact)["settings"].endswith("the manifest's default is onnx/model_q4.onnx")


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [((1, 2, 3), "1 of 1 prompts give other tokens"), ((10**12,), "beyond the vocabulary of 512"),
     ((3,) * 512, "longer than the context of 512 tokens")],
)  # fmt: skip
def test_golden_prompts_that_the_model_does_not_or_cannot_write_fail(
    artifact: Path, artifacts: Any, expected: tuple[int, ...], complaint: str
) -> None:
    artifacts.reseal(artifact, golden=(GoldenPrompt(variant="int4", prompt_ids=(1, 5), expected_ids=expected),))
    assert complaint in failed(artifact, golden=True)["golden int4"]


def test_what_is_missing_is_said(artifact: Path) -> None:
    (artifact / "bom.cdx.json").unlink()
    (artifact / "README.md").unlink()
    edit(artifact / "manifest.json", lambda m: [m["files"].pop(name) for name in ("bom.cdx.json", "README.md")])
    assert failed(artifact)["card"] == "the artifact has no README.md"
    assert "has no bom.cdx.json" in failed(artifact)["bill of materials"]


def test_a_check_whose_library_is_absent_is_not_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    checks = by_name(verify_artifact(artifact))
    for name in ("graphs", "its schema", "golden int4"):
        assert checks[name].status == "not_run" and "pip install 'distill[export]'" in checks[name].detail
