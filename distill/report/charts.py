"""Charts as HTML and SVG without a script: bars that are elements, curves whose labels are text of the page's own size.

Only lines are SVG, stretched to the frame; ticks, dots and titles are HTML placed in per cent of it, so that a chart is
legible at any width. Every chart says in words what it shows (`aria-label`); colours come from classes `m-…`.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

TICKS = 5
"""At most so many steps along an axis."""


class Bar(NamedTuple):
    """One bar, as shares of the track."""

    name: str
    share: float | None
    """None draws no bar: the text then says why."""
    text: str
    """The value as it is written beside the bar."""
    colour: str
    low: float | None = None
    high: float | None = None
    detail: str = ""
    """A second, fainter text after the value."""


class Line(NamedTuple):
    """One series of a line chart."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    style: str = ""
    """Classes of the stroke: `faint`, `dash1` …"""


class Axis(NamedTuple):
    """The range of an axis and what is written along it."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, in per cent of the axis."""
        if self.high == self.low:
            return 50.0
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)


def bars(title: str, rows: Sequence[Bar], ticks: Sequence[tuple[float, str]] = ()) -> str:
    """Horizontal bars with their values, each with its interval where it has one.

    `ticks` are shares of the track and what is written below them; without them there is no axis.
    """
    words = "; ".join(f"{row.name} {row.text} {row.detail}".strip() for row in rows)
    drawn = "".join(_bar(row) for row in rows)
    axis = "".join(f'<span style="left:{_percent(share)}">{escape(text)}</span>' for share, text in ticks)
    scale = f'<div class="bar axis"><span></span><span class="scale">{axis}</span><span></span></div>' if ticks else ""
    grid = " grid" if ticks else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<div class="bars{grid}" role="img" aria-label="{escape(f"{title}: {words}")}">{drawn}{scale}</div></figure>'
    )


def _bar(row: Bar) -> str:
    name = f'<span class="name">{escape(row.name)}</span>'
    if row.share is None:
        return f'<div class="bar {row.colour}">{name}<span class="absent">{escape(row.text)}</span></div>'
    whisker = ""
    if row.low is not None and row.high is not None:
        whisker = f'<span class="whisker" style="left:{_percent(row.low)};width:{_percent(row.high - row.low)}"></span>'
    detail = f' <span class="detail">{escape(row.detail)}</span>' if row.detail else ""
    fill = f'<span class="fill" style="width:{_percent(row.share)}"></span>'
    return (
        f'<div class="bar {row.colour}">{name}<span class="track">{fill}{whisker}</span>'
        f'<span class="value">{escape(row.text)}{detail}</span></div>'
    )


def cell_bar(share: float, lost: float = 0.0, colour: str = "m-plain") -> str:
    """A bar for a cell of a table that has its number beside it: what is there, and after it what was lost."""
    gone = f'<span class="lost" style="width:{_percent(lost)}"></span>' if lost else ""
    fill = f'<span class="fill" style="width:{_percent(share)}"></span>'
    return f'<span class="track inline {colour}" aria-hidden="true">{fill}{gone}</span>'


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def lines(title: str, series: Sequence[Line], x: Axis, y: Axis, dots: bool = False, small: bool = False) -> str:
    """A line chart; `dots` marks the points, `small` halves its height."""
    strokes = "".join(_grid_line(y.at(value)) for value, _ in y.ticks) + "".join(_stroke(line, x, y) for line in series)
    marks = "".join(_dots(line, x, y) for line in series) if dots else ""
    words = _in_words(title, series, x, y)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{_legend(series)}'
        f'<div class="plot{" small" if small else ""}" role="img" aria-label="{escape(words)}"><div class="area">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{strokes}</svg>{marks}'
        f"{''.join(_tick(value, text, x, 'x') for value, text in x.ticks)}"
        f"{''.join(_tick(value, text, y, 'y') for value, text in y.ticks)}"
        f'</div><span class="xtitle">{escape(x.title)}</span></div></figure>'
    )


class Point(NamedTuple):
    """One point of a scatter chart, with a vertical interval where it has one."""

    name: str
    """Short: it stands beside the point."""
    x: float
    y: float
    colour: str
    low: float | None = None
    high: float | None = None
    detail: str = ""
    """What the point's tooltip adds."""


def scatter(title: str, points: Sequence[Point], front: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Points with their intervals, and the front that joins the best of them as steps."""
    corners = [corner for (a, b), (c, d) in zip(front, front[1:]) for corner in ((a, b), (c, b), (c, d))] or front
    line = _stroke(Line("front", "m-student", corners, "faint"), x, y) if len(front) > 1 else ""
    strokes = "".join(_grid_line(y.at(value)) for value, _ in y.ticks) + line
    words = "; ".join(f"{point.name} {point.y:.3g} at {point.x:,.6g}" for point in points)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><div class="plot" role="img"'
        f' aria-label="{escape(f"{title}; {y.title} over {x.title}: {words}")}"><div class="area">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{strokes}</svg>'
        f"{''.join(_point(point, x, y) for point in points)}"
        f"{''.join(_tick(value, text, x, 'x') for value, text in x.ticks)}"
        f"{''.join(_tick(value, text, y, 'y') for value, text in y.ticks)}"
        f'</div><span class="xtitle">{escape(x.title)}</span></div></figure>'
    )


def _point(point: Point, x: Axis, y: Axis) -> str:
    left, bottom = x.at(point.x), y.at(point.y)
    bar = ""
    if point.low is not None and point.high is not None:
        low, high = y.at(point.low), y.at(point.high)
        span = f"left:{left:.2f}%;bottom:{low:.2f}%;height:{high - low:.2f}%"
        bar = f'<i class="upright {point.colour}" style="{span}"></i>'
    tooltip = f"{point.name}: {point.y:.3g} at {point.x:,.6g} {point.detail}".strip()
    place = f"left:{left:.2f}%;bottom:{bottom:.2f}%"
    return (
        f'{bar}<i class="dot {point.colour}" style="{place}" title="{escape(tooltip)}"></i>'
        f'<span class="pointname" style="{place}">{escape(point.name)}</span>'
    )


class Track(NamedTuple):
    """One line through a chart of parallel axes: where it crosses each, from 0 to 1; None where it has no value."""

    name: str
    colour: str
    at: Sequence[float | None]
    style: str = ""


def parallel(title: str, axes: Sequence[tuple[str, Sequence[tuple[float, str]]]], tracks: Sequence[Track]) -> str:
    """Parallel axes, each with its title and ticks (share of the axis, text), and a line for each track."""
    step = 100 / max(1, len(axes) - 1)
    uprights = "".join(f'<path class="gridline" d="M{index * step:.2f} 0V100"/>' for index in range(len(axes)))
    drawn = "".join(_track(track, step) for track in tracks)
    names = "".join(
        f'<span class="pname" style="left:{index * step:.2f}%">{escape(name)}</span>'
        for index, (name, _) in enumerate(axes)
    )
    ticks = "".join(
        f'<span class="ptick" style="left:{index * step:.2f}%;bottom:{100 * share:.2f}%">{escape(text)}</span>'
        for index, (_, marks) in enumerate(axes)
        for share, text in marks
    )
    words = f"{title}: {len(tracks)} lines over {', '.join(name for name, _ in axes)}. The numbers are in the table."
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><div class="parallel" role="img"'
        f' aria-label="{escape(words)}"><div class="area"><svg viewBox="0 0 100 100" preserveAspectRatio="none"'
        f' aria-hidden="true">{uprights}{drawn}</svg>{ticks}{names}</div></div></figure>'
    )


def _track(track: Track, step: float) -> str:
    path = " ".join(f"{index * step:.2f},{100 - 100 * at:.2f}" for index, at in enumerate(track.at) if at is not None)
    return (
        f'<polyline class="{track.colour} {track.style}" points="{path}"><title>{escape(track.name)}</title></polyline>'
    )


def _in_words(title: str, series: Sequence[Line], x: Axis, y: Axis) -> str:
    ends = (
        f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in series if len(line.points)
    )
    return f"{title}; {y.title} over {x.title}: {'; '.join(ends)}. The numbers are in the table below."


def _legend(series: Sequence[Line]) -> str:
    if len(series) < 2:
        return ""
    keys = "".join(
        f'<span class="key {line.colour}"><svg viewBox="0 0 24 6" aria-hidden="true"><path class="{line.style}"'
        f' d="M0 3H24"/></svg>{escape(line.name)}</span>'
        for line in series
    )
    return f'<div class="legend" aria-hidden="true">{keys}</div>'


def _stroke(line: Line, x: Axis, y: Axis) -> str:
    path = " ".join(f"{x.at(a):.2f},{100 - y.at(b):.2f}" for a, b in line.points)
    return f'<polyline class="{line.colour} {line.style}" points="{path}"/>'


def _grid_line(at: float) -> str:
    return f'<path class="gridline" d="M0 {100 - at:.2f}H100"/>'


def _dots(line: Line, x: Axis, y: Axis) -> str:
    return "".join(
        f'<i class="dot {line.colour}" style="left:{x.at(a):.2f}%;bottom:{y.at(b):.2f}%"'
        f' title="{escape(f"{line.name}: {b:.3g} at {a:,.6g}")}"></i>'
        for a, b in line.points
    )


def _tick(value: float, text: str, axis: Axis, side: str) -> str:
    edge = "left" if side == "x" else "bottom"
    return f'<span class="{side}tick" style="{edge}:{axis.at(value):.2f}%">{escape(text)}</span>'


def round_ticks(
    low: float, high: float, text: Callable[[float], str] = "{:g}".format, most: int = TICKS
) -> list[tuple[float, str]]:
    """Round values that span `low` to `high`: at most `most` steps, of 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(index * step, text(round(index * step, 12))) for index in range(first, max(last, first + 1) + 1)]


def axis_of(
    title: str, values: Sequence[float], text: Callable[[float], str] = "{:g}".format, most: int = TICKS
) -> Axis:
    """An axis with round ends around the values."""
    ticks = round_ticks(min(values), max(values), text, most)
    return Axis(title, ticks[0][0], ticks[-1][0], ticks)


def axis_to(title: str, end: float, text: Callable[[float], str] = "{:g}".format) -> Axis:
    """An axis from 0 that ends where the values end, with round ticks on the way."""
    return Axis(title, 0.0, end, [(value, name) for value, name in round_ticks(0.0, end, text) if value <= end])
