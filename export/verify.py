"""`distill verify`: a shipped artifact checks itself, with neither torch nor transformers installed.

Files against the manifest's sha256, gates against what the manifest says of them, golden prompts against what
onnxruntime-genai writes now.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from distill.errors import ArtifactError
from distill.onnx_decoding import GenaiDecoder
from distill.runs import available_cores

from .manifest import GateEntry, GoldenPrompt, verify_files
from .package import lint_end_tokens


class Check(NamedTuple):
    """One thing that was checked."""

    name: str
    status: Literal["passed", "failed", "not_run"]
    detail: str


def verify_artifact(folder: Path, golden: bool = True) -> list[Check]:
    """Check an artifact's folder.

    Raises ArtifactError at the first file that is not what the manifest says, since nothing that follows would mean
    anything. Everything else comes back as checks; `golden=False` loads no model.
    """
    manifest = verify_files(folder)
    checks = [Check("files", "passed", f"{len(manifest.files)} files match the manifest")]
    checks += [_end_tokens(folder)]
    checks += [_gate(gate) for gate in manifest.gates]
    for variant in manifest.variants:
        chosen = [prompt for prompt in manifest.golden if prompt.variant == variant]
        checks.append(_golden(folder, variant, chosen) if golden and chosen else _not_run(variant, golden))
    return checks


def refuse_failed(checks: Sequence[Check], require: bool = False) -> None:
    """Raise ArtifactError if a check failed, or with `require` if one was not run."""
    bad = [check for check in checks if check.status == "failed" or (require and check.status == "not_run")]
    if bad:
        raise ArtifactError(f"{len(bad)} check(s) failed: " + "; ".join(f"{c.name}: {c.detail}" for c in bad))


def _gate(gate: GateEntry) -> Check:
    return Check(f"gate {gate.variant or ''} {gate.name}".replace("  ", " "), gate.status, gate.detail)


def _end_tokens(folder: Path) -> Check:
    problems = lint_end_tokens(folder)
    return Check(
        "end tokens", "failed" if problems else "passed", "; ".join(problems) or "all files name the same ones"
    )


def _not_run(variant: str, golden: bool) -> Check:
    why = "the manifest has no golden prompts" if golden else "not asked for"
    return Check(f"golden {variant}", "not_run", why)


def _golden(folder: Path, variant: str, prompts: Sequence[GoldenPrompt]) -> Check:
    decoder = GenaiDecoder(folder, available_cores(), variant)
    wrong = [
        prompt
        for prompt in prompts
        if tuple(decoder.greedy(prompt.prompt_ids, len(prompt.expected_ids))) != prompt.expected_ids
    ]
    if wrong:
        return Check(f"golden {variant}", "failed", f"{len(wrong)} of {len(prompts)} prompts give other tokens")
    return Check(f"golden {variant}", "passed", f"{len(prompts)} prompts give the expected tokens")
