"""The report as one HTML page: its frame, and the answer on top of it.

The page has no script and asks the network for nothing, and says so to the browser (a content policy). All text that
comes from models, recipes and files is escaped.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from .content import Headline, Report
from .facts import Gate
from .markup import STATUS, Palette, bounds, chip, dollars, duration, percent, point_bounds, points, size, tiles, when
from .process import cost, reproduce, traces, training
from .results import accuracy, answers, artifact
from .scores import Score
from .style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Part(NamedTuple):
    """A section of the page and its place in the navigation."""

    anchor: str
    name: str
    make: Callable[[Report, Palette], str]


PARTS = (
    Part("accuracy", "Accuracy", accuracy),
    Part("artifact", "Artifact", artifact),
    Part("answers", "Answers side by side", answers),
    Part("traces", "Traces", traces),
    Part("training", "Training", training),
    Part("cost", "Cost", cost),
    Part("reproduce", "Reproduce", reproduce),
)


def render(report: Report) -> str:
    """The whole page."""
    palette = Palette(report.scores.scores, report.facts.artifact)
    made = [(part, part.make(report, palette)) for part in PARTS]
    links = "".join(f'<li><a href="#{part.anchor}">{part.name}</a></li>' for part, html in made if html)
    title = f"{report.name}: distillation report"
    body = (
        f"{top(report, palette)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>'
        f"{''.join(html for _, html in made)}"
        f"</main>\n<footer>Written by distill from {escape(report.runs)}, pipeline {escape(report.identity)}. Intervals"
        " are 95%, two-sided. This page holds everything it shows and loads nothing.</footer>"
    )
    return document(title, sentence(report.headline), body)


def document(title: str, description: str, body: str, css: str = CSS) -> str:
    """A whole page that loads nothing; `body` is html."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="description" content="{escape(description)}">'
        f"<title>{escape(title)}</title><style>{css}</style></head>\n<body>{body}</body></html>\n"
    )


# --- the answer -----------------------------------------------------------------------------------------------------


def top(report: Report, palette: Palette) -> str:
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


def answer(head: Headline, palette: Palette) -> str:
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


def sentence(head: Headline | None) -> str:
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


def overview(report: Report) -> str:
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


def missing(report: Report) -> str:
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
