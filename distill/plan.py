"""The plan of a recipe: every stage with its identity, known before anything runs.

A stage's identity is a hash over its version, the hashed fields of its sections that differ from their defaults, the
content of its root inputs, and the identities (never the outputs) of its upstream stages. So one pass over the recipe
gives the whole graph, and a look at the run store says which of it is done, which is unfinished, and what changed.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distill.config import KdPhase, PromptSource, Recipe, Replay, TeacherModel, hashed_fields
from distill.engines import ENGINES, load
from distill.errors import RecipeError, naming
from distill.models import find_model, model_digest, tokenizer_root
from distill.prompts import roots as prompt_roots
from distill.records import digest_json
from distill.rows import check_file, hub_root
from distill.runs import STAGE_FILE, DigestCache, RunOptions, Step
from distill.verifiers import resolve

STAGE_VERSIONS = {"prompts": 1, "generate": 1, "select": 2, "prune": 1, "score": 1, "train": 2, "eval": 1, "export": 4}
"""Bumped when a stage gives other results for the same recipe (a changed default is such a change)."""

STAGES = {
    "prompts": "distill.prompts",
    "generate": "distill.teachers.generate",
    "select": "distill.teachers.select",
    "prune": "distill.students.prune",
    "score": "distill.teachers.score",
    "train": "distill.students.train",
    "eval": "distill.evaluation",
    "export": "distill.export.export",
}
"""The module of each stage, imported when the stage runs; each has `preflight` and `run`."""

DIFFED_AS_ONE = 8
"""Changed fields named in a reason before it is cut short."""


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe in the order in which they can run."""

    recipe: Recipe
    steps: Mapping[str, Step]

    @property
    def identity(self) -> str:
        """Identity of the whole pipeline."""
        return digest_json([step.identity for step in self.steps.values()])[:16]

    def until(self, stage: str) -> list[Step]:
        """The steps of a stage and everything they need, in order.

        Raises RecipeError if the recipe has no such stage.
        """
        wanted = [step for step in self.steps.values() if step.stage == stage]
        if not wanted:
            raise RecipeError(f"the recipe has nothing to {stage}; {MISSING_SECTION.get(stage, 'see its sections')}")
        needed: set[str] = set()
        while wanted:
            step = wanted.pop()
            if step.label not in needed:
                needed.add(step.label)
                wanted.extend(step.upstream.values())
        return [step for step in self.steps.values() if step.label in needed]


MISSING_SECTION = {
    "prompts": "add a prompts section",
    "generate": "add prompts and a teacher section",
    "select": "add prompts and a teacher section",
    "prune": "add student.prune",
    "score": "add logprobs with teachers, and a kd phase that reads their cache (teacher: cache)",
    "train": "add a student section with phases",
    "eval": "add an evaluate section",
    "export": "add an export section",
}


ValueT = TypeVar("ValueT")


class Shared:
    """What the plans of many recipes have in common, found out once: digests of roots, hashed fields, whole steps.

    Sections are told apart as objects, so recipes gain where they hold the very same ones. Files are taken not to
    change while it is in use.
    """

    def __init__(self, digests: DigestCache | None = None) -> None:
        self.digests = digests or DigestCache()
        self.steps: dict[tuple[str, str], Step] = {}
        """By label and identity; a step stands for every recipe that has it."""
        self._known: dict[Hashable, Any] = {}

    def once(self, what: Hashable, of: Sequence[object], make: Callable[[], ValueT]) -> ValueT:
        """What `make` gave the first time for these very objects."""
        key = (what, *map(id, of))
        if key not in self._known:
            self._known[key] = (make(), tuple(of))  # held, so that no other object takes an id
        found: ValueT = self._known[key][0]
        return found


class Planner:
    """Builds the steps of one recipe; `make_plan` is the way in."""

    def __init__(self, recipe: Recipe, options: RunOptions, shared: Shared) -> None:
        self.recipe = recipe
        self.options = options
        self.shared = shared
        self.cache = shared.digests
        self.steps: dict[str, Step] = {}

    def hashed(self, section: Any) -> Any:
        """`hashed_fields` of a section or a list of them."""
        if isinstance(section, list):
            return self.shared.once("hashed list", section, lambda: hashed_fields(section))
        return self.shared.once("hashed", [section], lambda: hashed_fields(section))

    def _prompt_roots(self, sources: Sequence[PromptSource]) -> dict[str, str]:
        return self.shared.once("prompt roots", sources, lambda: prompt_roots(sources, self.cache))

    def _verifiers(self, sources: Sequence[PromptSource]) -> list[str]:
        return self.shared.once("verifiers", sources, lambda: verifier_labels(sources))

    def add(self, stage: str, label: str, fields: Mapping[str, Any], upstream: Mapping[str, Step], **args: Any) -> Step:
        """Name a step by what it is made from."""
        identity = digest_json(
            {
                "stage": stage,
                "version": STAGE_VERSIONS[stage],
                "fields": fields,
                "upstream": {role: step.identity for role, step in upstream.items()},
            }
        )[:16]
        step = self.shared.steps.get((label, identity))
        if step is None:
            name = "-".join([self.recipe.name, *label.split(":")[1:]])
            step = Step(stage, label, name, identity, fields, upstream, self.options.runs, args)
            self.shared.steps[label, identity] = step
        self.steps[label] = step
        return step

    def build(self) -> Plan:
        """Every stage that the recipe's sections ask for."""
        recipe = self.recipe
        prompts = self._prompts()
        sets = self._sets(prompts)
        traces = self._traces(prompts, sets)
        pruned = self._prune(traces)
        if recipe.evaluate and recipe.student and "base" in recipe.evaluate.models:
            self._evaluate("base", sets, {"model": pruned} if pruned else {})
        if recipe.evaluate and recipe.teacher and "teacher" in recipe.evaluate.models:
            self._evaluate("teacher", sets, {})
        scores = self._score(traces)
        student = self._train(traces, pruned, sets, scores) or pruned
        if recipe.evaluate and recipe.student and recipe.student.phases and "student" in recipe.evaluate.models:
            assert student is not None
            self._evaluate("student", sets, {"model": student})
        self._export(student, sets)
        return Plan(recipe, self.steps)

    def _prompts(self) -> Step | None:
        sources = self.recipe.prompts
        if not sources:
            return None
        fields = {"sources": self.hashed(sources), "roots": self._prompt_roots(sources)}
        return self.add("prompts", "prompts", fields, {})

    def _sets(self, prompts: Step | None) -> dict[str, Step]:
        """The step that holds each evaluation set's prompts."""
        sets: dict[str, Step] = {}
        for name, chosen in (self.recipe.evaluate.sets if self.recipe.evaluate else {}).items():
            if chosen.source is None:
                assert prompts is not None  # the recipe's own validation
                sets[name] = prompts
            else:
                roots = self._prompt_roots([chosen.source])
                fields = {"sources": self.hashed([chosen.source]), "roots": roots}
                sets[name] = self.add("prompts", f"prompts:{name}", fields, {}, set=name)
        return sets

    def _traces(self, prompts: Step | None, sets: Mapping[str, Step]) -> Step | None:
        teacher = self.recipe.teacher
        if teacher is None or prompts is None:
            return None
        roots = self._teacher_roots()
        fields = {"teacher": self.hashed(teacher), "roots": roots}
        if teacher.engine in ("transformers", "onnx", "vllm"):
            # a local teacher reads the format's markers and renders with the recipe's template
            fields["format"] = self.hashed(self.recipe.format)
        if teacher.engine == "recorded":
            fields["markers"] = [self.recipe.format.open_marker, self.recipe.format.close_marker]
        if teacher.until is not None:
            fields["verifiers"] = self._verifiers(self.recipe.prompts)  # they decide when a prompt has enough samples
        generated = self.add("generate", "generate", fields, {"prompts": prompts})
        if self.options.accept_partial and not generated.sealed:
            # what is there now is another thing than what is wanted, and has an identity of its own
            fields = {**fields, "partial": self._ledger_content(roots)}
            generated = self.add("generate", "generate", fields, {"prompts": prompts})
        # prompts of named evaluation sets never train, so selection depends on them
        kept_apart = {f"set:{name}": step for name, step in sets.items() if step is not prompts}
        fields = {"select": self.hashed(self.recipe.select), "verifiers": self._verifiers(self.recipe.prompts)}
        # the data set's chats are written with them
        markers = {key: text for key, text in self.hashed(self.recipe.format).items() if key.endswith("_marker")}
        fields |= {"markers": markers} if markers else {}
        return self.add("select", "select", fields, {"traces": generated, "prompts": prompts, **kept_apart})

    def _teacher_roots(self) -> dict[str, str]:
        assert self.recipe.teacher is not None
        teacher = self.recipe.teacher
        module = load(ENGINES[teacher.engine].partition(":")[0] + ":roots")
        return self.shared.once("teacher roots", [teacher], lambda: dict(module(teacher, self.cache)))

    def _ledger_content(self, roots: Mapping[str, str]) -> str:
        """What the teacher has answered so far, for a run that takes it as it is."""
        teacher = self.recipe.teacher
        assert teacher is not None
        engine_version = load(ENGINES[teacher.engine]).version
        content = load("distill.teachers.ledger:content_of")
        return str(content(self.options.runs, teacher, self.recipe.format, roots, engine_version, self.cache))

    def _base(self) -> dict[str, Any]:
        """The student's starting point: name and content."""
        student = self.recipe.student
        assert student is not None
        return self._model("init", student.init, student.revision)

    def _model(self, key: str, name: str, revision: str) -> dict[str, Any]:
        """What identifies a model: a hub id with its commit, else the content of its files."""

        def look() -> dict[str, Any]:
            source = find_model(name, revision)
            return {key: name if source.folder is None else "<by content>", "root": model_digest(source, self.cache)}

        return self.shared.once(("model", key, name, revision), [], look)

    def _prune(self, examples: Step | None) -> Step | None:
        student = self.recipe.student
        if student is None or student.prune is None:
            return None
        fields: dict[str, Any] = {"prune": self.hashed(student.prune), "base": self._base()}
        upstream: dict[str, Step] = {}
        if student.prune.measured:
            assert examples is not None  # the recipe's own validation
            fields["format"] = self.hashed(self.recipe.format)
            upstream["examples"] = examples
        return self.add("prune", "prune", fields, upstream)

    def _score(self, examples: Step | None) -> dict[str, Step]:
        """A step for every teacher whose distributions are stored: where a phase reads them, or there is no student."""
        logprobs, student = self.recipe.logprobs, self.recipe.student
        phases = student.phases if student else []
        cached = not phases or any(isinstance(phase, KdPhase) and phase.teacher == "cache" for phase in phases)
        if logprobs is None or examples is None or not cached:
            return {}
        unused = {"topk": ("draws", "seed"), "sampled": ("k",), "hybrid": ()}[logprobs.form]
        given = self.hashed(logprobs).items()
        stored = {key: value for key, value in given if key != "teachers" and key not in unused}
        steps = {}
        for teacher in logprobs.teachers:
            fields = {
                "logprobs": stored,
                "teacher": self._distilled(teacher),
                "format": self.hashed(self.recipe.format),
                # they render and tokenize the documents; the student's weights do not matter
                **({"tokenizer": self._tokenizer(), "new_tokens": list(student.new_tokens)} if student else {}),
            }
            label = f"score:{teacher.name}"
            steps[teacher.name] = self.add("score", label, fields, {"examples": examples}, teacher=teacher.name)
        return steps

    def _distilled(self, teacher: TeacherModel) -> dict[str, Any]:
        """What identifies a teacher whose distribution is learned, but for its share in a mixture."""
        assert self.recipe.logprobs is not None  # where teachers are named
        fields = {key: value for key, value in self.hashed(teacher).items() if key not in ("name", "weight")}
        with naming(f"{self.recipe.logprobs.key(teacher.name)}.model"):
            return {**fields, **self._model("model", teacher.model, teacher.revision)}

    def _tokenizer(self) -> str:
        """What identifies the student's tokenizer."""
        student = self.recipe.student
        assert student is not None
        given = (student.init, student.revision)
        return self.shared.once(("tokenizer", *given), [], lambda: tokenizer_root(find_model(*given), self.cache))

    def _learned(self, phase: KdPhase, scores: Mapping[str, Step]) -> tuple[dict[str, Any], dict[str, Step]]:
        """Fields and upstream steps of a phase that learns distributions."""
        logprobs = self.recipe.logprobs
        assert logprobs is not None  # the recipe's own validation
        fields: dict[str, Any] = {"shares": logprobs.weights()}
        if phase.teacher == "memory":
            fields["teachers"] = {teacher.name: self._distilled(teacher) for teacher in logprobs.teachers}
            return fields, {}
        return fields, {f"logprobs:{name}": step for name, step in scores.items()}

    def _train(
        self, examples: Step | None, pruned: Step | None, sets: Mapping[str, Step], scores: Mapping[str, Step]
    ) -> Step | None:
        student = self.recipe.student
        if student is None or examples is None:
            return None
        last: Step | None = pruned
        for index, phase in enumerate(student.phases):
            fields: dict[str, Any] = {
                "phase": self.hashed(phase),
                "precision": student.precision,
                "format": self.hashed(self.recipe.format),
            }
            if student.new_tokens:
                fields["new_tokens"] = list(student.new_tokens)
            if phase.replay:
                fields["replay"] = {one.name: self._replay_root(one) for one in phase.replay}
            if phase.early_stopping and phase.monitor:  # then what is looked at decides what comes out
                fields["monitor"] = {
                    "phase": phase.monitor.model_dump(mode="json"),
                    "sets": {name: sets[name].identity for name in phase.monitor.sets},
                }
            upstream = {"examples": examples}
            if isinstance(phase, KdPhase):
                learned, stored = self._learned(phase, scores)
                fields["distilled"] = learned
                upstream |= stored
            if last is None:
                fields["base"] = self._base()
            else:
                upstream["model"] = last
            watched = {name: sets[name] for name in phase.monitor.sets} if phase.monitor else {}
            last = self.add("train", f"train:{index}", fields, upstream, phase=index, sets=watched)
        return last if student.phases else None

    def _replay_root(self, replay: Replay) -> str:
        """What identifies a replay set's content."""
        if replay.file:
            check_file(replay.file)
            return self.cache.of(replay.file)
        assert replay.hub is not None  # the recipe's own validation
        return hub_root(replay.hub, self.cache)

    def _evaluate(self, model: str, sets: Mapping[str, Step], upstream: Mapping[str, Step], **args: Any) -> None:
        for name, prompts in sets.items():
            fields = self.eval_fields(name)
            if model == "base":
                fields["base"] = self._base()
            if model == "teacher":
                assert self.recipe.teacher is not None
                fields["teacher"] = self.hashed(self.recipe.teacher)
                fields["roots"] = self._teacher_roots()
            self.add(
                "eval",
                f"eval:{model}:{name}",
                {"model": model, **fields},
                {**upstream, "prompts": prompts},
                model=model,
                set=name,
                **args,
            )

    def eval_fields(self, name: str) -> dict[str, Any]:
        """What decides the text and the verdicts of an evaluation set."""
        evaluate = self.recipe.evaluate
        assert evaluate is not None
        return {
            "sampling": self.hashed(evaluate.sampling),
            "batch_size": evaluate.batch_size,
            "limit": evaluate.sets[name].limit,
            "format": self.hashed(self.recipe.format),
            "precision": self.recipe.student.precision if self.recipe.student else "fp32",
            "verifiers": self._verifiers(set_sources(self.recipe, name)),
        }

    def _export(self, student: Step | None, sets: Mapping[str, Step]) -> None:
        export = self.recipe.export
        if export is None:
            return
        fields: dict[str, Any] = {"export": self.hashed(export), "format": self.hashed(self.recipe.format)}
        upstream: dict[str, Step] = {}
        if student is not None and export.model is None:
            upstream["model"] = student
        elif export.model is not None:
            fields["root"] = model_digest(find_model(export.model), self.cache)
        else:
            fields["base"] = self._base()
        if export.set in sets:
            fields["evaluate"] = self.eval_fields(export.set)
            upstream["prompts"] = sets[export.set]
            # the task gate compares with these, item by item
            for model in ("student", "base"):
                if step := self.steps.get(f"eval:{model}:{export.set}"):
                    upstream[model] = step
        step = self.add("export", "export", fields, upstream)
        others = {name: prompts for name, prompts in sets.items() if name != export.set}
        for variant in export.variants:
            self._evaluate(variant, others, {"artifact": step}, variant=variant)


def set_sources(recipe: Recipe, name: str) -> list[PromptSource]:
    """The prompt sources of an evaluation set: its own, or those whose held-out prompts it takes."""
    assert recipe.evaluate is not None
    own = recipe.evaluate.sets[name].source
    return [own] if own else recipe.prompts


def verifier_labels(sources: Sequence[PromptSource]) -> list[str]:
    """`name@version` of the verifiers that judge these sources."""
    return sorted({resolve(source.verifier).label for source in sources})


def make_plan(recipe: Recipe, options: RunOptions, shared: Shared | None = None) -> Plan:
    """The stages of a recipe with their identities; reads root files, runs nothing, writes nothing in the run store.

    `shared` keeps what other recipes' plans need too. Raises RecipeError, DataError or ModelError if a root is missing.
    """
    return Planner(recipe, options, shared or Shared()).build()


# --- what is done, and why the rest is not --------------------------------------------------------------------------


def state_of(step: Step) -> tuple[str, str]:
    """(`done` | `unfinished` | `new`, why): the reason names the fields that differ from the nearest finished run."""
    if step.sealed:
        return "done", "finished before"
    if step.folder.exists():
        return "unfinished", "started before; will be resumed"
    earlier = _finished_siblings(step)
    if not earlier:
        return "new", "never run"
    changes = min((_changes(document, step) for document in earlier), key=len)
    shown = "; ".join(changes[:DIFFED_AS_ONE])
    return "new", f"differs from an earlier run: {shown or 'stage version'}"


def _finished_siblings(step: Step) -> list[dict[str, Any]]:
    found = []
    for folder in sorted(step.folder.parent.glob(f"{step.name}-*")):
        try:
            document = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if document.get("label") == step.label:
            found.append(document)
    return found


def _changes(document: Mapping[str, Any], step: Step) -> list[str]:
    before, now = _flat(document["fields"]), _flat(step.fields)
    changed = [
        f"{key} {before.get(key, 'default')!r} -> {now.get(key, 'default')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    upstream = {role: other.identity for role, other in step.upstream.items()}
    return changed + [
        f"{step.upstream[role].label} changed"
        for role, identity in upstream.items()
        if document["upstream"].get(role) != identity
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain JSON as dotted keys."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = {str(index): part for index, part in enumerate(value)}.items()
    else:
        return {prefix: value}
    return {key: leaf for name, part in parts for key, leaf in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def pipeline_file(plan: Plan, runs: Path) -> Path:
    """Where the pipeline's own record lies."""
    return runs / "pipelines" / f"{plan.recipe.name}-{plan.identity}.json"
