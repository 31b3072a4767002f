"""The sections that say how it was made: traces, training, cost, and how to make it again.

Functions of what was read; nothing is read or computed here, and all text is escaped.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .charts import Line, axis_of, axis_to, cell_bar, lines
from .content import Report
from .facts import LOST, Costs, CurvePoint, Facts, Funnel, Phase, StageFact, TrainingExample
from .markup import (
    NA,
    STATES,
    Column,
    Palette,
    block,
    chip,
    dollars,
    duration,
    fold,
    number,
    percent,
    section,
    table,
    tiles,
    when,
)

SMOOTHED_FROM = 40
"""Points from which a loss curve is drawn with a running mean."""
CURVE_ROWS = 12
"""Rows of a curve's table."""
OUTCOMES = ("correct", "wrong", "unverifiable", "timeout", "error")


# --- traces ---------------------------------------------------------------------------------------------------------


def traces(report: Report, palette: Palette) -> str:
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
    lead = "Is the data right? From what was asked to what trains, with every drop and its reason."
    return section("traces", "Traces", lead, *body)


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
    rows = list(_funnel_rows(funnel))
    columns = [Column("Step"), Column("", "wide"), number("Left"), number("Dropped"), Column("Why", "text")]
    return table("Traces: from asked for to training examples", columns, rows, total=True)


def _funnel_rows(funnel: Funnel) -> Iterator[list[str]]:
    asked = funnel.asked or funnel.answered or 0

    def row(step: str, left: int, dropped: int, why: str) -> list[str]:
        bar = cell_bar(left / max(1, asked), dropped / max(1, asked))
        return [escape(step), bar, f"{left:,}", f"{dropped:,}" if dropped else "", escape(why)]

    yield row("asked for", asked, 0, "")
    if funnel.answered is not None:
        lost = asked - funnel.answered
        yield row("answered", funnel.answered, lost, "requests without an answer" if lost else "")
    for drop in funnel.drops:
        if drop.reason not in LOST:
            yield row(drop.reason, drop.remaining, drop.dropped, drop.why)
    if funnel.examples is None:
        yield ["examples", "", NA, "", "not selected yet"]
    else:
        yield row("examples", funnel.examples, 0, f"train, of {funnel.prompts or 0:,} problems")


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
    html = []
    if kept:
        html += [f'<h3>What trains <small class="na">the first {len(kept)}</small></h3>', *map(_example, kept)]
    if dropped:
        html += ['<h3>What does not <small class="na">one for each reason</small></h3>', *map(_example, dropped)]
    return html


def _example(example: TrainingExample) -> str:
    why = f" {chip(example.dropped, 'none')}" if example.dropped else ""
    gold = f'<p class="gold">Reference: <code>{escape(example.gold)}</code></p>' if example.gold is not None else ""
    parts = [f"trace {example.trace_id}", example.prompt], ["reasoning", example.reasoning], ["answer", example.answer]
    shown = [f'<p class="label">{escape(name or "")}</p>{block(text)}' for name, text in parts if text]
    return (
        f'<details class="case"><summary><span class="q">{escape(example.prompt)}</span>{why}</summary>'
        f'<div class="body">{shown[0]}{gold}{"".join(shown[1:])}</div></details>'
    )


# --- training -------------------------------------------------------------------------------------------------------


def training(report: Report, _: Palette) -> str:
    """Every phase: curve, learning rate, and what it took."""
    phases = report.facts.phases
    if not phases:
        return ""
    lead = "How the student was trained: loss over supervised tokens and the learning rate, over the tokens trained on."
    return section("training", "Training", lead, *map(_phase, phases))


def _phase(phase: Phase) -> str:
    kind = f" · {phase.kind}" if phase.kind else ""
    state = "" if phase.state == "done" else f" {chip(*STATES[phase.state])}"
    curves = _curves(phase) if phase.curve else '<p class="note">No step yet.</p>'
    return f"<h3>{escape(phase.label + kind)}{state}</h3>{tiles(list(_phase_tiles(phase)))}{curves}"


def _phase_tiles(phase: Phase) -> Iterator[tuple[str, str, str]]:
    counts = phase.counts
    supervised = f"{counts['supervised_tokens']:,} supervised" if "supervised_tokens" in counts else ""
    yield "Steps", f"{phase.steps:,}", "" if phase.state == "done" else "so far"
    yield "Tokens", f"{phase.tokens:,}", supervised
    if phase.tokens_per_s is not None:
        yield "Speed", f"{phase.tokens_per_s:,.0f} tokens/s", f"{duration(phase.tokens / phase.tokens_per_s)} of steps"
    if phase.mfu is not None:
        yield "MFU", percent(phase.mfu), "of the matrix products measured here"
    if phase.first_loss is not None and phase.last_loss is not None:
        yield "Loss, nats/token", f"{phase.first_loss:.3f} → {phase.last_loss:.3f}", "first and last step"
    if "packing_efficiency" in counts:
        yield "Packing efficiency", percent(counts["packing_efficiency"]), "of micro-batches filled"
    if "documents" in counts:
        names = {"too_long": "too long", "seam_differs": "differ at the seam"}
        remarks = [f"{counts[key]:,} {name}" for key, name in names.items() if counts.get(key)]
        yield "Documents", f"{counts['documents']:,}", ", ".join(remarks)


def _curves(phase: Phase) -> str:
    x = axis_to("tokens trained on", phase.curve[-1].tokens, thousands)
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
    return charts + averaged + _look_charts(phase) + fold("The curve as numbers", _curve_table(phase))


LOOK_COLOURS = ("m-student", "m-v0", "m-v1", "m-v2", "m-v3", "m-v4")


def _look_charts(phase: Phase) -> str:
    """What the monitor saw: held-out loss by segment, and accuracy on each of its sets."""
    if not phase.looks:
        return ""
    x = axis_to("tokens trained on", max(1, phase.looks[-1].tokens), thousands)
    losses = _look_series(phase, lambda name: name.startswith("heldout_loss"), _segment)
    accuracies = _look_series(
        phase, lambda name: name.endswith("/accuracy"), lambda name: name.removesuffix("/accuracy")
    )
    html = ""
    for title, series in (("Held-out loss, nats per token", losses), ("Accuracy while training", accuracies)):
        if series:
            y = axis_of(title.partition(",")[0].lower(), [value for line in series for _, value in line.points])
            html += lines(title, series, x, y, dots=True, small=True)
    return html + fold("The looks as numbers", _look_table(phase))


def _segment(name: str) -> str:
    return name.removeprefix("heldout_loss_") if name != "heldout_loss" else "all"


def _look_series(phase: Phase, wanted: Callable[[str], bool], shown: Callable[[str], str]) -> list[Line]:
    names = [name for name in phase.looks[0].figures if wanted(name)]
    return [
        Line(
            shown(name),
            LOOK_COLOURS[place % len(LOOK_COLOURS)],
            [(float(look.tokens), look.figures[name]) for look in phase.looks if name in look.figures],
        )
        for place, name in enumerate(names)
    ]


def _look_table(phase: Phase) -> str:
    names = list(dict.fromkeys(name for look in phase.looks for name in look.figures))
    rows = [
        [f"{look.step:,}", *(NA if name not in look.figures else f"{look.figures[name]:.4g}" for name in names)]
        for look in phase.looks
    ]
    return table(f"{phase.label}: looks", [Column("Step"), *(number(escape(name)) for name in names)], rows)


def _curve_table(phase: Phase) -> str:
    every = max(1, len(phase.curve) // CURVE_ROWS)
    rows = [_curve_row(point) for point in [*phase.curve[:-1:every], phase.curve[-1]]]
    columns = [Column("Step"), number("Tokens"), number("Loss"), number("Learning rate"), number("Gradient norm")]
    return table(f"{phase.label}: steps", columns, rows)


def _curve_row(point: CurvePoint) -> list[str]:
    norm = NA if point.grad_norm is None else f"{point.grad_norm:.3g}"
    return [f"{point.step:,}", f"{point.tokens:,}", f"{point.loss:.4f}", f"{point.lr:.3g}", norm]


def smoothed(points_: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean over about a twentieth of the points, centred."""
    half = max(1, len(points_) // 40)
    windows = [points_[max(0, i - half) : i + half + 1] for i in range(len(points_))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points_, windows)]


def thousands(value: float) -> str:
    """`12k`, `1.5M`."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _exponent(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(report: Report, _: Palette) -> str:
    """Money and tokens of the teacher, time and place of every stage."""
    facts = report.facts
    money = _money(facts.costs) if facts.costs else ""
    lead = "What it took: the teacher's tokens and money, and the wall time of every stage."
    return section("cost", "Cost", lead, money, stages_table(facts))


def _money(costs: Costs) -> str:
    def known(name: str, value: float | None, text: Callable[[Any], str], reason: str) -> tuple[str, str, str]:
        return (name, NA, costs.reasons.get(reason, "")) if value is None else (name, text(value), "")

    shown = [known("Price of all answers", costs.usd, dollars, "usd")]
    if costs.spent_usd is not None:
        shown.append(known("Bought by this run", costs.spent_usd, dollars, "usd"))
    shown.append(known("Output tokens", costs.output_tokens, "{:,}".format, "output_tokens"))
    if costs.output_tokens is not None:
        shown.append(known("of which reasoning", costs.reasoning_tokens, "{:,}".format, "output_tokens"))
        shown.append(known("Input tokens", costs.input_tokens, "{:,}".format, "output_tokens"))
    shown += [
        ("Found in the ledger", f"{costs.reused:,}", "answers not bought again"),
        ("Possibly paid twice", f"{costs.possibly_paid_twice:,}", "in flight at a stop"),
    ]
    teacher = " ".join(filter(None, (costs.engine, costs.model))) or "not named"
    return f'<h3>Teacher\'s answers <small class="na">{escape(teacher)}</small></h3>{tiles(shown)}'


def stages_table(facts: Facts) -> str:
    """Every stage with its state, time and folder."""
    seconds = [stage.seconds or 0.0 for stage in facts.stages]
    rows = [_stage_row(stage, max(seconds)) for stage in facts.stages]
    rows.append(["all", "", "", duration(sum(seconds)), "", ""])
    columns = [
        Column("Stage"), Column("State"), Column("", "wide"), number("Wall time"), Column("Finished", "nowrap"),
        Column("Folder in the run store, ending in the identity"),
    ]  # fmt: skip
    return table("Stages", columns, rows, total=True)


def _stage_row(stage: StageFact, longest: float) -> list[str]:
    folder, seconds = stage.folder.removesuffix(stage.identity), stage.seconds
    return [
        escape(stage.label),
        chip(*STATES[stage.state]),
        "" if seconds is None else cell_bar(seconds / (longest or 1.0)),
        NA if seconds is None else duration(seconds),
        escape(when(stage.finished or "")),
        f'<span class="mono">{escape(folder)}<b>{escape(stage.identity)}</b></span>',
    ]


# --- how to make it again -------------------------------------------------------------------------------------------


def reproduce(report: Report, _: Palette) -> str:
    """The command, the recipe, and what equality of results depends on."""
    facts = report.facts
    body = []
    if facts.recipe_yaml:
        command = f"distill run {report.name}.yaml --runs {shlex.quote(report.runs)}{_threads(facts)}"
        body.append(f"{block(command)}{fold('The recipe as it was resolved', block(facts.recipe_yaml))}")
    body.append(_environments(facts))
    lead = (
        "Save the recipe below under the name in the command. Finished stages are found again by their identity; "
        "results are equal to the bit on the same kind of device with the same threads and versions."
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
    css = "slim" if len(made) == 1 else ""
    return f'<div class="{css}">{table("Environment", [Column(""), *(Column(title) for title in titles)], rows)}</div>'
