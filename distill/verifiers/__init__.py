"""Verifiers: functions `verify(prompt, trace) -> Verdict` that say whether an answer is right.

    from distill.verifiers import number
    number(prompt, trace).outcome

`resolve` turns what a recipe says into a `VerifierSpec`: a built-in name, the name of an installed one (entry point
group `distill.verifiers`), a file of your own with a function `verify`, or a section with options
(`{regex: {pattern: ...}}`), which may combine others (`{any_of: [number, {regex: ...}]}`). Specs travel to worker
processes; the pool in `distill.verifiers.pool` runs them there under a time limit. Importing this package loads no
library that verifies.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distill.config import (
    VERIFIERS,
    ChoiceVerifier,
    CodeVerifier,
    FileVerifier,
    JsonSchemaVerifier,
    JudgeVerifier,
    RegexVerifier,
    Section,
    Verifier,
    VerifierSection,
    hashed_fields,
    is_hashed,
    validate,
)
from distill.errors import RecipeError
from distill.records import Prompt, Trace, Verdict, digest_json
from distill.rows import nearest
from distill.verifiers import judging, multiple_choice, program, structured
from distill.verifiers.builtin import exact, math, number, reasoning_gym, verdict_of, version_of
from distill.verifiers.combination import combine
from distill.verifiers.multiple_choice import choice
from distill.verifiers.program import code
from distill.verifiers.structured import json_schema, regex

__all__ = [
    "VerifierSpec",
    "Verify",
    "choice",
    "code",
    "columns_of",
    "exact",
    "json_schema",
    "judge",
    "math",
    "number",
    "reasoning_gym",
    "recorded_name",
    "regex",
    "resolve",
    "verdict_of",
]

Verify = Callable[[Prompt, Trace], Verdict]

ENTRY_POINTS = "distill.verifiers"
FUNCTION = "verify"
"""Name of the function in a verifier file."""
FILE = "file:"
"""How a verifier file is marked in a prompt's `verifier`."""
DEFAULT_TIMEOUT_S = 10.0
LIGHT = ("number", "exact", "choice")
"""Verifiers that need no process of their own: they run in linear time."""
JUDGE = "judge"
"""The verifier that is asked over the network, by whoever holds the pool."""
COMBINATIONS = ("any_of", "all_of")


@dataclass(frozen=True)
class VerifierSpec:
    """Which function judges, in which version, and how long it may take; can be pickled."""

    name: str
    version: str
    where: str
    """`module:function`, or `file:/path.py`."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    light: bool = False
    """Whether it may run in this process."""
    options: str = ""
    """Options that differ from their defaults, as canonical JSON."""
    parts: tuple["VerifierSpec", ...] = ()
    """What a combination combines."""

    @property
    def label(self) -> str:
        """What verdicts are signed with: `number@1`."""
        return f"{self.name}@{self.version}"

    @property
    def custom(self) -> bool:
        """Whether the function is not one of ours."""
        return not self.where.startswith(OURS)

    @property
    def section(self) -> Any:
        """The options as their section of the recipe: a `CodeVerifier` for `code`."""
        kind = BUILT_IN[self.name].section
        assert kind is not None, f"{self.name} takes no options"
        return kind.model_validate_json(self.options or "{}")

    def leaves(self) -> Iterator["VerifierSpec"]:
        """The verifiers that a combination comes down to; any other is its own."""
        for part in self.parts:
            yield from part.leaves()
        if not self.parts:
            yield self

    def load(self) -> Verify:
        """The function itself.

        Raises RecipeError if its file or module is broken, was changed meanwhile, or has no such function.
        """
        if self.parts:
            loaded = [(part, part.load()) for part in self.parts]
            return lambda prompt, trace: combine(
                self.label, self.name, prompt, trace, [judge(part, verify, prompt, trace) for part, verify in loaded]
            )
        if self.name == JUDGE:
            raise RecipeError(f"verifier {self.label} is asked over the network; it is no function to be called")
        if self.where.startswith(FILE):
            path = Path(self.where.removeprefix(FILE))
            if _version_of_file(path) != self.version:
                raise RecipeError(f"{path}: the verifier was changed while the run was using it; run again")
            return _function(_load_file(path, self.version), FUNCTION, str(path))
        module, _, name = self.where.partition(":")
        try:
            function = _function(importlib.import_module(module), name, self.where)
        except ImportError as error:
            raise RecipeError(f"verifier {self.name}: {module} cannot be imported: {error}") from error
        if not self.options:
            return function
        if _version_of(self.name, self.section) != self.version:
            raise RecipeError(f"verifier {self.name}: its file was changed while the run was using it; run again")
        with_options: Callable[..., Verdict] = function
        return partial(with_options, options=self.section)


def resolve(verifier: Verifier) -> VerifierSpec:
    """The verifier that a recipe or a prompt names; reads a file's bytes, but runs none of its code.

    Raises RecipeError for an unknown name (with the nearest one) and for a file that is not there.
    """
    if isinstance(verifier, FileVerifier):
        return _file_spec(verifier.file, verifier.timeout_s)
    if isinstance(verifier, VerifierSection):
        return _section_spec(verifier)
    if verifier.startswith("{"):
        return _section_spec(validate(VerifierSection, json.loads(verifier), f"verifier {verifier}", {}))
    if verifier in VERIFIERS:
        return _built_in_spec(verifier, None)
    if verifier.startswith(FILE):
        return _file_spec(Path(verifier.removeprefix(FILE)), DEFAULT_TIMEOUT_S)
    if verifier in VerifierSection.model_fields:
        raise RecipeError(f"verifier {verifier!r} takes options; write it as {{{verifier}: {EXAMPLES[verifier]}}}")
    installed = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if verifier not in installed:
        names = [*VERIFIERS, *installed]
        raise RecipeError(
            f"unknown verifier {verifier!r}{nearest(verifier, names)}; choose one of {', '.join(names)},"
            f" or {{file: my_verifier.py}} with a function {FUNCTION}(prompt, trace) -> Verdict"
        )
    point = installed[verifier]
    version = f"{point.dist.name}-{point.dist.version}" if point.dist else "unknown"
    return VerifierSpec(verifier, version, point.value)


def recorded_name(verifier: Verifier) -> str:
    """How a prompt's record names its verifier; `resolve` takes it back.

    Options that are no part of identities (where a judge is asked, how long it may take) are left out.
    """
    if isinstance(verifier, FileVerifier):
        return f"{FILE}{verifier.file.resolve()}"
    plain = _recorded(verifier)
    return plain if isinstance(plain, str) else _canonical(plain)


class Columns(NamedTuple):
    """Columns of a row that a verifier reads, beside the question and the reference answer."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def columns_of(verifier: Verifier) -> Columns | None:
    """Which columns of its row a prompt has to keep for its verifier; None where it may want any."""
    if isinstance(verifier, FileVerifier) or (isinstance(verifier, str) and verifier not in VERIFIERS):
        return None
    name, options = (verifier, None) if isinstance(verifier, str) else _only_key(verifier)
    if isinstance(options, list):
        return _columns_of_all(options)
    if name == "choice":
        return Columns(optional=multiple_choice.OPTION_COLUMNS)
    return Columns(*program.columns(options or BUILT_IN[name].defaults())) if name == "code" else Columns()


def _columns_of_all(verifiers: Sequence[Verifier]) -> Columns | None:
    required: list[str] = []
    optional: list[str] = []
    for verifier in verifiers:
        columns = columns_of(verifier)
        if columns is None:
            return None
        required += columns.required
        optional += columns.optional
    return Columns(tuple(dict.fromkeys(required)), tuple(dict.fromkeys(optional)))


def judge(spec: VerifierSpec, verify: Verify, prompt: Prompt, trace: Trace) -> Verdict:
    """Call a verifier; whatever it raises or returns, the result is a verdict signed by the spec."""
    try:
        verdict: Any = verify(prompt, trace)
    except Exception as error:  # a verifier's failure is a verdict, never a crash
        return verdict_of(prompt, trace, "error", f"{type(error).__name__}: {error}"[:500], spec.label)
    if not isinstance(verdict, Verdict):
        detail = f"{FUNCTION} returned {type(verdict).__name__}, not a Verdict"
        return verdict_of(prompt, trace, "error", detail, spec.label)
    signed = {"trace_id": trace.trace_id, "gold": prompt.gold, "verifier": spec.label}
    return verdict.model_copy(update=signed)


# --- built-in ones and their options ---------------------------------------------------------------------------------

OURS = "distill.verifiers."


class BuiltIn(NamedTuple):
    """Where one of our own verifiers lies, its version, and the section of its options."""

    where: str
    version: Callable[[], str]
    section: type[Section] | None = None

    def defaults(self) -> Any:
        """Its options where the recipe gives none."""
        assert self.section is not None
        return self.section()


BUILT_IN = {
    **{name: BuiltIn(f"{OURS}builtin:{name}", partial(version_of, name)) for name in ("number", "math", "exact")},
    "reasoning_gym": BuiltIn(f"{OURS}builtin:reasoning_gym", partial(version_of, "reasoning_gym")),
    "choice": BuiltIn(f"{OURS}multiple_choice:choice", multiple_choice.version, ChoiceVerifier),
    "regex": BuiltIn(f"{OURS}structured:regex", structured.regex_version, RegexVerifier),
    "json_schema": BuiltIn(f"{OURS}structured:json_schema", structured.json_schema_version, JsonSchemaVerifier),
    "code": BuiltIn(f"{OURS}program:code", program.version, CodeVerifier),
    JUDGE: BuiltIn(f"{OURS}judging", judging.version, JudgeVerifier),
}
EXAMPLES = {
    "json_schema": "{file: schema.json}",
    JUDGE: "{model: MODEL, endpoint: {base_url: ...}}",
    **dict.fromkeys(COMBINATIONS, "[number, exact]"),
}
"""Options of verifiers that do not work without any."""


def _section_spec(section: VerifierSection) -> VerifierSpec:
    name, options = _only_key(section)
    return _combined_spec(name, options) if name in COMBINATIONS else _built_in_spec(name, options)


def _only_key(section: VerifierSection) -> tuple[str, Any]:
    return next((name, value) for name in type(section).model_fields if (value := getattr(section, name)) is not None)


def _combined_spec(name: str, verifiers: Sequence[Verifier]) -> VerifierSpec:
    parts = tuple(resolve(verifier) for verifier in verifiers)
    version = digest_json([part.label for part in parts])[:8]
    return VerifierSpec(
        name, version, f"{OURS}combination:{name}", light=all(part.light for part in parts), parts=parts
    )


def _built_in_spec(name: str, options: Any) -> VerifierSpec:
    """A verifier of ours; its version counts those of its options that decide verdicts, and files by content."""
    built_in = BUILT_IN[name]
    given = "" if options is None else _canonical(options.model_dump(mode="json", exclude_defaults=True))
    timeout_s = program.longest_s(options or built_in.defaults()) if name == "code" else DEFAULT_TIMEOUT_S
    version = _version_of(name, options) if options else built_in.version()
    return VerifierSpec(name, version, built_in.where, timeout_s, name in LIGHT, "" if given == "{}" else given)


def _version_of(name: str, options: Any) -> str:
    decides: Any = hashed_fields(options)
    if name == JUDGE:
        decides = judging.identity(options)
    if name == "json_schema":
        decides = structured.schema_digest(options)
    version = BUILT_IN[name].version()
    return f"{version}+{digest_json(decides)[:8]}" if decides else version


def _recorded(verifier: Verifier) -> Any:
    """A verifier as plain JSON: identities' options only, absolute paths."""
    if isinstance(verifier, str):
        return verifier
    if isinstance(verifier, FileVerifier):
        return {"file": str(verifier.file.resolve())}
    name, options = _only_key(verifier)
    if name in COMBINATIONS:
        return {name: [_recorded(part) for part in options]}
    fields = type(options).model_fields.items()
    plain = {key: getattr(options, key) for key, field in fields if is_hashed(field)}
    plain = {key: value for key, value in plain.items() if value != type(options).model_fields[key].default}
    plain = {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in plain.items()}
    return {name: plain} if plain else name


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# --- files ----------------------------------------------------------------------------------------------------------


def _file_spec(path: Path, timeout_s: float) -> VerifierSpec:
    path = path.resolve()
    # the name leaves the folder out: where a recipe lies is no part of what it means
    return VerifierSpec(f"{FILE}{path.name}", _version_of_file(path), f"{FILE}{path}", timeout_s)


def _version_of_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise RecipeError(
            f"verifier file {path}: {error.strerror or error}; give a Python file with a function"
            f" {FUNCTION}(prompt, trace) -> Verdict (relative paths are taken from the recipe's folder)"
        ) from error


def _load_file(path: Path, version: str) -> ModuleType:
    """Run the file as a module of its own name, once a process and version."""
    name = f"_distill_verifier_{version}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"verifier file {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # a verifier file may also call sys.exit
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise RecipeError(f"verifier file {where}: cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _function(module: ModuleType, name: str, where: str) -> Verify:
    function: Any = getattr(module, name, None)
    if not callable(function):
        given = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(name, given)
        raise RecipeError(f"verifier {where}: no function {name}(prompt, trace) in it{hint}; add one")
    return function  # type: ignore[no-any-return]
