"""The training loop on live objects: a model, documents, a phase.

A step's loss is the sum over its supervised tokens, each with its weight, divided by the sum of the weights, however
the step is cut into micro-batches and however many processes share them. Every draw is seeded from the step and the
pack, so a resumed training goes on as if it had never stopped.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from distill.attention import attending_by, decoder_of
from distill.config import KdPhase, TrainingPhase
from distill.documents import Documents
from distill.errors import Interrupted, TrainingError
from distill.format import SEGMENTS
from distill.interrupts import Stop
from distill.models import seeded
from distill.runs import PARTIAL

from .checkpoint import BEST, CheckpointWriter, load_newest, read_state, write_state
from .distributed import World
from .fused import lean
from .hidden import detach
from .kernels import check_kernel
from .objective import PackTensors, StudentObjective, mix_of
from .on_policy import Rollouts
from .optimizers import RunningMean, learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from .packing import (
    Pack,
    Source,
    bucket_step,
    epochs_of,
    lay_out,
    lay_side_by_side,
    pack_step,
    plan_steps,
)
from .stopping import Stopping
from .taid import TeacherShare
from .tutors import Tutor, TutorInMemory
from .weights import make_weights


class StepReport(NamedTuple):
    """What one optimizer step did."""

    step: int
    loss: float
    """Weighted mean of what is minimised over the step's supervised tokens, in nats: cross-entropy with smoothing and
    z-loss, or the divergence to the teachers with its weights."""
    lr: float
    grad_norm: float
    tokens: int
    supervised: int
    packs: int
    seconds: float
    cells: int
    """Cells of the forward passes, padding included."""


class Look(Protocol):
    """Measures the student as it is; `loop` calls it at the monitor's steps."""

    def __call__(self, trainer: "Trainer", step: int) -> Mapping[str, Any]:
        """Figures after `step` steps, for metrics.jsonl."""


class StepSums(NamedTuple):
    """What a process found in its packs of a step; added up over processes."""

    loss: float = 0.0
    weight: float = 0.0
    bad: float = 0.0


class Trainer:
    """One phase of training: plan, step, checkpoint, resume.

    `sources` says which documents an epoch takes (see `epochs_of`); all of them by default. `look` is called at the
    steps that `phase.monitor` names. `tutor` gives the teachers' distributions of a phase that learns them, `rollouts`
    the student's own answers of one that learns from these.
    """

    def __init__(
        self,
        model: Any,
        documents: Documents,
        phase: TrainingPhase,
        precision: str,
        work: Path,
        sources: Sequence[Source] | None = None,
        world: World | None = None,
        parallel: str = "auto",
        look: Look | None = None,
        tutor: Tutor | None = None,
        rollouts: Rollouts | None = None,
    ) -> None:
        self.documents = documents
        self.tutor = tutor
        self.rollouts = rollouts
        self.phase = phase
        self.work = work
        self.world = world or World()
        self.look = look
        self.plan = plan_of(documents, phase, sources)
        for module in model.modules():  # the one that peft trains as a copy too
            if isinstance(module, torch.nn.Embedding):
                # torch keeps the gradient of a padding id's row at zero; where pad == eos, that would be the end token
                module.padding_idx = None
        objective = self._plain = StudentObjective(model, phase)
        self.weights = make_weights(objective, precision, parallel, self.world)
        check_kernel(phase.loss_kernel, model)
        self.optimizer = make_optimizer(self.weights, phase)
        self.objective = self.weights.engage(objective, self.optimizer)
        self.mean = RunningMean(self.weights.params, phase.ema_decay) if phase.ema_decay else None
        self.stopping = Stopping(phase.early_stopping)
        self.share = TeacherShare(phase, len(self.plan)) if isinstance(phase, KdPhase) else None
        self.last_lengths: list[int] = []
        """Tokens of each document of the last step."""
        self._writer = CheckpointWriter(work, phase.keep_checkpoints)
        self.resumed_from = self._resume()

    @property
    def model(self) -> Any:
        """The model inside the objective."""
        return self.objective.model

    # --- checkpoints ---

    def _expected(self) -> dict[str, Any]:
        return {"data": self.documents.digest, "steps": len(self.plan)}

    def _resume(self) -> int:
        state = load_newest(self.work, self._expected())
        if state is None:
            return 0
        self.weights.load(state["weights"])
        load_optimizer_state(self.optimizer, self.weights, state["optimizer"])
        if self.mean is not None:
            self.mean.updates = state["mean"]["updates"]
            for own, name, param in zip(self.mean.means, self.weights.names, self.weights.params):
                own.copy_(self.weights.like(state["mean"]["weights"][name], param))
        self.stopping.load(state["stopping"])
        if self.share is not None and "share" in state:
            self.share.load(state["share"])
        if self.rollouts is not None:
            self.rollouts.guard.load(state["guard"])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Begin a checkpoint of the state after `step` steps; a thread writes it while training goes on."""
        state: dict[str, Any] = {
            "weights": self.weights.state(),
            "optimizer": optimizer_state(self.optimizer, self.weights),
            "stopping": self.stopping.state(),
            **self._expected(),
        }
        if self.share is not None:
            state["share"] = self.share.state()
        if self.rollouts is not None:
            state["guard"] = self.rollouts.guard.state()
        if self.mean is not None:
            means = {n: self.weights.whole(m) for n, m in zip(self.weights.names, self.mean.means)}
            state["mean"] = {"updates": self.mean.updates, "weights": means}
        if self.world.main:
            self._writer.save(step, state)

    # --- the loop ---

    def run(self, stop: Stop) -> Iterator[StepReport | Mapping[str, Any]]:
        """Train from where the last checkpoint stands; yields a report after each optimizer step and each look.

        A step is checkpointed once its report has been taken, so no checkpoint is ahead of what was reported. On a
        stop request it checkpoints and raises what the request says. Raises TrainingError on a loss that is not
        finite, with the offending documents saved. Ends with the weights that the phase asks for.
        """
        with lean(self.model, self.phase.fused), compiled(self.model, self.phase.compile):
            self.objective.train()
            try:
                if self.resumed_from == 0:
                    yield from self._look(0)
                for step in range(self.resumed_from, len(self.plan)):
                    if self.stopping.stopped:
                        break
                    yield self._step(step)
                    stopping = self.world.any(stop.requested)
                    yield from self._after(step + 1, stopping)
                    if stopping:
                        self._writer.finish()
                        self.world.wait()
                        stop.raise_if_requested()
                        raise Interrupted(signal.SIGTERM)  # another process of this training was asked to stop
            finally:
                self._writer.finish()
            self._settle()
            self.objective.eval()

    def _after(self, done: int, stopping: bool) -> Iterator[Mapping[str, Any]]:
        """Look and checkpoint where it is time."""
        last = done == len(self.plan)
        monitor = self.phase.monitor
        if monitor and (last or done % monitor.every_steps == 0):
            yield from self._look(done)
        if stopping or (done % self.phase.checkpoint_every_steps == 0 and not last):
            self.save(done)

    def _look(self, step: int) -> Iterator[Mapping[str, Any]]:
        if self.look is None or self.phase.monitor is None:
            return
        self.objective.eval()
        figures = self.look(self, step)
        self.objective.train()
        if self.stopping.take(figures, step):
            state = self.weights.state()
            if self.world.main:
                write_state(self.work / BEST, {"weights": state, "step": step})
        yield {"step": step, **figures}

    def _settle(self) -> None:
        """End with the best weights where early stopping chose some, else with the running mean where one was kept."""
        if self.stopping.best_step is not None:
            self.world.wait()
            self.weights.load(read_state(self.work / BEST)["weights"])
        elif self.mean is not None and self.mean.updates:
            for param, mean in zip(self.weights.params, self.mean.means):
                param.data.copy_(mean)
            self.weights.publish()
        detach(self.model)

    # --- one step ---

    def _step(self, step: int) -> StepReport:
        started = time.perf_counter()
        documents, chosen = self._material(step)
        packs = cut(chosen, documents, self.phase)
        if isinstance(self.phase, KdPhase) and self.share is not None:
            self._plain.mix = mix_of(self.phase, self.share.at(step))
        lr = learning_rate(self.phase, step, len(self.plan))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        found = self._passes(step, packs, documents)
        sums = StepSums(*self.world.sums(found))
        if sums.bad:
            self._refuse(step, documents, chosen, sums.loss / max(sums.weight, 1e-9), math.nan)
        norm = self.weights.step(self.optimizer, sums.weight, self.phase.grad_clip)
        if not math.isfinite(norm):
            self._refuse(step, documents, chosen, sums.loss / sums.weight, norm)
        if self.mean is not None:
            self.mean.update(self.weights.params)
        self.last_lengths = [int(documents.lengths[index]) for index in chosen]
        supervised, cells = (sum(values) for values in zip(*((len(p.rows_N), p.ids_BT.size) for p in packs)))
        seconds = time.perf_counter() - started
        loss = sums.loss / sums.weight
        if self.share is not None:
            self.share.take(step, loss)
        tokens = sum(self.last_lengths)
        return StepReport(step + 1, loss, lr, norm, tokens, supervised, len(packs), seconds, cells)

    def _material(self, step: int) -> tuple[Documents, Sequence[int]]:
        """The documents that a step learns from, and which of them."""
        if self.rollouts is None:
            return self.documents, self.plan[step]
        self.objective.eval()
        with writing(self) as model:
            found = self.rollouts.documents(model, self.documents, self.plan[step], step, self.world)
        self.objective.train()
        return found

    def _passes(self, step: int, packs: Sequence[Pack], documents: Documents) -> StepSums:
        """The forward and backward passes of this process in a step."""
        loss = torch.zeros((), dtype=torch.float64)
        weight = bad = 0.0
        for turn in range(self.world.rounds(packs)):
            place = turn * self.world.size + self.world.rank
            if place >= len(packs) and not self.weights.lockstep:
                break
            # with shards all processes pass as often as the busiest; a pass too many counts for nothing
            pack = packs[place] if place < len(packs) else nothing(packs[0])
            tensors = PackTensors.of(pack, self.model.device)
            lesson = self.tutor.lesson(documents, pack, tensors) if self.tutor else None
            with seeded(pack_seed(self.phase.seed, step, place), str(self.model.device)):
                found = self.objective(tensors, lesson)
                self.weights.backward(found.total)
            own = found.total.detach().double().cpu()
            if not bool(torch.isfinite(own)):
                bad = 1.0
                self._keep_bad(step, place, pack, float(own))
            loss += own
            weight += pack.weight
        return StepSums(float(loss), weight, bad)

    def _keep_bad(self, step: int, place: int, pack: Pack, loss: float) -> None:
        path = self.work / f"bad-step-{step + 1}-pack-{place}.json"
        path.write_text(json.dumps({"loss": str(loss), "bounds": pack.bounds, "ids": pack.ids_BT.tolist()}))

    def _refuse(self, step: int, documents: Documents, chosen: Sequence[int], loss: float, norm: float) -> None:
        path = self.work / f"bad-step-{step + 1}.json"
        if self.world.main:
            shown = [{"number": index, "ids": documents.ids(index).tolist()} for index in chosen]
            path.write_text(json.dumps({"documents": shown}))
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; the documents are in {path};"
            " lower student.phases.N.lr or look at these documents"
        )


@contextlib.contextmanager
def writing(trainer: Trainer) -> Iterator[Any]:
    """The student in a form that generates, inside the block.

    Raises TrainingError for one in shards, which no process has as a whole.
    """
    if trainer.weights.scattered:
        raise TrainingError("an on_policy phase lets every process write answers; set student.parallel=ddp")
    with attending_by(trainer.model, "sdpa"):
        yield trainer.model


def plan_of(documents: Documents, phase: TrainingPhase, sources: Sequence[Source] | None = None) -> list[list[int]]:
    """The documents of every optimizer step of a phase."""
    sources = sources or [Source(range(len(documents)))]
    order = epochs_of(sources, documents.lengths, phase.epochs, phase.seed)
    return plan_steps(order, documents.lengths, phase.step_tokens, phase.max_steps)


def cut(chosen: Sequence[int], documents: Documents, phase: TrainingPhase) -> list[Pack]:
    """A step's documents as forward passes."""
    if phase.batching == "bucketed":
        batches = bucket_step(chosen, documents.lengths, phase.micro_batch_tokens)
        return [lay_side_by_side(documents, batch, phase.loss_weights) for batch in batches]
    packs = pack_step(chosen, documents.lengths, phase.micro_batch_tokens)
    return [lay_out(documents, pack, phase.loss_weights) for pack in packs]


def nothing(pack: Pack) -> Pack:
    """The same pass with no weight in the loss."""
    return pack._replace(weights_N=pack.weights_N * 0)


def pack_seed(seed: int, step: int, place: int) -> int:
    """The seed of a pass's draws (dropout, noise): of the phase, the step and the pack, whoever makes the pass."""
    return (seed * 1_000_003 + step) * 4_099 + place


@contextlib.contextmanager
def compiled(model: Any, wanted: bool) -> Iterator[None]:
    """Let torch.compile generate code for the decoder's layers inside the block; attention keeps its own."""
    if not wanted:
        yield
        return
    from transformers import AttentionInterface

    from distill.attention import PER_DOCUMENT, per_document_attention, register_attention

    AttentionInterface.register(PER_DOCUMENT, torch.compiler.disable(per_document_attention))
    layers = decoder_of(model).layers
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        register_attention()
        for layer in layers:
            layer._compiled_call_impl = None


def heldout_losses(trainer: Trainer, documents: Documents) -> dict[str, float]:
    """Mean negative log-likelihood of held-out documents in nats a token: of each segment, and of all together."""
    means = heldout_means(trainer, documents)
    by_segment = {f"heldout_loss_{name}": mean for name, mean in means.items() if name}
    return {"heldout_loss": means[""], **by_segment}


def heldout_kl(trainer: Trainer, documents: Documents) -> dict[str, float]:
    """Mean KL(teacher || student) on held-out documents in nats a token."""
    tutor = trainer.tutor
    if isinstance(tutor, TutorInMemory):  # whatever the phase learns of it, here all of the distribution counts
        tutor = tutor._replace(drawn_only=False, match=None)
    return {"heldout_kl": heldout_means(trainer, documents, tutor)[""]}


def heldout_means(trainer: Trainer, documents: Documents, tutor: Tutor | None = None) -> dict[str, float]:
    """Means over the rows of documents, by segment and (under "") of all: -log q, or with a tutor the KL from it."""
    phase = trainer.phase.model_copy(update={"loss_weights": type(trainer.phase.loss_weights)()})
    packs = cut(range(len(documents)), documents, phase)
    sums = torch.zeros(2, len(SEGMENTS), dtype=torch.float64)
    for turn in range(trainer.world.rounds(packs)):
        place = turn * trainer.world.size + trainer.world.rank
        pack = packs[min(place, len(packs) - 1)]
        tensors = PackTensors.of(pack, trainer.model.device)
        with torch.no_grad():
            found = trainer.objective(tensors, tutor.lesson(documents, pack, tensors) if tutor else None)
        if place < len(packs):
            kinds = torch.from_numpy(pack.segments_N).long()
            sums[0].index_add_(0, kinds, found.nll_N.double().cpu())
            sums[1].index_add_(0, kinds, torch.ones(len(kinds), dtype=torch.float64))
    total, count = torch.tensor(trainer.world.sums(sums.flatten().tolist()), dtype=torch.float64).view(2, -1)
    by_segment = {name: float(total[i] / count[i]) for i, name in enumerate(SEGMENTS) if count[i]}
    return {"": float(total.sum() / count.sum()), **by_segment}


def write_metrics(path: Path, start: int) -> Callable[[Mapping[str, Any]], None]:
    """A function that appends to metrics.jsonl; lines after step `start` (of a killed attempt) are dropped first."""
    kept = []
    if path.exists() and start:
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
