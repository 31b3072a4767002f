"""What the page holds: an index of small fields, read at once, and the records in parts, read when they are asked for.

Both are JSON, deflated and in base64, so that nothing a model wrote can be taken for a part of the page. A part holds
whole records, up to about half a megabyte; the index says how many, and knows of every trace what a list, a filter, a
sum and an order need. Columns of the index are lists of equal length, one value a trace.
"""

import base64
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic_core import PydanticSerializationError, to_json

from distill.inspection import Shown
from distill.records import Trace

PART_BYTES = 1 << 19
"""Size from which a part is closed: small enough to unpack between two frames, large enough to compress well."""
EXCERPT_CHARS = 160
"""How much of a prompt and of a verdict's detail a line of the list has."""

Json = dict[str, Any]


# --- the index ------------------------------------------------------------------------------------------------------


class Facet(NamedTuple):
    """Something traces are counted and filtered by; most have one value of it, flags are many."""

    name: str
    title: str
    of: Callable[[Shown], list[str]]


FACETS = (
    Facet("verdict", "Verdict", lambda shown: [_verdict(shown)]),
    Facet("selection", "Kept, or dropped for", lambda shown: [_selection(shown)]),
    Facet("flag", "Flags", lambda shown: list(dict.fromkeys(flag.flag for flag in shown.flags)) or ["no flag"]),
    Facet("source", "Source", lambda shown: [(shown.prompt.source if shown.prompt else "") or "unknown"]),
    Facet("model", "Model", lambda shown: [shown.trace.teacher.model or shown.trace.teacher.engine]),
    Facet("finish", "Finish reason", lambda shown: [shown.trace.finish_reason]),
    Facet("think", "Reasoning", lambda shown: [shown.trace.think]),
    Facet("stage", "Stage", lambda shown: [shown.label]),
)

COLUMNS: dict[str, Callable[[Shown], Any]] = {
    "id": lambda shown: shown.trace.trace_id,
    "opening": lambda shown: "" if shown.prompt else _excerpt(shown.trace.answer or shown.trace.reasoning or ""),
    "sample": lambda shown: shown.trace.sample,
    "accepted": lambda shown: int(shown.accepted),
    "input": lambda shown: shown.trace.usage.input,
    "output": lambda shown: shown.trace.usage.output,
    "reasoning": lambda shown: shown.trace.usage.reasoning,
    "cost": lambda shown: shown.trace.cost_usd,
    "latency": lambda shown: shown.trace.latency_s,
    "chars": lambda shown: len(shown.trace.reasoning or "") + len(shown.trace.answer),
    "note": lambda shown: _excerpt(shown.trace.error or _finding(shown)),
}


def _verdict(shown: Shown) -> str:
    if shown.verdict:
        return shown.verdict.outcome
    return "failed" if shown.trace.failed else "not judged"


def _selection(shown: Shown) -> str:
    return shown.dropped or ("kept" if shown.kept else "not selected")


def _finding(shown: Shown) -> str:
    """What the verifier found, with the reference where it was not met."""
    if shown.verdict is None:
        return ""
    missed = shown.verdict.gold is not None and not shown.verdict.correct
    return f"{shown.verdict.detail} · reference {shown.verdict.gold}" if missed else shown.verdict.detail


def _excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    return " ".join(text[: 4 * EXCERPT_CHARS].split())[:EXCERPT_CHARS]


@dataclass
class Index:
    """The small fields of every trace, column by column; values that repeat are numbers into a list."""

    parts: list[int] = field(default_factory=list)
    """Records of each part."""
    prompts: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Number and excerpt of each prompt, by id."""
    prompt: list[int] = field(default_factory=list)
    """Number of each trace's prompt."""
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    values: dict[str, dict[str, int]] = field(default_factory=lambda: {facet.name: {} for facet in FACETS})
    """Number of each value of a facet."""
    codes: dict[str, list[list[int]]] = field(default_factory=lambda: {facet.name: [] for facet in FACETS})
    """Numbers of each trace's values."""

    def __len__(self) -> int:
        return len(self.prompt)

    def add(self, shown: Shown) -> None:
        """One more trace."""
        excerpt = _excerpt(shown.prompt.text) if shown.prompt else ""
        number, _ = self.prompts.setdefault(shown.trace.prompt_id, (len(self.prompts), excerpt))
        self.prompt.append(number)
        for name, value_of in COLUMNS.items():
            self.columns[name].append(value_of(shown))
        for facet in FACETS:
            known = self.values[facet.name]
            self.codes[facet.name].append([known.setdefault(value, len(known)) for value in facet.of(shown)])

    def document(self) -> Json:
        """The same as plain values."""
        return {
            "schema": 1,
            "parts": self.parts,
            "prompts": [[prompt_id, excerpt] for prompt_id, (_, excerpt) in self.prompts.items()],
            "columns": {**self.columns, "prompt": self.prompt},
            "facets": [
                {
                    "name": facet.name,
                    "title": facet.title,
                    "values": list(self.values[facet.name]),
                    "of": self.codes[facet.name],
                }
                for facet in FACETS
            ],
        }


# --- the records ----------------------------------------------------------------------------------------------------


def parts(shown: Iterable[Shown], index: Index) -> Iterator[str]:
    """The records, packed; the index learns of each one and of each part."""
    texts: list[bytes] = []
    size = 0
    for one in shown:
        index.add(one)
        texts.append(_as_json(record_of(one)))
        size += len(texts[-1])
        if size >= PART_BYTES:
            yield _close(texts, index)
            size = 0
    if texts:
        yield _close(texts, index)


def _close(texts: list[bytes], index: Index) -> str:
    index.parts.append(len(texts))
    packed = _deflated(b"[" + b",".join(texts) + b"]")
    texts.clear()
    return packed


def record_of(shown: Shown) -> Json:
    """Everything known of a trace but its token ids, which nobody reads and which outweigh the text."""
    record = shown.to_json()
    trace = record["trace"]
    del trace["token_ids"]
    trace["raw"] = raw_parts(shown.trace)
    return record


def raw_parts(trace: Trace) -> str | list[str]:
    """The raw text; where reasoning and answer stand in it, only what is before, between and behind them."""
    before, found, rest = trace.raw.partition(trace.reasoning) if trace.reasoning else ("", "", trace.raw)
    between, answer, behind = rest.rpartition(trace.answer) if trace.answer else (rest, "", "")
    is_whole = found == (trace.reasoning or "") and answer == trace.answer
    return [before, between, behind] if is_whole else trace.raw


# --- packing --------------------------------------------------------------------------------------------------------


def pack(value: Any) -> str:
    """A JSON value as it stands in the page: deflated (zlib) and in base64."""
    return _deflated(_as_json(value))


def _as_json(value: Any) -> bytes:
    """JSON that every reader takes: no number is NaN, and half a surrogate pair, which UTF-8 cannot say, is escaped."""
    try:
        return to_json(value, inf_nan_mode="null")
    except PydanticSerializationError:
        return json.dumps(_finite(value), separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()
