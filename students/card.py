"""The checkpoint's card: what the student is, what it was trained on, how, and what was measured on the way.

Written into the checkpoint's folder from the recipe and what the stages counted, with no times or speeds, so that a
run that was stopped and resumed has the same card. What is not known is said and not guessed; local folders and
addresses of servers are left out, and no name can break its Markdown.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from distill import __version__
from distill.ancestry import (
    Ancestry,
    Base,
    ancestry_of,
    chain,
    counts_of_step,
    hub_header,
    licence_section,
    shown_model,
)
from distill.cards import code, fenced, markdown_table, origin, published, sampling, text, without_folders
from distill.config import KdPhase, Recipe, StudentConfig, is_hashed
from distill.format import with_system
from distill.licences import in_table
from distill.prompts import placeholders, render
from distill.records import Message
from distill.rows import Row
from distill.runs import PARTIAL, Step, library_versions

CARD_FILE = "README.md"
TAGS = ("reasoning", "knowledge-distillation", "distill")
VERSIONS = ("distill", "torch", "transformers", "tokenizers", "safetensors", "peft")
QUESTION = "What is 17 + 25?"
"""What the code in the card asks, in the words of the largest prompt source."""


class PhaseRun(NamedTuple):
    """A phase with what its run counted."""

    number: int
    """Its place in the recipe's list, from 0."""
    phase: Any
    counts: Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from; `facts_of` makes one."""

    identity: str
    """Of the train run."""
    ancestry: Ancestry
    selection: Mapping[str, Any]
    """What the select run counted."""
    phases: Sequence[PhaseRun]
    """Those that the checkpoint has been through, in order."""
    looks: Sequence[Mapping[str, Any]]
    """What the last phase's monitor measured, a row a look, in order; figures under any names, and their `step`."""
    versions: Mapping[str, str]
    pruned: Mapping[str, Any]
    """What the prune run counted; empty where there was none."""

    @property
    def recipe(self) -> Recipe:
        """The recipe it was trained by."""
        return self.ancestry.recipe

    @property
    def student(self) -> StudentConfig:
        """The recipe's student."""
        assert self.recipe.student is not None  # there would be no checkpoint
        return self.recipe.student


# --- facts ----------------------------------------------------------------------------------------------------------


def facts_of(
    recipe: Recipe, step: Step, counts: Mapping[str, Any], monitor_rows: Sequence[Mapping[str, Any]] = ()
) -> CardFacts:
    """Gather what the card of a train step says, before the step is sealed.

    `counts` are those the step will be sealed with. `monitor_rows` are the monitor's looks, oldest first: each has a
    `step`; numbers, also nested (`{"heldout_loss": {"think": 0.4}}`), are shown under their names. Raises RunError
    where the select run is not what was sealed.
    """
    assert recipe.student is not None  # the plan has no train step without it
    ancestry, steps = ancestry_of(recipe, step), list(chain(step))
    phases = [
        PhaseRun(number, recipe.student.phases[number], counts if one is step else counts_of_step(one))
        for one in steps
        if (number := one.args.get("phase")) is not None
    ]
    return CardFacts(
        identity=step.identity,
        ancestry=ancestry,
        selection=ancestry.examples.counts if ancestry.examples else {},
        phases=phases,
        looks=list(monitor_rows),
        versions=library_versions(VERSIONS),
        pruned=next((counts_of_step(one) for one in steps if one.stage == "prune"), {}),
    )


# --- the card -------------------------------------------------------------------------------------------------------


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into a checkpoint's folder, aside and then in place of any that is there."""
    part = folder / (CARD_FILE + PARTIAL)
    part.write_text(card(facts), encoding="utf-8")
    os.replace(part, folder / CARD_FILE)


def card(facts: CardFacts) -> str:
    """The README.md of a checkpoint, in Markdown."""
    parts = (
        header, opening, use, prompts, teacher, distribution_teachers, selection, replay, training, metrics, licences,
        limits, reproduction, versions,
    )  # fmt: skip
    return "\n\n".join(section for part in parts if (section := part(facts))) + "\n"


def header(facts: CardFacts) -> str:
    """What hubs read."""
    return hub_header(facts.ancestry, "transformers", TAGS)


def opening(facts: CardFacts) -> str:
    """The first paragraph: what it is."""
    teachers = list(dict.fromkeys(text(one.model) for one in facts.ancestry.teachers))
    asked = facts.recipe.teacher
    taught = "worked solutions that a program wrote" if asked and asked.engine == "solver" else ", ".join(teachers)
    examples = counted(sum(source.examples for source in facts.ancestry.sources), "example")
    writes = "It writes its answer at once."
    if facts.recipe.select.reasoning != "none":
        markers = facts.recipe.format
        writes = f"It writes its reasoning, ended by {code(markers.close_marker)}, and then its answer."
    return (
        f"# {facts.recipe.name}\n\nA causal language model distilled with distill {__version__}: {based_on(facts)} was"
        f" trained on {examples} of {taught}. {writes}"
    )


def based_on(facts: CardFacts) -> str:
    """The base, in words."""
    base, prune = facts.ancestry.base, facts.student.prune
    link = f"[{text(base.name)}](https://huggingface.co/{base.hub_id})" if base.hub_id else code(base.name)
    return f"a pruned {link}" if prune else link


# --- use ------------------------------------------------------------------------------------------------------------

LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")

messages = [
{messages}
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
written = model.generate(**inputs, {drawn})
text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
{ending}"""
SPLITTING = """reasoning, _, answer = text.rpartition({close})
print(answer.strip())"""


def use(facts: CardFacts) -> str:
    """Code that sends what the student was trained on, and what else a caller must know."""
    recipe = facts.recipe
    asked = with_system([Message(role="user", content=user_turn(facts))], recipe.format.system)
    program = LOADING.format(
        messages="\n".join(f"    {message!r}," for message in asked),
        drawn=drawing(recipe),
        ending="print(text)" if recipe.select.reasoning == "none" else SPLITTING.format(close=_marker(recipe)),
    )
    notes = [
        "`FOLDER` is this folder, or its name on a hub. The tokenizer's chat template is the one of training, so these"
        " lines send a prompt in exactly the form that training saw."
    ]
    if recipe.format.system is not None:
        notes.append(
            "Send the system message with every conversation: the student was trained with it, and without it the"
            " template may put one of its own."
        )
    return f"## Use\n\n{fenced(program, 'python')}\n\n" + " ".join(notes)


def _marker(recipe: Recipe) -> str:
    return repr(recipe.format.close_marker)


def user_turn(facts: CardFacts) -> str:
    """A generated problem, or else a question in the words that the largest prompt source puts around it."""
    largest = next((one for one in facts.ancestry.sources if one.config), None)
    if largest is None or largest.config is None:
        return QUESTION
    source = largest.config
    if source.reasoning_gym is not None:
        return largest.first
    columns = {name: f"{{{name}}}" for name in placeholders(source.template) if name != "instruction"}
    return render(source, Row("the card", columns | {source.question_column: QUESTION}), QUESTION)


def drawing(recipe: Recipe) -> str:
    """Arguments of `generate`: as the recipe evaluates, else greedily up to the longest training document."""
    if recipe.evaluate is None:
        return f"max_new_tokens={recipe.format.max_tokens}, do_sample=False"
    drawn = recipe.evaluate.sampling
    if drawn.temperature == 0:
        return f"max_new_tokens={drawn.max_new_tokens}, do_sample=False"
    return (
        f"max_new_tokens={drawn.max_new_tokens}, do_sample=True, temperature={drawn.temperature}, top_p={drawn.top_p}"
    )


# --- data -----------------------------------------------------------------------------------------------------------


def prompts(facts: CardFacts) -> str:
    """Where the prompts come from, and how they are worded."""
    rows = [
        [text(one.name), origin(one.config) if one.config else "", in_table(one.licences), f"{one.examples:,}"]
        for one in facts.ancestry.sources
    ]
    worded = [
        f"- {text(one.name)}: {code(repr(one.config.template))}"
        + (f", where the instruction is {code(repr(one.config.instruction))}" if one.config.instruction else "")
        for one in facts.ancestry.sources
        if one.config and one.config.template != "{question}"
    ]
    return "## Training data\n\n### Prompts\n\n" + "\n\n".join(
        [
            markdown_table(["source", "from", "licence", "examples"], rows),
            *(["Wording of the user's turn:\n\n" + "\n".join(worded)] if worded else []),
        ]
    )


def teacher(facts: CardFacts) -> str:
    """Who wrote the answers, and how they were drawn."""
    rows = [
        [
            text(one.model),
            text(one.revision or "not known"),
            text(one.engine),
            in_table(one.licences),
            "not counted" if one.examples is None else f"{one.examples:,}",
        ]
        for one in facts.ancestry.teachers
    ]
    if not rows:
        return ""
    table = markdown_table(["teacher", "revision", "engine", "licence", "examples"], rows)
    drawn = [f"- {line}" for line in sampling(facts.recipe.teacher)] if facts.recipe.teacher else []
    return f"### Teacher\n\n{table}\n\n" + "\n".join(drawn)


def distribution_teachers(facts: CardFacts) -> str:
    """Whose distributions were learned, and in what form."""
    models, logprobs = facts.ancestry.distributions, facts.recipe.logprobs
    if not models or logprobs is None:
        return ""
    shares = logprobs.weights()
    rows = [
        [text(shown_model(one)), text(one.revision), in_table([one.licence]), f"{shares[one.name]:.0%}"]
        for one in models
    ]
    table = markdown_table(["teacher of distributions", "revision", "licence", "share"], rows)
    cached = any(isinstance(run.phase, KdPhase) and run.phase.teacher == "cache" for run in facts.phases)
    kept = {"topk": f"the {logprobs.k} likeliest tokens and the mass of all others",
            "sampled": f"{logprobs.draws} tokens drawn",
            "hybrid": f"the {logprobs.k} likeliest tokens and {logprobs.draws} drawn from the others"}  # fmt: skip
    said = f"Stored for each position: {kept[logprobs.form]}." if cached else "In memory beside the student."
    return f"### Distributions\n\n{table}\n\n{said}"


def selection(facts: CardFacts) -> str:
    """Which of the teacher's answers trained, and why the others did not."""
    counts, select = facts.selection, facts.recipe.select
    lines = [
        f"- Verdicts that may train: {', '.join(select.outcomes)}; reasoning: {select.reasoning}; of the answers to one"
        f" prompt: {select.per_prompt}."
    ]
    if "samples" in counts:
        prompts_of = counted(int(counts["prompts"]), "prompt")
        lines.insert(
            0,
            f"- Of {counted(int(counts['samples']), 'answer')}, {counts['examples']:,} to {prompts_of} were selected.",
        )
    dropped = [
        [text(str(one["reason"])), text(str(one["why"])), f"{one['dropped']:,}"] for one in counts.get("funnel", ())
    ]
    return "\n\n".join(
        [
            "### Selection",
            "\n".join(lines),
            *([markdown_table(["dropped for", "meaning", "answers"], dropped)] if dropped else []),
        ]
    )


def replay(facts: CardFacts) -> str:
    """Other chats that were mixed in."""
    rows = [
        [str(phase), text(one.name), origin(one), in_table([one.licence]), f"{one.weight:g}"]
        for phase, _, one in facts.ancestry.replayed
    ]
    if not rows:
        return ""
    titles = ["phase", "replay set", "from", "licence", "tokens for each token of the traces"]
    return "### Replay\n\nMixed in, so that the student keeps what it knew:\n\n" + markdown_table(titles, rows)


# --- training -------------------------------------------------------------------------------------------------------

LABELS = {
    "documents": "training documents",
    "too_long": "documents left out: longer than format.max_tokens",
    "seam_differs": "documents that tokenize otherwise when prompt and answer are one text",
    "steps": "optimizer steps",
    "tokens": "tokens, prompts included",
    "supervised_tokens": "supervised tokens",
    "packing_efficiency": "packing efficiency",
    "first_loss": "loss of the first step, nats a token",
    "last_loss": "loss of the last step, nats a token",
}
"""Titles of what a train run counts; another count is shown under its own name."""
LOSSES = ("first_loss", "last_loss")
DIFFERS_BY_RUN = re.compile(r"seconds|_s$|_gb$|_mb$|bytes|memory")
"""Names of measurements that are not the same when a run is made again."""


def training(facts: CardFacts) -> str:
    """What was done: the settings of each phase and what it counted."""
    student, numbers = facts.student, [f"phase {run.number}" for run in facts.phases]
    lines = [f"- Started from {code(facts.ancestry.base.name)}{content_of(facts.ancestry.base)}."]
    if student.prune:
        asked = flat(published(student.prune)) | counts_of(facts.pruned)
        cut = "; ".join(f"{key.replace('_', ' ')} {text(shown(value))}" for key, value in asked.items())
        lines.append(f"- Pruned before training: {cut}.")
    if student.new_tokens:
        lines.append(f"- Tokens added to the vocabulary: {', '.join(map(code, student.new_tokens))}.")
    kept = "master weights and optimizer state fp32"
    lines.append(f"- Precision: {student.precision} compute, {kept}; documents of at most"
                 f" {facts.recipe.format.max_tokens:,} tokens, prompts unsupervised.")  # fmt: skip
    if any(getattr(run.phase, "lora", None) for run in facts.phases):
        lines.append("- Low-rank adapters (LoRA) were trained and merged: this is a plain checkpoint.")
    settings = table_of([setting_of(run.phase) for run in facts.phases])
    measured = table_of([counts_of(run.counts, but=LOSSES) for run in facts.phases], LABELS)
    return "\n\n".join(
        [
            "## Training procedure",
            "\n".join(lines),
            markdown_table(["setting", *numbers], settings),
            markdown_table(["counted", *numbers], measured),
        ]
    )


def content_of(base: Base) -> str:
    """Which base exactly, in words."""
    name, at, commit = base.root.rpartition("@")
    if at and name:
        known = not commit.startswith("unresolved:")
        return (
            f" at commit {code(commit)}"
            if known
            else f" at {code(commit.removeprefix('unresolved:'))}, commit not known"
        )
    return f", sha256 {code(base.root)}" if base.root else ""


def setting_of(phase: BaseModel) -> dict[str, Any]:
    """What decides a phase's result, nested keys dotted; replay sets have a table of their own."""
    kept = {
        name: getattr(phase, name)
        for name, field in type(phase).model_fields.items()
        if is_hashed(field) and name != "replay"
    }
    return flat(
        {name: part.model_dump(mode="json") if isinstance(part, BaseModel) else part for name, part in kept.items()}
    )


def counts_of(counts: Mapping[str, Any], but: Sequence[str] = ()) -> dict[str, Any]:
    """Counts that are the same when the run is made again, nested keys dotted."""
    return {
        key: without_folders(value) if isinstance(value, str) else value
        for key, value in flat(counts).items()
        if key not in but and not DIFFERS_BY_RUN.search(key) and isinstance(value, int | float | str)
    }


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; what is None is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        elif value is not None:
            found[f"{above}{key}"] = value
    return found


def table_of(columns: Sequence[Mapping[str, Any]], labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """Rows of a table with a column a mapping, a row a key of any."""
    keys = dict.fromkeys(key for column in (labels or {}, *columns) for key in column if any(key in c for c in columns))
    return [
        [
            (labels or {}).get(key) or code(key),
            *(text(shown(column[key])) if key in column else "" for column in columns),
        ]
        for key in keys
    ]


def shown(value: Any) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return (", ".join(map(shown, value)) or "none") if isinstance(value, list | tuple) else str(value)


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics(facts: CardFacts) -> str:
    """Loss of each phase, and what the last phase's monitor measured."""
    losses = [{key: run.counts[key] for key in LOSSES if run.counts.get(key) is not None} for run in facts.phases]
    numbers = [f"phase {run.number}" for run in facts.phases]
    parts = ["## Metrics", "Training loss:\n\n" + markdown_table(["measured", *numbers], table_of(losses, LABELS))]
    parts += [monitored(facts)] if facts.looks else ["Nothing else was measured while training."]
    parts.append(
        "Verified accuracy of this checkpoint, with intervals and beside its base and its teacher, is measured after"
        " training by `distill eval`; it is not part of this card."
    )
    return "\n\n".join(parts)


def monitored(facts: CardFacts) -> str:
    """The monitor's figures at its first and last look, and at the one that early stopping chose."""
    last = facts.phases[-1]
    looks = list({int(look.get("step", 0)): look for look in facts.looks}.values())
    best = last.counts.get("best_step")
    chosen = [looks[0], *(look for look in looks[1:-1] if look.get("step") == best), *looks[1:][-1:]]
    rows = [{key: figure(key, value) for key, value in flat(look).items() if is_figure(key, value)} for look in chosen]
    titles = [f"step {look.get('step', 0):,}{' (best)' if look.get('step') == best else ''}" for look in chosen]
    table = markdown_table([f"measured in phase {last.number}", *titles], table_of(rows))
    monitor = getattr(last.phase, "monitor", None)
    if monitor is None or not monitor.sets:
        return f"In the loop:\n\n{table}"
    asked = f"{counted(monitor.problems, 'problem')} a set, answers of at most {monitor.max_new_tokens:,} tokens"
    return f"In the loop (accuracies on {asked}):\n\n{table}"


def is_figure(key: str, value: Any) -> bool:
    """Whether a part of a look is something measured."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and key != "step" and not DIFFERS_BY_RUN.search(key)


def figure(key: str, value: float) -> str:
    """A measured number; shares as percent."""
    return f"{value:.1%}" if "accuracy" in key and isinstance(value, float) and 0 <= value <= 1 else shown(value)


# --- licences -------------------------------------------------------------------------------------------------------


def licences(facts: CardFacts) -> str:
    """Whose terms this model stands under, and what is open."""
    return licence_section(facts.ancestry)


# --- limits, origin -------------------------------------------------------------------------------------------------


def limits(facts: CardFacts) -> str:
    """What a user of the model should not take for granted."""
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in known_limits(facts))


def known_limits(facts: CardFacts) -> Iterator[str]:
    """One sentence or two each."""
    recipe, select, last = facts.recipe, facts.recipe.select, facts.phases[-1].phase
    named = ", ".join(text(source.name) for source in facts.ancestry.sources)
    yield f"It was trained on prompts of {named}; nothing here says how it does on anything else."
    if recipe.teacher and recipe.teacher.engine == "solver":
        yield "Its teacher was a program that writes worked solutions of generated problems, no language model."
    if select.outcomes == ["correct"]:
        yield "Verdicts were on final answers: reasoning that is wrong on the way to a right one was learned too."
    else:
        yield f"Answers judged {', '.join(select.outcomes)} trained: not all of what it learned is right."
    if select.reasoning != "none":
        yield "What it writes before its answer reads like reasoning; that it led to the answer is not known."
    yield (
        f"No training document was longer than {recipe.format.max_tokens:,} tokens, prompt included"
        f"{too_long(facts)}; texts beyond that length are untried."
    )
    if not facts.ancestry.replayed:
        yield "No other data was mixed in, so it may have lost some of what its base could do."
    if facts.student.prune:
        yield "It is smaller than its base, and was healed on this training data alone."
    stopping, monitor = getattr(last, "early_stopping", None), getattr(last, "monitor", None)
    if stopping:
        yield f"Its weights were chosen by {stopping.metric} in the loop, so that figure above flatters it."
    if facts.looks and monitor and monitor.sets:
        yield "Accuracies in the loop are on few problems and have no intervals: they show a trend and compare nothing."
    yield "It was not trained or tested for safety, and takes over what its base and its teacher get wrong."


def too_long(facts: CardFacts) -> str:
    """How many documents were too long to train, if any."""
    most = max((int(run.counts.get("too_long") or 0) for run in facts.phases), default=0)
    return f" ({counted(most, 'longer one')} left out)" if most else ""


PARTS = ("name", "prompts", "teacher", "select", "format", "student", "evaluate")
"""Sections of a recipe that decide what trains: prompts of evaluation sets never do."""


def reproduction(facts: CardFacts) -> str:
    """The recipe and the command."""
    shown = published(facts.recipe)
    kept = {key: shown[key] for key in PARTS if key in shown}
    recipe = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
    return (
        "## Make it again\n\nSave this as `recipe.yaml`, beside it the files it names, and run `distill train"
        f" recipe.yaml` with distill {__version__}. The identity of the last phase is `{facts.identity}`. From the"
        " same traces the same weights come out, to the bit, on the same kind of device with as many threads and the"
        " same versions; a language model that is asked again may write other traces.\n\n"
        f"{fenced(recipe, 'yaml')}"
    )


def versions(facts: CardFacts) -> str:
    """Of the libraries that trained it."""
    return "## Versions\n\n" + ", ".join(f"{name} {text(version)}" for name, version in facts.versions.items())


def counted(number: int, what: str) -> str:
    """`1 example`, `2 examples`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
