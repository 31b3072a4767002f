"""A manifest binds every file, and whatever was done to the folder since is said in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.errors import ArtifactError
from distill.export.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Attempt,
    DataOrigin,
    Draft,
    GateEntry,
    GoldenPrompt,
    ModelOrigin,
    Origins,
    RecipeOrigin,
    read_manifest,
    result_digest,
    verify_files,
    write_manifest,
)
from distill.untrusted import LARGEST_CONFIG


def draft(**changes: Any) -> Draft:
    return Draft(
        **{
            "name": "tiny",
            "variants": ("int8", "int4"),
            "default": "int4",
            "origins": Origins(
                student=ModelOrigin(id="runs/train/tiny", revision="abc", licence="Apache-2.0"),
                base=ModelOrigin(id="some/base", licence="Apache-2.0"),
                teachers=(ModelOrigin(id="deepseek-ai/DeepSeek-R1", licence="MIT", engine="openai"),),
                data=DataOrigin(id="sums-select-5", digest="5" * 64, examples=3, licences={"gsm8k": ("MIT", None)}),
                recipe=RecipeOrigin(name="sums", identity="0" * 16),
            ),
            "tools": {"onnxruntime": "1.31.1"},
            "gates": (
                GateEntry(name="kl", variant="int4", status="passed", value=0.03, limit=0.1, unit="nats/token"),
                GateEntry(name="webgpu", status="not_run", detail="no WebGPU device"),
            ),
            "golden": (GoldenPrompt(variant="int8", prompt_ids=(1, 2), expected_ids=(3,)),),
            "measured": {"build_s": 3.5},
            **changes,
        }
    )


def fill(folder: Path) -> Path:
    for name, content in {
        "README.md": "# tiny",
        "onnx/model_q4.onnx": "graph",
        "onnx/model_q4.onnx_data": "weights",
        "onnx/model_quantized.onnx": "graph8",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A complete artifact with a manifest."""
    folder = fill(tmp_path / "artifact")
    write_manifest(folder, draft())
    return folder


def rewrite(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((artifact / MANIFEST_FILE).read_text())
    change(content)
    (artifact / MANIFEST_FILE).write_text(json.dumps(content))


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_manifest_names_every_file_with_its_sha256_and_bytes(artifact: Path) -> None:
    manifest = verify_files(artifact)
    graphs = ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_quantized.onnx"]
    assert list(manifest.files) == ["README.md", *graphs]
    found = manifest.files["onnx/model_q4.onnx_data"]
    assert found.bytes == len("weights")
    assert (
        found.sha256 == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )  # printf weights | sha256sum


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    written = write_manifest(folder, draft())
    assert read_manifest(folder) == written
    content = json.loads((folder / MANIFEST_FILE).read_text())
    assert content["schema"] == 1
    assert set(content) == {
        *("schema", "name", "variants", "default", "origins", "licences", "tools", "options", "files", "gates"),
        *("evaluation", "attempts", "golden", "measured"),
    }


def test_writing_again_replaces_the_manifest_and_does_not_list_it(artifact: Path) -> None:
    (artifact / "README.md").write_text("# changed")
    manifest = write_manifest(artifact, draft(name="again"))
    assert MANIFEST_FILE not in manifest.files
    assert verify_files(artifact).name == "again"


def test_equal_results_have_equal_digests_whatever_was_measured(artifact: Path) -> None:
    digest = result_digest(read_manifest(artifact))
    (artifact / "README.md").write_text("# tiny, measured again")
    assert result_digest(write_manifest(artifact, draft(measured={"build_s": 99.0}))) == digest
    assert result_digest(write_manifest(artifact, draft(tools={"onnxruntime": "2"}))) != digest
    (artifact / "onnx/model_q4.onnx").write_text("other")
    assert result_digest(write_manifest(artifact, draft())) != digest


def test_a_signature_is_no_listed_file_and_goes_with_the_manifest_that_it_signed(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).write_text("{}")
    assert SIGNATURE_FILE not in verify_files(artifact).files
    write_manifest(artifact, draft(name="again"))
    assert not (artifact / SIGNATURE_FILE).exists()


def test_a_gate_or_golden_prompt_of_no_variant_is_refused() -> None:
    with pytest.raises(ValidationError, match="'fp32', which is not among the variants"):
        draft(gates=(GateEntry(name="kl", variant="fp32", status="passed"),))
    with pytest.raises(ValidationError, match="default is 'fp32', which is not among the variants"):
        draft(default="fp32")
    with pytest.raises(ValidationError, match="'fp32', which is not among the variants"):
        draft(attempts=(Attempt(variant="fp32", scheme="fp32", bytes=1),))
    with pytest.raises(ValidationError, match="'fp32', which is not among the variants"):
        draft(golden=(GoldenPrompt(variant="fp32", prompt_ids=(1,), expected_ids=(2,)),))


def test_verifying_loads_no_heavy_library(artifact: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distill.export.manifest import verify_files;"
        "verify_files(Path(sys.argv[1]));"
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'onnxruntime_genai', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- tampering with files ---------------------------------------------------------------------------------------------


def flip_a_bit(artifact: Path) -> None:
    path = artifact / "onnx/model_q4.onnx_data"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def swap_two_files(artifact: Path) -> None:
    one, other = artifact / "onnx/model_q4.onnx", artifact / "README.md"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def link_out(artifact: Path) -> None:
    outside = artifact.parent / "outside"
    outside.write_text("weights")
    (artifact / "onnx/model_q4.onnx_data").unlink()
    (artifact / "onnx/model_q4.onnx_data").symlink_to(outside)


def link_a_folder_out(artifact: Path) -> None:
    (artifact.parent / "elsewhere").mkdir()
    (artifact / "extra").symlink_to(artifact.parent / "elsewhere")


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (flip_a_bit, "onnx/model_q4.onnx_data was changed: its sha256"),
        (swap_two_files, r"README.md was changed: it has 5 bytes, the manifest says 6 \(and 1 more\)"),
        (lambda a: (a / "onnx/model_q4.onnx_data").unlink(), "onnx/model_q4.onnx_data is missing"),
        (lambda a: (a / "onnx/model_q4.onnx_data").write_text("weight"), "has 6 bytes, the manifest says 7"),
        (lambda a: (a / "onnx/sitecustomize.py").write_text(""), "onnx/sitecustomize.py is not in the manifest"),
        (link_out, "onnx/model_q4.onnx_data is a link that leads out of the folder"),
        (link_a_folder_out, "extra is a link that leads out of the folder"),
        (lambda a: (a / "loop").symlink_to(a / "loop"), "loop is a link to no file"),
        (lambda a: os.mkfifo(a / "pipe"), "pipe is neither a file nor a folder"),
        (lambda a: (a / "/".join("abcdefghijkl")).mkdir(parents=True), "nested too deeply"),
        (lambda a: (a / "onnx" / "new\nline").write_text(""), "characters that a portable name has not"),
    ],
    ids=["bit", "swap", "missing", "short", "extra", "link", "folder link", "loop", "pipe", "deep", "name"],
)
def test_a_changed_folder_is_refused_in_one_line(artifact: Path, tamper: Callable[[Path], Any], complaint: str) -> None:
    verify_files(artifact)
    tamper(artifact)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        verify_files(artifact)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_link_within_the_folder_is_the_file_it_leads_to(artifact: Path) -> None:
    (artifact / "onnx/model_quantized.onnx").unlink()
    (artifact / "onnx/model_quantized.onnx").symlink_to("model_q4.onnx")
    with pytest.raises(ArtifactError, match=r"onnx/model_quantized\.onnx was changed"):
        verify_files(artifact)
    write_manifest(artifact, draft())
    verify_files(artifact)


def test_an_artifact_with_a_link_out_of_it_is_not_written(artifact: Path) -> None:
    link_out(artifact)
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        write_manifest(artifact, draft())


def test_a_variant_without_files_is_refused(artifact: Path) -> None:
    rewrite(artifact, lambda m: m.update(variants=["int4", "int8", "fp32"]))
    with pytest.raises(ArtifactError, match="variant fp32 has no graph"):
        verify_files(artifact)


# --- tampering with the manifest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("../outside", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("onnx/../../outside", "leads out of the folder"),
        ("int4\\..\\..\\outside", "characters that a portable name has not"),
        ("C:/outside", "characters that a portable name has not"),
        ("onnx//model_q4.onnx", "not in its plain form"),
        ("./README.md", "not in its plain form"),
        ("onnx/", "not in its plain form"),
        (".", "not in its plain form"),
        ("", "characters that a portable name has not"),
        ("a\x00b", "characters that a portable name has not"),
        ("manifest.json", "cannot hold its own hash"),
        ("model.sig", "cannot hold its own hash nor that of its signature"),
    ],
)
def test_a_file_name_that_leads_elsewhere_is_refused(artifact: Path, name: str, complaint: str) -> None:
    (artifact.parent / "outside").write_text("x")
    rewrite(artifact, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(ArtifactError, match=complaint) as caught:
        verify_files(artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is not a JSON document"),
        (b'{"schema": 1, "name": ', "is not a JSON document"),
        (b"\xff\xfe{}", "is not a JSON document"),
        (b"[]", "has schema None"),
        (b'{"schema": 2}', "has schema 2; this version reads schema 1"),
        (b'{"schema": 1}', r"name: Field required"),
        (b'{"schema": 1, "schema": 1}', "a key appears twice"),
        (b'{"schema": 1, "measured": NaN}', "NaN is not a JSON number"),
        (b'{"schema": ' + b"[" * 200_000, "nested too deeply|not a JSON document"),
        (b'{"schema": ' + b"1" * 5000 + b"}", "is not a JSON document"),
    ],
    ids=["empty", "cut", "utf-16", "list", "schema", "fields", "twice", "nan", "deep", "digits"],
)
def test_a_malformed_manifest_is_refused(artifact: Path, text: bytes, complaint: str) -> None:
    (artifact / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        read_manifest(artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(hook="os.system"), "hook: Extra inputs"),
        (lambda m: m["files"]["README.md"].update(sha256="00"), "files.README.md.sha256: String should match"),
        (lambda m: m["files"]["README.md"].update(bytes=-1), "files.README.md.bytes"),
        (lambda m: m.update(variants=["../x"]), "variants.0: String should match"),
        (lambda m: m["golden"][0].update(prompt_ids=[-1]), "golden.0.prompt_ids.0"),
        (lambda m: m["gates"][0].update(status="fine"), "gates.0.status"),
    ],
    ids=["unknown key", "hash", "bytes", "variant", "token", "status"],
)
def test_an_edited_manifest_is_refused_by_the_name_of_the_field(
    artifact: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    rewrite(artifact, change)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        read_manifest(artifact)
    assert "\n" not in str(caught.value)


def test_a_huge_manifest_is_not_read(artifact: Path) -> None:
    with (artifact / MANIFEST_FILE).open("r+b") as file:
        file.truncate(LARGEST_CONFIG + 1)
    with pytest.raises(ArtifactError, match="such a file has at most 16,777,216"):
        read_manifest(artifact)


def test_a_manifest_that_is_absent_or_a_link_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    (artifact / MANIFEST_FILE).rename(artifact.parent / "m.json")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json; not an artifact, or not a complete one"):
        read_manifest(artifact)
    (artifact / MANIFEST_FILE).symlink_to(artifact.parent / "m.json")
    with pytest.raises(ArtifactError, match="is not a regular file"):
        read_manifest(artifact)
