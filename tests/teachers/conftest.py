"""A laboratory for the teacher stage: prompts runs written by hand, steps without a plan, and a chat server."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.config import Recipe, hashed_fields, recipe_from
from distill.records import Message, Prompt, digest_json, write_records
from distill.runs import RunOptions, SealedRun, Step, open_run


@pytest.fixture(scope="session")
def chat() -> Any:
    """The module of the scripted chat server."""
    path = Path(__file__).parent.parent / "chat_server.py"
    spec = importlib.util.spec_from_file_location("chat_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def problems(count: int) -> list[Prompt]:
    """Problems whose answer by the chat server is their length."""
    texts = [f"problem {number}" for number in range(count)]
    return [Prompt.of([Message(role="user", content=t)], gold=str(len(t)), source="sums") for t in texts]


@dataclass(frozen=True)
class Lab:
    """A run store with what is needed to run the teacher stages in it."""

    runs: Path

    @property
    def options(self) -> RunOptions:
        return RunOptions(runs=self.runs, threads=1, quiet=True)

    def prompts(self, train: Sequence[Prompt], heldout: Sequence[Prompt] = (), label: str = "prompts") -> Step:
        """A sealed prompts run."""
        ids = [[prompt.model_dump(mode="json") for prompt in side] for side in (train, heldout)]
        step = Step("prompts", label, "r", digest_json([label, ids])[:16], {}, {}, self.runs)
        with open_run(step, self.options) as run:
            write_records(run.path("train.jsonl"), train)
            write_records(run.path("heldout.jsonl"), heldout)
            run.seal(digest_json(ids), {"train": len(train)})
        return step

    def recipe(self, teacher: Mapping[str, Any], select: Mapping[str, Any] | None = None, **source: Any) -> Recipe:
        """A recipe with one prompt source, a teacher and a selection."""
        first = {"name": "sums", "file": "sums.jsonl"} | source
        return recipe_from({"name": "r", "prompts": [first], "teacher": teacher, "select": select or {}})

    def step(self, recipe: Recipe, prompts: Step) -> Step:
        """The generate step, named by what it is made from."""
        fields = {"teacher": hashed_fields(recipe.teacher), "roots": {}}
        identity = digest_json([fields, prompts.identity])[:16]
        return Step("generate", "generate", "r", identity, fields, {"prompts": prompts}, self.runs)

    def generate(self, train: Sequence[Prompt], teacher: Mapping[str, Any]) -> SealedRun:
        """Run the generate stage."""
        from distill.teachers import generate

        recipe = self.recipe(teacher)
        return generate.run(recipe, self.step(recipe, self.prompts(train)), self.options)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")
