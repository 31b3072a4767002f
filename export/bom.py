"""The artifact's bill of materials: `bom.cdx.json`, CycloneDX 1.6, with the model card that machines read.

The model is a component with the sha256 of each of its files; base, teachers and training data are components with
their licences and, where they are its ancestors, in its pedigree; libraries are tools with their versions. The library
`cyclonedx-python-lib` writes all but `modelCard`, which it does not know. Nothing in it differs between equal runs: its
serial number follows from its content and it has no timestamp.
"""

import importlib.util
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.cards import is_hub_id
from distill.errors import ArtifactError, ExportError, MissingExtraError
from distill.licences import hub_id
from distill.records import digest_json, write_json
from distill.untrusted import read_json

from .limits import known_limits
from .manifest import (
    BOM_FILE,
    CARD_FILE,
    DataOrigin,
    Draft,
    Evaluated,
    FileEntry,
    GateEntry,
    Manifest,
    ModelOrigin,
)

SPECIFICATION = "1.6"
MODEL_REF = "model"
REPEATING = (BOM_FILE, CARD_FILE)
"""Files that are not in the bill: itself, and the card, whose measured numbers differ between equal runs."""


def write_bom(folder: Path, draft: Draft, files: Mapping[str, FileEntry]) -> None:
    """Write bom.cdx.json into the artifact, valid by its schema.

    Raises MissingExtraError without cyclonedx-python-lib, ExportError with the first thing that its validator says.
    """
    content = bom(draft, files, architecture(folder))
    if problem := schema_problem(content):
        raise ExportError(f"{BOM_FILE}: is not valid CycloneDX {SPECIFICATION}: {problem}")
    write_json(folder / BOM_FILE, content)


def bom(draft: Draft, files: Mapping[str, FileEntry], architecture: str | None = None) -> dict[str, Any]:
    """The document for a draft and the files that it will list."""
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.tool import ToolRepository
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError as error:
        raise MissingExtraError("cyclonedx-python-lib", "export") from error
    listed = {name: entry for name, entry in files.items() if name not in REPEATING}
    model, parts = _model(draft, listed), _parts(draft)
    document = Bom(metadata=BomMetaData(component=model), components=parts)
    document.metadata.tools = ToolRepository(components=_tools(draft.tools))
    document.register_dependency(model, parts)
    text = make_outputter(document, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    content: dict[str, Any] = json.loads(text)
    del content["metadata"]["timestamp"], content["serialNumber"]
    content["metadata"]["component"]["modelCard"] = model_card(draft, architecture)
    number = uuid.uuid5(uuid.NAMESPACE_URL, f"distill:{digest_json(content)}")
    return {"bomFormat": content.pop("bomFormat"), "serialNumber": f"urn:uuid:{number}", **content}


def architecture(folder: Path) -> str | None:
    """The architecture's name in the artifact's config.json."""
    path = folder / "config.json"
    named = read_json(path).get("architectures") if path.is_file() else None
    return str(named[0]) if named else None


# --- components -----------------------------------------------------------------------------------------------------


def _model(draft: Draft, files: Mapping[str, FileEntry]) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    student, base = draft.origins.student, draft.origins.base
    parts = [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"file:{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)],
        )
        for name, entry in files.items()
    ]
    facts = {
        "distill:student": f"{student.id} {student.revision or ''}".strip(),
        "distill:default_variant": draft.default,
        "distill:variants": ", ".join(draft.variants),
        **({"distill:recipe": draft.origins.recipe.identity} if draft.origins.recipe else {}),
    }
    return Component(
        name=draft.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=MODEL_REF,
        version=student.revision,
        description=f"ONNX variants {', '.join(draft.variants)} of a language model, made with distill",
        licenses=_licences([draft.licences.licence]),
        pedigree=Pedigree(ancestors=[_model_origin(base, "ancestor:base", "base")]) if base else None,
        components=parts,
        properties=[Property(name=name, value=value) for name, value in facts.items()],
    )


def _parts(draft: Draft) -> list[Any]:
    """What the model was made from, a component each."""
    origins = draft.origins
    return [
        *([_model_origin(origins.base, "base", "base")] if origins.base else []),
        *(_model_origin(one, f"teacher:{number}", "teacher") for number, one in enumerate(origins.teachers)),
        *([_data(origins.data)] if origins.data else []),
    ]


def _model_origin(one: ModelOrigin, ref: str, role: str) -> Any:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    group, _, name = one.id.rpartition("/")
    on_hub = group and is_hub_id(one.id)
    return Component(
        name=one.id,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=ref,
        version=one.revision,
        licenses=_licences([one.licence]),
        purl=PackageURL("huggingface", group, name, one.revision) if on_hub else None,
        properties=[
            Property(name="distill:role", value=role),
            *([Property(name="distill:engine", value=one.engine)] if one.engine else []),
        ],
    )


def _data(data: DataOrigin) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    counts = {"distill:role": "training data", "distill:examples": str(data.examples)}
    return Component(
        name=data.id,
        type=ComponentType.DATA,
        bom_ref="data",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=data.digest)],
        licenses=_licences(licence for several in data.licences.values() for licence in several),
        properties=[Property(name=name, value=value) for name, value in counts.items()]
        + ([Property(name="distill:tokens", value=str(data.tokens))] if data.tokens is not None else []),
    )


def _tools(versions: Mapping[str, str]) -> list[Any]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    return [
        Component(
            name=name,
            type=ComponentType.LIBRARY,
            bom_ref=f"tool:{name}",
            version=version,
            purl=PackageURL("pypi", None, name, version),
        )
        for name, version in versions.items()
    ]


def _licences(stated: Iterable[str | None]) -> list[Any]:
    """Licences by SPDX id where they have one, else by name; those that are not stated are left out."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.exception.factory import InvalidSpdxLicenseException

    factory = LicenseFactory()
    found = []
    for name in sorted({hub_id(one) or one for one in stated if one and one not in ("unknown", "other")}):
        try:
            found.append(factory.make_with_id(name))
        except InvalidSpdxLicenseException:
            found.append(factory.make_with_name(name))
    return found


# --- the model card -------------------------------------------------------------------------------------------------


def model_card(draft: Draft, architecture: str | None) -> dict[str, Any]:
    """CycloneDX's `modelCard` of the model: how it was made, what was measured, what to mind."""
    parameters: dict[str, Any] = {
        **({"approach": {"type": "supervised"}} if draft.origins.data else {}),
        "task": "text-generation",
        "architectureFamily": "transformer",
        **({"modelArchitecture": architecture} if architecture else {}),
        **({"datasets": [{"ref": "data"}]} if draft.origins.data else {}),
        "inputs": [{"format": "string"}],
        "outputs": [{"format": "string"}],
    }
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": [*map(_accuracy, draft.evaluation), *map(_gate, draft.gates)]},
        "considerations": {
            "technicalLimitations": list(known_limits(draft)),
            **({"performanceTradeoffs": tradeoffs} if (tradeoffs := list(_tradeoffs(draft))) else {}),
            **({"ethicalConsiderations": risks} if (risks := list(_risks(draft))) else {}),
        },
    }


def _accuracy(one: Evaluated) -> dict[str, Any]:
    return {
        "type": "verified accuracy",
        "slice": f"{one.model} on {one.set}, {one.problems} problems",
        "value": f"{one.accuracy:.6g}",
        "confidenceInterval": {"lowerBound": f"{one.low:.6g}", "upperBound": f"{one.high:.6g}"},
    }


def _gate(gate: GateEntry) -> dict[str, Any]:
    """A gate as a metric; one that was not run has its status for a value."""
    limit = "" if gate.limit is None else f", limit {gate.limit:.6g}"
    return {
        "type": f"gate {gate.name}" + (f" ({gate.unit})" if gate.unit else ""),
        "slice": f"{gate.variant or 'all variants'}: {gate.status}{limit}",
        "value": gate.status if gate.value is None else f"{gate.value:.6g}",
    }


def _tradeoffs(draft: Draft) -> Iterator[str]:
    for one in draft.attempts:
        ended = ", ".join(f"{gate.name} {gate.status}" for gate in one.gates) or "no gates"
        yield f"{one.variant} as {one.scheme}: {one.bytes:,} bytes, {ended}{', chosen' if one.chosen else ''}"


def _risks(draft: Draft) -> Iterator[dict[str, str]]:
    yield from ({"name": question} for question in draft.licences.questions)


# --- checking -------------------------------------------------------------------------------------------------------


def can_validate() -> bool:
    """Whether the library and what its validator needs are installed."""
    return all(importlib.util.find_spec(name) for name in ("cyclonedx", "jsonschema", "referencing"))


def schema_problem(content: Mapping[str, Any]) -> str | None:
    """The first thing in a document that CycloneDX's schema does not allow; None where it allows all.

    Raises MissingExtraError without the library's validator.
    """
    if not can_validate():
        raise MissingExtraError("cyclonedx-python-lib", "export")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content))
    if found is None:
        return None
    where = "/".join(map(str, found.data.absolute_path)) or "top level"
    return f"{where}: {found.data.message[:300]}"


def read_bom(folder: Path) -> dict[str, Any]:
    """The document in the artifact. Raises ArtifactError where it is missing or no JSON object."""
    path = folder / BOM_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder}: has no {BOM_FILE}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: is not a JSON object")
    return content


def hash_problem(content: Mapping[str, Any], manifest: Manifest) -> str | None:
    """The first difference between the hashes in a bill and in the manifest; None where all agree."""
    try:
        parts: Sequence[Any] = content["metadata"]["component"]["components"]
        found = {str(part["name"]): str(part["hashes"][0]["content"]) for part in parts}
    except (KeyError, IndexError, TypeError) as error:
        return f"does not list the model's files ({type(error).__name__}: {error})"
    expected = {name: entry.sha256 for name, entry in manifest.files.items() if name not in REPEATING}
    if len(parts) != len(found) or found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys()) or ["a file twice"]
        return f"lists other files than the manifest: {names[0][:120]}"
    wrong = sorted(name for name in expected if found[name] != expected[name])
    return f"{wrong[0]} has another sha256 than in the manifest" if wrong else None
