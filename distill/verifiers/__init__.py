"""Verifiers: functions `verify(prompt, trace) -> Verdict` that say whether an answer is right.

    from distill.verifiers import number
    number(prompt, trace).outcome

`resolve` turns what a recipe says into a `VerifierSpec`: a built-in name, the name of an installed one (entry point
group `distill.verifiers`), or a file of your own with a function `verify`. Specs travel to worker processes; the pool
in `distill.verifiers.pool` runs them there under a time limit. Importing this package loads no library that verifies.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from distill.config import VERIFIERS, FileVerifier
from distill.errors import RecipeError
from distill.records import Prompt, Trace, Verdict
from distill.rows import nearest
from distill.verifiers.builtin import exact, math, number, reasoning_gym, verdict_of, version_of

__all__ = [
    "VerifierSpec",
    "Verify",
    "exact",
    "judge",
    "math",
    "number",
    "reasoning_gym",
    "recorded_name",
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
LIGHT = ("number", "exact")
"""Verifiers that need no process of their own: they run in linear time."""


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

    @property
    def label(self) -> str:
        """What verdicts are signed with: `number@1`."""
        return f"{self.name}@{self.version}"

    @property
    def custom(self) -> bool:
        """Whether the function is not one of ours."""
        return self.name not in VERIFIERS

    def load(self) -> Verify:
        """The function itself.

        Raises RecipeError if its file or module is broken, was changed meanwhile, or has no such function.
        """
        if self.where.startswith(FILE):
            path = Path(self.where.removeprefix(FILE))
            if _version_of_file(path) != self.version:
                raise RecipeError(f"{path}: the verifier was changed while the run was using it; run again")
            return _function(_load_file(path, self.version), FUNCTION, str(path))
        module, _, function = self.where.partition(":")
        try:
            return _function(importlib.import_module(module), function, self.where)
        except ImportError as error:
            raise RecipeError(f"verifier {self.name}: {module} cannot be imported: {error}") from error


def resolve(verifier: str | FileVerifier) -> VerifierSpec:
    """The verifier that a recipe or a prompt names; reads a file's bytes, but runs none of its code.

    Raises RecipeError for an unknown name (with the nearest one) and for a file that is not there.
    """
    if isinstance(verifier, FileVerifier):
        return _file_spec(verifier.file, verifier.timeout_s)
    if verifier in VERIFIERS:
        where = f"distill.verifiers.builtin:{verifier}"
        return VerifierSpec(verifier, version_of(verifier), where, light=verifier in LIGHT)
    if verifier.startswith(FILE):
        return _file_spec(Path(verifier.removeprefix(FILE)), DEFAULT_TIMEOUT_S)
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


def recorded_name(verifier: str | FileVerifier) -> str:
    """How a prompt's record names its verifier; `resolve` takes it back."""
    return f"{FILE}{verifier.file.resolve()}" if isinstance(verifier, FileVerifier) else verifier


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
