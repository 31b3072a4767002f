"""What the cards of data sets, students and artifacts share: Markdown that no text can break, and recipes to be shown.

Cards are published, so names of models and files lose the folders they lie in, and what says only where or at what
price a stage runs is left out.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distill.config import HubSource, PromptSource, Replay, TeacherConfig, is_hashed

PUBLISHED = ("name", "licence", "monitor")
"""Fields of a recipe that are shown though no identity depends on them."""
LOCAL_NAMES = frozenset(
    [
        ("TeacherConfig", "model"), ("JudgeVerifier", "model"), ("ExportConfig", "model"), ("StudentConfig", "init"),
        ("HubSource", "id"), ("FormatConfig", "template"),
    ]
)  # fmt: skip
"""Texts of a recipe that may be the path of a file or a folder."""
LONGEST = 3000
"""Longest text, in characters, that a block shows whole."""


# --- Markdown -------------------------------------------------------------------------------------------------------

_STRUCTURE = re.compile(r"[&<>|`*\[\]\\~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENDS_A_SPAN = re.compile(r"[`|]")


def text(given: str) -> str:
    """Words for a paragraph or a cell: one line, and no character of theirs is taken for markup."""
    return _STRUCTURE.sub(lambda found: f"&#{ord(found[0])};", one_line(given))


def code(given: str) -> str:
    """Text as it is, in a code span; in HTML where its own characters would end the span or a table's cell."""
    plain = one_line(given)
    if not plain:
        return "(empty)"
    if not _ENDS_A_SPAN.search(plain):
        return f"`{plain}`"
    return f"<code>{''.join(c if c.isalnum() or c in ' .,-' else f'&#{ord(c)};' for c in plain)}</code>"


def one_line(given: str) -> str:
    """White space folded; characters that cannot be seen become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(given.split()))


def html_text(given: str) -> str:
    """Text that no reader takes for markup."""
    return given.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(given: str, language: str = "text") -> str:
    """A block of text as it is, the middle of a long one left out; its fence is longer than any in the text."""
    half = LONGEST // 2
    if len(given) > LONGEST and language == "text":
        given = f"{given[:half]}\n[… {len(given) - 2 * half:,} characters …]\n{given[-half:]}"
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", given)), 3)
    return f"{fence}{language}\n{given.rstrip()}\n{fence}"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells in Markdown; bars and line ends in them are made harmless."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(given: str) -> str:
    # a backslash before a bar would make the one before that bar a plain character
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line(given))


# --- recipes as they can be shown -----------------------------------------------------------------------------------


def published(value: Any) -> Any:
    """A section as plain values: what has its default and what says only where or at what price is left out."""
    if isinstance(value, BaseModel):
        kind = type(value)
        fields = {
            key: getattr(value, key)
            for key, field in kind.model_fields.items()
            if (is_hashed(field) or key in PUBLISHED)
            and getattr(value, key) != field.get_default(call_default_factory=True)
        }
        return {
            key: without_folders(part) if (kind.__name__, key) in LOCAL_NAMES and part else published(part)
            for key, part in fields.items()
        }
    if isinstance(value, dict):
        return {key: published(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [published(part) for part in value]
    return value.name if isinstance(value, Path) else value


def without_folders(name: str) -> str:
    """The last part of a local path; the name of anything else as it is."""
    if name.startswith("package:"):
        return name
    local = re.match(r"/|~|\.{1,2}/|file:", name) or name.endswith(".gguf")
    return Path(name).name if local else name


def is_hub_id(name: str) -> bool:
    """Whether a name is one of a hub's, and not that of a file or folder here."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?", name)
    return bool(plain) and "--" not in name and ".." not in name and len(name) <= 96 and not Path(name).exists()


def origin(source: PromptSource | Replay) -> str:
    """Where a source's rows come from, in Markdown."""
    if source.hub is not None:
        return hub_origin(source.hub)
    if isinstance(source, PromptSource) and source.reasoning_gym is not None:
        return f"reasoning-gym task {code(source.reasoning_gym.task)}, seed {source.reasoning_gym.seed}"
    return f"file {code(source.file.name)}" if source.file is not None else ""


def hub_origin(source: HubSource) -> str:
    """A data set of the hub and its part, in Markdown."""
    parts = [code(without_folders(source.id)), text(source.config or ""), text(source.split)]
    return " ".join(part for part in parts if part)


def sampling(asked: TeacherConfig) -> Iterator[str]:
    """How the answers were drawn, as far as the recipe decides it: sentences in Markdown."""
    if asked.engine == "recorded":
        yield "Recorded traces: how they were drawn is not known here."
    elif asked.engine == "solver":
        yield "Worked solutions by a program, no language model."
    else:
        drawn, limit = asked.sampling, asked.sampling.max_new_tokens
        yield f"Sampling: temperature {drawn.temperature:g}, top_p {drawn.top_p:g}, at most {limit:,} tokens."
        if asked.escalate:
            yield f"Cut-off answers were asked for again with at most {', '.join(map(str, asked.escalate))} tokens."
        yield "System prompt: " + (f"{code(asked.system)}." if asked.system is not None else "none.")
    if asked.until is not None:
        yield f"Until {asked.until.correct} correct, at most {asked.until.tries} samples a prompt."
    elif asked.sampling.n > 1:
        yield f"{asked.sampling.n} samples a prompt."
