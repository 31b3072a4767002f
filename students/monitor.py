"""What is measured while a student trains: held-out loss by segment, answers on small verified sets, harness tasks.

A look changes nothing: it makes no gradients, draws from seeds of its own, and evaluates through the same engine and
verifiers as the eval stage. Answers are written by the main process while the others wait; a sharded student is
gathered for it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.attention import attending_by
from distill.config import Monitor, Recipe, Sampling
from distill.documents import Documents
from distill.engines.transformers import TransformersEngine
from distill.evaluation import evaluate
from distill.plan import set_sources
from distill.records import Prompt
from distill.runs import RunOptions

from .loop import Trainer, heldout_kl, heldout_losses

LooksAt = Callable[[Trainer, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Watcher:
    """The monitor's look at a training; `prompts` are the problems of each of its sets."""

    monitor: Monitor
    recipe: Recipe
    tokenizer: Any
    heldout: Documents | None
    prompts: Mapping[str, list[Prompt]]
    folder: Path
    options: RunOptions

    def __call__(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Figures of the student as it is: `heldout_loss…`, `heldout_kl`, `accuracy`, `SET/accuracy`, …"""
        figures: dict[str, Any] = {}
        if self.heldout is not None:
            figures |= heldout_losses(trainer, self.heldout)
            if self.monitor.kl:
                figures |= heldout_kl(trainer, self.heldout)
        if self.prompts or self.monitor.lm_eval:
            with student_that_writes(trainer) as model:
                figures |= trainer.world.from_main(self._written(model, step) if model is not None else None)
        return figures

    def _written(self, model: Any, step: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, prompts in self.prompts.items():
            summary = self._answers(model, name, prompts, step)
            for key in ("accuracy", "accuracy_low", "accuracy_high", "stop_rate", "mean_tokens"):
                figures[f"{name}/{key}"] = summary.get(key)
        if self.prompts:
            figures["accuracy"] = figures[f"{next(iter(self.prompts))}/accuracy"]
        if self.monitor.lm_eval:
            from .harness import harness_figures

            figures |= harness_figures(model, self.tokenizer, self.monitor)
        return figures

    def _answers(self, model: Any, name: str, prompts: list[Prompt], step: int) -> dict[str, Any]:
        assert self.recipe.evaluate is not None  # the recipe's own validation
        config = self.recipe.evaluate.model_copy(
            update={
                "sampling": Sampling(max_new_tokens=self.monitor.max_new_tokens),
                "batch_size": self.monitor.batch_size,
            }
        )
        folder = self.folder / f"step-{step}" / name
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was stopped here: the weights may differ
        folder.mkdir(parents=True)
        engine = TransformersEngine(model, self.tokenizer, self.recipe.format, config.batch_size)
        sources = set_sources(self.recipe, name)
        return evaluate(engine, prompts, config, "student", name, folder, self.options, sources)


@contextmanager
def student_that_writes(trainer: Trainer) -> Iterator[Any]:
    """The student in a form that generates, in the main process; None in all others, which wait at the end."""
    model = trainer.model
    if trainer.weights.scattered:
        model = _gathered(trainer)
    try:
        if model is None or not trainer.world.main:
            yield None
            return
        with attending_by(model, "sdpa"):
            yield model
    finally:
        trainer.world.wait()


def _gathered(trainer: Trainer) -> Any:
    """A whole copy of a sharded student in the main process."""
    state = trainer.weights.state()
    if not trainer.world.main:
        return None
    plain = type(trainer.model)(trainer.model.config).to(
        torch.bfloat16 if trainer.model.device.type == "cuda" else None
    )
    plain.load_state_dict(state, strict=False)
    plain.tie_weights()
    return plain.to(trainer.model.device).eval()
