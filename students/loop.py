"""The training loop on live objects: a model, documents, a phase.

bf16 runs the model in bf16 with fp32 master weights beside it: gradients of every micro-batch are added up in fp32,
AdamW works on the masters, and the result is rounded back. fp32 trains the model's own weights. The loss of a step is
the sum over its supervised tokens divided by their number, however the step is cut into micro-batches.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import SftPhase
from distill.errors import TrainingError
from distill.interrupts import Stop
from distill.models import PER_DOCUMENT, seeded
from distill.runs import PARTIAL

from .checkpoint import load_newest, save_checkpoint
from .data import Documents, documents_digest
from .losses import cross_entropy
from .packing import Pack, lay_out, pack_step, plan_steps

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StepReport(NamedTuple):
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean cross-entropy over the step's supervised tokens, in nats."""
    lr: float
    grad_norm: float
    tokens: int
    supervised: int
    packs: int
    seconds: float


def learning_rate(phase: SftPhase, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then the phase's schedule down to its floor."""
    warmup = math.ceil(phase.warmup_ratio * total - 1e-9)  # 0.07 * 100 is a little above 7
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    if phase.schedule == "constant":
        return phase.lr
    progress = (step - warmup) / max(1, total - warmup)
    falling = (1 + math.cos(math.pi * progress)) / 2 if phase.schedule == "cosine" else 1 - progress
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * falling)


class Masters:
    """fp32 weights and their gradients, beside a model that computes in bf16 (or being the model itself in fp32).

    Takes an fp32 model and turns its weights to `dtype` in place, so the masters keep what rounding would lose.
    Buffers stay as they are: the rotary frequencies are fp32 in inference, whatever the weights are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model_params = [p for p in model.parameters() if p.requires_grad]
        self.separate = dtype != torch.float32
        self.params = self.model_params
        if self.separate:
            self.params = [p.detach().clone().requires_grad_() for p in self.model_params]
            for own in model.parameters():
                own.data = own.data.to(dtype)
            for own, master in zip(self.model_params, self.params):
                own.register_post_accumulate_grad_hook(self._collect(master))

    @staticmethod
    def _collect(master: Tensor) -> Callable[[Tensor], None]:
        """Move a bf16 gradient into the master's fp32 one as soon as it exists, so sums are never kept in bf16."""

        def hook(own: Tensor) -> None:
            assert own.grad is not None
            if master.grad is None:
                master.grad = own.grad.float()
            else:
                master.grad.add_(own.grad)
            own.grad = None

        return hook

    @torch.no_grad()
    def average(self, count: int, clip: float) -> float:
        """Turn gradients that are sums over `count` rows into means of norm `clip` at most; returns the norm before.

        Done here, once a step and in fp32: scaling the loss would round 1 / count to bf16.
        """
        gradients = [p.grad for p in self.params if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / count
        factor = min(1.0, clip / (norm + 1e-6)) / count
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's weights."""
        if self.separate:
            for own, master in zip(self.model_params, self.params):
                own.copy_(master)

    def state(self) -> list[Tensor]:
        """The fp32 weights, in the model's parameter order."""
        return [p.detach() for p in self.params]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Take over saved fp32 weights."""
        for master, saved in zip(self.params, state, strict=True):
            master.copy_(saved)
        self.publish()


def make_optimizer(masters: Masters, phase: SftPhase) -> torch.optim.AdamW:
    """AdamW on the masters (fused where torch has it); decay on matrices only."""
    matrices = [p for p in masters.params if p.ndim >= 2]
    vectors = [p for p in masters.params if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=phase.lr,
        betas=(phase.beta1, phase.beta2),
        fused=True,
    )


def pack_loss(model: Any, pack: Pack) -> Tensor:
    """Summed cross-entropy over a pack's supervised rows, in nats.

    The head is applied to supervised rows only; attention stays inside documents.
    """
    device = model.device
    ids, positions = torch.from_numpy(pack.ids_T).to(device), torch.from_numpy(pack.positions_T).to(device)
    hidden_TH = model.get_decoder()(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, **boundaries(model, pack.bounds)
    ).last_hidden_state[0]
    rows = torch.from_numpy(pack.rows_N).to(device)
    targets = torch.from_numpy(pack.targets_N).to(device)
    return cross_entropy(hidden_TH[rows], model.get_output_embeddings().weight, targets)


def boundaries(model: Any, bounds: list[int]) -> dict[str, Any]:
    """Document boundaries as the model's attention takes them."""
    if model.config._attn_implementation == PER_DOCUMENT:
        return {"cu_seq_lens_q": bounds}
    lengths = torch.tensor(bounds, dtype=torch.int32, device=model.device)
    longest = max(end - start for start, end in zip(bounds, bounds[1:]))
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


class Trainer:
    """One phase of training: plan, step, checkpoint, resume."""

    def __init__(self, model: Any, documents: Documents, phase: SftPhase, precision: str, work: Path) -> None:
        self.model = model
        self.documents = documents
        self.phase = phase
        self.work = work
        self.lengths = documents.lengths
        self.plan = plan_steps(self.lengths, phase.step_tokens, phase.epochs, phase.seed, phase.max_steps)
        # torch keeps the gradient of a padding id's embedding at zero; where pad == eos, that would be the end token's
        model.get_input_embeddings().padding_idx = None
        self.masters = Masters(model, DTYPES[precision])
        self.optimizer = make_optimizer(self.masters, phase)
        self.resumed_from = self._resume()

    def _expected(self) -> dict[str, Any]:
        return {"data": documents_digest(self.documents), "steps": len(self.plan)}

    def _resume(self) -> int:
        state = load_newest(self.work, self._expected())
        if state is None:
            return 0
        self.masters.load(state["masters"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Checkpoint after `step` steps."""
        state = {"masters": self.masters.state(), "optimizer": self.optimizer.state_dict(), **self._expected()}
        save_checkpoint(self.work, step, state)

    def run(self, stop: Stop) -> Iterator[StepReport]:
        """Train from where the last checkpoint stands; yields after each optimizer step.

        A step is checkpointed once its report has been taken, so no checkpoint is ahead of what was reported. On a
        stop request it checkpoints and raises what the request says. Raises TrainingError on a loss that is not
        finite, with the offending documents saved.
        """
        self.model.train()
        for step in range(self.resumed_from, len(self.plan)):
            yield self._step(step)
            done, stopping = step + 1, stop.requested
            if stopping or (done % self.phase.checkpoint_every_steps == 0 and done < len(self.plan)):
                self.save(done)
            if stopping:
                stop.raise_if_requested()
        self.model.eval()

    def _step(self, step: int) -> StepReport:
        started = time.perf_counter()
        chosen = self.plan[step]
        packs = pack_step(chosen, self.lengths, self.phase.micro_batch_tokens)
        laid = [lay_out(self.documents.ids, self.documents.prompt_tokens, pack) for pack in packs]
        supervised = sum(len(pack.rows_N) for pack in laid)
        lr = learning_rate(self.phase, step, len(self.plan))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        with seeded(self.phase.seed * 1_000_003 + step, str(self.model.device)):  # dropout, where a base has any
            for pack in laid:
                loss = pack_loss(self.model, pack)
                loss.backward()
                total += float(loss.detach())
        norm = self.masters.average(supervised, self.phase.grad_clip)
        if not math.isfinite(total) or not math.isfinite(norm):
            self._refuse(step, chosen, total / supervised, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()
        tokens = sum(self.lengths[index] for index in chosen)
        seconds = time.perf_counter() - started
        return StepReport(step + 1, total / supervised, lr, norm, tokens, supervised, len(packs), seconds)

    def _refuse(self, step: int, chosen: list[int], loss: float, norm: float) -> None:
        path = self.work / f"bad-step-{step + 1}.json"
        path.write_text(json.dumps({"documents": [self.documents.ids[index].tolist() for index in chosen]}))
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; the documents are in {path};"
            " lower student.phases.N.lr or look at these documents"
        )


def write_metrics(path: Path, start: int) -> Callable[[Mapping[str, Any]], None]:
    """A function that appends to metrics.jsonl; lines after step `start` (of a killed attempt) are dropped first."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # a line torn by a kill
    part = path.with_name(path.name + PARTIAL)
    part.write_text("".join(line + "\n" for line in kept))
    os.replace(part, path)

    def append(values: Mapping[str, Any]) -> None:
        with path.open("a") as out:
            out.write(json.dumps(values) + "\n")

    return append
