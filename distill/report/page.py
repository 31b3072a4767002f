"""The report as one HTML page: every section is a function of what was read; nothing is read or computed here.

The page has no script and asks the network for nothing, and says so to the browser (a content policy). All text that
comes from models, recipes and files is escaped.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from .charts import Axis, Bar, Line, axis_of, axis_to, bars, cell_bar, lines
from .facts import Artifact, Costs, Facts, Funnel, Gate, Phase, TrainingExample
from .markup import (
    Column,
    Notes,
    block,
    bounds,
    chip,
    compact,
    dollars,
    duration,
    fold,
    number,
    percent,
    point_bounds,
    points,
    section,
    size,
    table,
    tiles,
    when,
)
from .scores import Answer, Case, Changes, Score, Scores
from .style import CSS

if TYPE_CHECKING:
    from . import Headline, Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
VARIANT_COLOURS = 5
SMOOTHED_FROM = 40
"""Points from which a loss curve is drawn with a running mean."""
CURVE_ROWS = 12
"""Rows of a curve's table."""
STATUS = {"passed": ("✓ passed", "good"), "failed": ("✗ failed", "bad"), "not_run": ("not run", "none")}
STATES = {"done": ("done", "good"), "unfinished": ("unfinished", "none"), "not run": ("not run", "none")}
QUARTERS = [(tick / 100, f"{tick}%") for tick in (0, 25, 50, 75, 100)]
OUTCOMES = ("correct", "wrong", "unverifiable", "timeout", "error")


class Part(NamedTuple):
    """A section of the page and its place in the navigation."""

    anchor: str
    name: str
    make: Callable[["Report", "Palette"], str]


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
        return f"m-{model}" if model in ("teacher", "base", "student") else "m-plain"

    def label(self, model: str) -> str:
        """The model's name behind a swatch of its colour."""
        return f'<span class="{self.of(model)}"><i class="swatch" aria-hidden="true"></i>{escape(model)}</span>'


def render(report: "Report") -> str:
    """The whole page."""
    palette = Palette(report.scores.scores, report.facts.artifact)
    made = [(part, part.make(report, palette)) for part in PARTS]
    links = "".join(f'<li><a href="#{part.anchor}">{part.name}</a></li>' for part, html in made if html)
    title = f"{report.name}: distillation report"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="description" content="{escape(sentence(report.headline))}">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>"
        f"{top(report, palette)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>'
        f"{''.join(html for _, html in made)}"
        f"</main>\n<footer>Written by distill from {escape(report.runs)}, pipeline {escape(report.identity)}. Intervals"
        " are 95%, two-sided. This page holds everything it shows and loads nothing.</footer></body></html>\n"
    )


# --- the answer -----------------------------------------------------------------------------------------------------


def top(report: "Report", palette: Palette) -> str:
    """Name, the answer, and what is missing."""
    head = report.headline
    facts = [f"pipeline {report.identity}"] if report.identity else []
    problems = next((score.problems for score in head.scores if score.problems), None) if head else None
    if head and problems:
        facts.append(f"{problems:,} problems in set {head.set}")
    facts += [f"last written {when(report.updated)}"] if report.updated else []
    return (
        '<header><p class="kicker">distillation report</p>'
        f'<h1>{escape(report.name)}</h1><p class="meta">{escape(" · ".join(facts))}</p>'
        f"{answer(head, palette) if head else ''}{overview(report)}{missing(report)}</header>"
    )


def answer(head: "Headline", palette: Palette) -> str:
    """Teacher, base, student and the smallest variant in a row, and the two differences that matter."""
    steps = "".join(_answer_step(score, palette) for score in head.scores)
    verdict = []
    if head.gain:
        verdict.append(f"<span>Gain <strong>{points(head.gain)} points</strong> {point_bounds(head.gain)}</span>")
    variant = head.scores[-1]
    if head.variant_minus_student:
        drop = head.variant_minus_student
        name = f"{escape(variant.model)} minus student"
        verdict.append(f"<span>{name} <strong>{points(drop)} points</strong> {point_bounds(drop)}</span>")
    line = f'<p class="verdict">{" ".join(verdict)}</p>' if verdict else ""
    return f'<ol class="answer" aria-label="{escape(sentence(head))}">{steps}</ol>{line}'


def _answer_step(score: Score, palette: Palette) -> str:
    if score.accuracy is None:
        value = '<span class="big na">n/a</span>'
        small = [score.reasons.get("accuracy", "")]
    else:
        value = f'<span class="big">{percent(score.accuracy.value)}</span>'
        small = [bounds(score.accuracy)]
    if score.kind == "variant":
        small.append(", ".join(_shipping(score)))
    lines_ = "".join(f'<span class="small">{escape(text)}</span>' for text in small if text)
    return f'<li class="{palette.of(score.model)}"><span class="who">{escape(score.model)}</span>{value}{lines_}</li>'


def _shipping(score: Score) -> list[str]:
    """Size and speed, as far as they are known."""
    known = [size(score.megabytes)] if score.megabytes is not None else []
    return known + ([f"{score.tokens_per_s:,.0f} tokens/s"] if score.tokens_per_s is not None else [])


def sentence(head: "Headline | None") -> str:
    """The answer as one line of plain text."""
    if head is None:
        return "No evaluation yet."
    steps = []
    for score in head.scores:
        if score.accuracy is None:
            steps.append(f"{score.model} n/a")
        else:
            more = f" ({', '.join(_shipping(score))})" if score.kind == "variant" and _shipping(score) else ""
            steps.append(f"{score.model} {percent(score.accuracy.value)} {bounds(score.accuracy)}{more}")
    gain = f"; gain {points(head.gain)} points {point_bounds(head.gain)}" if head.gain else ""
    drop = head.variant_minus_student
    kept = f"; {head.scores[-1].model} minus student {points(drop)} points {point_bounds(drop)}" if drop else ""
    return " → ".join(steps) + gain + kept


def overview(report: "Report") -> str:
    """Gates, money, traces, time: one tile each."""
    facts = report.facts
    shown = []
    if facts.artifact and facts.artifact.gates:
        shown.append(("Gates", *_gate_tally(facts.artifact.gates)))
    if facts.funnel and facts.funnel.examples is not None:
        shown.append(("Training examples", f"{facts.funnel.examples:,}", f"of {facts.funnel.asked or 0:,} traces"))
    if facts.phases:
        count = len(facts.phases)
        phases = f"tokens, in {count} phases" if count > 1 else "tokens"
        shown.append(("Trained on", f"{sum(phase.tokens for phase in facts.phases):,}", phases))
    if facts.costs:
        usd = facts.costs.usd
        value = dollars(usd) if usd is not None else '<span class="na">n/a</span>'
        shown.append(("Teacher's answers", value, facts.costs.reasons.get("usd", "at the recipe's prices")))
    seconds = [stage.seconds for stage in facts.stages if stage.seconds is not None]
    shown.append(("Time of all stages", duration(sum(seconds)), f"{len(seconds)} of {len(facts.stages)} stages"))
    return tiles(shown)


def _gate_tally(gates: Sequence[Gate]) -> tuple[str, str]:
    """The worst status with its count as a chip, and the counts of the others."""
    counts = {status: sum(gate.status == status for gate in gates) for status in ("failed", "not_run", "passed")}
    worst = next(status for status, count in counts.items() if count)
    words = {"failed": "failed", "not_run": "not run", "passed": "passed"}
    rest = ", ".join(f"{count} {words[status]}" for status, count in counts.items() if status != worst)
    return chip(f"{counts[worst]} {words[worst]}", STATUS[worst][1]), rest


def missing(report: "Report") -> str:
    """What the pipeline has not done, and gates that stopped it."""
    lines_ = []
    artifact = report.facts.artifact
    failed = [gate for gate in artifact.gates if gate.status == "failed"] if artifact else []
    if failed:
        names = ", ".join(f"{gate.variant} {gate.name}" for gate in failed)
        lines_.append(f"<strong>Stopped by a gate:</strong> {escape(names)}. The artifact is not released.")
    if report.missing:
        lines_.append(f"<strong>Not here yet:</strong> {escape(', '.join(report.missing))}.")
    body = "<br>".join(lines_)
    return f'<p class="missing" role="status">{body}</p>' if body else ""


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(report: "Report", palette: Palette) -> str:
    """Every set: a chart with intervals, all numbers, and accuracy against the token budget."""
    groups = _by_set(report.scores.scores)
    if not groups:
        return ""
    body = "".join(_set_accuracy(name, group, palette) for name, group in groups.items())
    lead = "Did the student learn? Verified answers to problems that were kept out of its training set."
    return section("accuracy", "Accuracy", lead, body)


def _by_set(scores: Sequence[Score]) -> dict[str, list[Score]]:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.set, []).append(score)
    return groups


def _set_accuracy(name: str, group: Sequence[Score], palette: Palette) -> str:
    problems = next((score.problems for score in group if score.problems), None)
    title = f"Accuracy on {name}" + (f", {problems:,} problems, with 95% intervals" if problems else "")
    chart = bars(title, [_accuracy_bar(score, palette) for score in group], QUARTERS)
    notes = Notes()
    rows = [_score_row(score, palette, notes) for score in group]
    columns = [
        Column("Model"), number("Accuracy"), number("minus base, points"), number("minus student, points"),
        number("Problems"), number("Mean tokens"), number("Stops"), number("Truncated"), number("tokens/s"), number("MB"),
    ]  # fmt: skip
    return (
        f"{chart}{table(f'All numbers on {name}', columns, rows)}{notes.listed()}{_budget_chart(name, group, palette)}"
    )


def _accuracy_bar(score: Score, palette: Palette) -> Bar:
    known = score.accuracy
    if known is None:
        return Bar(score.model, None, f"n/a: {score.reasons.get('accuracy', '')}", palette.of(score.model))
    return Bar(
        score.model, known.value, percent(known.value), palette.of(score.model), known.low, known.high, bounds(known)
    )


def _score_row(score: Score, palette: Palette, notes: Notes) -> list[str]:
    def known(name: str, text: Callable[[float], str]) -> str:
        value = getattr(score, name)
        return (
            text(value)
            if value is not None
            else notes.absent(score.reasons.get(name, score.reasons.get("accuracy", "")))
        )

    def difference(name: str, other: str) -> str:
        if score.model == other:
            return '<span class="na">–</span>'
        estimate = getattr(score, name)
        if estimate is None:
            return notes.absent(score.reasons.get(name, score.reasons.get("accuracy", "")))
        return f"{points(estimate)} <small>{point_bounds(estimate)}</small>"

    share = f"{percent(score.accuracy.value)} <small>{bounds(score.accuracy)}</small>" if score.accuracy else None
    problems = f"{score.problems:,}" if score.problems is not None else notes.absent(score.reasons.get("accuracy", ""))
    if score.samples and score.problems and score.samples != score.problems:
        problems += f" <small>× {score.samples / score.problems:g}</small>"
    if score.failed:
        problems += f" <small>({score.failed} failed)</small>"
    return [
        palette.label(score.model),
        share or notes.absent(score.reasons.get("accuracy", "")),
        difference("minus_base", "base"),
        difference("minus_student", "student"),
        problems,
        known("mean_tokens", "{:,.0f}".format),
        known("stop_rate", percent),
        known("truncation_rate", percent),
        known("tokens_per_s", "{:,.0f}".format),
        known("megabytes", "{:,.1f}".format),
    ]


def _budget_chart(name: str, group: Sequence[Score], palette: Palette) -> str:
    counted = [score for score in group if score.within_tokens]
    if not counted:
        return ""
    budgets = _telling_budgets(counted)
    styles = {"variant": ("dash1", "dash2", "dash3")}
    series = []
    for index, score in enumerate(counted):
        style = styles[score.kind][index % 3] if score.kind in styles else ""
        reached = [(float(budget), 100 * score.within_tokens[budget]) for budget in budgets]
        series.append(Line(score.model, palette.of(score.model), reached, style))
    x = Axis("tokens allowed", budgets[0], budgets[-1], [(budget, f"{budget:,}") for budget in budgets], log=True)
    y = Axis("accuracy in %", 0, 100, [(100 * share, text) for share, text in QUARTERS])
    chart = lines(f"Accuracy on {name} if generation had stopped at a budget of tokens", series, x, y, dots=True)
    rows = [
        [palette.label(score.model), *(percent(score.within_tokens[budget]) for budget in budgets)] for score in counted
    ]
    columns = [Column("Model"), *(number(f"{budget:,}") for budget in budgets)]
    left_out = [score for score in group if score.accuracy and not score.within_tokens]
    why = "".join(f'<p class="note">{escape(_left_out(score))}</p>' for score in left_out)
    return chart + why + fold("The same as numbers", table("Accuracy within so many tokens", columns, rows))


def _left_out(score: Score) -> str:
    return f"{score.model} is not drawn: {score.reasons.get('within_tokens', 'no budgets')}."


def _telling_budgets(scores: Sequence[Score]) -> list[int]:
    """Budgets up to the first one beyond which nothing changes; at least two."""
    budgets = sorted(set.intersection(*(set(score.within_tokens) for score in scores)))
    while len(budgets) > 2 and all(
        score.within_tokens[budgets[-1]] == score.within_tokens[budgets[-2]] for score in scores
    ):
        budgets.pop()
    return budgets


# --- the artifact ---------------------------------------------------------------------------------------------------


def artifact(report: "Report", palette: Palette) -> str:
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
        _gates(made, palette),
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


def _gates(made: Artifact, palette: Palette) -> str:
    rows = [_gate_row(gate, palette) for gate in made.gates]
    if not rows:
        return '<p class="note">No gate has been run.</p>'
    columns = [
        Column("Variant"),
        Column("Gate"),
        Column("Status"),
        number("Value"),
        number("Limit"),
        Column("Detail", "text"),
    ]
    unfinished = "" if made.complete else " (unfinished: gates still to come are listed as not run)"
    return table(f"Gates{unfinished}", columns, rows)


def _gate_row(gate: Gate, palette: Palette) -> list[str]:
    text, css = STATUS[gate.status]
    as_share = gate.unit.startswith("share")

    def shown(value: float | None) -> str:
        if value is None:
            return '<span class="na">n/a</span>'
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


def answers(report: "Report", palette: Palette) -> str:
    """The same problems side by side."""
    cases = report.scores.cases
    if not cases:
        return ""
    body, kind = [], None
    for index, case in enumerate(cases):
        if (case.set, case.kind) != kind:
            kind = (case.set, case.kind)
            shown = sum((other.set, other.kind) == kind for other in cases)
            body.append(
                f"<h3>{escape(case.kind)} <small class='na'>{shown} of {case.of_kind:,} on {escape(case.set)}</small></h3>"
            )
        body.append(_case(case, palette, is_open=index == 0))
    lead = (
        "The same problems, side by side: first the answers that quantization changed, then those that training changed."
        " Taken in the order of their ids, which are hashes; nothing is picked by hand."
    )
    return section("answers", "Answers side by side", lead, *body)


def _case(case: Case, palette: Palette, is_open: bool) -> str:
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
        f"{chip(given.outcome, css)}</h4>{_text(given.reasoning, given.answer, given.think, given.error)}"
        f'<p class="why">{escape(why)}</p></article>'
    )


def _text(reasoning: str | None, answer_text: str, think: str = "closed", error: str | None = None) -> str:
    """Reasoning folded, the answer below it."""
    parts = []
    if reasoning:
        state = "" if think == "closed" else f", {think}"
        parts.append(fold(f"reasoning ({len(reasoning):,} characters{state})", f"<pre>{escape(reasoning)}</pre>"))
    if error is not None:
        parts.append(f"<pre>{escape(error)}</pre>")
    elif answer_text:
        parts.append(f"<pre>{escape(answer_text)}</pre>")
    else:
        parts.append('<p class="na">no answer text</p>')
    return "".join(parts)


# --- traces ---------------------------------------------------------------------------------------------------------


def traces(report: "Report", palette: Palette) -> str:
    """Prompts, funnel, verdicts, and a look at what trains and what does not."""
    facts = report.facts
    if facts.funnel is None and not facts.prompts:
        return ""
    body = [_prompts_line(facts.prompts)]
    if facts.funnel is None:
        body.append('<p class="note">No traces yet.</p>')
    else:
        body += [_funnel_table(facts.funnel), _verdicts(facts.funnel), _flags(facts.funnel)]
    body += _training_examples(facts.examples)
    return section(
        "traces",
        "Traces",
        "Is the data right? From what was asked to what trains, with every drop and its reason.",
        *body,
    )


def _prompts_line(counts: Mapping[str, object]) -> str:
    names = {
        "rows": "problems read", "duplicates": "duplicates", "conflicting": "with conflicting references",
        "no_gold": "without a reference", "subsampled_away": "left out by weight or limit",
        "split_surplus": "left out by the split", "kept_apart": "kept apart for other sets", "heldout": "held out",
        "train": "to be answered by the teacher",
    }  # fmt: skip
    shown = [
        f"{counts[key]:,} {name}" for key, name in names.items() if isinstance(counts.get(key), int) and counts[key]
    ]
    return f'<p class="note">{escape(", ".join(shown))}.</p>' if shown else ""


def _funnel_table(funnel: Funnel) -> str:
    asked = funnel.asked or funnel.answered or 1
    rows = []
    if funnel.asked is not None:
        rows.append(["asked for", cell_bar(1.0), f"{funnel.asked:,}", "", ""])
    if funnel.answered is not None:
        lost = (funnel.asked or funnel.answered) - funnel.answered
        gone = cell_bar(funnel.answered / asked, lost / asked)
        rows.append(
            [
                "answered",
                gone,
                f"{funnel.answered:,}",
                f"{lost:,}" if lost else "",
                "requests without an answer" if lost else "",
            ]
        )
    for drop in funnel.drops:
        if drop.reason not in ("api-error", "no-trace"):
            gone = cell_bar(drop.remaining / asked, drop.dropped / asked)
            rows.append([escape(drop.reason), gone, f"{drop.remaining:,}", f"{drop.dropped:,}", escape(drop.why)])
    if funnel.examples is None:
        rows.append(["examples", "", '<span class="na">n/a</span>', "", "not selected yet"])
    else:
        why = f"train, of {funnel.prompts:,} problems" if funnel.prompts is not None else "train"
        rows.append(["examples", cell_bar(funnel.examples / asked), f"{funnel.examples:,}", "", why])
    columns = [Column("Step"), Column("", "wide"), number("Left"), number("Dropped"), Column("Why", "text")]
    return table("Traces: from asked for to training examples", columns, rows, total=True)


def _verdicts(funnel: Funnel) -> str:
    if not funnel.outcomes:
        return ""
    rows = [
        [escape(source), *(f"{found.get(outcome, 0):,}" for outcome in OUTCOMES), f"{sum(found.values()):,}"]
        for source, found in funnel.outcomes.items()
    ]
    columns = [Column("Source"), *(number(outcome) for outcome in OUTCOMES), number("verified")]
    return table("Verdicts on the teacher's answers", columns, rows)


def _flags(funnel: Funnel) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in funnel.flags.items())
    return f'<p class="note">Flags: {escape(shown)}.</p>' if shown else '<p class="note">No trace was flagged.</p>'


def _training_examples(examples: Sequence[TrainingExample]) -> list[str]:
    kept = [example for example in examples if example.dropped is None]
    dropped = [example for example in examples if example.dropped is not None]
    html = (
        [f"<h3>What trains <small class='na'>the first {len(kept)}</small></h3>", *map(_example, kept)] if kept else []
    )
    if dropped:
        html += ["<h3>What does not <small class='na'>one for each reason</small></h3>", *map(_example, dropped)]
    return html


def _example(example: TrainingExample) -> str:
    why = f" {chip(example.dropped, 'none')}" if example.dropped else ""
    gold = f'<p class="gold">Reference: <code>{escape(example.gold)}</code></p>' if example.gold is not None else ""
    reasoning = (
        f'<p class="label">reasoning</p><pre class="block">{escape(example.reasoning)}</pre>'
        if example.reasoning
        else ""
    )
    return (
        f'<details class="case"><summary><span class="q">{escape(example.prompt)}</span>{why}</summary><div class="body">'
        f'<p class="label">trace {escape(example.trace_id)}</p><pre class="block">{escape(example.prompt)}</pre>{gold}'
        f'{reasoning}<p class="label">answer</p><pre class="block">{escape(example.answer)}</pre></div></details>'
    )


# --- training -------------------------------------------------------------------------------------------------------


def training(report: "Report", _: Palette) -> str:
    """Every phase: curve, learning rate, and what it took."""
    phases = report.facts.phases
    if not phases:
        return ""
    lead = "How the student was trained: loss over supervised tokens and the learning rate, over the tokens trained on."
    return section("training", "Training", lead, *map(_phase, phases))


def _phase(phase: Phase) -> str:
    kind = f" · {phase.kind}" if phase.kind else ""
    state = "" if phase.state == "done" else f" {chip(*STATES[phase.state])}"
    heading = f"<h3>{escape(phase.label + kind)}{state}</h3>"
    return (
        heading + tiles(_phase_tiles(phase)) + (_curves(phase) if phase.curve else '<p class="note">No step yet.</p>')
    )


def _phase_tiles(phase: Phase) -> list[tuple[str, str, str]]:
    counts = phase.counts
    shown = [
        (
            "Steps",
            f"{phase.steps:,}",
            f"of {counts['steps']:,}" if counts.get("steps", phase.steps) != phase.steps else "",
        )
    ]
    shown.append(
        (
            "Tokens",
            f"{phase.tokens:,}",
            f"{counts['supervised_tokens']:,} supervised" if "supervised_tokens" in counts else "",
        )
    )
    if phase.tokens_per_s is not None:
        seconds = f"{duration(counts['train_seconds'])} of steps" if "train_seconds" in counts else ""
        shown.append(("Speed", f"{phase.tokens_per_s:,.0f} tokens/s", seconds))
    if phase.curve:
        first, last = counts.get("first_loss"), counts.get("last_loss")
        first, last = (
            (phase.curve[0].loss if first is None else first),
            (phase.curve[-1].loss if last is None else last),
        )
        shown.append(("Loss, nats/token", f"{first:.3f} → {last:.3f}", "first and last step"))
    if "packing_efficiency" in counts:
        shown.append(("Packing efficiency", percent(counts["packing_efficiency"]), "of micro-batches filled"))
    if "documents" in counts:
        extra = [
            f"{counts[key]:,} {name}"
            for key, name in (("too_long", "too long"), ("seam_differs", "differ at the seam"))
            if counts.get(key)
        ]
        shown.append(("Documents", f"{counts['documents']:,}", ", ".join(extra)))
    return shown


def _curves(phase: Phase) -> str:
    x = axis_to("tokens trained on", phase.curve[-1].tokens, _thousands)
    loss = [(float(point.tokens), point.loss) for point in phase.curve]
    series = [Line("loss", "m-student", loss)]
    if len(loss) >= SMOOTHED_FROM:
        series = [Line("each point", "m-student", loss, "faint"), Line("running mean", "m-student", smoothed(loss))]
    y = axis_of("loss", [value for _, value in loss])
    charts = lines("Training loss, nats per supervised token", series, x, y, dots=len(loss) < SMOOTHED_FROM)
    rate = [(float(point.tokens), point.lr) for point in phase.curve]
    rates = axis_of("learning rate", [0.0, *(value for _, value in rate)], _exponent, most=2)
    charts += lines("Learning rate", [Line("learning rate", "m-base", rate)], x, rates, small=True)
    averaged = f'<p class="note">Each point is the mean of {phase.averaged} steps.</p>' if phase.averaged > 1 else ""
    every = max(1, len(phase.curve) // CURVE_ROWS)
    shown = [*phase.curve[:-1:every], phase.curve[-1]]
    rows = [
        [
            f"{p.step:,}",
            f"{p.tokens:,}",
            f"{p.loss:.4f}",
            f"{p.lr:.3g}",
            f"{p.grad_norm:.3g}" if p.grad_norm is not None else "",
        ]
        for p in shown
    ]
    columns = [Column("Step"), number("Tokens"), number("Loss"), number("Learning rate"), number("Gradient norm")]
    return charts + averaged + fold("The curve as numbers", table(f"{phase.label}: steps", columns, rows))


def smoothed(points_: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean over about a twentieth of the points, centred."""
    half = max(1, len(points_) // 40)
    windows = [points_[max(0, i - half) : i + half + 1] for i in range(len(points_))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points_, windows)]


def _thousands(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _exponent(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(report: "Report", _: Palette) -> str:
    """Money and tokens of the teacher, time and place of every stage."""
    facts = report.facts
    money = _money(facts.costs) if facts.costs else ""
    return section(
        "cost",
        "Cost",
        "What it took: the teacher's tokens and money, and the wall time of every stage.",
        money,
        _stages(facts),
    )


def _money(costs: Costs) -> str:
    teacher = " ".join(filter(None, (costs.engine, costs.model))) or "not named"
    shown: list[tuple[str, str, str]] = []
    absent = '<span class="na">n/a</span>'

    def add(name: str, value: float | None, text: Callable[[float], str], reason: str) -> None:
        shown.append(
            (name, absent if value is None else text(value), costs.reasons.get(reason, "") if value is None else "")
        )

    add("All answers in use", costs.usd, dollars, "usd")
    add("Bought by this run", costs.spent_usd, dollars, "spent_usd")
    add("Input tokens", costs.input_tokens, "{:,}".format, "output_tokens")
    add("Output tokens", costs.output_tokens, "{:,}".format, "output_tokens")
    add("of which reasoning", costs.reasoning_tokens, "{:,}".format, "output_tokens")
    shown.append(("Already in the ledger", f"{costs.reused:,}", "answers not bought again"))
    shown.append(("Possibly paid twice", f"{costs.possibly_paid_twice:,}", "in flight when a run was stopped"))
    return f"<h3>Teacher's answers <small class='na'>{escape(teacher)}</small></h3>{tiles(shown)}"


def _stages(facts: Facts) -> str:
    longest = max((stage.seconds or 0.0 for stage in facts.stages), default=0.0) or 1.0
    rows = []
    for stage in facts.stages:
        seconds = stage.seconds
        rows.append(
            [
                escape(stage.label),
                chip(*STATES[stage.state]),
                cell_bar(seconds / longest) if seconds is not None else "",
                duration(seconds) if seconds is not None else '<span class="na">n/a</span>',
                when(escape(stage.finished or "")),
                f'<span class="mono">{escape(stage.folder.removesuffix(stage.identity))}<b>{escape(stage.identity)}</b></span>',
            ]
        )
    total = sum(stage.seconds or 0.0 for stage in facts.stages)
    rows.append(["all", "", "", duration(total), "", ""])
    columns = [
        Column("Stage"), Column("State"), Column("", "wide"), number("Wall time"), Column("Finished", "nowrap"),
        Column("Folder in the run store, ending in the identity"),
    ]  # fmt: skip
    return table("Stages", columns, rows, total=True)


# --- how to make it again -------------------------------------------------------------------------------------------


def reproduce(report: "Report", _: Palette) -> str:
    """The command, the recipe, and what equality of results depends on."""
    facts = report.facts
    body = []
    if facts.recipe_yaml:
        command = f"distill run {report.name}.yaml --runs {report.runs}{_threads(facts)}"
        body.append(f"{block(command)}{fold('The recipe as it was resolved', block(facts.recipe_yaml))}")
    body.append(_environments(facts))
    lead = (
        "Save the recipe below under the name in the command. Finished stages are found again by their identity; results"
        " are equal to the bit on the same kind of device with the same threads and versions."
    )
    return section("reproduce", "Reproduce", lead, *body)


def _threads(facts: Facts) -> str:
    threads = {made.settings.get("threads") for made in facts.environments} - {None}
    return f" --threads {threads.pop()}" if len(threads) == 1 else ""


def _environments(facts: Facts) -> str:
    made = facts.environments
    if not made:
        return '<p class="note">No stage has finished, so no environment is recorded.</p>'
    names = list(dict.fromkeys(name for one in made for name in one.settings))
    rows = [[escape(name), *(escape(one.settings.get(name, "not recorded")) for one in made)] for name in names]
    titles = ["All stages"] if len(made) == 1 else [", ".join(one.stages) for one in made]
    return table("Environment", [Column(""), *(Column(title) for title in titles)], rows)


PARTS = (
    Part("accuracy", "Accuracy", accuracy),
    Part("artifact", "Artifact", artifact),
    Part("answers", "Answers side by side", answers),
    Part("traces", "Traces", traces),
    Part("training", "Training", training),
    Part("cost", "Cost", cost),
    Part("reproduce", "Reproduce", reproduce),
)
