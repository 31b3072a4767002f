"""What a model comes from: its base, the prompts and teachers that trained it, and whose licences meet in it.

Read from the recipe and from what the stages before it recorded, for the cards of students and of artifacts and for an
artifact's manifest. What is not known is None and never guessed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill.cards import is_hub_id, markdown_table, text, without_folders
from distill.config import (
    HubSource,
    KdPhase,
    PromptSource,
    Recipe,
    Replay,
    StudentConfig,
    TeacherConfig,
    TeacherModel,
)
from distill.errors import ModelError
from distill.licences import MODEL, Stated, in_table, model_fields, model_terms, problems
from distill.models import find_model
from distill.records import Example, read_records
from distill.runs import SealedRun, Step, open_sealed


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
    remedy: str = "student.licence"
    """Where a recipe states its licence."""


@dataclass(frozen=True)
class Ancestry:
    """What went into a model; `ancestry_of` and `base_alone` make one."""

    recipe: Recipe
    base: Base
    sources: Sequence[Source] = ()
    """Most examples first."""
    teachers: Sequence[Taught] = ()
    phases: Sequence[int] = ()
    """Places in the recipe's list of the phases that the model went through, in order."""
    examples: SealedRun | None = None
    """The select run whose examples trained it; None where nothing did."""

    @property
    def replayed(self) -> list[tuple[int, int, Replay]]:
        """(phase, place in its list, set) of every replay set."""
        student = self.recipe.student
        return [
            (number, place, one)
            for number in self.phases
            for place, one in enumerate(getattr(student.phases[number] if student else None, "replay", []))
        ]

    @property
    def distributions(self) -> list[TeacherModel]:
        """The models whose distributions were learned; none where every phase learned from text alone."""
        student, logprobs = self.recipe.student, self.recipe.logprobs
        learned = any(isinstance(student.phases[number], KdPhase) for number in self.phases) if student else False
        return list(logprobs.teachers) if logprobs and learned else []

    @property
    def hub_sets(self) -> list[str]:
        """Ids of the hub's data sets in what trained: prompts, recorded traces, replay sets."""
        teacher = self.recipe.teacher
        recorded = teacher.recorded.hub if teacher and teacher.recorded and self.phases else None
        found = [
            *(source.config.hub for source in self.sources if source.config),
            recorded,
            *(one.hub for _, _, one in self.replayed),
        ]
        return list(dict.fromkeys(hub.id for hub in found if isinstance(hub, HubSource) and is_hub_id(hub.id)))


# --- gathering ------------------------------------------------------------------------------------------------------


def ancestry_of(recipe: Recipe, step: Step) -> Ancestry:
    """What the model of a train step comes from. Raises RunError where the select run is not what was sealed."""
    assert recipe.student is not None  # the plan has no train step without it
    selected = step.result("examples")
    steps = list(chain(step))
    return Ancestry(
        recipe=recipe,
        base=_base(recipe.student, steps),
        sources=_sources(recipe, selected.path("examples.jsonl")),
        teachers=_teachers(recipe.teacher, selected.counts.get("teachers", ())),
        phases=[number for one in steps if (number := one.args.get("phase")) is not None],
        examples=selected,
    )


def base_alone(recipe: Recipe, name: str, revision: str, licence: str | None, remedy: str, root: str) -> Ancestry:
    """The ancestry of a model that no recipe trained: itself."""
    return Ancestry(recipe, Base(without_folders(name), _hub_id(name, revision), root, licence, remedy))


def chain(step: Step) -> Iterator[Step]:
    """The steps that made a model, the first one first."""
    if "model" in step.upstream:
        yield from chain(step.upstream["model"])
    yield step


def counts_of_step(step: Step) -> Mapping[str, Any]:
    """What a sealed step counted; its files are not read."""
    return open_sealed(step.folder, check=False).counts


def _base(student: StudentConfig, steps: Iterable[Step]) -> Base:
    known = [step.fields["base"] for step in steps if isinstance(step.fields.get("base"), Mapping)]
    root = str(known[0].get("root", "")) if known else ""
    return Base(without_folders(student.init), _hub_id(student.init, student.revision), root, student.licence)


def _hub_id(name: str, revision: str) -> str | None:
    """A model's name on the hub; None for one that lies here."""
    try:
        on_hub = find_model(name, revision).folder is None and is_hub_id(name)
    except ModelError:  # a later phase does without it
        on_hub = False
    return name if on_hub else None


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


# --- licences -------------------------------------------------------------------------------------------------------


def stated_licences(model: Ancestry) -> list[Stated]:
    """Those of the base, first, and of everything that trained it."""
    numbers = {source.name: n for n, source in enumerate(model.recipe.prompts)}
    of_sources = [
        Stated(f"prompt source {one.name}", licence, f"prompts.{numbers.get(one.name, 0)}.licence")
        for one in model.sources
        for licence in sorted(one.licences, key=str)
    ]
    of_sets = [
        Stated(f"replay set {one.name}", one.licence, f"student.phases.{phase}.replay.{place}.licence")
        for phase, place, one in model.replayed
    ]
    base = Stated(f"base {model.base.name}", model.base.licence, model.base.remedy)
    return list(dict.fromkeys([base, *taught_licences(model), *of_sources, *of_sets]))


def taught_licences(model: Ancestry) -> list[Stated]:
    """Those of the teachers: of the traces' and of the distributions'."""
    of_traces = [
        Stated(f"teacher {one.model}", licence, "teacher.licence")
        for one in model.teachers
        for licence in sorted(one.licences, key=str)
    ]
    learned = [(place, one) for place, one in enumerate(model.distributions)]
    return of_traces + [
        Stated(f"teacher {shown_model(one)}", one.licence, f"logprobs.teachers.{place}.licence")
        for place, one in learned
    ]


def shown_model(one: TeacherModel) -> str:
    """A model by its hub id, a local one by its name."""
    return one.model if is_hub_id(one.model) else one.name


def licence_questions(model: Ancestry) -> list[str]:
    """What is open about the licences that meet in a model, contradictions among them: Markdown, a sentence each."""
    stated = stated_licences(model)
    return [*problems(stated, MODEL), *model_terms(stated[0], taught_licences(model), model.recipe.name)]


def licence_section(model: Ancestry) -> str:
    """A card's section: whose terms the model stands under, and what is open."""
    rows = [[text(one.whose), in_table([one.licence])] for one in stated_licences(model)]
    found = licence_questions(model)
    listed = "\n".join(f"- {problem}" for problem in found)
    said = (
        "Open questions, to be settled before this model is passed on (a reading of names, no legal advice):\n\n"
        + listed
        if found
        else "Every part states a licence that is known, and by their names none contradicts another."
    )
    return f"## Licences\n\n{markdown_table(['of', 'licence'], rows)}\n\n{said}"


def licence_fields(model: Ancestry) -> dict[str, Any]:
    """The `license` of the model by all that went into it, as hubs write it."""
    base, *others = stated_licences(model)
    return model_fields(base.licence, others)


# --- the header that hubs read --------------------------------------------------------------------------------------


def hub_header(model: Ancestry, library: str, tags: Sequence[str], relation: str | None = None) -> str:
    """The YAML block on top of a model's card: ids that hubs have, and nothing else."""
    base = {"base_model": model.base.hub_id} if model.base.hub_id else {}
    related = {"base_model_relation": relation} if base and relation else {}
    plain = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        **licence_fields(model),
        **base,
        **related,
        **({"datasets": model.hub_sets} if model.hub_sets else {}),
        "tags": list(tags),
    }
    return "---\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) + "---"
