"""The sections that say how it came out: accuracy, the artifact, answers side by side.

Functions of what was read; nothing is read or computed here, and all text is escaped.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from .charts import Axis, Bar, Line, bars, lines
from .content import Report
from .facts import Artifact, Attempt, Estimate, Gate
from .markup import (
    NA,
    STATUS,
    Column,
    Notes,
    Palette,
    bounds,
    chip,
    compact,
    fold,
    number,
    percent,
    point_bounds,
    points,
    section,
    table,
)
from .scores import Answer, Case, Changes, Score

QUARTERS = [(tick / 100, f"{tick}%") for tick in (0, 25, 50, 75, 100)]
DASHES = ("dash1", "dash2", "dash3")
"""Strokes of the variants, whose curves often lie on one another."""


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(report: Report, palette: Palette) -> str:
    """Every set: a chart with intervals, all numbers, and accuracy against the token budget."""
    groups = _by_set(report.scores.scores)
    if not groups:
        return ""
    body = "".join(set_accuracy(name, group, palette) for name, group in groups.items())
    lead = "Did the student learn? Verified answers to problems that were kept out of its training set."
    return section("accuracy", "Accuracy", lead, body)


def _by_set(scores: Sequence[Score]) -> dict[str, list[Score]]:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.set, []).append(score)
    return groups


def set_accuracy(name: str, group: Sequence[Score], palette: Palette) -> str:
    """One evaluation set: bars with intervals, all numbers, accuracy within token budgets."""
    if not any(score.accuracy for score in group):
        reasons = ", ".join(f"{score.model} ({score.why_not('accuracy')})" for score in group)
        return f'<h3>{escape(name)}</h3><p class="note">n/a, nothing is measured yet: {escape(reasons)}.</p>'
    problems = next((score.problems for score in group if score.problems), None)
    title = f"Accuracy on {name}" + (f", {problems:,} problems, with 95% intervals" if problems else "")
    chart = bars(title, [_accuracy_bar(score, palette) for score in group], QUARTERS)
    notes = Notes()
    rows = [_score_row(score, palette, notes) for score in group]
    columns = [
        Column("Model"), number("Accuracy"), number("minus base, points"), number("minus student, points"),
        number("Problems"), number("Mean tokens"), number("Stops"), number("Truncated"), number("tokens/s"),
        number("MB"),
    ]  # fmt: skip
    return (
        f"{chart}{table(f'All numbers on {name}', columns, rows)}{notes.listed()}{_budget_chart(name, group, palette)}"
    )


def _accuracy_bar(score: Score, palette: Palette) -> Bar:
    colour, known = palette.of(score.model), score.accuracy
    if known is None:
        return Bar(score.model, None, f"n/a: {score.why_not('accuracy')}", colour)
    return Bar(score.model, known.value, percent(known.value), colour, known.low, known.high, bounds(known))


def _score_row(score: Score, palette: Palette, notes: Notes) -> list[str]:
    def cell(name: str, text: Callable[[Any], str]) -> str:
        value = getattr(score, name)
        return notes.absent(score.why_not(name)) if value is None else text(value)

    same = '<span class="na">–</span>'
    return [
        palette.label(score.model),
        cell("accuracy", lambda share: f"{percent(share.value)} <small>{bounds(share)}</small>"),
        same if score.model == "base" else cell("minus_base", _points),
        same if score.model == "student" else cell("minus_student", _points),
        cell("problems", "{:,}".format) + _samples(score),
        cell("mean_tokens", "{:,.0f}".format),
        cell("stop_rate", percent),
        cell("truncation_rate", percent),
        cell("tokens_per_s", "{:,.0f}".format),
        cell("megabytes", "{:,.1f}".format),
    ]


def _points(difference: Estimate) -> str:
    return f"{points(difference)} <small>{point_bounds(difference)}</small>"


def _samples(score: Score) -> str:
    """Samples a problem where there are several, and requests that failed."""
    several = score.samples and score.problems and score.samples != score.problems
    parts = [f"× {score.samples / score.problems:g}"] if several and score.samples and score.problems else []
    parts += [f"({score.failed:,} failed)"] if score.failed else []
    return f" <small>{' '.join(parts)}</small>" if parts else ""


def _budget_chart(name: str, group: Sequence[Score], palette: Palette) -> str:
    counted = [score for score in group if score.within_tokens]
    if not counted:
        return ""
    budgets = _telling_budgets(counted)
    series = [_budget_line(index, score, budgets, palette) for index, score in enumerate(counted)]
    x = Axis("tokens allowed", budgets[0], budgets[-1], [(budget, f"{budget:,}") for budget in budgets], log=True)
    y = Axis("accuracy in %", 0, 100, [(100 * share, text) for share, text in QUARTERS])
    chart = lines(f"Accuracy on {name} if generation had stopped at a budget of tokens", series, x, y, dots=True)
    left_out = [score for score in group if score.accuracy and not score.within_tokens]
    rows = [[palette.label(s.model), *(percent(s.within_tokens[budget]) for budget in budgets)] for s in counted]
    columns = [Column("Model"), *(number(f"{budget:,}") for budget in budgets)]
    numbers = fold("The same as numbers", table(f"Accuracy on {name} within so many tokens", columns, rows))
    return chart + "".join(map(_left_out, left_out)) + numbers


def _budget_line(index: int, score: Score, budgets: Sequence[int], palette: Palette) -> Line:
    style = DASHES[index % len(DASHES)] if score.kind == "variant" else ""
    reached = [(float(budget), 100 * score.within_tokens[budget]) for budget in budgets]
    return Line(score.model, palette.of(score.model), reached, style)


def _left_out(score: Score) -> str:
    return f'<p class="note">{escape(score.model)} is not drawn: {escape(score.why_not("within_tokens"))}.</p>'


def _telling_budgets(scores: Sequence[Score]) -> list[int]:
    """Budgets up to the first one beyond which nothing changes; at least two."""
    budgets = sorted(set.intersection(*(set(score.within_tokens) for score in scores)))
    while len(budgets) > 2 and all(s.within_tokens[budgets[-1]] == s.within_tokens[budgets[-2]] for s in scores):
        budgets.pop()
    return budgets


# --- the artifact ---------------------------------------------------------------------------------------------------


def artifact(report: Report, palette: Palette) -> str:
    """Size, speed, answers that changed, gates."""
    made = report.facts.artifact
    if made is None:
        return ""
    head = report.headline
    group = [score for score in report.scores.scores if head and score.set == head.set]
    lead = "Is the artifact still the student? What it weighs, how fast it is, which answers changed, and every gate."
    return section(
        "artifact",
        "Artifact",
        lead,
        _size_and_speed(made, group, palette),
        _changes_table(report.scores.changes, palette),
        attempts_table(made, palette),
        gates_table(made, palette),
    )


def _size_and_speed(made: Artifact, group: Sequence[Score], palette: Palette) -> str:
    sizes = {variant.name: variant.megabytes for variant in made.variants}
    student = next((score for score in group if score.kind == "student"), None)
    if student and student.megabytes is not None:
        sizes = {"student": student.megabytes, **sizes}
    speeds = {s.model: s.tokens_per_s for s in group if s.model in sizes or s.kind == "student"}
    size_bars = _plain_bars("Size, MB (10⁶ bytes)", sizes, "{:,.1f}".format, "not built", palette)
    speed_bars = _plain_bars("Speed in evaluation, tokens/s", speeds, "{:,.0f}".format, "not measured", palette)
    note = (
        '<p class="note">The student is the PyTorch checkpoint. Speeds are the tokens generated over the time spent, as'
        " the evaluation ran (its batches, its threads): good for comparing on one machine, not a benchmark.</p>"
    )
    return f'<div class="pair">{size_bars}{speed_bars}</div>{note}'


def _plain_bars(
    title: str, values: Mapping[str, float | None], text: Callable[[float], str], absent: str, palette: Palette
) -> str:
    known = [value for value in values.values() if value is not None]
    if not known:
        return ""
    largest = max(known) or 1.0
    rows = [
        Bar(name, None, f"n/a: {absent}", palette.of(name))
        if value is None
        else Bar(name, value / largest, text(value), palette.of(name))
        for name, value in values.items()
    ]
    return bars(title, rows)


def _changes_table(changes: Sequence[Changes], palette: Palette) -> str:
    if not changes:
        return ""
    rows = [
        [
            f"{palette.label(c.before)} → {palette.label(c.after)}",
            escape(c.set),
            *(f"{n:,}" for n in (c.kept_right, c.lost, c.gained, c.kept_wrong)),
        ]
        for c in changes
    ]
    columns = [
        Column("From → to"), Column("Set"), number("right → right"), number("right → wrong"), number("wrong → right"),
        number("wrong → wrong"),
    ]  # fmt: skip
    return table("Answers that stayed and that changed", columns, rows)


def attempts_table(made: Artifact, palette: Palette) -> str:
    """What each scheme cost and lost, where more than one was tried for a variant."""
    if len({attempt.variant for attempt in made.attempts}) == len(made.attempts):
        return ""
    columns = [
        Column("Variant"), Column("Scheme"), number("MB"), number("Build, s"), number("KL, nats/token"),
        number("Top-1"), number("Accuracy"), number("Tokens/s"), Column("Misses"), Column("Ships"),
    ]  # fmt: skip
    return table("Schemes that were tried", columns, [_attempt_row(one, palette) for one in made.attempts])


def _attempt_row(attempt: Attempt, palette: Palette) -> list[str]:
    def shown(value: float | None, text: Callable[[float], str]) -> str:
        return NA if value is None else text(value)

    return [
        palette.label(attempt.variant),
        escape(attempt.scheme),
        f"{attempt.megabytes:,.1f}",
        f"{attempt.build_seconds:,.0f}",
        shown(attempt.kl, compact),
        shown(attempt.top1, percent),
        shown(attempt.accuracy, percent),
        shown(attempt.tokens_per_s, "{:,.0f}".format),
        escape(", ".join(name.replace("_", " ") for name in attempt.missed)) or "nothing",
        _verdict(attempt),
    ]


def _verdict(attempt: Attempt) -> str:
    if not attempt.chosen:
        return ""
    return "none passed" if attempt.missed else chip(*STATUS["passed"])


def gates_table(made: Artifact, palette: Palette) -> str:
    """Every gate with its value and limit."""
    rows = [_gate_row(gate, palette) for gate in made.gates]
    if not rows:
        return '<p class="note">No gate has been run.</p>'
    columns = [
        Column("Variant"), Column("Gate", "nowrap"), Column("Status"), number("Value"), number("Limit"),
        Column("Detail", "text"),
    ]  # fmt: skip
    unfinished = "" if made.complete else " (unfinished: gates still to come are listed as not run)"
    return table(f"Gates{unfinished}", columns, rows)


def _gate_row(gate: Gate, palette: Palette) -> list[str]:
    text, css = STATUS[gate.status]
    as_share = gate.unit.startswith("share")

    def shown(value: float | None) -> str:
        if value is None:
            return NA
        return percent(value) if as_share else compact(value)

    unit = f" <small>{escape(gate.unit)}</small>" if gate.unit and not as_share and gate.value is not None else ""
    return [
        palette.label(gate.variant),
        escape(gate.name.replace("_", " ")),
        chip(text, css),
        shown(gate.value) + unit,
        shown(gate.limit),
        escape(gate.detail),
    ]


# --- single answers -------------------------------------------------------------------------------------------------


def answers(report: Report, palette: Palette) -> str:
    """The same problems side by side."""
    cases = report.scores.cases
    if not cases:
        return ""
    body = []
    for _, group in groupby(cases, key=lambda case: (case.set, case.kind)):
        alike = list(group)
        count = f"{len(alike)} of {alike[0].of_kind:,} on {alike[0].set}"
        body.append(f'<h3>{escape(alike[0].kind)} <small class="na">{escape(count)}</small></h3>')
        body += [case_html(case, palette, is_open=case is cases[0]) for case in alike]
    lead = (
        "The same problems, side by side: first answers that quantization changed, then those that training changed."
        " Taken in the order of their ids, which are hashes; nothing is picked by hand."
    )
    return section("answers", "Answers side by side", lead, *body)


def case_html(case: Case, palette: Palette, is_open: bool) -> str:
    """One problem with the models' answers side by side, to be opened."""
    marks = "".join(_mark(given) for given in case.answers)
    columns = "".join(_answer_column(given, palette) for given in case.answers)
    gold = f'<p class="gold">Reference: <code>{escape(case.gold)}</code></p>' if case.gold is not None else ""
    return (
        f'<details class="case"{" open" if is_open else ""}><summary><span class="q">{escape(case.prompt)}</span>'
        f'<span class="marks">{marks}</span></summary><div class="body"><p class="label">problem'
        f' {escape(case.prompt_id)}</p><pre class="block">{escape(case.prompt)}</pre>{gold}'
        f'<div class="answers">{columns}</div></div></details>'
    )


def _mark(given: Answer) -> str:
    css, sign = ("good", "✓") if given.outcome == "correct" else ("bad", "✗") if given.outcome == "wrong" else ("", "?")
    return f'<span class="mark {css}">{escape(given.model)} <b>{sign}</b></span>'


def _answer_column(given: Answer, palette: Palette) -> str:
    css = {"correct": "good", "wrong": "bad"}.get(given.outcome, "none")
    tokens = f"{given.tokens:,} tokens" if given.tokens else "tokens not counted"
    why = " · ".join(filter(None, (given.detail, tokens, f"ended: {given.finish_reason}")))
    return (
        f'<article class="{palette.of(given.model)}"><h4><span>{escape(given.model)}</span>'
        f"{chip(given.outcome, css)}</h4>{_text(given)}"
        f'<p class="why">{escape(why)}</p></article>'
    )


def _text(given: Answer) -> str:
    """Reasoning folded, the answer (or the error that came instead) below it."""
    folded = ""
    if given.reasoning:
        state = "" if given.think == "closed" else f", {given.think}"
        folded = fold(
            f"reasoning ({len(given.reasoning):,} characters{state})", f"<pre>{escape(given.reasoning)}</pre>"
        )
    text = given.answer if given.error is None else given.error
    return folded + (f"<pre>{escape(text)}</pre>" if text else '<p class="na">no answer text</p>')
