"""The checkpoint's card: what the student is, what it was trained on, how, and what was measured on the way.

Written into the checkpoint's folder from the recipe and what the stages counted, with no times or speeds, so that a
run that was stopped and resumed has the same card. What is not known is said and not guessed; local folders and
addresses of servers are left out, and no name can break its Markdown.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from distill import __version__
from distill.cards import (
    code,
    fenced,
    is_hub_id,
    markdown_table,
    origin,
    published,
    sampling,
    text,
    without_folders,
)
from distill.config import (
    HubSource,
    KdPhase,
    PromptSource,
    Recipe,
    Replay,
    StudentConfig,
    TeacherConfig,
    TeacherModel,
    is_hashed,
)
from distill.errors import ModelError
from distill.format import with_system
from distill.licences import MODEL, Stated, in_table, model_fields, model_terms, problems
from distill.models import find_model
from distill.prompts import placeholders, render
from distill.records import Example, Message, read_records
from distill.rows import Row
from distill.runs import PARTIAL, Step, library_versions, open_sealed

CARD_FILE = "README.md"
TAGS = ("reasoning", "knowledge-distillation", "distill")
VERSIONS = ("distill", "torch", "transformers", "tokenizers", "safetensors", "peft")
QUESTION = "What is 17 + 25?"
"""What the code in the card asks, in the words of the largest prompt source."""


class Source(NamedTuple):
    """A prompt source as far as it trains."""

    name: str
    config: PromptSource | None
    """Its part of the recipe."""
    licences: frozenset[str | None]
    """As its prompts state them."""
    examples: int
    first: str
    """Its first prompt that trains; shown only where a generator made it, since others may be nobody's business."""


class Taught(NamedTuple):
    """Who wrote the examples."""

    model: str
    revision: str | None
    engine: str
    licences: frozenset[str | None]
    """By its traces and by the recipe."""
    examples: int | None
    """None where they were not counted."""


class Base(NamedTuple):
    """What the first phase started from."""

    name: str
    hub_id: str | None
    root: str
    """Its content: a sha256, or the id and the commit of the hub; empty where that is not known."""
    licence: str | None


class PhaseRun(NamedTuple):
    """A phase with what its run counted."""

    number: int
    """Its place in the recipe's list, from 0."""
    phase: Any
    counts: Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from; `facts_of` makes one."""

    recipe: Recipe
    identity: str
    """Of the train run."""
    base: Base
    sources: Sequence[Source]
    teachers: Sequence[Taught]
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
    def student(self) -> StudentConfig:
        """The recipe's student."""
        assert self.recipe.student is not None  # there would be no checkpoint
        return self.recipe.student

    @property
    def replayed(self) -> list[tuple[int, int, Replay]]:
        """(phase, place in its list, set) of every replay set."""
        return [
            (run.number, place, one)
            for run in self.phases
            for place, one in enumerate(getattr(run.phase, "replay", []))
        ]


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
    selected = step.result("examples")
    chain = list(_chain(step))
    phases = [
        PhaseRun(number, recipe.student.phases[number], counts if one is step else _counts(one))
        for one in chain
        if (number := one.args.get("phase")) is not None
    ]
    return CardFacts(
        recipe=recipe,
        identity=step.identity,
        base=_base(recipe.student, chain),
        sources=_sources(recipe, selected.path("examples.jsonl")),
        teachers=_teachers(recipe.teacher, selected.counts.get("teachers", ())),
        selection=selected.counts,
        phases=phases,
        looks=list(monitor_rows),
        versions=library_versions(VERSIONS),
        pruned=next((_counts(one) for one in chain if one.stage == "prune"), {}),
    )


def _chain(step: Step) -> Iterator[Step]:
    """The steps that made a model, the first one first."""
    if "model" in step.upstream:
        yield from _chain(step.upstream["model"])
    yield step


def _counts(step: Step) -> Mapping[str, Any]:
    return open_sealed(step.folder, check=False).counts


def _base(student: StudentConfig, chain: Iterable[Step]) -> Base:
    try:
        on_hub = find_model(student.init, student.revision).folder is None and is_hub_id(student.init)
    except ModelError:  # a later phase does without it
        on_hub = False
    known = [step.fields["base"] for step in chain if isinstance(step.fields.get("base"), Mapping)]
    root = str(known[0].get("root", "")) if known else ""
    return Base(without_folders(student.init), student.init if on_hub else None, root, student.licence)


def _sources(recipe: Recipe, examples: Path) -> list[Source]:
    """Who asked what trains, most examples first."""
    numbers, licences, firsts = Counter[str](), dict[str, set[str | None]](), dict[str, str]()
    for example in read_records(examples, Example):
        name = example.prompt.source
        numbers[name] += 1
        licences.setdefault(name, set()).add(example.prompt.licence)
        firsts.setdefault(name, example.prompt.text)
    configs = {source.name: source for source in recipe.prompts}
    return [
        Source(name, configs.get(name), frozenset(licences[name]), number, firsts[name])
        for name, number in numbers.most_common()
    ]


def _teachers(asked: TeacherConfig | None, counted: Iterable[Mapping[str, Any]]) -> list[Taught]:
    """As the select run counted them; a run of an earlier version did not, so what the recipe asked stands for them."""
    stated = asked.licence if asked else None
    found = [
        Taught(
            without_folders(str(one["model"])) or str(one["engine"]),
            one["revision"],
            f"{one['engine']} {one['engine_version']}".strip(),
            frozenset({licence for licence in (one["licence"], stated) if licence} or {None}),
            int(one["examples"]),
        )
        for one in counted
    ]
    if not found and asked:
        model = without_folders(asked.model) or asked.engine
        found = [Taught(model, asked.revision, asked.engine, frozenset({stated}), None)]
    return found


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
    """What hubs read: ids that hubs have, and nothing else."""
    base, *others = stated_licences(facts)
    plain = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **model_fields(base.licence, others),
        **({"base_model": facts.base.hub_id} if facts.base.hub_id else {}),
        **({"datasets": sets} if (sets := hub_sets(facts)) else {}),
        "tags": list(TAGS),
    }
    return "---\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) + "---"


def hub_sets(facts: CardFacts) -> list[str]:
    """Ids of the hub's data sets in what trained: prompts, recorded traces, replay sets."""
    teacher = facts.recipe.teacher
    recorded = teacher.recorded.hub if teacher and teacher.recorded else None
    found = [
        *(source.config.hub for source in facts.sources if source.config),
        recorded,
        *(one.hub for _, _, one in facts.replayed),
    ]
    return list(dict.fromkeys(hub.id for hub in found if isinstance(hub, HubSource) and is_hub_id(hub.id)))


def opening(facts: CardFacts) -> str:
    """The first paragraph: what it is."""
    teachers = list(dict.fromkeys(text(one.model) for one in facts.teachers))
    asked = facts.recipe.teacher
    taught = "worked solutions that a program wrote" if asked and asked.engine == "solver" else ", ".join(teachers)
    writes = "It writes its answer at once."
    if facts.recipe.select.reasoning != "none":
        markers = facts.recipe.format
        writes = f"It writes its reasoning, ended by {code(markers.close_marker)}, and then its answer."
    return (
        f"# {facts.recipe.name}\n\nA causal language model distilled with distill {__version__}: {based_on(facts)} was"
        f" trained on {counted(sum(source.examples for source in facts.sources), 'example')} of {taught}. {writes}"
    )


def based_on(facts: CardFacts) -> str:
    """The base, in words."""
    base, prune = facts.base, facts.student.prune
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
    largest = next((one for one in facts.sources if one.config), None)
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
        for one in facts.sources
    ]
    worded = [
        f"- {text(one.name)}: {code(repr(one.config.template))}"
        + (f", where the instruction is {code(repr(one.config.instruction))}" if one.config.instruction else "")
        for one in facts.sources
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
        for one in facts.teachers
    ]
    if not rows:
        return ""
    table = markdown_table(["teacher", "revision", "engine", "licence", "examples"], rows)
    drawn = [f"- {line}" for line in sampling(facts.recipe.teacher)] if facts.recipe.teacher else []
    return f"### Teacher\n\n{table}\n\n" + "\n".join(drawn)


def distributions(facts: CardFacts) -> list[TeacherModel]:
    """The models whose distributions were learned; none where every phase learned from text alone."""
    logprobs = facts.recipe.logprobs
    learned = any(isinstance(run.phase, KdPhase) for run in facts.phases)
    return list(logprobs.teachers) if logprobs and learned else []


def shown_model(one: TeacherModel) -> str:
    """A model by its hub id, a local one by its name."""
    return one.model if is_hub_id(one.model) else one.name


def distribution_teachers(facts: CardFacts) -> str:
    """Whose distributions were learned, and in what form."""
    models, logprobs = distributions(facts), facts.recipe.logprobs
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
        for phase, _, one in facts.replayed
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
    lines = [f"- Started from {code(facts.base.name)}{content_of(facts.base)}."]
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


def stated_licences(facts: CardFacts) -> list[Stated]:
    """Those of the base, first, and of everything that trained it."""
    numbers = {source.name: n for n, source in enumerate(facts.recipe.prompts)}
    of_sources = [
        Stated(f"prompt source {one.name}", licence, f"prompts.{numbers.get(one.name, 0)}.licence")
        for one in facts.sources
        for licence in sorted(one.licences, key=str)
    ]
    of_sets = [
        Stated(f"replay set {one.name}", one.licence, f"student.phases.{phase}.replay.{place}.licence")
        for phase, place, one in facts.replayed
    ]
    base = Stated(f"base {facts.base.name}", facts.base.licence, "student.licence")
    return list(dict.fromkeys([base, *taught_licences(facts), *of_sources, *of_sets]))


def taught_licences(facts: CardFacts) -> list[Stated]:
    """Those of the teachers: of the traces' and of the distributions'."""
    of_traces = [
        Stated(f"teacher {one.model}", licence, "teacher.licence")
        for one in facts.teachers
        for licence in sorted(one.licences, key=str)
    ]
    learned = [(place, one) for place, one in enumerate(distributions(facts))]
    return of_traces + [
        Stated(f"teacher {shown_model(one)}", one.licence, f"logprobs.teachers.{place}.licence")
        for place, one in learned
    ]


def licences(facts: CardFacts) -> str:
    """Whose terms this model stands under, and what is open."""
    stated = stated_licences(facts)
    rows = [[text(one.whose), in_table([one.licence])] for one in stated]
    found = [*problems(stated, MODEL), *model_terms(stated[0], taught_licences(facts))]
    listed = "\n".join(f"- {problem}" for problem in found)
    said = (
        "Open questions, to be settled before this model is passed on (a reading of names, no legal advice):\n\n"
        + listed
        if found
        else "Every part states a licence that is known, and by their names none contradicts another."
    )
    return f"## Licences\n\n{markdown_table(['of', 'licence'], rows)}\n\n{said}"


# --- limits, origin -------------------------------------------------------------------------------------------------


def limits(facts: CardFacts) -> str:
    """What a user of the model should not take for granted."""
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in known_limits(facts))


def known_limits(facts: CardFacts) -> Iterator[str]:
    """One sentence or two each."""
    recipe, select, last = facts.recipe, facts.recipe.select, facts.phases[-1].phase
    named = ", ".join(text(source.name) for source in facts.sources)
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
    if not facts.replayed:
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
