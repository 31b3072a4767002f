"""`distill verify`: a shipped artifact checks itself, with neither torch nor transformers installed.

Files against the manifest's sha256, settings and graphs against what a runtime may be given, end tokens against one
another, bill of materials and card against the manifest, the signature against a key, gates against what the manifest
says of them, golden prompts against what onnxruntime-genai writes now. What cannot be checked here is not run, with
the reason, and never counted as passed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.artifact import GENAI_CONFIG, VARIANT_FILES, default_file
from distill.errors import ArtifactError, DistillError, EngineError, MissingExtraError
from distill.onnx_decoding import GenaiDecoder, read_shape
from distill.runs import available_cores
from distill.untrusted import read_bounded, refuse_unsafe_configs, refuse_unsafe_graph

from .bom import can_validate, hash_problem, read_bom, schema_problem
from .card import card_problem
from .manifest import BOM_FILE, CARD_FILE, SIGNATURE_FILE, GateEntry, GoldenPrompt, Manifest, verify_files
from .package import lint_end_tokens
from .signing import signature_problem

Status = Literal["passed", "failed", "not_run"]


class Check(NamedTuple):
    """One thing that was checked."""

    name: str
    status: Status
    detail: str


def verify_artifact(folder: Path, golden: bool = True, public_key: Path | None = None) -> list[Check]:
    """Check an artifact's folder.

    Raises ArtifactError at the first file that is not what the manifest says or that no runtime should be given, since
    nothing that follows would mean anything; RecipeError for a public key that is none. Everything else comes back
    as checks; `golden=False` loads no model.
    """
    manifest = verify_files(folder)
    checks = [Check("files", "passed", f"{len(manifest.files)} files match the manifest")]
    checks += [_settings(folder, manifest), _graphs(folder, manifest), _end_tokens(folder)]
    checks += _bom(folder, manifest)
    checks += [_card(folder, manifest), _signature(folder, public_key)]
    checks += [_gate(gate) for gate in manifest.gates]
    for variant in manifest.variants:
        chosen = [prompt for prompt in manifest.golden if prompt.variant == variant]
        checks.append(_golden(folder, variant, chosen) if golden and chosen else _no_golden(variant, golden))
    return checks


def refuse_failed(checks: Sequence[Check], require: bool = False) -> None:
    """Raise ArtifactError if a check failed, or with `require` if one was not run."""
    bad = [check for check in checks if check.status == "failed" or (require and check.status == "not_run")]
    if bad:
        raise ArtifactError(f"{len(bad)} check(s) failed: " + "; ".join(f"{c.name}: {c.detail}" for c in bad))


def summary(checks: Sequence[Check]) -> str:
    """How many checks ended in which way, and which were not run."""
    missing = [check.name for check in checks if check.status == "not_run"]
    passed, failed = (sum(check.status == status for check in checks) for status in ("passed", "failed"))
    listed = f" ({', '.join(missing)})" if missing else ""
    return f"{passed} passed, {failed} failed, {len(missing)} not run{listed}"


def _found(name: str, problem: str | None, passed: str) -> Check:
    return Check(name, "failed", problem) if problem else Check(name, "passed", passed)


# --- what a runtime is given ----------------------------------------------------------------------------------------


def _settings(folder: Path, manifest: Manifest) -> Check:
    """Configurations that are safe to parse and name no file but the default variant's graph."""
    refuse_unsafe_configs(folder)
    try:
        named = default_file(folder)
    except EngineError as error:
        return Check("settings", "failed", str(error))
    expected = VARIANT_FILES[manifest.default]
    wrong = None if named == expected else f"{GENAI_CONFIG} loads {named}, the manifest's default is {expected}"
    return _found("settings", wrong, f"safe to load; {manifest.default} is the default")


def _graphs(folder: Path, manifest: Manifest) -> Check:
    try:
        for variant in manifest.variants:
            refuse_unsafe_graph(folder, VARIANT_FILES[variant])
    except MissingExtraError as error:
        return Check("graphs", "not_run", str(error))
    return Check("graphs", "passed", f"{len(manifest.variants)} graphs keep their weights in files beside them")


def _end_tokens(folder: Path) -> Check:
    """All four files that a runtime may take it from end a text at the same tokens."""
    problems = lint_end_tokens(folder)
    return _found("end tokens", "; ".join(problems)[:300] or None, "the same in all four files")


# --- what was written about it --------------------------------------------------------------------------------------


def _bom(folder: Path, manifest: Manifest) -> Iterator[Check]:
    try:
        content: Mapping[str, Any] = read_bom(folder)
    except ArtifactError as error:
        yield Check("bill of materials", "failed", str(error))
        return
    problem = hash_problem(content, manifest)
    yield _found("bill of materials", problem and f"{BOM_FILE} {problem}", "has the manifest's hashes")
    if can_validate():
        yield _found("its schema", schema_problem(content), "valid CycloneDX 1.6")
    else:
        yield Check("its schema", "not_run", str(MissingExtraError("cyclonedx-python-lib", "export")))


def _card(folder: Path, manifest: Manifest) -> Check:
    try:
        content = read_bounded(folder / CARD_FILE).decode("utf-8")
    except FileNotFoundError:
        return Check("card", "failed", f"the artifact has no {CARD_FILE}")
    except UnicodeDecodeError:
        return Check("card", "failed", f"{CARD_FILE} is not UTF-8 text")
    return _found("card", card_problem(content, manifest, manifest.files), "has the manifest's numbers")


def _signature(folder: Path, public_key: Path | None) -> Check:
    signed = (folder / SIGNATURE_FILE).is_file()
    if not signed:
        status: Status = "not_run" if public_key is None else "failed"
        return Check("signature", status, f"the artifact is not signed (no {SIGNATURE_FILE})")
    if public_key is None:
        return Check("signature", "not_run", f"{SIGNATURE_FILE} is there; give its maker's --public-key to check it")
    try:
        problem = signature_problem(folder, public_key)
    except MissingExtraError as error:
        return Check("signature", "not_run", str(error))
    return _found("signature", problem, f"all files are signed by {public_key.name}")


def _gate(gate: GateEntry) -> Check:
    return Check(" ".join(filter(None, ("gate", gate.variant, gate.name))), gate.status, gate.detail)


# --- what it writes -------------------------------------------------------------------------------------------------


def _no_golden(variant: str, golden: bool) -> Check:
    why = "the manifest has no golden prompts" if golden else "not asked for"
    return Check(f"golden {variant}", "not_run", why)


def _golden(folder: Path, variant: str, prompts: Sequence[GoldenPrompt]) -> Check:
    name = f"golden {variant}"
    try:
        if problem := _impossible(folder, prompts):
            return Check(name, "failed", problem)
        decoder = GenaiDecoder(folder, available_cores(), variant)
        wrong = [
            prompt
            for prompt in prompts
            if tuple(decoder.greedy(prompt.prompt_ids, len(prompt.expected_ids))) != prompt.expected_ids
        ]
    except MissingExtraError as error:
        return Check(name, "not_run", str(error))
    except ArtifactError:
        raise
    except (DistillError, RuntimeError) as error:
        return Check(name, "failed", str(error)[:300])
    failed = f"{len(wrong)} of {len(prompts)} prompts give other tokens" if wrong else None
    return _found(name, failed, f"{len(prompts)} prompts give the expected tokens")


def _impossible(folder: Path, prompts: Sequence[GoldenPrompt]) -> str | None:
    """Why the model cannot write what a golden prompt expects, whatever it is; None where it could."""
    shape = read_shape(folder)
    for prompt in prompts:
        if max(*prompt.prompt_ids, *prompt.expected_ids) >= shape.vocabulary:
            return f"a golden prompt has token ids beyond the vocabulary of {shape.vocabulary}"
        if len(prompt.prompt_ids) + len(prompt.expected_ids) > shape.context:
            return f"a golden prompt is longer than the context of {shape.context} tokens"
    return None
