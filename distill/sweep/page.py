"""A sweep's report as one HTML page, from the parts that the reports of single pipelines are made of.

First the answer: which trial is best, and which is the smallest that cannot be told from it. Then fronts, comparisons,
what mattered, curves, and every trial to be opened. No script, nothing loaded; all text is escaped.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from distill.report.charts import Axis, Bar, Line, Point, Track, axis_of, axis_to, bars, lines, parallel, scatter
from distill.report.content import Report, read_report
from distill.report.markup import (
    NA,
    Column,
    Palette,
    block,
    bounds,
    chip,
    duration,
    number,
    percent,
    point_bounds,
    points,
    section,
    table,
    tiles,
)
from distill.report.page import document
from distill.report.process import SMOOTHED_FROM, smoothed, stages_table, thousands
from distill.report.results import case_html, gates_table, set_accuracy

from .config import Objective
from .measures import Measure
from .record import State
from .results import Candidate, Comparison, Influence, Results, TrialResult
from .view import changes_of, short_keys, value_of, value_text

STATES: Mapping[State, str] = {"done": "good", "failed": "bad", "pruned": "none"}
CURVES_AT_MOST = 12
"""Learning curves that are drawn: those of the best candidates."""
OPENED_AT_MOST = 40
"""Trials that can be opened: the best ones, and those that failed."""
CASES_OF_A_TRIAL = 3
MB = 1_000_000
COLOURS = ("m-student", "m-v0", "m-v1", "m-v2", "m-v3", "m-v4")
QUARTERS = [(tick / 100, f"{tick}%") for tick in (0, 25, 50, 75, 100)]


class Sheet:
    """What all sections of a page read."""

    def __init__(self, results: Results, file: str, recipe: str, runs: str, fixed: Sequence[str] = ()) -> None:
        self.results = results
        self.fixed = fixed
        """Overrides that all trials have."""
        self.file, self.recipe, self.runs = file, recipe, runs
        """Sweep file, base recipe and run store, as commands name them."""

    @property
    def first(self) -> Objective:
        """The objective that decides."""
        return self.results.objectives[0]

    def link(self, candidate: Candidate) -> str:
        """A candidate's name as a link to its first trial."""
        return f'<a href="#trial-{candidate.first.number}">trial {escape(candidate.name)}</a>'


def render(sheet: Sheet) -> str:
    """The whole page."""
    results = sheet.results
    made = [(anchor, name, make(sheet)) for anchor, name, make in PARTS]
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, html in made if html)
    body = (
        f'<header><p class="kicker">sweep report</p><h1>{escape(results.name)}</h1>'
        f'<p class="meta">{escape(_counts(results))}</p>{_answer(sheet)}</header>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>'
        f"{''.join(html for _, _, html in made)}</main>\n"
        f"<footer>Written by distill from {escape(sheet.runs)}. Intervals are 95%, two-sided. This page holds all that"
        " it shows and loads nothing.</footer>"
    )
    return document(f"{results.name}: sweep report", sentence(results), body)


def _counts(results: Results) -> str:
    states = [one.state for one in results.trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(states)} trials: {counted}"


# --- the answer -----------------------------------------------------------------------------------------------------


def sentence(results: Results) -> str:
    """The answer as one line of plain text."""
    best, small = results.best, results.smallest_equal
    if best is None:
        return "No trial has come to its end yet."
    values = ", ".join(f"{one.title} {_value(best, one)}" for one in results.objectives)
    text = f"Best: trial {best.name} ({values})"
    return text + (f"; cheapest that cannot be told from it: trial {small.name}" if small and small != best else "")


def _answer(sheet: Sheet) -> str:
    results = sheet.results
    best, small = results.best, results.smallest_equal
    if best is None:
        return '<p class="missing" role="status">No trial has come to its end yet.</p>'
    shown = [("best", best, "m-student")]
    if small is not None and small != best:
        shown.append((f"least {results.objectives[1].title} of those not told from it", small, "m-v0"))
    items = "".join(_answer_item(sheet, title, one, colour) for title, one, colour in shown)
    ship = block(f"distill sweep ship {shlex.quote(sheet.file)} --trial {(small or best).first.number}"
                 f" --runs {shlex.quote(sheet.runs)}")  # fmt: skip
    warning = (
        '<p class="note">The best of many trials is chosen on these very problems, so its own figure is flattering: the'
        " more trials, the more. Comparisons below are not corrected for the number of trials.</p>"
    )
    return f'<ol class="answer">{items}</ol>{warning if len(results.candidates) > 1 else ""}{ship}'


def _answer_item(sheet: Sheet, title: str, one: Candidate, colour: str) -> str:
    rest = [f"{other.title} {_value(one, other)}" for other in sheet.results.objectives[1:]]
    small = [bounds(one.accuracy) if one.accuracy and sheet.first.metric == "accuracy" else "", ", ".join(rest)]
    small.append(" · ".join(f"{key} {value_of(value, 40)}" for key, value in one.first.trial.varied.items()))
    texts = "".join(f'<span class="small">{escape(text)}</span>' for text in small if text)
    return (
        f'<li class="{colour}"><span class="who">{escape(title)}: {sheet.link(one)}</span>'
        f'<span class="big">{escape(_value(one, sheet.first))}</span>{texts}</li>'
    )


def _value(one: Candidate, objective: Objective) -> str:
    return value_text(objective, Measure(one.values.get(objective.title)))


# --- sections -------------------------------------------------------------------------------------------------------


def ranking(sheet: Sheet) -> str:
    """All candidates, best first."""
    found = sheet.results.candidates
    if not found:
        return ""
    keys = _keys(found)
    rows = [
        [
            sheet.link(one),
            *(_shown(one.first.trial.varied.get(key, "base")) for key in keys),
            *(_cell(one, objective) for objective in sheet.results.objectives),
            chip("on a front", "good") if sheet.results.is_on_a_front(one.name) else "",
        ]
        for one in found
    ]
    titles = [number(one.title) for one in sheet.results.objectives]
    columns = [Column("Trial"), *(Column(key) for key in keys), *titles, Column("")]
    lead = f"Every combination that came to its end, best {sheet.first.title} first; seeds of one combination together."
    return section("ranking", "Trials", lead, table("Trials", columns, rows))


def _keys(found: Sequence[Candidate]) -> list[str]:
    return list(dict.fromkeys(key for one in found for key in one.first.trial.varied))


def _shown(value: Any) -> str:
    return escape(value_of(value, 80))


def _cell(one: Candidate, objective: Objective) -> str:
    if objective.title not in one.values:
        return NA
    interval = one.accuracy if objective.metric == "accuracy" and objective.model == "product" else None
    return escape(_value(one, objective)) + (f" <small>{bounds(interval)}</small>" if interval else "")


def fronts(sheet: Sheet) -> str:
    """The first objective against each other one."""
    charts = [_front(sheet, other) for other in sheet.results.objectives[1:]]
    lead = "What one objective costs in the other. Joined are the candidates that no other beats in both."
    return section("fronts", "Fronts", lead, *charts) if any(charts) else ""


def _front(sheet: Sheet, other: Objective) -> str:
    first, names = sheet.first, sheet.results.fronts.get(other.title, ())
    having = [one for one in sheet.results.candidates if other.title in one.values]
    if not having:
        return f'<p class="note">{escape(other.title)}: no trial has a value.</p>'
    marks = [_mark(one, first, other, one.name in names) for one in having]
    joined = [(mark.x, mark.y) for mark in marks if mark.name in names]
    spread = [mark.y for mark in marks] + [end for mark in marks for end in (mark.low, mark.high) if end is not None]
    x = axis_of(_unit(other), [mark.x for mark in marks], thousands)
    y = axis_of(first.title, spread, percent if first.metric == "accuracy" else "{:g}".format)
    return scatter(f"{first.title} against {other.title}", marks, sorted(joined), x, y)


def _mark(one: Candidate, first: Objective, other: Objective, on_front: bool) -> Point:
    interval = one.accuracy if first.metric == "accuracy" and first.model == "product" else None
    low, high = (interval.low, interval.high) if interval else (None, None)
    x = one.values[other.title] / (MB if other.metric == "bytes" else 1)
    colour = "m-student" if on_front else "m-base"
    return Point(one.name, x, one.values[first.title], colour, low, high, changes_of(one.first.trial))


def _unit(objective: Objective) -> str:
    return f"{objective.title}, MB" if objective.metric == "bytes" else objective.title


def coordinates(sheet: Sheet) -> str:
    """Parallel axes: what varied on the left, what came out on the right."""
    found, results = sheet.results.candidates, sheet.results
    keys = _keys(found)
    if len(found) < 2 or not keys:
        return ""
    scales = [_key_scale([one.first.trial.varied.get(key) for one in found]) for key in keys]
    measured = [one for one in results.objectives if any(one.title in candidate.values for candidate in found)]
    scales += [_objective_scale(found, objective) for objective in measured]
    names = [*short_keys(keys).values()] + [one.title for one in measured]
    axes = [(name, ticks) for name, (_, ticks) in zip(names, scales)]
    tracks = [
        Track(
            f"trial {one.name}", "m-student" if results.is_on_a_front(one.name) else "m-base",
            [places[index] for places, _ in scales], "" if results.is_on_a_front(one.name) else "faint",
        )
        for index, one in enumerate(found)
    ]  # fmt: skip
    lead = "Each line is a candidate, from what it was given to what it came to; those on a front stand out."
    chart = parallel("Candidates over their keys and objectives", axes, tracks[::-1])
    return section("coordinates", "Parallel coordinates", lead, chart)


Scale = tuple[list[float | None], list[tuple[float, str]]]
"""Where each candidate stands on an axis, and the axis's ticks."""


def _key_scale(values: Sequence[Any]) -> Scale:
    """Numbers by rank, everything else in the order in which it comes."""
    distinct = list({repr(value): value for value in values}.values())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        distinct.sort()
    # a lone value in the middle, several apart from the ends, where lines would run through their names
    inner = [0.5] if len(distinct) == 1 else [0.1 + 0.8 * index / (len(distinct) - 1) for index in range(len(distinct))]
    order = {repr(value): at for value, at in zip(distinct, inner)}
    every = max(1, len(distinct) // 8)
    ticks = [(order[repr(value)], value_of(value)) for value in distinct[::every]]
    return [order[repr(value)] for value in values], ticks


def _objective_scale(found: Sequence[Candidate], objective: Objective) -> Scale:
    known = [one.values[objective.title] for one in found if objective.title in one.values]
    if not known:
        return [None] * len(found), []
    axis: Axis = axis_of("", known)
    places = [axis.at(one.values[objective.title]) / 100 if objective.title in one.values else None for one in found]
    return places, [(axis.at(value) / 100, value_text(objective, Measure(value))) for value, _ in axis.ticks]


def importance(sheet: Sheet) -> str:
    """How much of each objective's variance each key explains."""
    charts = [
        bars(f"Share of the variance of {title} that a key explains", list(map(_influence, found)), QUARTERS)
        for title, found in sheet.results.influences.items()
        if found
    ]
    lead = (
        "What mattered. Each key on its own (one-way analysis of variance; many numbers are cut into four groups); what"
        " keys do together is not seen, and with few trials chance alone explains a share."
    )
    html = f'<div class="named">{"".join(charts)}</div>'
    return section("importance", "Importance of keys", lead, html) if charts else ""


def _influence(one: Influence) -> Bar:
    name = ".".join(one.key.split(".")[-2:])
    return Bar(name, one.share, percent(one.share), "m-plain", detail=f"{one.values} values")


def significance(sheet: Sheet) -> str:
    """The best against its base and every other candidate."""
    found = sheet.results.comparisons
    if not found:
        return ""
    columns = [
        Column("Best"), Column("less"), number("Accuracy, points"), number("McNemar p"), number("Problems"), Column(""),
    ]  # fmt: skip
    lead = (
        "Is the best really better? Differences are paired by problem, with a bootstrap over problems; McNemar's exact"
        " test counts the problems on which just one of the two is right. Told apart is what both say."
    )
    rows = list(map(_compared, found))
    return section("significance", "Is it really better?", lead, table("Comparisons", columns, rows))


def _compared(one: Comparison) -> list[str]:
    against = "its base" if one.against == "base" else f"trial {one.against}"
    p = NA if one.p is None else f"{one.p:.2g}" if one.p >= 1e-4 else "&lt; 0.0001"
    verdict = chip("better", "good") if one.difference.value > 0 else chip("worse", "bad")
    verdict = verdict if one.told_apart else chip("not told apart", "none")
    value = f"{points(one.difference)} <small>{point_bounds(one.difference)}</small>"
    return [f"trial {escape(one.name)}", escape(against), value, p, f"{one.problems:,}", verdict]


def curves(sheet: Sheet) -> str:
    """The last training phase of the best candidates."""
    drawn: list[Line] = []
    for one, names in _trained_apart(sheet.results.candidates[:CURVES_AT_MOST]):
        phases = read_report(one.first.pipeline).facts.phases
        if phases and phases[-1].curve:
            points_ = [(float(point.tokens), point.loss) for point in phases[-1].curve]
            colour = COLOURS[len(drawn) % len(COLOURS)]
            style = "" if len(drawn) < len(COLOURS) else "dash1"
            shown = smoothed(points_) if len(points_) >= SMOOTHED_FROM else points_
            drawn.append(Line(f"trial{'s' * (len(names) > 1)} {', '.join(names)}", colour, shown, style))
    if not drawn:
        return ""
    x = axis_to("tokens trained on", max(line.points[-1][0] for line in drawn), thousands)
    y = axis_of("loss", [value for line in drawn for _, value in line.points])
    lead = "Loss of the last training phase, running means, of the best candidates; one curve where they share it."
    chart = lines("Training loss, nats per supervised token", drawn, x, y)
    return section("curves", "Learning curves", lead, chart)


def _trained_apart(found: Sequence[Candidate]) -> list[tuple[Candidate, list[str]]]:
    """Candidates with a training of their own, each with the names of all that share it."""
    shared: dict[str, tuple[Candidate, list[str]]] = {}
    for one in found:
        trainings = one.first.pipeline.of("train")
        key = trainings[-1].identity if trainings else one.name
        shared.setdefault(key, (one, []))[1].append(one.name)
    return list(shared.values())


# --- trials ---------------------------------------------------------------------------------------------------------


def trials(sheet: Sheet) -> str:
    """Every trial, to be opened: its figures, stages, gates, answers, and the command that makes it again."""
    ranked = [trial for one in sheet.results.candidates for trial in one.trials]
    others = [one for one in sheet.results.trials if one not in ranked]
    shown = sorted(others, key=lambda one: one.state != "failed") + ranked
    kept = {one.number for one in [*ranked[:OPENED_AT_MOST], *shown[:OPENED_AT_MOST]][:OPENED_AT_MOST]}
    html = [_trial(sheet, one) for one in sheet.results.trials if one.number in kept]
    more = len(sheet.results.trials) - len(html)
    note = f'<p class="note">{more:,} more trials are in the CSV and JSON files beside this page.</p>' if more else ""
    lead = "Each trial as it was made: open one for its stages, gates and answers."
    return section("trials", "Trial by trial", lead, *html, note)


def _trial(sheet: Sheet, one: TrialResult) -> str:
    values = " · ".join(
        f"{objective.title} {value_text(objective, measure)}"
        for objective in sheet.results.objectives
        if (measure := one.measures.get(objective.title)) is not None and measure.value is not None
    )
    state = chip(one.state, STATES.get(one.state, ""))
    return (
        f'<details class="case" id="trial-{one.number}"><summary><span class="q">trial {one.number}:'
        f' {escape(changes_of(one.trial))}</span><span class="marks">{escape(values)}</span>{state}</summary>'
        f'<div class="body">{_trial_body(sheet, one)}</div></details>'
    )


def _trial_body(sheet: Sheet, one: TrialResult) -> str:
    error = f'<p class="missing">{escape(one.error)}</p>' if one.error else ""
    changed = "".join(f"<div>{escape(argument)}</div>" for argument in one.trial.arguments)
    commands = block("\n".join(commands_of(sheet, one)))
    head = f'{error}<p class="label">changes</p><div class="mono">{changed or "nothing"}</div>{commands}'
    if one.state != "done":
        return head
    report = read_report(one.pipeline)
    return head + _measured(report)


def commands_of(sheet: Sheet, one: TrialResult) -> list[str]:
    """How to make a trial again, report on it, and ship it."""
    arguments = " ".join(shlex.quote(argument) for argument in [*sheet.fixed, *one.trial.arguments])
    rest = f"{shlex.quote(sheet.recipe)} {arguments}".strip() + f" --runs {shlex.quote(sheet.runs)}"
    ship = f"distill sweep ship {shlex.quote(sheet.file)} --trial {one.number} --runs {shlex.quote(sheet.runs)}"
    return [f"distill run {rest}", f"distill report {rest}", ship]


def _measured(report: Report) -> str:
    palette = Palette(report.scores.scores, report.facts.artifact)
    sets: dict[str, list[Any]] = {}
    for score in report.scores.scores:
        sets.setdefault(score.set, []).append(score)
    seconds = [stage.seconds for stage in report.facts.stages if stage.seconds is not None]
    html = [tiles([("Time of all stages", duration(sum(seconds)), f"{len(seconds)} stages")])]
    html += [set_accuracy(name, group, palette) for name, group in sets.items()]
    if report.facts.artifact:
        html.append(gates_table(report.facts.artifact, palette))
    html.append(stages_table(report.facts))
    html += [case_html(case, palette, is_open=False) for case in report.scores.cases[:CASES_OF_A_TRIAL]]
    return "".join(html)


PARTS: Sequence[tuple[str, str, Callable[[Sheet], str]]] = (
    ("ranking", "Trials", ranking),
    ("fronts", "Fronts", fronts),
    ("significance", "Is it really better?", significance),
    ("coordinates", "Parallel coordinates", coordinates),
    ("importance", "Importance", importance),
    ("curves", "Learning curves", curves),
    ("trials", "Trial by trial", trials),
)
