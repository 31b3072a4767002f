"""The bill of materials is valid by CycloneDX's own schema, says what the manifest says, and is the same every time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import ArtifactError, ExportError
from distill.export import bom as module
from distill.export.bom import bom, hash_problem, read_bom, schema_problem, write_bom
from distill.export.manifest import (
    Attempt,
    DataOrigin,
    Draft,
    Evaluated,
    FileEntry,
    GateEntry,
    LicenceReading,
    ModelOrigin,
    Origins,
    RecipeOrigin,
    read_manifest,
)

EVIL = "` | <b>\n\u0000☃ ../x"
FILES = {"onnx/model_q4.onnx": FileEntry(sha256="a" * 64, bytes=3), "README.md": FileEntry(sha256="b" * 64, bytes=1)}


def draft(**changes: Any) -> Draft:
    failed = GateEntry(name="mean_kl", variant="int4", status="failed", value=0.75, limit=0.5, unit="nats/token")
    plain = {
        "name": "sums",
        "variants": ("int4",),
        "default": "int4",
        "origins": Origins(
            student=ModelOrigin(id="sums-train-2", revision="e" * 64, licence="apache 2.0"),
            base=ModelOrigin(id="Qwen/Qwen2.5-0.5B", revision="c" * 40, licence="apache 2.0"),
            teachers=(ModelOrigin(id="deepseek-ai/DeepSeek-R1", engine="openai 2", licence="MIT"),),
            data=DataOrigin(id="sums-5", digest="d" * 64, examples=7, tokens=99, licences={"a": ("MIT", "own")}),
            recipe=RecipeOrigin(name="sums", identity="0" * 16),
        ),
        "licences": LicenceReading(licence="apache-2.0", questions=("teacher: read its terms.",)),
        "tools": {"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0"},
        "gates": (failed, GateEntry(name="webgpu", variant="int4", status="not_run", detail="no browser")),
        "evaluation": (Evaluated(model="int4", set="heldout", problems=256, accuracy=0.75, low=0.7, high=0.8),),
        "attempts": (Attempt(variant="int4", scheme="4 bits", bytes=12, gates=(failed,), chosen=True),),
    }
    return Draft(**{**plain, **changes})


def test_the_bill_is_valid_and_names_every_part_with_its_licence() -> None:
    content = bom(draft(), FILES, "Qwen2ForCausalLM")
    assert schema_problem(content) is None
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    parts = {part["bom-ref"]: part for part in content["components"]}
    assert parts["base"]["purl"] == f"pkg:huggingface/Qwen/Qwen2.5-0.5B@{'c' * 40}"
    assert parts["base"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["teacher:0"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert {"name": "distill:engine", "value": "openai 2"} in parts["teacher:0"]["properties"]
    assert parts["data"]["hashes"] == [{"alg": "SHA-256", "content": "d" * 64}]
    assert parts["data"]["licenses"] == [{"license": {"id": "MIT"}}, {"license": {"name": "own"}}]
    model = content["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["version"] == "e" * 64
    assert [one["name"] for one in model["pedigree"]["ancestors"]] == ["Qwen/Qwen2.5-0.5B"]
    assert [(one["name"], one["hashes"][0]["content"]) for one in model["components"]] == [
        ("onnx/model_q4.onnx", "a" * 64)
    ]
    tools = content["metadata"]["tools"]["components"]
    assert [(one["name"], one["version"]) for one in tools] == list(draft().tools.items())
    assert {"ref": "model", "dependsOn": ["base", "data", "teacher:0"]} in content["dependencies"]


def test_the_model_card_holds_numbers_with_their_intervals_and_what_was_not_run() -> None:
    card = bom(draft(), FILES, "Qwen2ForCausalLM")["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "Qwen2ForCausalLM"
    assert card["modelParameters"]["datasets"] == [{"ref": "data"}]
    accuracy, kl, webgpu = card["quantitativeAnalysis"]["performanceMetrics"]
    assert accuracy["value"] == "0.75" and accuracy["slice"] == "int4 on heldout, 256 problems"
    assert accuracy["confidenceInterval"] == {"lowerBound": "0.7", "upperBound": "0.8"}
    assert (kl["value"], kl["slice"]) == ("0.75", "int4: failed, limit 0.5")
    assert webgpu["value"] == "not_run"
    limits = card["considerations"]["technicalLimitations"]
    assert "Gate webgpu of int4 was not run: no browser." in limits
    assert card["considerations"]["ethicalConsiderations"] == [{"name": "teacher: read its terms."}]
    assert card["considerations"]["performanceTradeoffs"] == ["int4 as 4 bits: 12 bytes, mean_kl failed, chosen"]


def test_equal_artifacts_have_equal_bills_and_others_another_serial_number() -> None:
    one, again = bom(draft(measured={"build_s": 1}), FILES), bom(draft(measured={"build_s": 2}), FILES)
    assert json.dumps(one) == json.dumps(again)
    other = bom(draft(), FILES | {"onnx/model_q4.onnx": FileEntry(sha256="f" * 64, bytes=3)})
    assert other["serialNumber"] != one["serialNumber"] and one["serialNumber"].startswith("urn:uuid:")
    assert "timestamp" not in one["metadata"]


def test_no_name_makes_the_bill_invalid() -> None:
    made = ModelOrigin(id=EVIL, revision=EVIL, engine=EVIL, licence=EVIL)
    data = DataOrigin(id=EVIL, digest="d" * 64, examples=0, licences={EVIL: (EVIL, None)})
    origins = Origins(student=made, base=made, teachers=(made, made), data=data)
    assert schema_problem(bom(draft(origins=origins, tools={EVIL: EVIL}), FILES, EVIL)) is None


def test_the_schema_is_really_asked() -> None:
    content = bom(draft(), FILES)
    content["metadata"]["component"]["modelCard"]["accuracy"] = 1
    assert "accuracy" in str(schema_problem(content))
    del content["metadata"]["component"]["modelCard"]["accuracy"]
    content["metadata"]["component"]["components"][0]["hashes"][0]["content"] = "no hash"
    assert "no hash" in str(schema_problem(content))
    assert "metadata" in str(schema_problem(bom(draft(), FILES) | {"metadata": 3}))


def test_a_bill_of_other_files_or_hashes_than_the_manifests_is_told(artifacts: Any, tmp_path: Path) -> None:
    folder = artifacts.make(tmp_path / "a")
    manifest = read_manifest(folder)

    def problem(change: Callable[[list[Any]], Any]) -> str | None:
        content = read_bom(folder)
        change(content["metadata"]["component"]["components"])
        return hash_problem(content, manifest)

    assert problem(lambda parts: None) is None
    assert problem(lambda parts: parts.pop(0)) == "lists other files than the manifest: config.json"
    assert problem(lambda parts: parts.append(parts[0])) == "lists other files than the manifest: a file twice"
    assert problem(lambda parts: parts[0].pop("hashes")) == "does not list the model's files (KeyError: 'hashes')"
    changed = problem(lambda parts: parts[0]["hashes"][0].update(content="0" * 64))
    assert changed == "config.json has another sha256 than in the manifest"
    assert str(hash_problem({}, manifest)).startswith("does not list the model's files")
    (folder / "bom.cdx.json").write_text("[]")
    with pytest.raises(ArtifactError, match="is not a JSON object"):
        read_bom(folder)


def test_a_bill_that_the_schema_refuses_is_not_written(tmp_path: Path) -> None:
    bad = {"onnx/model_q4.onnx": FileEntry.model_construct(sha256="no hash", bytes=1)}
    with pytest.raises(ExportError, match=r"bom\.cdx\.json: is not valid CycloneDX 1\.6"):
        write_bom(tmp_path, draft(), bad)
    assert not (tmp_path / module.BOM_FILE).exists()
