"""What stages may use at once: CPU slots, memory and GPUs, handed out and given back.

The number of CPU slots that a stage is given is its number of threads, and depends on nothing but the sweep file and
the machine: results are bit-equal at equal thread counts only, so what else happens to run must not change it.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from distill.config import Recipe, TeacherConfig
from distill.errors import RecipeError
from distill.runs import Step, available_cores

from .config import Needs, Resources

MOST_THREADS = 4
"""CPU slots of a heavy stage unless the sweep says otherwise; beyond, another stage gains more from a core."""
ASKED_ELSEWHERE = ("openai", "openai_batch", "solver", "recorded")
"""Teachers that do their work on other machines, or do hardly any."""


class Grant(NamedTuple):
    """What a running stage holds."""

    cpus: int
    memory_gb: float
    gpus: tuple[int, ...] = ()


@dataclass
class Pool:
    """What is free now."""

    cpus: int
    memory_gb: float | None
    gpus: list[int] = field(default_factory=list)

    def take(self, needs: "Grant", gpus: int) -> Grant | None:
        """Hand out what a stage needs, or None where that is not free."""
        if needs.cpus > self.cpus or gpus > len(self.gpus):
            return None
        if self.memory_gb is not None:
            if needs.memory_gb > self.memory_gb:
                return None
            self.memory_gb -= needs.memory_gb
        self.cpus -= needs.cpus
        given, self.gpus = self.gpus[:gpus], self.gpus[gpus:]
        return needs._replace(gpus=tuple(given))

    def give_back(self, grant: Grant) -> None:
        """Take a stage's resources back."""
        self.cpus += grant.cpus
        self.gpus = sorted([*self.gpus, *grant.gpus])
        if self.memory_gb is not None:
            self.memory_gb += grant.memory_gb


def pool_of(resources: Resources) -> Pool:
    """Everything that a sweep may use."""
    return Pool(cpu_slots(resources), resources.memory_gb, list(range(gpu_count(resources))))


def gpu_count(resources: Resources) -> int:
    """GPUs in all: as declared, else those that this process may see."""
    return len(visible_gpus()) if resources.gpus is None else resources.gpus


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may see, as CUDA_VISIBLE_DEVICES names them; nothing heavy is asked."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def cpu_slots(resources: Resources) -> int:
    """CPU slots in all: as declared, else the cores that this process may use."""
    return resources.cpus or available_cores()


def needed(step: Step, recipe: Recipe, resources: Resources) -> tuple[Grant, int]:
    """What a stage takes while it runs, and how many GPUs.

    Raises RecipeError if that is more than there is.
    """
    asked = resources.stages.get(step.stage, Needs())  # type: ignore[call-overload]  # stages are named by Literal
    heavy, slots = is_heavy(step, recipe), cpu_slots(resources)
    cpus = asked.cpus or (min(slots, MOST_THREADS) if heavy else 1)
    there = gpu_count(resources)
    gpus = asked.gpus if asked.gpus is not None else int(heavy and there > 0)
    if gpus > there:
        raise RecipeError(f"resources.stages.{step.stage}.gpus is {gpus}, but there are {there} GPUs; ask for fewer")
    if cpus > slots:
        raise RecipeError(
            f"resources.stages.{step.stage}.cpus is {cpus}, but there are {slots} CPU slots; ask for {slots} or less"
        )
    return Grant(cpus, asked.memory_gb), gpus


def is_heavy(step: Step, recipe: Recipe) -> bool:
    """Whether a stage runs a model on this machine."""
    if step.stage in ("prompts", "select"):
        return False
    asks_teacher = step.stage == "generate" or step.args.get("model") == "teacher"
    return not (asks_teacher and recipe.teacher and recipe.teacher.engine in ASKED_ELSEWHERE)


def is_paid(step: Step, recipe: Recipe) -> bool:
    """Whether a stage may be charged for."""
    teacher: TeacherConfig | None = recipe.teacher
    return step.stage == "generate" and teacher is not None and teacher.engine in ("openai", "openai_batch")
