"""One process of a training that torchrun started: trains a tiny student and leaves what it ended with.

usage: torchrun --nproc-per-node N train_in_ranks.py MODEL WORK OUT STRATEGY PRECISION [STOP_AFTER]

STRATEGY is a value of `student.parallel`, with `-lora` for adapters, `-plain` for no running mean, `-recompute` for
checkpointed activations, `-poisoned` for an infinite gradient in the third step.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from distill.attention import PER_DOCUMENT
from distill.config import KdPhase, Lora, OnPolicyPhase, SftPhase, TrainingPhase
from distill.documents import Documents
from distill.errors import Interrupted, TrainingError
from distill.format import Document
from distill.interrupts import Stop, graceful
from distill.models import find_model, load_model
from distill.students.adapters import with_adapters
from distill.students.distributed import joined_world
from distill.students.loop import StepReport, Trainer, heldout_losses
from distill.students.on_policy import Guard, Rollouts
from distill.students.optimizers import optimizer_state
from distill.students.train import checkpoint_activations
from distill.students.tutors import TutorInMemory
from distill.students.writers import writer_of

LENGTHS, PROMPTS = [9, 14, 5, 6, 20, 12, 7, 11, 16, 8, 3, 25], [3, 1, 4, 2, 11, 6, 2, 5, 8, 4, 1, 7]


def documents() -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of(
        Document(rng.integers(3, 512, size=n).tolist(), bytes([0] * p + [1] * (n - p - 1) + [3]), False)
        for n, p in zip(LENGTHS, PROMPTS, strict=True)
    )


def enliven(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model


def student(folder: str, dtype: str, phase: TrainingPhase) -> Any:
    model = enliven(load_model(find_model(folder), dtype, "cpu", PER_DOCUMENT))
    checkpoint_activations(model, phase)
    return with_adapters(model, phase.lora, 0) if phase.lora else model


def teacher(folder: str, dtype: str) -> Any:
    """Another model of the same kind."""
    model = load_model(find_model(folder), dtype, "cpu", PER_DOCUMENT)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(12)
    return model


def phase_of(extras: list[str], **given: Any) -> TrainingPhase:
    """The phase of a strategy: `kd` and `onpolicy` among its extras distil from a teacher in memory."""
    if "kd" in extras:
        return KdPhase(kind="kd", teacher="memory", divergence="jsd", ce_weight=0.3, **given)
    if "onpolicy" in extras:
        return OnPolicyPhase(
            kind="on_policy", max_new_tokens=5, batch_size=2, min_stop_rate=0, on_policy_fraction=0.5, **given
        )
    return SftPhase(kind="sft", **given)


def trained(trainer: Trainer, stop: Stop, out: Path, stop_after: int | None, poisoned: bool) -> list[list[float]]:
    losses: list[list[float]] = []
    try:
        for report in trainer.run(stop):
            assert isinstance(report, StepReport)
            losses.append([report.step, report.loss, report.grad_norm, report.packs])
            if poisoned and report.step == 2 and trainer.world.main:
                next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
            if report.step == stop_after and trainer.world.rank == trainer.world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # one of them only: the others must learn of it
    except Interrupted:
        if trainer.world.main:
            out.with_suffix(".stopped").write_text(json.dumps(losses))
        raise SystemExit(143) from None
    except TrainingError:
        left = trainer.weights.state()
        if trainer.world.main:
            torch.save(left, out.with_suffix(".poisoned"))
        raise
    return losses


def main() -> None:
    model_folder, work, out, strategy, precision, *stop_after = sys.argv[1:]
    torch.set_num_threads(1)
    parallel, *extras = strategy.split("-")
    phase = phase_of(
        extras, lr=1e-3, epochs=3, step_tokens=64, micro_batch_tokens=24, weight_decay=0.1, grad_clip=0.5,
        ema_decay=None if "plain" in extras else 0.9, neftune_alpha=5.0, checkpoint_every_steps=2,
        lora=Lora(rank=4, dropout=0.1) if "lora" in extras else None, gradient_checkpointing="recompute" in extras,
    )  # fmt: skip
    made = documents()
    with joined_world("cpu") as world, graceful() as stop:
        exact = precision == "fp64"  # weights that are float64 stay so, and only the order of sums is left to differ
        model = student(model_folder, "float64" if exact else "float32", phase)
        computing = "fp32" if exact else precision
        taught: dict[str, Any] = {}
        if isinstance(phase, KdPhase):
            taught["tutor"] = TutorInMemory([teacher(model_folder, "float64" if exact else "float32")], [1.0], 512, 1.0)
        if isinstance(phase, OnPolicyPhase):
            taught["rollouts"] = Rollouts(phase, writer_of(phase, 0, 512, 64), Guard.of(phase), 64)
        trainer = Trainer(model, made, phase, computing, Path(work), world=world, parallel=parallel, **taught)
        params = trainer.weights.params
        seen = {
            "world": world.size,
            "dtensors": sum(isinstance(p, DTensor) for p in params),
            "gone": sum(p.numel() == 0 for p in params),
        }
        last = int(stop_after[0]) if stop_after else None
        losses = trained(trainer, stop, Path(out), last, "poisoned" in extras)
        heldout = heldout_losses(trainer, made)
        state, optimizer = trainer.weights.state(), optimizer_state(trainer.optimizer, trainer.weights)
        moments = [v for kept in trainer.optimizer.state.values() for v in kept.values()]
        seen["own_moments"] = sum(v.numel() for v in moments if v.ndim)
        if world.main:
            torch.save({"weights": state, "optimizer": optimizer, "losses": losses, "heldout": heldout, **seen}, out)


if __name__ == "__main__":
    main()
