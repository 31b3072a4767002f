"""What a plan would do, before anything has run: which stages are done, why the others are not, tokens at most.

Token numbers are upper bounds: prompts times samples times `max_new_tokens`, training documents at their longest.
Where a number is not known before a stage has run (rows of a file, traces that survive), it is left open.
"""

from typing import Any, NamedTuple

from distill.config import EvalSet, Evaluate, PromptSource, Recipe
from distill.plan import Plan, state_of
from distill.records import digest_json
from distill.runs import Step, open_sealed

FREE_ENGINES = ("solver", "recorded")
"""Teachers that generate no tokens: nothing is sampled."""


class Row(NamedTuple):
    """One stage of a plan as `--dry-run` shows it."""

    label: str
    identity: str
    state: str
    """done, unfinished or new."""
    why: str
    tokens: int | None
    """Most tokens the stage can generate or train on; None where it is not known, 0 where there are none."""
    unresolved: tuple[str, ...]
    """Hub ids whose commit could not be found out: their identity will change once a hub answers."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {**self._asdict(), "unresolved": list(self.unresolved)}


def forecast(plan: Plan) -> list[Row]:
    """Every stage of a plan, in order."""
    rows = []
    for step in plan.steps.values():
        state, why = state_of(step)
        rows.append(Row(step.label, step.identity, state, why, tokens_at_most(plan.recipe, step), unresolved(step)))
    return rows


def unresolved(step: Step) -> tuple[str, ...]:
    """Hub revisions in a step's own fields that neither the cache nor a hub could resolve."""
    return tuple(dict.fromkeys(text for text in _texts(step.fields) if "unresolved:" in text))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for part in value.values() for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple) else []


# --- tokens at most -------------------------------------------------------------------------------------------------


def tokens_at_most(recipe: Recipe, step: Step) -> int | None:
    """Most tokens that a stage can generate or train on; None where that is not known, 0 where there are none."""
    if step.stage == "generate":
        return _generated(recipe)
    if step.stage == "eval":
        return _evaluated(recipe, str(step.args["model"]), str(step.args["set"]))
    if step.stage == "train":
        return _trained(recipe, step)
    return 0


def _generated(recipe: Recipe) -> int | None:
    assert recipe.teacher is not None  # there is a generate step
    if recipe.teacher.engine in FREE_ENGINES:
        return 0
    per_prompt = recipe.teacher.sampling.n * recipe.teacher.sampling.max_new_tokens
    return _times(_training_prompts(recipe), per_prompt)


def _evaluated(recipe: Recipe, model: str, name: str) -> int | None:
    assert recipe.evaluate is not None  # there is an eval step
    if model == "teacher" and recipe.teacher and recipe.teacher.engine in FREE_ENGINES:
        return 0
    sampling = recipe.evaluate.sampling
    return _times(_set_size(recipe, recipe.evaluate, recipe.evaluate.sets[name]), sampling.n * sampling.max_new_tokens)


def _trained(recipe: Recipe, step: Step) -> int | None:
    assert recipe.student is not None and recipe.teacher is not None  # there is a train step
    phase = recipe.student.phases[int(step.args["phase"])]
    if phase.max_steps is not None:
        return phase.max_steps * phase.step_tokens
    examples = _examples(recipe, step.upstream["examples"])
    return None if examples is None else int(examples * phase.epochs * recipe.format.max_tokens)


def _examples(recipe: Recipe, select: Step) -> int | None:
    """Training examples: as counted if selection has run, else at most."""
    if select.sealed:
        counted = open_sealed(select.folder, check=False).counts.get("examples")
        if isinstance(counted, int):
            return counted
    assert recipe.teacher is not None
    many = recipe.select.per_prompt == "all"
    at_most = _times(_training_prompts(recipe), recipe.teacher.sampling.n if many else 1)
    limits = [limit for limit in (recipe.select.limit, at_most) if limit is not None]
    return min(limits) if limits else None


def _training_prompts(recipe: Recipe) -> int | None:
    return _sum([_less(_rows(source), source.heldout) for source in recipe.prompts])


def _set_size(recipe: Recipe, evaluate: Evaluate, chosen: EvalSet) -> int | None:
    size = _rows(chosen.source) if chosen.source else sum(source.heldout for source in recipe.prompts)
    return min(size, chosen.limit) if size is not None and chosen.limit else chosen.limit or size


def _rows(source: PromptSource) -> int | None:
    """Rows of a source at most; None where only reading it would tell."""
    size = source.reasoning_gym.size if source.reasoning_gym else None
    known = [number for number in (size, source.limit) if number is not None]
    return min(known) if known else None


def _less(whole: int | None, part: int) -> int | None:
    return None if whole is None else max(0, whole - part)


def _sum(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _times(count: int | None, each: int) -> int | None:
    return None if count is None else count * each


def plan_json(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """The plan as plain values, for `--dry-run --json`."""
    return {
        "name": plan.recipe.name,
        "identity": plan.identity,
        "recipe_sha256": digest_json(plan.recipe.model_dump(mode="json")),
        "stages": [row.to_json() for row in rows],
    }
