"""Progress on stderr: a bar with rate and ETA in a terminal, plain lines every few seconds elsewhere, nothing if quiet.

    with progress("train", total=steps, options=options, unit="steps") as bar:
        for step in loop:
            bar.advance(1, tokens=step.tokens, loss=f"{step.loss:.3f}")

stdout is left to results. Decisions (`say`) share stderr with the bar and are printed above it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from distill.runs import RunOptions

PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines."""
WORTH_SHOWING_S = 2.0
"""A piece of work shorter than this prints no plain line."""


def say(line: str) -> None:
    """Decisions go to stderr; stdout holds results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass
class Bar:
    """How far a piece of work has come; `advance` moves it on."""

    label: str
    total: int | None
    unit: str = ""
    done: float = 0
    """Units finished, those of earlier attempts included."""
    on_advance: Callable[["Bar"], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    tokens: int = 0
    shown: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started_s = self.clock()
        self.done_before = self.done

    def advance(self, n: float = 1, *, tokens: int = 0, **shown: str) -> None:
        """Count `n` finished units and `tokens` tokens; `shown` replaces the values named at the end of the line."""
        self.done += n
        self.tokens += tokens
        self.shown.update(shown)
        self.on_advance(self)

    @property
    def elapsed_s(self) -> float:
        """Seconds since this attempt began."""
        return self.clock() - self.started_s

    @property
    def rate(self) -> float:
        """Units a second in this attempt; 0 before anything is done."""
        return (self.done - self.done_before) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at this rate; None where it cannot be known."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0.0, self.total - self.done) / self.rate

    def figures(self) -> str:
        """Rate, tokens a second, ETA and whatever the work shows of itself."""
        parts = [f"{self.rate:.3g} {self.unit}/s" if self.unit else f"{self.rate:.3g}/s"]
        if self.tokens:
            parts.append(f"{self.tokens / max(self.elapsed_s, 1e-9):,.0f} tokens/s")
        if self.eta_s is not None:
            parts.append(f"ETA {clock_text(self.eta_s)}")
        return ", ".join(parts + [f"{name} {value}" for name, value in self.shown.items()])

    def line(self) -> str:
        """The whole state in one plain line."""
        done = f"{self.done:,.0f}"
        if self.total is not None:
            done += f"/{self.total:,} ({100 * self.done / self.total if self.total else 100:.0f}%)"
        return f"{self.label}: {done} {self.unit}".rstrip() + f", {self.figures()}"


def clock_text(seconds: float) -> str:
    """`1:05` or `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(
    label: str,
    total: int | None,
    options: RunOptions,
    unit: str = "",
    done: int = 0,
    terminal: bool | None = None,
    every_s: float = PLAIN_EVERY_S,
    worth_s: float = WORTH_SHOWING_S,
) -> Iterator[Bar]:
    """Show a piece of work of `total` units, of which `done` were finished before; yields the bar to advance.

    The rate is this attempt's, so what was done before does not make it look faster. `terminal` says whether stderr
    is one; by default it is asked. Plain lines come every `every_s` seconds, and for work shorter than `worth_s` not at
    all.
    """
    if options.quiet:
        yield Bar(label, total, unit, done)
    elif sys.stderr.isatty() if terminal is None else terminal:
        with _rich_bar(label, total, unit, done) as bar:
            yield bar
    else:
        with _plain_lines(Bar(label, total, unit, done), every_s, worth_s) as bar:
            yield bar


@contextmanager
def _plain_lines(bar: Bar, every_s: float, worth_s: float) -> Iterator[Bar]:
    shown_s = bar.elapsed_s

    def show(bar: Bar) -> None:
        nonlocal shown_s
        if bar.elapsed_s - shown_s >= every_s:
            shown_s = bar.elapsed_s
            say(bar.line())

    bar.on_advance = show
    try:
        yield bar
    finally:
        if bar.elapsed_s >= worth_s:
            say(bar.line())


@contextmanager
def _rich_bar(label: str, total: int | None, unit: str, done: int) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: list[Any] = [
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), TextColumn("{task.fields[figures]}"),
    ]  # fmt: skip
    # stdout belongs to results, so it is not captured; what others print to stderr appears above the bar
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as shown:
        task = shown.add_task(label, total=total, completed=done, figures="")
        yield Bar(label, total, unit, done, lambda bar: shown.update(task, completed=bar.done, figures=bar.figures()))
