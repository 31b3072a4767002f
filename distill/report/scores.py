"""What the evaluations say: accuracy, paired differences, answers that changed, and the same problems side by side.

Everything is read from the items that evaluations kept; differences are computed as the export's gate computes them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import DataError
from distill.evaluation import ITEMS, SUMMARY, difference
from distill.records import Item, read_records

from .facts import Estimate, clip, megabytes, variant_megabytes, variant_names
from .lineage import MODEL_ORDER, Pipeline, StageRun

Kind = Literal["teacher", "base", "student", "variant"]

WITHOUT_SIZE = {"variant": "not built yet", "student": "not trained yet"}
"""Why a model of the run store has no size."""
CASES_OF_A_KIND = 3
"""Problems shown of each kind of change."""


@dataclass(frozen=True)
class Score:
    """One model on one set. A value that is None has its reason in `reasons`, under its own name."""

    model: str
    set: str
    kind: Kind
    accuracy: Estimate | None = None
    minus_base: Estimate | None = None
    """Accuracy less the base's, paired by problem."""
    minus_student: Estimate | None = None
    problems: int | None = None
    samples: int | None = None
    failed: int | None = None
    """Requests without an answer; they count as wrong."""
    mean_tokens: float | None = None
    stop_rate: float | None = None
    truncation_rate: float | None = None
    tokens_per_s: float | None = None
    megabytes: float | None = None
    within_tokens: Mapping[int, float] = field(default_factory=dict)
    """Accuracy if generation had stopped at so many tokens."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, name: str) -> str:
        """Why a value is None: its own reason, else that of the whole evaluation."""
        return self.reasons.get(name) or self.reasons.get("accuracy", "")


@dataclass(frozen=True)
class Changes:
    """How single answers changed from one model to another; counts of samples."""

    set: str
    before: str
    after: str
    kept_right: int
    lost: int
    gained: int
    kept_wrong: int


@dataclass(frozen=True)
class Answer:
    """What one model wrote for a problem."""

    model: str
    outcome: str
    detail: str
    reasoning: str | None
    answer: str
    tokens: int
    finish_reason: str
    think: str
    error: str | None


@dataclass(frozen=True)
class Case:
    """One problem with the models' answers side by side."""

    set: str
    kind: str
    of_kind: int
    """How many answers changed in this way."""
    prompt_id: str
    prompt: str
    gold: str | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Scores:
    """All evaluations of a pipeline."""

    scores: tuple[Score, ...]
    changes: tuple[Changes, ...]
    cases: tuple[Case, ...]


Key = tuple[str, int]
"""A sample: prompt_id and which of the problem's samples it is."""


@dataclass(frozen=True)
class Evaluated:
    """A model on a set: what there is of it on the disk."""

    model: str
    set: str
    kind: Kind
    run: StageRun
    inside: str = ""
    """Folder inside the run; empty for an eval stage of its own."""

    def file(self, name: str) -> Path | None:
        """One of the evaluation's files."""
        return self.run.file(f"{self.inside}/{name}" if self.inside else name)

    @cached_property
    def summary(self) -> Mapping[str, Any] | None:
        """What it came to; None before it has ended."""
        return self.run.json(f"{self.inside}/{SUMMARY}" if self.inside else SUMMARY)

    @property
    def available(self) -> bool:
        """Whether there are answers of it to judge by."""
        return bool(self.summary and self.summary["available"])

    @cached_property
    def items(self) -> Mapping[Key, Item]:
        """Its items by problem and sample; none before it has ended."""
        path = self.file(ITEMS) if self.available else None
        items = read_records(path, Item) if path else ()
        return {(item.prompt.prompt_id, item.trace.sample): item for item in items}

    @property
    def missing(self) -> str:
        """Why there is no accuracy."""
        if self.summary is not None:
            return str(self.summary.get("reason") or "no answers")
        if self.run.state == "not run":
            return "not run yet"
        if self.inside and not (self.run.folder / self.inside).is_dir():
            return "the export has not come so far"
        return "unfinished; run the same command again"


def read_scores(pipeline: Pipeline) -> Scores:
    """Read every evaluation of a pipeline.

    Raises RunError where a finished stage's file is not the one that was sealed.
    """
    by_set: dict[str, list[Evaluated]] = {}
    for one in sorted(evaluations(pipeline), key=_order(pipeline)):
        by_set.setdefault(one.set, []).append(one)
    sizes = model_sizes(pipeline)
    return Scores(
        tuple(score(one, group, sizes) for group in by_set.values() for one in group),
        tuple(change for group in by_set.values() for change in changes(group)),
        tuple(case for group in by_set.values() for case in cases(group)),
    )


def evaluations(pipeline: Pipeline) -> Iterator[Evaluated]:
    """Every model on every set that the pipeline has or will have."""
    for run in pipeline.of("eval"):
        _, model, set_name = run.label.split(":", 2)
        yield Evaluated(model, set_name, _kind(model), run)
    export = pipeline.one("export")
    if export is None or "prompts" not in export.upstream:
        return
    set_name = str(pipeline.section("export").get("set", "heldout"))
    for variant in variant_names(pipeline):
        yield Evaluated(variant, set_name, "variant", export, f"eval-{variant}")


def _order(pipeline: Pipeline) -> Callable[[Evaluated], tuple[bool, str, int]]:
    """First the set of the export's gate; in each set teacher, base, student, then variants as the recipe has them."""
    first, models = pipeline.section("export").get("set"), [*MODEL_ORDER, *variant_names(pipeline)]
    return lambda one: (one.set != first, one.set, models.index(one.model) if one.model in models else len(models))


def _kind(model: str) -> Kind:
    return model if model in MODEL_ORDER else "variant"  # type: ignore[return-value]  # its members are the others


def model_sizes(pipeline: Pipeline) -> dict[str, float]:
    """MB of the models whose weights lie in the run store."""
    export, trained = pipeline.one("export"), pipeline.of("train")
    sizes = {name: variant_megabytes(export, name) for name in variant_names(pipeline)} if export else {}
    if trained:
        sizes["student"] = megabytes(trained[-1].folder / "model")
    return {name: size for name, size in sizes.items() if size is not None}


# --- accuracy -------------------------------------------------------------------------------------------------------


def score(one: Evaluated, group: Sequence[Evaluated], sizes: Mapping[str, float]) -> Score:
    """What one evaluation says, beside the others of its set."""
    known: dict[str, Any] = {"megabytes": sizes.get(one.model)}
    reasons: dict[str, str] = {}
    if known["megabytes"] is None:
        reasons["megabytes"] = WITHOUT_SIZE.get(one.kind, "its weights are not in the run store")
    if one.available and one.summary:
        known |= _measured(one.summary, reasons)
        for other in ("base", "student"):
            known[f"minus_{other}"] = _minus(one, other, group, reasons)
    else:
        reasons["accuracy"] = one.missing
        known["problems"] = one.summary["problems"] if one.summary else None
    return Score(one.model, one.set, one.kind, reasons=reasons, **known)


def _measured(summary: Mapping[str, Any], reasons: dict[str, str]) -> dict[str, Any]:
    """The summary's numbers; those that go by tokens only where the engine counts them."""
    plain = ("problems", "samples", "failed", "stop_rate", "truncation_rate", "outcomes")
    known: dict[str, Any] = {name: summary[name] for name in plain}
    known["accuracy"] = Estimate(summary["accuracy"], summary["accuracy_low"], summary["accuracy_high"])
    if not summary["tokens"]:
        reasons["mean_tokens"] = reasons["tokens_per_s"] = reasons["within_tokens"] = "its engine counts no tokens"
        return known
    within = {int(budget): share for budget, share in summary["accuracy_within_tokens"].items()}
    return known | {
        "mean_tokens": summary["mean_tokens"],
        "tokens_per_s": summary["tokens_per_s"],
        "within_tokens": dict(sorted(within.items())),
    }


def _minus(one: Evaluated, model: str, group: Sequence[Evaluated], reasons: dict[str, str]) -> Estimate | None:
    """Accuracy less that of another model on the same problems."""
    if one.model == model:
        return None
    other = _of(group, model)
    if other is None or not other.available:
        why = "not evaluated" if other is None else other.missing
        reasons[f"minus_{model}"] = f"{model}: {why}"
        return None
    try:
        return Estimate(*difference(list(one.items.values()), list(other.items.values())))
    except DataError as error:
        reasons[f"minus_{model}"] = str(error)
        return None


def _of(group: Sequence[Evaluated], model: str) -> Evaluated | None:
    return next((one for one in group if one.model == model), None)


# --- single answers -------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two models of a set, both with answers, and the samples that both have."""

    before: Evaluated
    after: Evaluated

    def where(self, was_right: bool, is_right: bool) -> list[Key]:
        """Samples judged so before and after, in the order of their ids."""
        shared = sorted(self.before.items.keys() & self.after.items.keys())
        return [
            key
            for key in shared
            if self.before.items[key].verdict.correct == was_right and self.after.items[key].verdict.correct == is_right
        ]


def pairs(group: Sequence[Evaluated]) -> list[Pair]:
    """Base to student, and student to each variant."""
    base, student = _of(group, "base"), _of(group, "student")
    if student is None or not student.available:
        return []
    variants = [Pair(student, one) for one in group if one.kind == "variant" and one.available]
    return [*([Pair(base, student)] if base and base.available else []), *variants]


def changes(group: Sequence[Evaluated]) -> list[Changes]:
    """Counts of answers that stayed and that changed."""
    return [
        Changes(
            pair.before.set,
            pair.before.model,
            pair.after.model,
            kept_right=len(pair.where(True, True)),
            lost=len(pair.where(True, False)),
            gained=len(pair.where(False, True)),
            kept_wrong=len(pair.where(False, False)),
        )
        for pair in pairs(group)
    ]


def cases(group: Sequence[Evaluated]) -> Iterator[Case]:
    """A few problems of each kind: what a variant lost first, then what it gained, then what training changed.

    Problems are taken in the order of their ids, which are hashes: nothing is picked by its looks. Each is shown once.
    """
    shown: set[str] = set()
    for title, keys, models in _kinds(group):
        new = [key for key in keys if key[0] not in shown][:CASES_OF_A_KIND]
        shown |= {prompt_id for prompt_id, _ in new}
        yield from (_case(title, len(keys), key, group, models) for key in new)


def _kinds(group: Sequence[Evaluated]) -> Iterator[tuple[str, list[Key], list[str]]]:
    """Title, samples and models to show of each kind of change."""
    found = pairs(group)
    trained = [pair for pair in found if pair.after.model == "student"]
    quantized = [pair for pair in reversed(found) if pair.after.model != "student"]
    common = [*MODEL_ORDER, *(pair.after.model for pair in quantized[:1])]
    for pair in quantized:
        name = pair.after.model
        yield f"student right, {name} wrong", pair.where(True, False), [*common, name]
    for pair in quantized:
        name = pair.after.model
        yield f"student wrong, {name} right", pair.where(False, True), [*common, name]
    for pair in trained:
        yield "base right, student wrong", pair.where(True, False), common
        yield "base wrong, student right", pair.where(False, True), common
        yield "base and student wrong", pair.where(False, False), common
        yield "base and student right", pair.where(True, True), common
    if not trained:
        yield from _kinds_alone(group, common)


def _kinds_alone(group: Sequence[Evaluated], models: Sequence[str]) -> Iterator[tuple[str, list[Key], list[str]]]:
    """Where training cannot be compared: what the student (else the last model that answered) gets wrong and right."""
    answered = [one for one in group if one.available]
    if answered:
        alone = _of(answered, "student") or answered[-1]
        for title, right in (("wrong", False), ("right", True)):
            keys = sorted(key for key, item in alone.items.items() if item.verdict.correct == right)
            yield f"{alone.model} {title}", keys, [*models, alone.model]


def _case(title: str, of_kind: int, key: Key, group: Sequence[Evaluated], models: Sequence[str]) -> Case:
    items = {one.model: one.items[key] for one in group if one.model in models and key in one.items}
    first = next(iter(items.values()))
    return Case(
        set=first.set,
        kind=title,
        of_kind=of_kind,
        prompt_id=key[0],
        prompt=clip(first.prompt.text),
        gold=first.prompt.gold,
        answers=tuple(_answer(model, item) for model, item in items.items()),
    )


def _answer(model: str, item: Item) -> Answer:
    trace = item.trace
    answer = trace.answer or ("" if trace.reasoning else trace.raw.strip())
    return Answer(
        model=model,
        outcome=item.verdict.outcome,
        detail=item.verdict.detail,
        reasoning=None if trace.reasoning is None else clip(trace.reasoning),
        answer=clip(answer),
        tokens=item.tokens,
        finish_reason=trace.finish_reason,
        think=trace.think,
        error=trace.error,
    )
