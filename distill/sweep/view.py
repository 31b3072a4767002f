"""A sweep as a table: in a terminal while it runs, and from another shell at any time. Reads files only.

A row is a trial: its state, the stage it is at, what it came to, how long it still takes, what it cost. Times to come
are those of finished stages of the same kind in the run store.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.progress import clock_text, say

from .config import Objective
from .forecast import ToGo, Work, kind_of, median_seconds, wall_time
from .measures import Measure, measure, pipeline_of
from .record import Record, State, read_record
from .run import View
from .schedule import Scheduler
from .trials import Trial

ORDER: Sequence[State] = ("running", "failed", "waiting", "pruned", "done", "left out")
"""Which trials come first where not all can be shown."""
STYLES: Mapping[State, str] = {"running": "bold cyan", "failed": "red", "pruned": "yellow", "done": "green"}
CHANGES_COLUMN, STATE_COLUMN, STAGE_COLUMN = 1, 2, 4
ALWAYS_SHOWN = 7
"""Columns before the objectives."""
KEPT_OF_CHANGES = 44
"""Characters of what a trial changes that no figure takes away."""
LEAST_ROWS, LINES_AROUND = 4, 7
GAP = 2
"""Blanks between two columns."""
REFRESH_S = 1.0
PLAIN_EVERY_S = 10.0
KB = 1000
STOPS = "Ctrl-C stops the sweep safely"
LOOKS = "Ctrl-C ends this view; the sweep goes on"
HOLDS_AT_MOST = 70
"""Characters of what a trial changes."""


class Row(NamedTuple):
    """One trial as the table has it."""

    number: int
    changes: str
    state: State
    stage: str
    """What runs, or what failed, or what is next; empty where all is done."""
    done: int
    stages: int
    measures: Mapping[str, Measure]
    to_go: ToGo
    """Time of the stages to come, one after the other, as far as such have finished before."""
    usd: float | None
    """Price of the teacher's answers; None before they have come."""
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "to_go": self.to_go._asdict(),
                "measures": {title: vars(one) for title, one in self.measures.items()}}  # fmt: skip


class Board:
    """Reads a sweep's rows; what a finished trial came to is read once, and times when another stage has finished."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder, runs
        self._known: dict[int, Mapping[str, Measure]] = {}
        self._times: dict[str, float | None] = {}
        self._times_of: frozenset[str] = frozenset()

    def record(self) -> Record:
        """The sweep as it is now."""
        return read_record(self.folder, self.runs)

    def rows(self, record: Record) -> list[Row]:
        """Every trial, in order."""
        times = self._times_in(record)
        return [self._row(record, number, times) for number in record.numbers]

    def to_go(self, record: Record) -> ToGo:
        """How long the whole sweep still takes with all its slots; trials that are out or left out take nothing."""
        live = [n for n in record.numbers if record.state_of(n) in ("running", "waiting")]
        owed = dict.fromkeys(one for n in live for one in record.stages_of(n) if one not in record.store.sealed)
        return wall_time((_work(record, one) for one in owed), self._times_in(record), record.slots)

    def _times_in(self, record: Record) -> Mapping[str, float | None]:
        if self._times_of != record.store.sealed or not self._times:
            kinds = {kind_of(str(stage["label"])) for stage in record.document["stages"].values()}
            self._times = {kind: median_seconds(record.runs, kind) for kind in kinds}
            self._times_of = record.store.sealed
        return self._times

    def _row(self, record: Record, number: int, times: Mapping[str, float | None]) -> Row:
        stages, state = record.stages_of(number), record.state_of(number)
        owed = [identity for identity in stages if identity not in record.store.sealed]
        failure = record.failure_of(number) if state == "failed" else None
        return Row(
            number, changes_of(record.trial(number)), state,
            failure.label if failure else _stage_now(record, owed), len(stages) - len(owed), len(stages),
            self._measures(record, number, state), wall_time((_work(record, one, 1) for one in owed), times, 1),
            _usd(record, stages),
            failure.error if failure else "",
        )  # fmt: skip

    def _measures(self, record: Record, number: int, state: State) -> Mapping[str, Measure]:
        if state in ("waiting", "left out"):
            return {}
        if number not in self._known:
            found = measure(pipeline_of(record, number), record.sweep.objectives)
            if state != "done":
                return found
            self._known[number] = found
        return self._known[number]


def _stage_now(record: Record, owed: Sequence[str]) -> str:
    """What runs and for how long, or what is next."""
    running = [identity for identity in owed if identity in record.running]
    if not running:
        return str(record.stage(owed[0])["label"]) if owed else ""
    return ", ".join(f"{record.stage(one)['label']} {clock_text(record.running[one])}" for one in running)


def _work(record: Record, identity: str, cpus: int | None = None) -> Work:
    """A stage that is owed, with the CPU slots that it takes unless others are given."""
    stage = record.stage(identity)
    return Work(kind_of(str(stage["label"])), cpus or int(stage.get("cpus", 1)), record.running.get(identity, 0.0))


def _usd(record: Record, stages: Sequence[str]) -> float | None:
    from distill.runs import open_sealed

    for identity in stages:
        if record.stage(identity)["stage"] == "generate" and identity in record.store.sealed:
            return float(open_sealed(record.folder_of(identity), check=False).counts.get("usd") or 0.0)
    return None


def changes_of(trial: Trial) -> str:
    """What a trial changes, on one short line: keys by as many of their last parts as tell them apart."""
    varied = dict(trial.varied)
    shown = [f"{short}={value_of(varied[key], 24)}" for key, short in short_keys(list(varied)).items()]
    shown += [] if trial.seed is None else [f"seed={trial.seed}"]
    text = " ".join(shown) or "the base recipe"
    return text if len(text) <= HOLDS_AT_MOST else text[: HOLDS_AT_MOST - 1] + "…"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by the fewest of its last parts that no other key ends in."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-size:]) for size in range(1, len(parts) + 1)]
        others = [other for other in keys if other != key]
        found[key] = next((end for end in ends if not any(f".{one}".endswith(f".{end}") for one in others)), key)
    return found


def value_of(value: Any, longest: int = 16) -> str:
    """A recipe's value in few characters: lists and sections without brackets, null as none."""
    if isinstance(value, Mapping):
        value = [f"{key}: {value_of(part)}" for key, part in value.items()]
    text = ", ".join(map(value_of, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


# --- text -----------------------------------------------------------------------------------------------------------


def value_text(objective: Objective, one: Measure | None) -> str:
    """A measure as people read it: per cent, MB, milliseconds, dollars."""
    if one is None or one.value is None:
        return "-"
    value = one.value
    texts = {
        "accuracy": f"{value:.1%}",
        "bytes": f"{value / KB / KB:,.1f} MB",
        "latency_ms": f"{value:.2f} ms",
        "dollars": f"${value:,.2f}",
        "stage_seconds": clock_text(value),
    }
    return texts.get(objective.metric, f"{value:,.0f}")


def table_of(rows: Sequence[Row], objectives: Sequence[Objective]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table."""
    titles = ["trial", "changes", "state", "stages", "stage", "to go", "cost", *(one.title for one in objectives)]
    cells = [
        [
            str(row.number), row.changes, row.state, f"{row.done}/{row.stages}", row.stage,
            str(row.to_go) if row.state in ("running", "waiting") else "",
            "-" if row.usd is None else f"${row.usd:,.2f}",
            *(value_text(one, row.measures.get(one.title)) for one in objectives),
        ]
        for row in rows
    ]  # fmt: skip
    return titles, cells


def headline(record: Record, rows: Sequence[Row], to_go: ToGo) -> str:
    """The whole sweep on one line: trials, stages, time and money."""
    counts = {state: sum(row.state == state for row in rows) for state in ORDER}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    stages, done = len(record.document["stages"]), len(record.store.sealed & record.document["stages"].keys())
    parts = [f"{len(rows)} trials ({states})", f"{done} of {stages} distinct stages done"]
    parts += [f"{clock_text(record.attempts_s)} so far"] if record.attempts_s else []
    if counts["running"] or counts["waiting"]:
        missing = f" ({', '.join(to_go.untimed)} not known)" if to_go.untimed and to_go.seconds else ""
        parts.append(f"{to_go} to go{missing}")
    parts += [] if record.spent_usd is None else [f"${record.spent_usd:,.2f} spent"]
    held = "" if record.live else "; no driver runs it"
    return f"{record.name}: {', '.join(parts)}{held}"


# --- while it runs --------------------------------------------------------------------------------------------------


@contextmanager
def shown(folder: Path, runs: Path, quiet: bool, terminal: bool | None = None) -> Iterator[View]:
    """A view for the driver: a live table in a terminal, a line now and then elsewhere, nothing if quiet."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty() if terminal is None else terminal:
        with _live(Board(folder, runs)) as view:
            yield view
    else:
        yield _plain(Board(folder, runs))


def _plain(board: Board) -> View:
    shown_s = time.monotonic()

    def view(_: Scheduler) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s >= PLAIN_EVERY_S:
            shown_s = time.monotonic()
            record = board.record()
            say(headline(record, board.rows(record), board.to_go(record)))

    return view


@contextmanager
def _live(board: Board) -> Iterator[View]:
    from rich.console import Console
    from rich.live import Live

    shown_s = float("-inf")
    # what stages print is in their logs; decisions of the scheduler appear above the table
    with Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False) as live:

        def view(_: Scheduler) -> None:
            nonlocal shown_s
            if time.monotonic() - shown_s >= REFRESH_S:
                shown_s = time.monotonic()
                live.update(rich_table(board.record(), board, STOPS, live.console.size), refresh=True)

        yield view
        live.update(rich_table(board.record(), board, STOPS, live.console.size), refresh=True)


def follow(board: Board) -> None:
    """The live table from another shell, for as long as a driver runs the sweep; reads files only."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False, redirect_stderr=False) as live:
        while True:
            record = board.record()
            live.update(rich_table(record, board, LOOKS, live.console.size), refresh=True)
            if not record.live:
                return
            time.sleep(REFRESH_S)


def rich_table(record: Record, board: Board, caption: str, size: tuple[int, int]) -> Any:
    """The table for a terminal of so many columns and lines: what does not fit is left out, and said."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows, objectives = board.rows(record), record.sweep.objectives
    kept = shown_rows(rows, size[1])
    titles, cells = table_of(kept, objectives)
    widths = fitting(titles, cells, size[0])
    missing = [f"{len(rows) - len(kept)} more trials"] if len(rows) > len(kept) else []
    missing += [f"no room for {', '.join(titles[len(widths) :])}"] if len(widths) < len(titles) else []
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for index, (title, width) in enumerate(zip(titles, widths)):
        justify: Literal["left", "right"] = "left" if index <= STAGE_COLUMN else "right"
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis", width=width)
    for row, line in zip(kept, cells):
        styles = {STATE_COLUMN: STYLES.get(row.state, "")}
        table.add_row(*(Text(cell, styles.get(index, "")) for index, cell in enumerate(line[: len(widths)])))
    ends = "; ".join([caption if record.live else "no driver runs it", *missing])
    return Group(Text(headline(record, rows, board.to_go(record)), "bold"), "", table, Text(ends, "dim"))


def shown_rows(rows: Sequence[Row], lines: int) -> list[Row]:
    """As many trials as a terminal of so many lines has room for, those first that matter now; in order."""
    room = max(LEAST_ROWS, lines - LINES_AROUND)
    return sorted(sorted(rows, key=lambda row: (ORDER.index(row.state), row.number))[:room])


def fitting(titles: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of the columns that a terminal has room for.

    The last figures are left out first; then what a trial changes gives way; nothing else does.
    """
    widths = [max(len(line[index]) for line in [titles, *cells]) for index in range(len(titles))]
    changes = widths[CHANGES_COLUMN]
    widths[CHANGES_COLUMN] = min(changes, KEPT_OF_CHANGES)
    while len(widths) > ALWAYS_SHOWN and _whole(widths) > width:
        widths.pop()
    room = width - _whole(widths) + widths[CHANGES_COLUMN]
    widths[CHANGES_COLUMN] = max(len(titles[CHANGES_COLUMN]), min(changes, room))
    return widths


def _whole(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)
