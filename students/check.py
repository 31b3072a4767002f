"""`distill check`: what would go wrong in a training, found before it runs.

Each finding is `passed`, `failed` or `note`, with a sentence that says what was seen and, where it failed, what to do.
The cheap ones are made at the start of every training too (`require_sound`); the others train a copy of the student
for a moment, to see that it can learn the data at all and how long the real thing would take.
"""

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.config import KdPhase, Recipe, SftPhase, TrainingPhase
from distill.documents import Documents
from distill.engines.transformers import end_ids
from distill.errors import TrainingError
from distill.format import EOS, PROMPT, THINK
from distill.interrupts import Stop
from distill.models import choose_device, set_threads
from distill.pipeline import run_recipe
from distill.plan import Plan, make_plan
from distill.progress import clock_text
from distill.runs import RunOptions, Step

from .distributed import World
from .loop import StepReport, Trainer, cut, plan_of
from .objective import PackTensors, StudentObjective
from .packing import lay_out
from .throughput import peak_memory_mb

FREE = ("solver", "recorded")
"""Teachers whose traces cost nothing, so that check may make them itself."""
LEAK = 1e-3
"""Largest difference of a token's log-probability, packed against alone, in nats; a leak makes it far larger."""
SAMPLE = 64
"""Documents whose text is looked at."""
PROBE_DOCUMENTS, PROBE_TOKENS, PROBE_STEPS, PROBE_LR = 4, 512, 24, 5e-4


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    status: str
    """passed, failed or note."""
    detail: str


class Subject(NamedTuple):
    """What is checked: a phase with its model and data."""

    model: Any
    tokenizer: Any
    documents: Documents
    phase: TrainingPhase
    precision: str
    recipe: Recipe
    options: RunOptions


def check(recipe: Recipe, options: RunOptions) -> list[Finding]:
    """Everything about the recipe's first training phase.

    Traces that are free (built-in and recorded teachers) are made where they are missing. Raises RecipeError without
    a phase, TrainingError where traces would first have to be bought, and what preparing a training raises.
    """
    from .train import prepare

    set_threads(options)
    plan = make_plan(recipe, options)
    step = first_phase(plan)
    _make_traces(recipe, plan, step, options)
    ready = prepare(recipe, step, options, choose_device(options), World())
    subject = subject_of(ready, recipe, options)
    return [*cheap(subject), *(probe(subject) for probe in PROBES)]


def subject_of(ready: Any, recipe: Recipe, options: RunOptions) -> Subject:
    """What a prepared training (`train.Ready`) is checked as."""
    precision = ready.student.precision
    return Subject(ready.model, ready.tokenizer, ready.documents, ready.phase, precision, recipe, options)


def first_phase(plan: Plan) -> Step:
    """The recipe's first train step. Raises RecipeError if there is none."""
    return next(step for step in plan.until("train") if step.stage == "train")


def _make_traces(recipe: Recipe, plan: Plan, step: Step, options: RunOptions) -> None:
    before = [one for one in plan.until("train") if one.stage not in ("train", "score")]
    owed = [one for one in before if not one.sealed]
    if not owed:
        return
    assert recipe.teacher is not None  # there is something to train on
    if recipe.teacher.engine not in FREE:
        raise TrainingError(
            f"{owed[0].label} has not run; check buys no traces: run distill select first, then check what they teach"
        )
    run_recipe(recipe, options, "prune" if step.upstream.get("model") else "select")


def require_sound(subject: Subject) -> list[Finding]:
    """The cheap findings, for a training that is about to start.

    Raises TrainingError naming all that failed.
    """
    found = list(cheap(subject))
    if failed := [one for one in found if one.status == "failed"]:
        raise TrainingError("; ".join(f"{one.name}: {one.detail}" for one in failed))
    return found


def cheap(subject: Subject) -> Iterator[Finding]:
    """What takes a moment: the text of documents, ends, lengths, packing."""
    yield from (look(subject) for look in (template, reasoning, ends, masks, lengths, steps, packing))


def _sample(documents: Documents) -> list[int]:
    return sorted(random.Random(0).sample(range(len(documents)), min(SAMPLE, len(documents))))


# --- text -----------------------------------------------------------------------------------------------------------


def template(subject: Subject) -> Finding:
    """The chat template gives the same prompt every day."""
    text = str(subject.tokenizer.chat_template)
    if "strftime_now" in text:
        return Finding(
            "template", "note",
            "the chat template prints the day's date, so what is trained today is not quite what is sent tomorrow;"
            " give format.template a file that prints a fixed date",
        )  # fmt: skip
    return Finding(
        "template", "passed", f"the tokenizer's own, {len(text):,} characters, gives the same prompt every day"
    )


def reasoning(subject: Subject) -> Finding:
    """Reasoning is in what is supervised, wherever the traces have it."""
    close = subject.recipe.format.close_marker
    thoughts = [_text(subject, index, THINK) for index in _sample(subject.documents)]
    with_thought = [text for text in thoughts if text]
    if not with_thought:
        needed = subject.recipe.select.reasoning == "required"
        remedy = "; look at them: distill inspect --stage select" if needed else ""
        return Finding("reasoning", "failed" if needed else "note", f"no document has supervised reasoning{remedy}")
    open_ended = [text for text in with_thought if not text.rstrip().endswith(close)]
    if open_ended:
        return Finding("reasoning", "failed", f"{len(open_ended)} of {len(thoughts)} lack {close!r}")
    shown = " ".join(with_thought[0].split())[:60]
    return Finding(
        "reasoning", "passed", f"supervised in {len(with_thought)} of {len(thoughts)} looked at: {shown!r} …"
    )


def _text(subject: Subject, index: int, kind: int) -> str:
    ids, segments = subject.documents.ids(index), subject.documents.segments(index)
    return str(subject.tokenizer.decode(ids[segments == kind].tolist(), skip_special_tokens=False))


def ends(subject: Subject) -> Finding:
    """Every document ends with a supervised end token that generation stops at, and the files will agree on it."""
    end = subject.tokenizer.eos_token_id
    documents = subject.documents
    wrong = [
        index for index in _sample(documents)
        if documents.segments(index)[-1] != EOS or documents.ids(index)[-1] != end
    ]  # fmt: skip
    stops = end_ids(subject.model)
    agree = end in stops and subject.model.config.eos_token_id in (end, stops)
    if wrong or not agree or subject.phase.loss_weights.eos <= 0:
        return Finding(
            "end token", "failed", f"{len(wrong)} documents do not end in {end}; generation stops at {stops}"
        )
    name = subject.tokenizer.convert_ids_to_tokens(end)
    return Finding("end token", "passed", f"{name} ({end}) ends and is supervised in every document; stops: {stops}")


def masks(subject: Subject) -> Finding:
    """Masks go by position, so a pad token that is also the end token takes nothing away."""
    documents = subject.documents
    supervised = [int((documents.segments(index) != PROMPT).sum()) for index in _sample(documents)]
    share = sum(supervised) / sum(int(documents.lengths[index]) for index in _sample(documents))
    same = subject.tokenizer.pad_token_id == subject.tokenizer.eos_token_id
    pad = "pad and end are one token, which does no harm here" if same else "pad and end are different tokens"
    status = "passed" if min(supervised) > 1 else "failed"
    return Finding(
        "masks", status, f"by position; {share:.0%} of tokens are supervised, {min(supervised)} at least; {pad}"
    )


def lengths(subject: Subject) -> Finding:
    """How long documents are, and how many were too long."""
    counts, tokens = subject.documents.counts, subject.documents.lengths
    lost = counts.get("too_long", 0)
    share = lost / max(1, lost + counts.get("documents", len(tokens)))
    p50, p95 = (int(np.percentile(tokens, q)) for q in (50, 95))
    detail = (
        f"median {p50:,} tokens, 95% {p95:,}, longest {int(tokens.max()):,} of {subject.recipe.format.max_tokens:,};"
        f" {lost:,} ({share:.1%}) were longer and are left out"
    )
    remedy = "; raise format.max_tokens, or the student learns from short traces only" if share > 0.1 else ""
    return Finding("lengths", "note" if remedy else "passed", detail + remedy)


def steps(subject: Subject) -> Finding:
    """What the plan comes to."""
    phase, documents = subject.phase, subject.documents
    plan = plan_of(documents, phase)
    packs = [pack for chosen in plan[:20] for pack in cut(chosen, documents, phase)]
    filled = sum(int(documents.lengths[index]) for chosen in plan[:20] for index in chosen)
    room = sum(pack.ids_BT.size if phase.batching == "bucketed" else phase.micro_batch_tokens for pack in packs)
    detail = (
        f"{len(plan):,} optimizer steps of {sum(map(len, plan)) / len(plan):,.1f} documents; "
        f"micro-batches {filled / room:.0%} full"
    )
    few = len(plan) < 20
    return Finding("steps", "note" if few else "passed", detail + ("; few: lower step_tokens for more" if few else ""))


# --- the model ------------------------------------------------------------------------------------------------------


def _shortest(documents: Documents, most: int, tokens: int) -> list[int]:
    """The shortest documents, at most so many and so many tokens together; two at least where there are."""
    order = np.argsort(documents.lengths, kind="stable")[:most].tolist()
    total = np.cumsum(documents.lengths[order])
    return order[: max(min(2, len(order)), int((total <= tokens).sum()))]


@torch.no_grad()
def packing(subject: Subject) -> Finding:
    """Documents packed together have the log-probabilities of each alone, as transformers itself computes them."""
    chosen = _shortest(subject.documents, PROBE_DOCUMENTS, PROBE_TOKENS)
    worst = packing_difference(subject.model, subject.documents, chosen, subject.phase)
    status = "passed" if worst <= LEAK else "failed"
    remedy = "" if worst <= LEAK else "; documents see one another: set student.attention=per_document"
    return Finding(
        "packing", status, f"packed against alone: at most {worst:.1e} nats a token (limit {LEAK:g}){remedy}"
    )


@torch.no_grad()
def packing_difference(model: Any, documents: Documents, chosen: Sequence[int], phase: TrainingPhase) -> float:
    """Largest difference of a supervised token's log-probability between a pack and its documents alone, in nats."""
    training, attention = model.training, model.config._attn_implementation
    objective = StudentObjective(model.eval(), phase.model_copy(update={"loss_weights": type(phase.loss_weights)()}))
    packed = objective(PackTensors.of(lay_out(documents, chosen), model.device)).nll_N
    model.set_attn_implementation("sdpa")
    try:
        alone = [_alone(model, documents, index) for index in chosen]
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    return float((packed.double() - torch.cat(alone).to(packed.device)).abs().max())


def _alone(model: Any, documents: Documents, index: int) -> torch.Tensor:
    """Negative log-likelihood of each supervised token of one document, by transformers' own forward pass."""
    ids = torch.from_numpy(documents.ids(index).astype(np.int64)).to(model.device)
    logprobs = torch.log_softmax(model(ids[None], use_cache=False).logits[0].double(), -1)
    rows = torch.from_numpy(np.flatnonzero(documents.segments(index)[1:])).to(model.device)
    return -logprobs[rows].gather(-1, ids[1:][rows, None]).squeeze(-1)


def overfit(subject: Subject) -> Finding:
    """A copy of the student learns a few of the shortest documents: the loss must at least halve."""
    chosen = _shortest(subject.documents, PROBE_DOCUMENTS, PROBE_TOKENS)
    few = subject.documents.subset(chosen)
    phase = SftPhase(
        kind="sft", lr=max(PROBE_LR, subject.phase.lr), epochs=PROBE_STEPS, step_tokens=int(few.lengths.sum()),
        micro_batch_tokens=int(few.lengths.sum()), warmup_ratio=0.1, schedule="constant",
        gradient_checkpointing=subject.phase.gradient_checkpointing,
    )  # fmt: skip
    reports = _trained(subject, few, phase)
    first, last = reports[0].loss, reports[-1].loss
    status = "passed" if last < first / 2 else "failed"
    remedy = "" if status == "passed" else "; the model does not learn its own data: look at the documents and the base"
    return Finding(
        "overfit probe",
        status,
        f"{len(chosen)} documents, {len(reports)} steps: loss {first:.3f} to {last:.3f}{remedy}",
    )


def cost(subject: Subject) -> Finding:
    """Time and memory of the whole phase, from one step of it."""
    phase = subject.phase.model_copy(update={"max_steps": 1, "monitor": None, "early_stopping": None, "replay": []})
    started = time.perf_counter()
    [report] = _trained(subject, subject.documents, phase)
    plan = plan_of(subject.documents, subject.phase)
    tokens = sum(int(subject.documents.lengths[index]) for chosen in plan for index in chosen)
    rate = report.tokens / report.seconds
    device = str(subject.model.device)
    detail = (
        f"{rate:,.0f} tokens/s in a first step (later ones are faster): about {clock_text(tokens / rate)} for"
        f" {tokens:,} tokens; peak memory {peak_memory_mb(device) / 1e3:,.1f} GB with this probe's copy of the model"
        f" ({time.perf_counter() - started:,.0f} s for this estimate)"
    )
    if isinstance(phase, KdPhase):
        detail += "; that is with cross-entropy: what teachers and the student's own answers take comes on top"
    return Finding("cost", "note", detail)


def _trained(subject: Subject, documents: Documents, phase: TrainingPhase) -> list[StepReport]:
    """Train a copy of the student; what its steps said."""
    with tempfile.TemporaryDirectory(prefix="distill-check-") as work:
        trainer = Trainer(copy.deepcopy(subject.model), documents, phase, subject.precision, Path(work))
        return [report for report in trainer.run(Stop()) if isinstance(report, StepReport)]


PROBES: tuple[Callable[[Subject], Finding], ...] = (overfit, cost)
"""What takes longer and only `distill check` does."""
