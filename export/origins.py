"""What an artifact is bound to: its student, training data, teachers, base, recipe, their licences, and its numbers.

Read from the recipe and from what the stages before recorded; nothing here looks at the artifact.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from distill.ancestry import (
    Ancestry,
    ancestry_of,
    base_alone,
    chain,
    counts_of_step,
    licence_fields,
    licence_questions,
    shown_model,
)
from distill.cards import without_folders
from distill.config import Recipe
from distill.records import digest_json
from distill.runs import Step

from .manifest import DataOrigin, Evaluated, LicenceReading, ModelOrigin, Origins, RecipeOrigin


def ancestry_of_export(recipe: Recipe, step: Step) -> Ancestry:
    """What the exported model comes from: all that trained it, or itself where the recipe trains nothing."""
    made = step.upstream.get("model")
    if made is not None and "examples" in made.upstream:
        return ancestry_of(recipe, made)
    assert recipe.export is not None  # there would be no export step
    if recipe.export.model:
        root = str(step.fields.get("root", ""))
        return base_alone(recipe, recipe.export.model, "main", recipe.export.licence, "export.licence", root)
    assert recipe.student is not None  # the recipe's own validation
    steps = [step, *(chain(made) if made is not None else ())]
    known = [one.fields["base"] for one in steps if isinstance(one.fields.get("base"), Mapping)]
    root = str(known[0].get("root", "")) if known else ""
    student = recipe.student
    return base_alone(recipe, student.init, student.revision, student.licence, "student.licence", root)


def origins(recipe: Recipe, step: Step, ancestry: Ancestry) -> Origins:
    """Whose weights and words are in the artifact, each by its digest or revision where there is one."""
    base = ModelOrigin(
        id=ancestry.base.hub_id or ancestry.base.name,
        revision=ancestry.base.root.rpartition("@")[2] or None,
        licence=ancestry.base.licence,
    )
    made = step.upstream.get("model")
    return Origins(
        student=ModelOrigin(id=made.folder.name, revision=weights_digest(step), licence=base.licence) if made else base,
        base=base,
        teachers=tuple(_teachers(ancestry)),
        data=_data(ancestry, made) if made is not None and ancestry.examples is not None else None,
        recipe=RecipeOrigin(name=recipe.name, identity=step.identity),
    )


def weights_digest(step: Step) -> str:
    """sha256 of the student's weights as its run recorded it; of the list of them where they lie in several files."""
    files: Mapping[str, Any] = step.result("model").document["files"]
    weights = {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.startswith("model/") and name.endswith(".safetensors")
    }
    return str(next(iter(weights.values()))) if len(weights) == 1 else digest_json(weights)


def _teachers(ancestry: Ancestry) -> Iterable[ModelOrigin]:
    for one in ancestry.teachers:
        licence = " and ".join(sorted(licence for licence in one.licences if licence)) or None
        yield ModelOrigin(id=one.model, revision=one.revision, engine=one.engine, licence=licence)
    for learned in ancestry.distributions:
        yield ModelOrigin(
            id=without_folders(shown_model(learned)), revision=learned.revision, engine=None, licence=learned.licence
        )


def _data(ancestry: Ancestry, made: Step) -> DataOrigin:
    assert ancestry.examples is not None
    counted = [counts_of_step(one).get("tokens") for one in chain(made) if one.args.get("phase") is not None]
    licences = {one.name: tuple(sorted(one.licences, key=str)) for one in ancestry.sources}
    licences |= {f"replay {one.name}": (one.licence,) for _, _, one in ancestry.replayed}
    return DataOrigin(
        id=ancestry.examples.folder.name,
        digest=ancestry.examples.digest,
        examples=sum(one.examples for one in ancestry.sources),
        tokens=None if None in counted else sum(int(one) for one in counted if one is not None),
        licences=licences,
    )


def licence_reading(ancestry: Ancestry) -> LicenceReading:
    """What the licences come to, by their names, and what is open."""
    return LicenceReading(
        licence=str(licence_fields(ancestry)["license"]), questions=tuple(licence_questions(ancestry))
    )


def evaluated(recipe: Recipe, step: Step, summaries: Mapping[str, Mapping[str, Any]]) -> list[Evaluated]:
    """Accuracies with their intervals: of the torch models on the gate's set, then of every variant."""
    assert recipe.export is not None
    torch = {name: step.result(name).counts for name in ("base", "student") if name in step.upstream}
    return [
        Evaluated(
            model=name,
            set=recipe.export.set,
            problems=found["problems"],
            accuracy=found["accuracy"],
            low=found["accuracy_low"],
            high=found["accuracy_high"],
            mean_tokens=found.get("mean_tokens"),
            stop_rate=found.get("stop_rate"),
        )
        for name, found in {**torch, **summaries}.items()
        if found.get("available")
    ]
