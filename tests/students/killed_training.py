"""Train a tiny student that is killed again and again, beside the same training left alone.

usage: killed_training.py MODEL FOLDER PRECISION KILLS

KILLS is JSON: a list of [place, step, detail], each the place where one attempt is ended by SIGKILL: `backward` in pass
number `detail` of that step, `write` in the checkpoint thread after `detail` bytes of the checkpoint of that step,
`replace` before (0) or after (1) it is moved into place, `epoch` right after the first step of epoch `step`. Every
attempt is a process of its own, forked before it has trained anything; it goes on from what the one before left. Writes
FOLDER/whole.pt and FOLDER/resumed.pt, and prints a JSON row for each attempt.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.attention import PER_DOCUMENT
from distill.config import SftPhase
from distill.documents import Documents
from distill.format import Document
from distill.interrupts import Stop
from distill.models import find_model, load_model
from distill.students.loop import StepReport, Trainer
from distill.students.optimizers import optimizer_state

LENGTHS, PROMPTS = [9, 14, 5, 6, 20, 12, 7, 11, 16, 8], [3, 1, 4, 2, 11, 6, 2, 5, 8, 4]
PHASE = SftPhase(
    kind="sft", lr=1e-3, epochs=12, step_tokens=64, micro_batch_tokens=20, weight_decay=0.1, grad_clip=0.5,
    ema_decay=0.9, neftune_alpha=5.0, checkpoint_every_steps=2,
)  # fmt: skip


class Kill(NamedTuple):
    """Where an attempt ends."""

    place: str
    step: int
    detail: int = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def documents() -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of(
        Document(rng.integers(3, 512, size=n).tolist(), bytes([0] * p + [1] * (n - p - 1) + [3]), False)
        for n, p in zip(LENGTHS, PROMPTS, strict=True)
    )


def student(folder: str) -> Any:
    """A model with dropout and weights so large that every draw matters."""
    plain = load_model(find_model(folder), "float32", "cpu", PER_DOCUMENT)
    model = type(plain)(type(plain.config)(**(plain.config.to_dict() | {"attention_dropout": 0.2})))
    model.set_attn_implementation(PER_DOCUMENT)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model


def epoch_start(trainer: Trainer, epoch: int) -> int:
    """The number (from 1) of the first step that begins in an epoch (from 0)."""
    taken = np.cumsum([0, *map(len, trainer.plan)])
    return int(np.flatnonzero(taken >= epoch * len(LENGTHS))[0]) + 1


def armed(trainer: Trainer, kill: Kill) -> Callable[[StepReport], None]:
    """Lay the kill in wait; returns what wants to know of every step that was done."""
    done, passes = trainer.resumed_from, 0

    def in_backward(gradient: Any) -> None:
        nonlocal passes
        if (kill.place, kill.step, kill.detail) == ("backward", done + 1, passes):
            die()  # some of this pass's gradients are added to those of the passes before, others are not yet
        passes += 1

    def after(report: StepReport) -> None:
        nonlocal done, passes
        done, passes = report.step, 0
        if kill.place == "epoch" and done == epoch_start(trainer, kill.step):
            die()

    trainer.model.model.layers[0].mlp.down_proj.weight.register_hook(in_backward)
    if kill.place == "write":
        torch.save = torn(torch.save, kill)
    if kill.place == "replace":
        os.replace = around(os.replace, kill)
    return after


def torn(save: Any, kill: Kill) -> Any:
    """torch.save that dies after so many bytes of the checkpoint of a step."""

    class Torn:
        def __init__(self, out: Any) -> None:
            self.out, self.left = out, kill.detail

        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")[: self.left]
            self.left -= len(view)
            written: int = self.out.write(view)
            if not self.left:
                self.out.flush()
                die()
            return written

        def flush(self) -> None:
            self.out.flush()

    return lambda state, out: save(state, Torn(out) if state["step"] == kill.step else out)


def around(replace: Any, kill: Kill) -> Any:
    """os.replace that dies before or after it moves the checkpoint of a step."""

    def moved(source: Any, target: Any) -> None:
        mine = Path(target).name == f"checkpoint-{kill.step:08d}.pt"
        if mine and not kill.detail:
            die()
        replace(source, target)
        if mine:
            die()

    return moved


def attempt(model: Any, work: Path, precision: str, kill: Kill | None, out: Path) -> dict[str, Any]:
    """One process: train from where the last one stopped, to the kill or to the end."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            trainer = Trainer(model, documents(), PHASE, precision, work)
            os.write(tell, f"{trainer.resumed_from} {len(trainer.plan)}".encode())
            after = armed(trainer, kill) if kill else lambda report: None
            for report in trainer.run(Stop()):
                assert isinstance(report, StepReport)
                after(report)
            assert trainer.mean is not None
            state = optimizer_state(trainer.optimizer, trainer.weights)
            made = {"weights": trainer.weights.state(), "optimizer": state, "mean": trainer.mean.means}
            torch.save({**made, "model": trainer.model.state_dict()}, out)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(tell)
    _, status = os.waitpid(child, 0)
    with os.fdopen(told) as said:
        resumed_from, steps = map(int, said.read().split())
    code = os.waitstatus_to_exitcode(status)
    left = sorted(path.name for path in work.iterdir())
    return {"kill": kill, "code": code, "resumed_from": resumed_from, "steps": steps, "left": left}


def main() -> None:
    given, folder, precision, kills = sys.argv[1:]
    torch.set_num_threads(1)
    model = student(given)  # each attempt has its own, since it forks
    for name in ("whole", "resumed"):
        (Path(folder) / name).mkdir(parents=True)
    print(json.dumps(attempt(model, Path(folder) / "whole", precision, None, Path(folder) / "whole.pt")))
    for kill in [*(Kill(*one) for one in json.loads(kills)), None]:
        print(json.dumps(attempt(model, Path(folder) / "resumed", precision, kill, Path(folder) / "resumed.pt")))


if __name__ == "__main__":
    main()
