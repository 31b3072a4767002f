"""Running a plan: preflight everything that is not done, then each stage in turn, then the pipeline's record."""

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.errors import LockedError, storage_errors
from distill.plan import STAGES, Plan, make_plan, pipeline_file, state_of
from distill.processes import launched
from distill.progress import say
from distill.records import write_json
from distill.runs import STAGE_FILE, RunOptions, SealedRun, Step, open_sealed

SHARED_STAGES = ("train",)
"""Stages that all processes of a launch work on together."""
WAIT_S = 0.2
"""Pause before looking again whether another process has finished a stage."""


@dataclass(frozen=True)
class Outcome:
    """What a pipeline run left: every step's sealed run, and which of them ran now."""

    plan: Plan
    results: dict[str, SealedRun]
    executed: list[str]


def run_recipe(recipe: Recipe, options: RunOptions, stage: str | None = None) -> Outcome:
    """Run a recipe's stages up to and with `stage` (all of them by default), resuming where it stopped.

    Raises DistillError subclasses: before anything is written for bad input, GateError after a failed gate.
    """
    processes = launched()
    options = options if processes.main else replace(options, quiet=True)
    plan = make_plan(recipe, options)
    steps = plan.until(stage) if stage else list(plan.steps.values())
    preflight(recipe, steps, options)
    if processes.main:
        with storage_errors("cannot write the run store"):
            record(plan, options)
    results: dict[str, SealedRun] = {}
    executed: list[str] = []
    for step in steps:
        if not options.quiet:
            say(f"{step.label}: {'done before' if step.sealed else state_of(step)[1]} -> {step.folder}")
        if not step.sealed:
            if processes.main or step.stage in SHARED_STAGES:
                stage_module(step).run(recipe, step, options)
            else:
                _wait_for(step)
            executed.append(step.label)
        results[step.label] = open_sealed(step.folder, check=False)
        if processes.main:
            record(plan, options)
    return Outcome(plan, results, executed)


def _wait_for(step: Step) -> None:
    """Until the main process has sealed a step; if it fails, the launcher ends this process too."""
    while not (step.folder / STAGE_FILE).exists():
        time.sleep(WAIT_S)


def run_shard(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Let the teacher answer one shard of the prompts; nothing is sealed, `run_recipe` puts the shards together.

    Several processes may do so at once over one run store: the stages before are run by whichever comes first.
    """
    steps = make_plan(recipe, options).until("generate")
    preflight(recipe, steps, options)
    *before, generate = steps
    for step in before:
        _run_or_wait(recipe, step, options)
    if generate.sealed:
        return {"shard": str(options.shard), "asked": 0, "sealed": str(generate.folder)}
    return dict(stage_module(generate).run_shard(recipe, generate, options))


def _run_or_wait(recipe: Recipe, step: Step, options: RunOptions) -> None:
    while not step.sealed:
        try:
            stage_module(step).run(recipe, step, options)
        except LockedError:
            time.sleep(WAIT_S)


def run_pilot(recipe: Recipe, options: RunOptions, prompts: int) -> Any:
    """Answer a few prompts and forecast the whole: `distill.teachers.pilot.Pilot`. Seals only the stages before."""
    steps = make_plan(recipe, options).until("generate")
    preflight(recipe, steps, options)
    *before, generate = steps
    for step in before:
        _run_or_wait(recipe, step, options)
    return importlib.import_module("distill.teachers.pilot").run(recipe, generate, options, prompts)


def merge(recipe: Recipe, options: RunOptions, others: Sequence[Path] = ()) -> Outcome:
    """Put together what shards have answered, here and in other run stores, into the recipe's generate stage.

    Asks for nothing. Raises IncompleteError if answers are missing, DataError for a store with none of them.
    """
    options = replace(options, ask=False)
    *before, generate = make_plan(recipe, options).until("generate")
    for step in before:
        _run_or_wait(recipe, step, options)
    if others and not generate.sealed:
        came = stage_module(generate).take_over(recipe, generate, options, others)
        say(f"{generate.label}: {came} answers taken over from {', '.join(map(str, others))}")
    return run_recipe(recipe, options, "generate")


def preflight(recipe: Recipe, steps: Sequence[Step], options: RunOptions) -> None:
    """Let every stage that has to run refuse what it can refuse now, before work or money is spent."""
    for step in steps:
        if not step.sealed:
            stage_module(step).preflight(recipe, step, options)


def stage_module(step: Step) -> Any:
    """The module that runs a step, imported now."""
    return importlib.import_module(STAGES[step.stage])


def record(plan: Plan, options: RunOptions) -> None:
    """Write the pipeline's record: the resolved recipe and where each stage lies."""
    path = pipeline_file(plan, options.runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "schema": 1,
            "name": plan.recipe.name,
            "identity": plan.identity,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": plan.recipe.model_dump(mode="json"),
            "steps": {
                label: {
                    "stage": step.stage,
                    "identity": step.identity,
                    "folder": step.folder.relative_to(options.runs).as_posix(),
                    "sealed": step.sealed,
                    "args": {key: sorted(v) if isinstance(v, Mapping) else v for key, v in step.args.items()},
                    "upstream": {role: other.label for role, other in step.upstream.items()},
                }
                for label, step in plan.steps.items()
            },
        },
    )
