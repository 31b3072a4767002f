"""The manifest of an artifact: what it is, what made it, what it was held against, and the sha256 of every file.

`manifest.json` lies on top of the artifact's folder and names every other file in it. `verify_files` is the first thing
to run on an artifact that came from elsewhere, so it trusts nothing: names, sizes, links and JSON are bounded and
checked before anything is read, and no heavy library is loaded. Numbers that change from run to run (times, speeds)
live in `measured`, which `result_digest` leaves out.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.artifact import VARIANT_FILES
from distill.errors import ArtifactError
from distill.records import digest_json, write_json
from distill.runs import file_digest
from distill.untrusted import bad_name, file_in, parse_json, read_bounded

MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
BOM_FILE = "bom.cdx.json"
SIGNATURE_FILE = "model.sig"
UNLISTED = (MANIFEST_FILE, SIGNATURE_FILE)
"""Files that the manifest does not list: itself, and the signature, which signs the manifest too."""
DEEPEST_FOLDER = 8

GateStatus = Literal["passed", "failed", "not_run"]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""A plain word: it is shown, and names files."""
TokenId = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )


class ModelOrigin(_Part):
    """A model that the artifact comes from."""

    id: str
    """Hub id, package or folder name; for the student its run."""
    revision: str | None = None
    """Commit or digest of its weights."""
    engine: str | None = None
    """What ran a teacher, with its version."""
    licence: str | None = None
    """SPDX expression or the licence's own name; None where unknown."""


class DataOrigin(_Part):
    """What trained the student."""

    id: str
    """Folder name of the select run."""
    digest: str
    """Result digest of that run: of its examples, in order."""
    examples: int = Field(ge=0)
    """Verified traces in it."""
    tokens: int | None = Field(default=None, ge=0)
    """Tokens that all phases went through, prompts included, every epoch counted; None where one was not counted."""
    licences: dict[str, tuple[str | None, ...]] = {}
    """Licences of its prompts by source, and of replayed sets."""


class RecipeOrigin(_Part):
    """The experiment."""

    name: str
    identity: str
    """Of the export step: a hash over its options and, stage by stage, over everything that it was made from."""


class Origins(_Part):
    """Whose weights and words are in the artifact."""

    student: ModelOrigin
    base: ModelOrigin | None = None
    teachers: tuple[ModelOrigin, ...] = ()
    """Of the traces, then of learned distributions."""
    data: DataOrigin | None = None
    recipe: RecipeOrigin | None = None


class LicenceReading(_Part):
    """What the licences of everything in the artifact come to, by their names."""

    licence: str
    """Id that hubs know, `other` where terms meet that no one id says, or `unknown`."""
    questions: tuple[str, ...] = ()
    """What is to be settled before the artifact is passed on, contradictions among them: Markdown."""


class FileEntry(_Part):
    """One file of the artifact."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class GateEntry(_Part):
    """One check against a limit, and how it ended. Not run is never passed."""

    name: str
    variant: VariantName | None = None
    status: GateStatus
    value: float | None = None
    """What was measured; None where it could not be."""
    limit: float | None = None
    unit: str = ""
    detail: str = ""
    """Why it failed or was not run, or what else should be known."""


class GoldenPrompt(_Part):
    """A prompt whose greedy continuation the artifact must reproduce."""

    variant: VariantName
    prompt_ids: tuple[TokenId, ...] = Field(min_length=1)
    expected_ids: tuple[TokenId, ...] = Field(min_length=1)
    """New tokens, the end token included where it was reached."""


class Evaluated(_Part):
    """Verified accuracy of one model on one set."""

    model: str
    """A variant, or `student`, `base` or `teacher` in torch."""
    set: str
    problems: int = Field(ge=0)
    accuracy: float
    low: float
    """Ends of the 95% interval."""
    high: float
    mean_tokens: float | None = None
    stop_rate: float | None = None
    """Share of answers that ended by themselves."""


class Attempt(_Part):
    """One way of storing a variant's weights that was tried."""

    variant: VariantName
    scheme: str
    """How the weights are stored, in words."""
    bytes: int = Field(ge=0)
    gates: tuple[GateEntry, ...] = ()
    chosen: bool = False
    """Whether it is the one that ships."""


class Draft(_Part):
    """A manifest before its files are hashed."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str
    variants: tuple[VariantName, ...] = Field(min_length=1)
    """Graphs in the folder; where each lies is `distill.artifact.VARIANT_FILES`."""
    default: VariantName
    """The variant that onnxruntime-genai loads where none is asked for."""
    origins: Origins
    licences: LicenceReading = LicenceReading(licence="unknown")
    tools: dict[str, str] = {}
    """Versions of the libraries that made the files."""
    options: dict[str, Any] = {}
    """Export options, as far as they shape the files."""
    gates: tuple[GateEntry, ...] = ()
    evaluation: tuple[Evaluated, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    """What was tried for each variant, in order, where more than one scheme may be."""
    golden: tuple[GoldenPrompt, ...] = ()
    measured: dict[str, Any] = {}
    """Times, speeds, benchmarks (`bench`) and everything else that may differ between equal runs."""

    @model_validator(mode="after")
    def _variants_are_known(self) -> Self:
        named = {gate.variant for gate in self.gates if gate.variant} | {golden.variant for golden in self.golden}
        named |= {attempt.variant for attempt in self.attempts}
        if unknown := sorted(named - set(self.variants)):
            raise ValueError(f"gates, golden prompts or attempts of {unknown[0]!r}, which is not among the variants")
        if self.default not in self.variants:
            raise ValueError(f"default is {self.default!r}, which is not among the variants")
        return self


class Manifest(Draft):
    """The content of manifest.json."""

    files: dict[str, FileEntry]
    """Every file of the folder but the manifest itself and a signature, by relative POSIX path."""


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Every file of `folder` that a manifest lists, by relative POSIX path.

    Raises ArtifactError if a file could not be shipped under its name: a link out of the folder, an unportable name.
    """
    return {name: _entry(folder / name) for name in _list_files(folder)}


def write_manifest(folder: Path, draft: Draft, hashed: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Write manifest.json over every file in `folder`, complete or not at all; a signature of an older one is removed.

    `hashed` are files that need not be hashed again. Raises ArtifactError as `hash_files`.
    """
    known = hashed or {}
    files = {name: known.get(name) or _entry(folder / name) for name in _list_files(folder)}
    manifest = Manifest(**dict(draft), files=files)
    (folder / SIGNATURE_FILE).unlink(missing_ok=True)
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json", by_alias=True))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`.

    Raises ArtifactError, in one line, if it is absent, a link, larger than 16 MB, not JSON, or not a manifest of
    this schema. The files are not looked at.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; give the folder that holds {MANIFEST_FILE}")
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: has no {MANIFEST_FILE}; not an artifact, or not a complete one") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: is not a regular file")
    return _parse(path, read_bounded(path))


def verify_files(folder: Path) -> Manifest:
    """Check that `folder` holds exactly the files of its manifest, unchanged; the manifest, for further checks.

    Raises ArtifactError naming the first problem and how many there are. Sizes are compared before anything is
    hashed. Loads neither torch nor transformers nor onnxruntime.
    """
    manifest = read_manifest(folder)
    problems = list(_problems(folder, manifest))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(f"{folder}: {problems[0]}{more}")
    return manifest


def result_digest(manifest: Manifest) -> str:
    """sha256 (hex) of everything that equal runs must agree on.

    That is the manifest without `measured`, and without the hash of the card, which repeats measured numbers.
    """
    content = manifest.model_dump(mode="json", by_alias=True, exclude={"measured"})
    content["files"].pop(CARD_FILE, None)
    return digest_json(content)


# --- reading what may be hostile --------------------------------------------------------------------------------------


def _parse(path: Path, text: bytes) -> Manifest:
    content = parse_json(path, text)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != 1:
        raise ArtifactError(f"{path}: has schema {schema!r}; this version reads schema 1")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "top level"
        raise ArtifactError(f"{path}: {where}: {first['msg']} ({error.error_count()} in all)") from error
    for name in manifest.files:
        if reason := _bad_entry(name):
            raise ArtifactError(f"{path}: file name {name[:120]!r} {reason}")
    return manifest


def _bad_entry(name: str) -> str | None:
    """What is wrong with the name of a listed file."""
    if name in UNLISTED:
        return "is not for the manifest, which cannot hold its own hash nor that of its signature"
    return bad_name(name)


def _list_files(folder: Path) -> list[str]:
    """Sorted relative names of what a manifest lists; raises ArtifactError for what an artifact may not hold."""
    names = sorted(name for name in _walk(folder, "", 0) if name not in UNLISTED)
    for name in names:
        if reason := bad_name(name):
            raise ArtifactError(f"{folder}: file name {name!r} {reason}")
    return names


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[str]:
    """Relative names of the files below `folder`, which are regular files or links to such within it."""
    if depth > DEEPEST_FOLDER:
        raise ArtifactError(f"{folder}: {prefix}: folders are nested too deeply")
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_symlink():
                file_in(folder, name)
                yield name
            elif entry.is_dir():
                yield from _walk(folder, f"{name}/", depth + 1)
            elif entry.is_file():
                yield name
            else:
                raise ArtifactError(f"{folder}: {name} is neither a file nor a folder")


def _problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """One line for each file that is missing, not listed, or not the one that was listed."""
    found = set(_list_files(folder))
    yield from (f"{name} is missing" for name in sorted(manifest.files.keys() - found))
    yield from (f"{name} is not in the manifest" for name in sorted(found - manifest.files.keys()))
    for name in sorted(found & manifest.files.keys()):
        if reason := _changed(folder / name, manifest.files[name]):
            yield f"{name} {reason}"
    yield from (f"variant {variant} has no graph" for variant in manifest.variants if not _has_graph(manifest, variant))


def _changed(path: Path, entry: FileEntry) -> str | None:
    size = path.stat().st_size
    if size != entry.bytes:
        return f"was changed: it has {size:,} bytes, the manifest says {entry.bytes:,}"
    found = file_digest(path)
    return None if found == entry.sha256 else f"was changed: its sha256 is {found[:12]}…, not {entry.sha256[:12]}…"


def _has_graph(manifest: Manifest, variant: str) -> bool:
    return VARIANT_FILES.get(variant) in manifest.files


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=file_digest(path), bytes=path.stat().st_size)
