"""Small pieces of the page: numbers as text, colours, tables, notes, chips.

Text is escaped here; what a function takes as html, and says so, was escaped by its caller.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .facts import Artifact, Estimate
from .lineage import MODEL_ORDER
from .scores import Score

MINUS = "\N{MINUS SIGN}"
MINUTE, HOUR = 60, 3600
VARIANT_COLOURS = 5
STATUS = {"passed": ("✓ passed", "good"), "failed": ("✗ failed", "bad"), "not_run": ("not run", "none")}
"""Words and colour of a gate's status."""
STATES = {"done": ("done", "good"), "unfinished": ("unfinished", "none"), "not run": ("not run", "none")}
"""Words and colour of a stage's state."""


NA = '<span class="na">n/a</span>'


class Column(NamedTuple):
    """A column's title; numbers stand on the right."""

    title: str
    css: str = ""


def number(title: str) -> Column:
    """A column of numbers."""
    return Column(title, "n")


# --- numbers --------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """`71.1%`."""
    return f"{100 * share:.1f}%"


def bounds(estimate: Estimate) -> str:
    """`[65.2, 76.3]`, in per cent or points."""
    return f"[{signless(100 * estimate.low)}, {signless(100 * estimate.high)}]"


def points(estimate: Estimate) -> str:
    """`+64.8`: a difference of accuracies in percentage points."""
    value = round(100 * estimate.value, 1)
    return f"+{value:.1f}" if value > 0 else signless(value)


def point_bounds(estimate: Estimate) -> str:
    """`[+58.6, +71.0]`."""
    return f"[{', '.join(points(Estimate(bound, bound, bound)) for bound in (estimate.low, estimate.high))}]"


def signless(value: float) -> str:
    """One digit after the point, a true minus sign, and no sign on zero."""
    text = f"{abs(value):.1f}"
    return f"{MINUS}{text}" if value < 0 and float(text) else text


def compact(value: float) -> str:
    """Four significant digits, with thousands apart; whole numbers as they are."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("e-0", "e-").replace("-", MINUS)


def duration(seconds: float) -> str:
    """`under 0.1 s`, `0.1 s`, `49 s`, `4 min 30 s`, `2 h 05 min`."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < MINUTE:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE:02} min"


def size(megabytes: float) -> str:
    """`105 MB`, `0.452 MB`."""
    return f"{megabytes:,.0f} MB" if megabytes >= 100 else f"{megabytes:.3g} MB"


def dollars(usd: float) -> str:
    """`$12.30`, `$0.0042`."""
    return f"${usd:,.2f}" if usd >= 0.1 or usd == 0 else f"${usd:.4f}"


def when(timestamp: str) -> str:
    """`2026-11-22 11:23 UTC` of an ISO timestamp in UTC."""
    day, _, time = timestamp.partition("T")
    return f"{day} {time[:5]} UTC" if time else timestamp


class Palette:
    """The colour class of every model: the same in all charts."""

    def __init__(self, scores: Sequence[Score], artifact: Artifact | None) -> None:
        built = [variant.name for variant in artifact.variants] if artifact else []
        scored = [score.model for score in scores if score.kind == "variant"]
        self._variants = list(dict.fromkeys([*scored, *built]))

    def of(self, model: str) -> str:
        """`m-student`, `m-v0` …"""
        if model in self._variants:
            return f"m-v{self._variants.index(model) % VARIANT_COLOURS}"
        return f"m-{model}" if model in MODEL_ORDER else "m-plain"

    def label(self, model: str) -> str:
        """The model's name behind a swatch of its colour."""
        return f'<span class="{self.of(model)}"><i class="swatch" aria-hidden="true"></i>{escape(model)}</span>'


# --- pieces ---------------------------------------------------------------------------------------------------------


class Notes:
    """Reasons for what is not there, numbered in the order in which they are met."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def absent(self, reason: str) -> str:
        """`n/a` with the number of its reason."""
        if not reason:
            return NA
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f'<span class="na">n/a<sup>{self._reasons.index(reason) + 1}</sup></span>'

    def listed(self) -> str:
        """The reasons, to stand below."""
        items = "".join(f"<li><sup>{n}</sup> n/a: {escape(reason)}</li>" for n, reason in enumerate(self._reasons, 1))
        return f'<ul class="notes">{items}</ul>' if items else ""


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """A table of cells of html; the first of each row is its heading. `total` sets the last row apart."""
    head = "".join(f'<th scope="col"{_css(column)}>{escape(column.title)}</th>' for column in columns)
    last = len(rows) - 1
    body = "".join(_row(row, columns, "total" if total and index == last else "") for index, row in enumerate(rows))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str], columns: Sequence[Column], css: str) -> str:
    first, *others = cells
    rest = "".join(f"<td{_css(column)}>{cell}</td>" for column, cell in zip(columns[1:], others, strict=True))
    return f'<tr{f" class={css}" if css else ""}><th scope="row">{first}</th>{rest}</tr>'


def _css(column: Column) -> str:
    return f' class="{column.css}"' if column.css else ""


def chip(text: str, css: str) -> str:
    """A short word on a tinted ground; the word says what the colour says."""
    return f'<span class="chip {css}">{escape(text)}</span>'


def tiles(pairs: Sequence[tuple[str, str, str]]) -> str:
    """Name, value (html) and a further remark of a few numbers."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in pairs
    )
    return f'<dl class="tiles">{cells}</dl>'


def section(anchor: str, title: str, lead: str, *html: str) -> str:
    """A part of the page under its own heading."""
    body = "".join(html)
    return f'<section id="{anchor}"><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'


def fold(summary: str, html: str) -> str:
    """Something to be opened."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def block(text: str) -> str:
    """Text as it is, on a ground of its own."""
    return f'<pre class="block">{escape(text)}</pre>'
