"""The `code` verifier: Python code that must pass the tests of its prompt's row, in a sandbox.

This side finds the code in the answer and the tests in the row, starts the sandbox and reads the verdict; what happens
inside is in `harness`. A sandbox that does not start is an `error`, never a wrong answer.
"""

import ast
import importlib.util
import json
import re
import secrets
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from distill.config import CodeVerifier
from distill.errors import RecipeError
from distill.progress import say
from distill.records import Outcome, Prompt, Trace, Verdict
from distill.verifiers.builtin import Finding
from distill.verifiers.findings import fenced_blocks, judged
from distill.verifiers.sandbox import REMEDY, Ended, run_sandboxed, run_unsandboxed, sandbox_problem

START_S = 20.0
"""How much longer than its tests a sandbox may take, start and end included."""
VERDICT_BYTES = 1 << 16
"""Most that the referee says."""
LANGUAGES = ("python", "py", "python3")
"""Names of fenced blocks that hold the answer's code; blocks without a name may, those of other languages do not."""
UNSANDBOXED = "unsandboxed: "
"""How the details of verdicts start that no sandbox stood behind."""


def version() -> str:
    """Version of our own reading and tests, and of the language that decides."""
    return f"1+python-{sys.version_info.major}.{sys.version_info.minor}"


def columns(options: CodeVerifier) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of the row that are needed, and that may be there."""
    given = (options.tests_column, options.setup_column, options.entry_point_column)
    return tuple(column for column in given if column), ()


def longest_s(options: CodeVerifier) -> float:
    """Time after which a worker that judges is given up."""
    return options.timeout_s + 2 * START_S


def code(prompt: Prompt, trace: Trace, options: CodeVerifier = CodeVerifier()) -> Verdict:  # noqa: B008
    """Whether the answer's code passes the tests in `row[options.tests_column]`.

    Its code is the last fenced Python block that defines something, or else the last one, or the whole answer where it
    is Python. Tests without an assertion, and rows without tests, make it unverifiable.
    """
    return judged(f"code@{version()}", prompt, trace, partial(_code, options), needs_gold=False)


def _code(options: CodeVerifier, prompt: Prompt, answer: str) -> Finding:
    try:
        tests = cases_of(prompt.row, options) if options.entry == "stdin" else texts_of(prompt.row, options)
    except (KeyError, TypeError, ValueError) as error:
        return Finding("unverifiable", f"the row's {options.tests_column!r} cannot be read as tests: {error!r}")
    if not tests:
        return Finding("unverifiable", f"the row has no tests in {options.tests_column!r}")
    source = source_of(answer, last=options.entry == "stdin")
    if source is None:
        return Finding("wrong", "no Python code in the answer")
    job = {
        "token": secrets.token_hex(16),
        "entry": options.entry,
        "answer": source,
        "setup": "\n".join(_lines(prompt.row.get(options.setup_column or ""))),
        "entry_point": str(prompt.row.get(options.entry_point_column or "", "")),
        "tests": tests,
        **options.model_dump(include={"timeout_s", "cpu_s", "memory_mb", "file_mb", "output_kb", "processes"}),
    }
    return _run(options, job)


# --- what to run ----------------------------------------------------------------------------------------------------

_DEFINES = re.compile(r"^(?:def|class|async def)\s", re.MULTILINE)


def source_of(answer: str, last: bool = False) -> str | None:
    """The Python code of an answer, None where there is none; `last` takes the last block, whatever is in it."""
    blocks = fenced_blocks(answer)
    named = [textwrap.dedent(block.text) for block in blocks if block.language in LANGUAGES]
    if not named:
        unnamed = (textwrap.dedent(block.text) for block in blocks if not block.language)
        named = [text for text in unnamed if _is_python(text)]
    if not named:
        return answer if not blocks and _is_python(answer) else None
    # what follows is often an example of its use
    return next((text for text in reversed(named) if not last and _DEFINES.search(text)), named[-1])


def _is_python(text: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def texts_of(row: Mapping[str, Any], options: CodeVerifier) -> list[str]:
    """Tests as Python statements.

    Raises KeyError or TypeError where the row has none.
    """
    return [text for text in _lines(row[options.tests_column]) if text.strip()]


def _lines(value: Any) -> list[str]:
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    raise TypeError(f"{type(value).__name__} is neither a text nor a list of texts")


def cases_of(row: Mapping[str, Any], options: CodeVerifier) -> list[dict[str, str]]:
    """Tests as inputs of a program and what it must print.

    Raises KeyError, TypeError or ValueError where the row has none.
    """
    value = row[options.tests_column]
    value = json.loads(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        value = [dict(zip(("input", "output"), pair)) for pair in zip(value["inputs"], value["outputs"], strict=True)]
    return [{"input": _stream(case["input"]), "output": _stream(case["output"])} for case in value or []]


def _stream(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


# --- running it -----------------------------------------------------------------------------------------------------


def _run(options: CodeVerifier, job: Mapping[str, Any]) -> Finding:
    # where the recipe allows no other way, nothing is tried beforehand and nothing can go another way
    unsandboxed = options.allow_unsandboxed and sandbox_problem() is not None
    run = run_unsandboxed if unsandboxed else run_sandboxed
    given = json.dumps(job).encode()
    try:
        ended = run(_harness(), given, job["timeout_s"] + START_S, VERDICT_BYTES, options.file_mb)
    except RuntimeError as error:
        return Finding("error", f"no sandbox: {error}")
    found = _finding(ended, job["token"])
    return found._replace(detail=f"{UNSANDBOXED}{found.detail}") if unsandboxed else found


def _finding(ended: Ended, token: str) -> Finding:
    """What the referee said; only it knows the token."""
    messages = list(_messages(ended.output))
    for message in messages:
        if message.get("token") == token:
            outcome: Outcome = message["outcome"]
            return Finding(outcome, message["detail"])
    errors = " ".join(ended.errors.split())
    if not messages:
        return Finding("error", f"the sandbox did not start: {errors or 'no word from it'}"[:500])
    if ended.timed_out:
        return Finding("timeout", "no end within the limit")
    return Finding("error", f"the sandbox ended without a verdict (exit code {ended.exit_code}) {errors}"[:500])


def _messages(output: bytes) -> Iterator[dict[str, Any]]:
    while len(output) > 8:
        size = int.from_bytes(output[:8], "big")
        try:
            message = json.loads(output[8 : 8 + size])
        except ValueError:
            return
        if isinstance(message, dict):
            yield message
        output = output[8 + size :]


@cache
def _harness() -> str:
    spec = importlib.util.find_spec("distill.verifiers.harness")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


# --- before a run ---------------------------------------------------------------------------------------------------


def check_sandbox(options: CodeVerifier) -> None:
    """Refuse a machine without a sandbox, or say aloud that there is none where the recipe allows that.

    Raises RecipeError.
    """
    problem = sandbox_problem()
    if problem is None:
        return
    if not options.allow_unsandboxed:
        raise RecipeError(
            f"verifier code: there is no sandbox here: {problem}; {REMEDY}, or set allow_unsandboxed: true to run"
            " answers with all rights of this process"
        )
    _say_unsandboxed(problem)


@cache
def _say_unsandboxed(problem: str) -> None:
    """Once a process."""
    say(f"WARNING: verifier code runs answers WITHOUT a sandbox, with all rights of this process ({problem})")
