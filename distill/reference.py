"""The generated references: docs/config.md from the recipe's models, docs/cli.md from the command line itself.

`python -m distill.reference --write docs` is what `make docs` runs; `--check docs`, run by `make lint`, exits 1 where a
page is not current.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill.config import FileVerifier, Recipe, Section, is_hashed
from distill.sweep.config import Sweep

SWEEP_OPENING = """# Sweep reference

One YAML file describes one sweep: a base recipe, what varies in it, what is wanted and what it may cost. This page is
generated from the code by `make docs`; [sweeps.md](sweeps.md) is the guide.

Keys of the recipe are written as on the command line: dotted, lists by index (`student.phases.0.lr`).
"""

CONFIG_OPENING = """# Recipe reference

One YAML file describes one experiment; every section is optional and unknown keys are refused. This page is generated
from the code by `make docs`.

Values come from the defaults, then the file, then the command line: `section.key=value`, lists by index
(`student.phases.0.lr=1e-5`). Relative paths are taken from the recipe's folder. Keys marked *no* under "identity" say
where, how fast or at what price a stage runs: changing them never makes a finished stage run again. All others are
part of the stage's identity wherever they differ from their default.
"""

CLI_OPENING = """# Command reference

    distill VERB RECIPE.yaml [section.key=value …] [--runs DIR] [--dry-run] [--json] [--device NAME]

stdout holds the result (`--json` for machines), stderr the log and progress. Exit codes: 0 done, 2 your error (one line
says which file and what to do), 3 a gate, a budget or a failed check, 130 and 143 after SIGINT and SIGTERM. Everything
finished is kept: the same command goes on where it stopped. `distill --install-completion` adds completion to your
shell. This page is generated from the code by `make docs`.
"""


def pages() -> dict[str, str]:
    """File name and text of every generated page."""
    return {"config.md": config_page(), "sweep.md": sweep_page(), "cli.md": cli_page()}


# --- recipes --------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """The recipe reference in Markdown."""
    return _sections_page(CONFIG_OPENING, Recipe, "The recipe")


def sweep_page() -> str:
    """The reference of sweep files in Markdown."""
    return _sections_page(SWEEP_OPENING, Sweep, "The sweep", identity=False)


def _sections_page(opening: str, root: type[BaseModel], name: str, identity: bool = True) -> str:
    parts, first_at = [opening], dict[type, str]()
    for path, section in sections(root):
        title = f"`{path}`" if path else name
        if section in first_at:
            parts.append(f"## {title}\n\nThe same keys as [`{first_at[section]}`](#{_anchor(first_at[section])}).\n")
        else:
            first_at[section] = path
            parts.append(f"## {title}\n\n{_paragraph(section)}\n\n{_table(section, identity)}")
    return "\n".join(parts)


def _anchor(path: str) -> str:
    """The link target that Markdown viewers give a heading."""
    return path.lower().replace(".", "")


def sections(root: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section under a root with the key it stands at, parents first.

    One that stands at several keys comes each time; what is below it comes once.
    """
    seen: set[type[BaseModel]] = set()

    def visit(path: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
        yield path, section
        if section in seen:
            return
        seen.add(section)
        for name, field in section.model_fields.items():
            for suffix, inner in _inner_sections(field.annotation):
                yield from visit(f"{path}.{field.alias or name}{suffix}".lstrip("."), inner)

    return visit("", root)


def _inner_sections(annotation: Any, suffix: str = "") -> list[tuple[str, type[BaseModel]]]:
    """Sections that a field's type mentions, with `.0` for list items and `.NAME` for dictionary values."""
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [(suffix, annotation)]
    if origin is list:
        return _inner_sections(args[0], suffix + ".0")
    if origin is dict:
        return _inner_sections(args[1], suffix + ".NAME")
    if origin is Annotated:
        return _inner_sections(args[0], suffix)
    if origin in (Union, UnionType):
        return [found for part in args for found in _inner_sections(part, suffix)]
    return []


def _paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(section: type[BaseModel], identity: bool) -> str:
    """The keys of a section; `identity` adds whether each is part of a stage's."""
    titles = ["key", "type", "default", *(["identity"] if identity else []), "meaning"]
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, field in section.model_fields.items():
        text = " ".join((field.description or "").split())
        cells = [f"`{field.alias or name}`", _code(type_name(field.annotation) + _bounds(field)), _default(field)]
        cells += ["yes" if is_hashed(field) else "no"] if identity else []
        rows.append("| " + " | ".join([*cells, text.replace("|", "\\|")]) + " |")
    return "\n".join(rows) + "\n"


def type_name(annotation: Any) -> str:
    """A type as a person would write it: `int | null`, `list of str`, `cosine | linear`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "null"
    if origin is Literal:
        return " | ".join(str(value) for value in args)
    if origin in (Union, UnionType):
        return " | ".join(type_name(part) for part in args)
    if origin is Annotated:
        return type_name(args[0])
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{file: …}" if annotation is FileVerifier else "section"
    plain = {"str": "text", "Path": "path", "float": "number", "int": "integer"}
    return plain.get(str(annotation.__name__), str(annotation.__name__))


def _bounds(field: FieldInfo) -> str:
    """The limits of a number: `, > 0`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(signs[key], getattr(part, key)) for part in field.metadata for key in signs if hasattr(part, key)]
    return "".join(f", {sign} {value}" for sign, value in found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        given = default.model_dump(mode="json", exclude_defaults=True)
        return _code(_yaml(given)) if given else "its defaults"
    return _code(_yaml(default))


def _yaml(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, BaseModel):
        return _yaml(value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


# --- command line ---------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """The command reference in Markdown."""
    from typer.main import get_command

    from distill.cli import app

    command: Any = get_command(app)
    parts, first_with = [CLI_OPENING, f"## distill\n\n{_options(command)}"], dict[str, str]()
    for name, verb in _verbs(command):
        options = _options(verb)
        same = first_with.setdefault(options, name)
        usage = " ".join([name, *(_argument(part) for part in verb.params if part.param_type_name == "argument")])
        shown = options if same == name else f"Arguments and options are those of `distill {same}`.\n"
        parts.append(f"## distill {name}\n\n    distill {usage} [options]\n\n{verb.help.strip()}\n\n{shown}")
    return "\n".join(parts)


def _verbs(command: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb with its whole name; those of a group under the group's."""
    for name, verb in command.commands.items():
        if hasattr(verb, "commands"):
            yield from _verbs(verb, f"{before}{name} ")
        elif not verb.hidden:
            yield before + name, verb


def _argument(part: Any) -> str:
    text = part.metavar.strip("[]")
    return f"[{text} …]" if part.nargs == -1 else text if part.required else f"[{text}]"


def _options(command: Any) -> str:
    """Arguments and options of a command as a table."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for part in sorted(command.params, key=lambda part: part.param_type_name):
        is_argument = part.param_type_name == "argument"
        value = "" if is_argument or getattr(part, "is_flag", False) else f" {part.metavar}"
        name = part.metavar.strip("[]") if is_argument else ", ".join(part.opts) + value
        has_none = part.default is None or part.default is False or callable(part.default)
        shown = "" if has_none else f"`{part.default}`"
        rows.append(f"| {_code(name)} | {shown} | {' '.join((part.help or '').split())} |")
    return "\n".join(rows) + "\n"


# --- writing and checking -------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Write or check the pages of a folder; returns the exit code."""
    action, folder = (arguments[0], Path(arguments[1])) if len(arguments) == 2 else ("", Path())
    if action == "--write":
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages().items():
            (folder / name).write_text(text, encoding="utf-8")
        return 0
    if action == "--check":
        stale = [name for name, text in pages().items() if not _is_current(folder / name, text)]
        if stale:
            sys.stderr.write(f"not current: {', '.join(str(folder / name) for name in stale)}; run: make docs\n")
        return 1 if stale else 0
    sys.stderr.write("usage: python -m distill.reference --write|--check FOLDER\n")
    return 2


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
