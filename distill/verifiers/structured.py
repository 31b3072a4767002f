"""Verifiers of an answer's form: `regex`, a regular expression, and `json_schema`, a JSON Schema.

Both may take arbitrarily long on hostile text (a pattern that backtracks) and so belong into a `VerifierPool`. No
schema is ever fetched: a reference to another file or address is refused.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from distill.config import JsonSchemaVerifier, RegexVerifier
from distill.errors import RecipeError
from distill.records import Prompt, Trace, Verdict
from distill.verifiers.builtin import Finding
from distill.verifiers.builtin import _short_answers as short_answers
from distill.verifiers.findings import fenced_blocks, judged, shown

# --- regex ----------------------------------------------------------------------------------------------------------


def regex_version() -> str:
    """Version of our own reading; bumped whenever it judges differently."""
    return "1"


def regex(prompt: Prompt, trace: Trace, options: RegexVerifier = RegexVerifier()) -> Verdict:  # noqa: B008
    """Whether the answer matches the pattern, or where the recipe has none the prompt's reference answer as a pattern.

    A full match is tried on the boxed content, or else on the answer, its last line and what follows `answer:` there.
    """
    label = f"regex@{regex_version()}"
    return judged(label, prompt, trace, partial(_regex, options), needs_gold=options.pattern is None)


def _regex(options: RegexVerifier, prompt: Prompt, answer: str) -> Finding:
    pattern = options.pattern if options.pattern is not None else (prompt.gold or "")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return Finding("unverifiable", f"the reference {shown(pattern)!r} is no regular expression: {error}")
    if not options.full:
        match = compiled.search(answer)
        return Finding("correct", f"found {shown(match[0])!r}") if match else Finding("wrong", "no match")
    given = list(short_answers(answer))
    if any(compiled.fullmatch(text) for text in given):
        return Finding("correct", "full match")
    return Finding("wrong", f"no full match: answer {shown(given[-1])!r}")


# --- json_schema ----------------------------------------------------------------------------------------------------

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema_version() -> str:
    """Version of our own reading, and of the library which decides."""
    return f"1+jsonschema-{importlib.metadata.version('jsonschema')}"


def json_schema(prompt: Prompt, trace: Trace, options: JsonSchemaVerifier) -> Verdict:
    """Whether the JSON of the answer satisfies the schema: its last fenced block that is JSON, or else all of it.

    Raises RecipeError for a schema that cannot be used.
    """
    validator = load_schema(options.file)
    return judged(f"json_schema@{json_schema_version()}", prompt, trace, partial(_json, validator), needs_gold=False)


def _json(validator: Any, prompt: Prompt, answer: str) -> Finding:
    found = next(_documents(answer), None)
    if found is None:
        return Finding("wrong", "no JSON in the answer")
    try:
        problem = next(validator.iter_errors(found[0]), None)
    except RecursionError:
        return Finding("wrong", "the JSON is nested too deeply")
    if problem is None:
        return Finding("correct", "satisfies the schema")
    return Finding("wrong", f"{problem.json_path}: {shown(problem.message)}")


def _documents(answer: str) -> Iterator[tuple[Any]]:
    """JSON values of an answer, the last block first; one-tuples, since a document may be `null`."""
    for text in [*(block.text for block in reversed(fenced_blocks(answer))), answer]:
        try:
            yield (json.loads(text, parse_constant=_refuse),)
        except (ValueError, RecursionError):
            continue


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def schema_digest(options: JsonSchemaVerifier) -> str:
    """What identifies a schema: its bytes.

    Raises RecipeError if the file cannot be read.
    """
    return hashlib.sha256(_schema_bytes(options.file)).hexdigest()


def _schema_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"json_schema {path}: {error.strerror or error}; give a JSON file (relative paths are taken from the"
            " recipe's folder)"
        ) from error


@cache
def load_schema(path: Path) -> Any:
    """The validator of a schema file, once a process.

    Raises RecipeError if it is no JSON, no schema of Draft 2020-12, or refers to what is not in it.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry

    try:
        schema = json.loads(_schema_bytes(path))
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"json_schema {path}: {error.json_path}: {error.message}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"json_schema {path}: not JSON: {error}") from error
    if isinstance(schema, dict) and schema.get("$schema", DIALECT).rstrip("#") != DIALECT:
        raise RecipeError(f"json_schema {path}: $schema is {schema['$schema']!r}; only {DIALECT} is read")
    _check_references(schema, path)
    # an empty registry knows the drafts themselves and fetches nothing
    return Draft202012Validator(schema, registry=Registry())


def _check_references(schema: Any, path: Path) -> None:
    """Refuse a reference that leads out of the file or nowhere, before an answer meets it."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    def check(resource: Any, outer: Any) -> None:
        resolver = outer.in_subresource(resource)
        given = resource.contents if isinstance(resource.contents, dict) else {}
        for reference in (given[key] for key in ("$ref", "$dynamicRef") if key in given):
            try:
                resolver.lookup(reference)
            except Unresolvable as error:
                raise RecipeError(
                    f"json_schema {path}: $ref {reference!r} is not in the file; nothing is fetched, so put it under"
                    " $defs"
                ) from error
        for inner in resource.subresources():
            check(inner, resolver)

    root = DRAFT202012.create_resource(schema)
    check(root, Registry().resolver_with_root(root))
