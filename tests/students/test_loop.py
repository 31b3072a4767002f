"""The training loop: the arithmetic of a step, looks and early stopping, and going on after any kill."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.config import SftPhase
from distill.documents import Documents
from distill.errors import Interrupted, TrainingError
from distill.format import SEGMENTS
from distill.interrupts import Stop
from distill.models import seeded
from distill.students.checkpoint import BEST, checkpoints, read_state
from distill.students.distributed import World
from distill.students.loop import StepReport, Trainer, compiled, cut, heldout_losses, pack_seed, write_metrics
from distill.students.objective import PackTensors, StudentObjective
from distill.students.optimizers import learning_rate, optimizer_state
from distill.students.packing import Source

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
MakePhase = Callable[..., SftPhase]
TinyModel = Callable[[str], Path]

LENGTHS, PROMPTS = [9, 14, 5, 6, 20, 12, 7, 11, 16, 8], [3, 1, 4, 2, 11, 6, 2, 5, 8, 4]
SCRIPT = Path(__file__).with_name("killed_training.py")


@pytest.fixture
def documents(make_documents: MakeDocuments) -> Documents:
    return make_documents(LENGTHS, PROMPTS)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return make


def weights_of(trainer: Trainer) -> list[Any]:
    return list(trainer.weights.state().values())


def optimizer_of(trainer: Trainer) -> list[Any]:
    """Every tensor of the optimizer's state, by name."""
    state = optimizer_state(trainer.optimizer, trainer.weights)
    return [value for name in state for _, value in sorted(state[name].items())]


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def steps_of(trainer: Trainer) -> list[StepReport]:
    """Train to the end; the reports of its steps."""
    return [report for report in trainer.run(Stop()) if isinstance(report, StepReport)]


# --- one step -------------------------------------------------------------------------------------------------------


def plain_steps(model: Any, documents: Documents, phase: SftPhase, plan: list[list[int]]) -> list[tuple[float, float]]:
    """The same training as anyone would write it: one document at a time, torch's own loss, clipping and AdamW."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(phase.beta1, phase.beta2), fused=False, foreach=False)
    model.get_input_embeddings().padding_idx = None
    by_segment = torch.tensor([0.0, phase.loss_weights.think, phase.loss_weights.answer, phase.loss_weights.eos])
    weights = [by_segment[torch.from_numpy(documents.segments(i)).long()][1:] for i in range(len(documents))]
    reports = []
    for step, chosen in enumerate(plan):
        total = sum(float(weights[index].sum()) for index in chosen)
        loss = 0.0
        for index in chosen:
            tokens = torch.from_numpy(documents.ids(index)).long()
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
            rows = F.cross_entropy(logits, tokens[1:], reduction="none", label_smoothing=phase.label_smoothing)
            rows = rows + phase.z_loss * logits.logsumexp(-1).square()
            part = (rows * weights[index]).sum() / total
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), phase.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step, len(plan))
        optimizer.step()
        optimizer.zero_grad()
        reports.append((loss, float(norm)))
    return reports


WEIGHTED = {"loss_weights": {"think": 0.25, "answer": 2.0, "eos": 5.0}, "label_smoothing": 0.1, "z_loss": 0.01}


@pytest.mark.parametrize(
    "given", [{}, WEIGHTED, {"batching": "bucketed"}, {"batching": "bucketed", **WEIGHTED}], ids=str
)
@pytest.mark.parametrize("clip", [0.05, 1e9], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("micro", [1, 32, 64])
def test_training_is_what_a_plain_pytorch_loop_does(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, micro: int, clip: float, given: dict[str, Any]
) -> None:
    chosen = phase(micro_batch_tokens=micro, grad_clip=clip, weight_decay=0.1, epochs=2, warmup_ratio=0.3, **given)
    trainer = Trainer(live("qwen3"), documents, chosen, "fp32", tmp_path)
    reports = steps_of(trainer)
    reference = live("qwen3", attention="sdpa")
    expected = plain_steps(reference, documents, chosen, trainer.plan)
    assert len(reports) == len(trainer.plan) >= 4
    assert [r.loss for r in reports] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [r.grad_norm for r in reports] == pytest.approx([norm for _, norm in expected], rel=1e-3)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4), name
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(live("qwen3").parameters(), reference.parameters()))
    assert moved > 3e-3, "the comparison is of weights that moved"


def test_a_report_counts_what_its_step_trained_on(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    trainer = Trainer(live(), documents, phase(epochs=1.5), "fp32", tmp_path)
    reports = steps_of(trainer)
    assert [r.step for r in reports] == list(range(1, len(trainer.plan) + 1))
    for report, chosen in zip(reports, trainer.plan, strict=True):
        assert report.tokens == sum(LENGTHS[i] for i in chosen) == report.cells <= 64
        assert report.supervised == sum(LENGTHS[i] - PROMPTS[i] for i in chosen)
        assert 1 <= report.packs <= len(chosen) and report.seconds > 0
        assert report.lr == learning_rate(trainer.phase, report.step - 1, len(trainer.plan))


def test_cells_of_a_padded_batch_count_its_padding(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    trainer = Trainer(live(), documents, phase(batching="bucketed"), "fp32", tmp_path)
    for report, chosen in zip(steps_of(trainer), trainer.plan, strict=True):
        assert report.cells == sum(pack.ids_BT.size for pack in cut(chosen, documents, trainer.phase))
        assert report.cells > report.tokens == sum(LENGTHS[i] for i in chosen)


def test_only_the_documents_of_the_sources_train(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    trainer = Trainer(live(), documents, phase(epochs=2), "fp32", tmp_path, [Source([0, 3, 4])])
    assert sorted(index for chosen in trainer.plan for index in chosen) == [0, 0, 3, 3, 4, 4]


def test_the_end_token_learns_from_where_it_is_read_even_if_it_pads(
    live: Live, make_documents: MakeDocuments, phase: MakePhase, tmp_path: Path
) -> None:
    documents = make_documents([12], [6])
    documents.ids(0)[2] = 0  # the pad token of the tiny models, in the prompt: read, never predicted
    model = live(tie_word_embeddings=False)
    assert model.get_input_embeddings().padding_idx == 0, "transformers asks torch to keep this row's gradient at zero"
    before = model.get_input_embeddings().weight.detach().clone()
    list(Trainer(model, documents, phase(), "fp32", tmp_path).run(Stop()))
    moved = (model.get_input_embeddings().weight.detach() != before).any(-1)
    assert set(np.flatnonzero(moved.numpy())) == set(documents.ids(0)[:-1].tolist())


@pytest.mark.parametrize("given", [{}, {"fused": False}, {"gradient_checkpointing": True}], ids=str)
def test_the_model_is_left_as_it_came(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, given: dict[str, Any]
) -> None:
    model = live()
    running = Trainer(model, documents, phase(**given), "fp32", tmp_path).run(Stop())
    next(running)
    inside = [name for name, module in model.named_modules() if "forward" in vars(module)]
    changed = [
        name for name in inside if "proj" not in name and name != "lm_head"
    ]  # linear layers change on some processors only
    assert len(changed) == (0 if given.get("fused") is False else 7) and model.training
    list(running)
    assert not any("forward" in vars(module) for module in model.modules()) and not model.training


# --- draws ----------------------------------------------------------------------------------------------------------


class Several(World):
    """One of several processes that hear nothing of one another."""

    def sums(self, values: Sequence[float]) -> list[float]:
        return list(values)


def test_noise_and_dropout_do_not_depend_on_how_many_processes_share_a_step(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path]
) -> None:
    chosen = phase(neftune_alpha=20.0, step_tokens=200, micro_batch_tokens=20)

    def gradients(size: int, rank: int) -> list[Any]:
        model = live("qwen2", "float32", attention_dropout=0.2)
        trainer = Trainer(model, documents, chosen, "fp32", folder(f"{rank}-{size}"), world=Several(rank, size))
        trainer.objective.train()
        packs = cut(trainer.plan[0], documents, chosen)
        assert len(packs) == 6
        trainer._passes(0, packs, documents)
        return [p.grad for p in trainer.weights.params]

    alone = gradients(1, 0)
    for size in (2, 3):
        shares = [gradients(size, rank) for rank in range(size)]
        together = [sum(parts) for parts in zip(*shares)]
        assert max(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True)) < 1e-4
    largest = max(float(gradient.abs().max()) for gradient in alone)
    assert largest > 1, "the gradients are far larger than the tolerance"


def test_every_pass_of_every_step_draws_anew(live: Live, documents: Documents, phase: MakePhase) -> None:
    seeds = {pack_seed(seed, step, place) for seed in range(3) for step in range(50) for place in range(40)}
    assert len(seeds) == 3 * 50 * 40
    objective = StudentObjective(live(), phase(neftune_alpha=20.0)).train()
    [pack] = cut([0], documents, objective.phase)
    losses = set()
    for seed in (pack_seed(0, 0, 0), pack_seed(0, 0, 1), pack_seed(0, 1, 0), pack_seed(1, 0, 0), pack_seed(0, 0, 0)):
        with seeded(seed, "cpu"):
            losses.add(objective(PackTensors.of(pack, "cpu")).total.item())
    assert len(losses) == 4, "the last one is the first again"


# --- compiled layers ------------------------------------------------------------------------------------------------


COMPILER = pytest.mark.filterwarnings("ignore")
"""torch's compiler warns of what it does itself: deprecated imports, gradients of inner tensors."""


@COMPILER
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU takes a C++ compiler")
@pytest.mark.parametrize(
    "fused", [True, pytest.param(False, marks=pytest.mark.full)], ids=["lean", "transformers' own code"]
)
@pytest.mark.full
def test_compiled_layers_train_to_the_same_losses(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path], fused: bool
) -> None:
    runs = {}
    for wanted in (False, True):
        chosen = phase(max_steps=2, compile=wanted, fused=fused)
        trainer = Trainer(live("qwen3"), documents, chosen, "fp32", folder(f"compiled-{wanted}"))
        runs[wanted] = steps_of(trainer)
        assert all(layer._compiled_call_impl is None for layer in trainer.model.model.layers), "taken off at the end"
    assert [r.loss for r in runs[True]] == pytest.approx([r.loss for r in runs[False]], abs=1e-5)
    assert [r.grad_norm for r in runs[True]] == pytest.approx([r.grad_norm for r in runs[False]], rel=1e-4)


@COMPILER
def test_layers_are_compiled_inside_the_block_only(live: Live) -> None:
    model = live()
    with compiled(model, False):
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    with compiled(model, True):  # torch compiles at the first call, which does not come
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


# --- looks and early stopping ---------------------------------------------------------------------------------------


class Scripted:
    """A look that reads its figures from a table and remembers the weights it was shown."""

    def __init__(self, figures: Mapping[int, float]) -> None:
        self.figures = figures
        self.seen: dict[int, list[Any]] = {}

    def __call__(self, trainer: Trainer, step: int) -> Mapping[str, Any]:
        assert not trainer.model.training and not trainer.objective.training
        self.seen[step] = weights_of(trainer)
        return {"heldout_loss": self.figures[step]}


WATCHED: dict[str, Any] = {"epochs": 4, "monitor": {"every_steps": 2}, "checkpoint_every_steps": 4}
STOPPING: dict[str, Any] = {**WATCHED, "early_stopping": {"patience": 2}, "heldout_traces": 1}
FIGURES = {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.2, 8: 1.0}
"""Best at step 2; two looks later it stops, before it could see step 8."""


def watched(
    live: Live, documents: Documents, phase: SftPhase, work: Path, figures: Mapping[int, float] = FIGURES, seed: int = 7
) -> tuple[Trainer, Scripted]:
    look = Scripted(figures)
    return Trainer(live(seed=seed), documents, phase, "bf16", work, look=look), look


def rows_of(running: Iterator[Any]) -> list[Any]:
    """Step numbers of reports, and (step, figure) of looks, in order."""
    return [row.step if isinstance(row, StepReport) else (row["step"], row["heldout_loss"]) for row in running]


@pytest.mark.parametrize(("every", "looks"), [(3, [0, 3, 6, 8]), (4, [0, 4, 8]), (100, [0, 8])])
def test_a_look_sees_the_first_and_the_last_weights_and_those_between(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, every: int, looks: list[int]
) -> None:
    chosen = phase(epochs=4, monitor={"every_steps": every})
    trainer, look = watched(live, documents, chosen, tmp_path, dict.fromkeys(range(9), 1.0))
    first = weights_of(trainer)
    rows = rows_of(trainer.run(Stop()))
    assert [row for row in rows if isinstance(row, int)] == list(range(1, 9))
    assert [row[0] for row in rows if not isinstance(row, int)] == looks == list(look.seen)
    assert all(rows.index(at) + 1 == rows.index((at, 1.0)) for at in looks[1:]), "a look comes after its step"
    assert equal(look.seen[0], first) and equal(look.seen[8], weights_of(trainer))
    assert not (tmp_path / BEST).exists(), "nothing stops, so nothing is best"


def test_without_a_monitor_nobody_looks(live: Live, documents: Documents, phase: MakePhase, tmp_path: Path) -> None:
    trainer, look = watched(live, documents, phase(), tmp_path, {})
    assert all(isinstance(row, int) for row in rows_of(trainer.run(Stop()))) and not look.seen


def test_looking_changes_no_weight(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path]
) -> None:
    def look(trainer: Trainer, step: int) -> dict[str, float]:
        torch.rand(step + 1)
        return heldout_losses(trainer, documents)

    chosen = phase(epochs=4, neftune_alpha=5.0, monitor={"every_steps": 1})
    seen = Trainer(live(), documents, chosen, "bf16", folder("seen"), look=look)
    unseen = Trainer(live(), documents, chosen, "bf16", folder("unseen"))
    looks = [row for row in seen.run(Stop()) if not isinstance(row, StepReport)]
    steps_of(unseen)
    assert equal(weights_of(seen), weights_of(unseen)) and len(looks) == 9
    assert looks[-1]["heldout_loss"] < looks[0]["heldout_loss"]


def test_training_stops_after_its_patience_and_ends_with_the_best_weights(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    trainer, look = watched(live, documents, phase(**STOPPING), tmp_path)
    rows = rows_of(trainer.run(Stop()))
    assert rows == [(0, 3.0), 1, 2, (2, 2.0), 3, 4, (4, 2.5), 5, 6, (6, 2.2)] and len(trainer.plan) == 8
    best = read_state(tmp_path / BEST)
    assert best["step"] == 2 and trainer.stopping.best == 2.0
    assert equal(weights_of(trainer), list(best["weights"].values()))
    assert equal(weights_of(trainer), look.seen[2]) and not equal(weights_of(trainer), look.seen[6])
    assert equal(list(trainer.model.parameters()), [w.bfloat16() for w in look.seen[2]]), "the model computes with them"


def test_the_best_weights_win_where_training_runs_to_its_end_and_keeps_a_mean(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    figures = {0: 3.0, 2: 2.0, 4: 1.0, 6: 2.2, 8: 1.5}
    trainer, look = watched(live, documents, phase(**STOPPING, ema_decay=0.9), tmp_path, figures)
    assert rows_of(trainer.run(Stop()))[-1] == (8, 1.5)
    assert equal(weights_of(trainer), look.seen[4])


@pytest.mark.parametrize("rows", range(1, 11))
def test_a_resumed_training_stops_where_it_would_have_and_with_the_same_best_weights(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path], rows: int
) -> None:
    whole, _ = watched(live, documents, phase(**STOPPING), folder("whole"))
    everything = rows_of(whole.run(Stop()))
    before, _ = watched(live, documents, phase(**STOPPING), folder("killed"))
    running = before.run(Stop())
    for _ in range(rows):
        next(running)
    running.close()
    after, look = watched(live, documents, phase(**STOPPING), folder("killed"), seed=7 if rows < 8 else 1)
    assert after.resumed_from == (4 if rows >= 8 else 0), "its figure of step 4 is in the checkpoint of step 4"
    rest = rows_of(after.run(Stop()))
    assert rest == everything[-len(rest) :] and set(look.seen) == ({6} if rows >= 8 else {0, 2, 4, 6})
    assert equal(weights_of(after), weights_of(whole))


def test_a_training_killed_after_it_has_stopped_trains_no_further(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    chosen = phase(**{**STOPPING, "checkpoint_every_steps": 3})
    before, look = watched(live, documents, chosen, tmp_path)
    rows_of(before.run(Stop()))
    again, later = watched(live, documents, chosen, tmp_path, seed=1)
    assert again.resumed_from == 6 and rows_of(again.run(Stop())) == [] and not later.seen
    assert equal(weights_of(again), look.seen[2])


def test_a_running_mean_is_what_training_ends_with(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path]
) -> None:
    decay = 0.7
    plain = Trainer(live(), documents, phase(epochs=3), "bf16", folder("plain"))
    seen = [weights_of(plain) for _ in plain.run(Stop())]
    mean = Trainer(live(), documents, phase(epochs=3, ema_decay=decay), "bf16", folder("mean"))
    steps_of(mean)
    t = len(seen)
    share = [(1 - decay) * decay ** (t - i) / (1 - decay**t) for i in range(1, t + 1)]
    for index, ours in enumerate(weights_of(mean)):
        expected = sum(weight * step[index].double() for weight, step in zip(share, seen, strict=True))
        assert float((ours - expected).abs().max()) < 1e-6
    assert equal(list(mean.model.parameters()), [w.bfloat16() for w in weights_of(mean)])
    assert not equal(weights_of(mean), seen[-1])


@pytest.mark.parametrize(
    "given", [{}, {"batching": "bucketed"}, WEIGHTED, {"loss_weights": {"think": 0.0, "eos": 0.5}}], ids=str
)
def test_held_out_losses_are_means_by_segment_whatever_training_weighs(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, given: dict[str, Any]
) -> None:
    trainer = Trainer(live("qwen2", "float64"), documents, phase(**given), "fp32", tmp_path)
    trainer.objective.eval()
    found = heldout_losses(trainer, documents)
    reference = live("qwen2", "float64", attention="sdpa")
    rows, kinds = [], []
    for index in range(len(documents)):
        tokens = torch.from_numpy(documents.ids(index)).long()
        with torch.no_grad():
            logits = reference(tokens[None], use_cache=False).logits[0, :-1]
        rows.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
        kinds.append(torch.from_numpy(documents.segments(index)).long()[1:])
    nll, kind = torch.cat(rows), torch.cat(kinds)
    expected = {f"heldout_loss_{name}": float(nll[kind == i].mean()) for i, name in enumerate(SEGMENTS) if i}
    assert found == pytest.approx({"heldout_loss": float(nll[kind > 0].mean()), **expected}, abs=1e-9)


# --- killed and resumed ---------------------------------------------------------------------------------------------


def trained_until(trainer: Trainer, reports: int) -> Trainer:
    """Take so many reports and then forget the generator, as a kill between two steps would."""
    running = trainer.run(Stop())
    for _ in range(reports):
        next(running)
    return trainer


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("given", "changes"),
    [({}, {}), ({"ema_decay": 0.9, "neftune_alpha": 5.0}, {"attention_dropout": 0.3})],
    ids=["as it is", "with noise, dropout and a mean"],
)
def test_training_killed_after_any_step_ends_in_equal_weights_and_optimizer_state(
    live: Live,
    documents: Documents,
    phase: MakePhase,
    folder: Callable[[str], Path],
    precision: str,
    given: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    chosen = phase(epochs=4, checkpoint_every_steps=2, **given)
    whole = Trainer(live(**changes), documents, chosen, precision, folder("whole"))
    losses = [report.loss for report in steps_of(whole)]
    assert len(losses) == 8
    for killed in (1, 2, 5, 8):
        work = folder(f"killed-{killed}")
        trained_until(Trainer(live(**changes), documents, chosen, precision, work), killed)
        # a model that differs shows that the checkpoint holds everything; before the first one there is the base only
        seed = 1 if killed > 2 else 7
        again = Trainer(live(seed=seed, **changes), documents, chosen, precision, work)
        assert again.resumed_from == (killed - 1) // 2 * 2, "the newest checkpoint that was written"
        resumed = [report.loss for report in steps_of(again)]
        assert resumed == losses[again.resumed_from :]
        assert equal(weights_of(again), weights_of(whole))
        assert equal(optimizer_of(again), optimizer_of(whole)) and optimizer_of(whole)
        assert equal(list(again.model.parameters()), list(whole.model.parameters()))


KILLS: list[tuple[str, int, int]] = [
    ("backward", 4, 1),
    ("write", 4, 1_000),
    ("epoch", 3, 0),
    ("write", 10, 700_000),
    ("backward", 16, 2),
]


def many_kills(count: int, seed: int) -> list[tuple[str, int, int]]:
    """Kills of every kind, each a step later than the one before: what comes back dies again before it ends.

    The training has 23 steps of three passes or more, a checkpoint after every second one, and two steps an epoch.
    """
    rng = random.Random(seed)
    kills = []
    for step in range(2, 2 + count):
        kind = "backward" if step % 2 else ("write", "replace", "write", "backward")[step // 2 % 4]
        size = {"backward": 3, "write": 1_700_000, "replace": 2}[kind]
        kills.append((kind, step, rng.randrange(size) if kind != "write" else rng.randrange(1, size)))
    for place, epoch in ((5, 3), (13, 7)):
        kills[place] = ("epoch", epoch, 0)
    return kills


def killed_and_whole(
    model: Path, folder: Path, precision: str, kills: Sequence[tuple[str, int, int]]
) -> tuple[list[Any], ...]:
    said = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(model), str(folder), precision, json.dumps(kills)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    whole, *attempts = map(json.loads, said.stdout.splitlines())
    assert whole["code"] == 0 and whole["resumed_from"] == 0
    assert [attempt["code"] for attempt in attempts] == [-signal.SIGKILL] * len(kills) + [0], said.stdout
    torn = [a["left"] for a in attempts if a["kill"] and a["kill"][0] == "write"]
    assert torn and all(any(name.endswith(".part") for name in left) for left in torn), "the kill was in the writing"
    assert max(a["resumed_from"] for a in attempts) > 10 and len({a["resumed_from"] for a in attempts}) > 2
    return tuple(leaves(torch.load(folder / f"{name}.pt", weights_only=True)) for name in ("resumed", "whole"))


def leaves(made: Any) -> list[Any]:
    """All tensors of weights, optimizer state, running mean and model, in order."""
    if isinstance(made, Mapping):
        return [leaf for key in sorted(made) for leaf in leaves(made[key])]
    return [leaf for one in made for leaf in leaves(one)] if isinstance(made, list) else [made]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_training_killed_five_times_is_bit_equal_to_one_left_alone(
    tiny_model: TinyModel, tmp_path: Path, precision: str
) -> None:
    """In a backward pass, while a checkpoint is written, as an epoch starts; with noise, dropout and a running mean."""
    resumed, whole = killed_and_whole(tiny_model("qwen3"), tmp_path / "killed", precision, KILLS)
    assert len(whole) > 100 and equal(resumed, whole)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_training_killed_twenty_times_is_bit_equal_to_one_left_alone(
    tiny_model: TinyModel, tmp_path: Path, precision: str, seed: int
) -> None:
    resumed, whole = killed_and_whole(tiny_model("qwen3"), tmp_path / "killed", precision, many_kills(20, seed))
    assert len(whole) > 100 and equal(resumed, whole)


def stopped_at(trainer: Trainer, step: int) -> None:
    stop = Stop()
    with pytest.raises(Interrupted):
        for report in trainer.run(stop):
            assert isinstance(report, StepReport)
            if report.step == step:
                stop.signum = signal.SIGTERM
    assert report.step == step


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_stop_request_checkpoints_at_once_and_costs_no_step(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path], step: int
) -> None:
    chosen = phase(epochs=4, checkpoint_every_steps=100)
    whole = trained_until(Trainer(live(), documents, chosen, "bf16", folder("whole")), 8)
    stopped_at(Trainer(live(), documents, chosen, "bf16", folder("stopped")), step)
    again = Trainer(live(seed=1), documents, chosen, "bf16", folder("stopped"))
    assert again.resumed_from == step
    assert len(steps_of(again)) == 8 - step
    assert equal(weights_of(again), weights_of(whole))


def test_a_checkpoint_of_other_data_is_refused(
    live: Live, documents: Documents, make_documents: MakeDocuments, phase: MakePhase, tmp_path: Path
) -> None:
    trained_until(Trainer(live(), documents, phase(epochs=2, checkpoint_every_steps=2), "fp32", tmp_path), 3)
    other = make_documents(LENGTHS, PROMPTS, seed=1)
    with pytest.raises(TrainingError, match=r"checkpoint-00000002\.pt: was written for another data .* delete "):
        Trainer(live(), other, phase(epochs=2), "fp32", tmp_path)
    with pytest.raises(TrainingError, match="was written for another steps"):
        Trainer(live(), documents, phase(epochs=1), "fp32", tmp_path)


def test_as_many_checkpoints_as_the_phase_says_are_kept(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    chosen = phase(epochs=4, checkpoint_every_steps=1, keep_checkpoints=3)
    steps_of(Trainer(live(), documents, chosen, "fp32", tmp_path))
    assert [path.name[-5:-3] for path in checkpoints(tmp_path)] == ["05", "06", "07"], "the last step needs none"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_checkpoint_that_could_not_be_written_stops_the_training(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-00000004.pt.part").symlink_to("/dev/full")
    trainer = Trainer(live(), documents, phase(epochs=4, checkpoint_every_steps=2), "fp32", tmp_path)
    with pytest.raises(OSError, match="No space left"):
        steps_of(trainer)
    assert Trainer(live(), documents, trainer.phase, "fp32", tmp_path).resumed_from == 2


# --- what is not finite ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_documents_saved(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    chosen = phase(epochs=1, micro_batch_tokens=16)
    trainer = Trainer(live(), documents, chosen, "bf16", tmp_path)
    assert len(trainer.plan) >= 2
    bad = trainer.plan[1][0]
    poisoned = 511
    for index in range(len(LENGTHS)):
        ids = documents.ids(index)
        ids[ids == poisoned] = 3
    documents.ids(bad)[:] = poisoned
    with torch.no_grad():  # an embedding that only the bad document reads; the head is tied, so every loss sees it
        trainer.weights.params[0][poisoned] = float("nan")
    trainer.weights.publish()
    running = trainer.run(Stop())
    with pytest.raises(TrainingError, match=r"not finite; the documents are in .*bad-step-1\.json; lower student"):
        next(running)
    saved = json.loads((tmp_path / "bad-step-1.json").read_text())["documents"]
    assert saved == [{"number": index, "ids": documents.ids(index).tolist()} for index in trainer.plan[0]]
    packs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("bad-step-1-pack-*.json"))]
    assert len(packs) == len(cut(trainer.plan[0], documents, chosen)) and {one["loss"] for one in packs} == {"nan"}
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_only_the_step_with_the_bad_document_is_refused(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, batching: str
) -> None:
    model = live(tie_word_embeddings=False)
    chosen = phase(epochs=1, micro_batch_tokens=20, batching=batching, checkpoint_every_steps=1, ema_decay=0.9)
    trainer = Trainer(model, documents, chosen, "fp32", tmp_path)
    bad, poisoned = trainer.plan[1][0], 511
    for index in range(len(LENGTHS)):
        ids = documents.ids(index)
        ids[ids == poisoned] = 3
        ids[0] = poisoned if index == bad else ids[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[poisoned] = float("inf")
    running = trainer.run(Stop())
    first = next(running)
    assert isinstance(first, StepReport) and math.isfinite(first.loss)
    assert trainer.mean is not None
    before, state = weights_of(trainer), optimizer_of(trainer)
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        next(running)
    assert equal(weights_of(trainer), before) and equal(optimizer_of(trainer), state), "nothing was learnt from it"
    assert trainer.mean.updates == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000001.pt"]
    saved = json.loads((tmp_path / "bad-step-2.json").read_text())["documents"]
    assert {"number": bad, "ids": documents.ids(bad).tolist()} in saved
    [offending] = [json.loads(path.read_text()) for path in tmp_path.glob("bad-step-2-pack-*.json")]
    assert any(documents.ids(bad).tolist() == row[: LENGTHS[bad]] for row in offending["ids"]) or (
        poisoned in offending["ids"][0]
    )
    assert len(cut(trainer.plan[1], documents, chosen)) > 1, "the other packs of the step are not accused"


def test_a_gradient_that_is_not_finite_stops_too(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    trainer = Trainer(live(), documents, phase(), "fp32", tmp_path)
    before = weights_of(trainer)
    trainer.weights.params[3].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 1: loss \d+\.\d+, gradient norm (nan|inf): not finite"):
        steps_of(trainer)
    assert equal(weights_of(trainer), before) and (tmp_path / "bad-step-1.json").exists()


# --- metrics --------------------------------------------------------------------------------------------------------


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def plain(row: Any) -> dict[str, Any]:
    return row._asdict() if isinstance(row, StepReport) else dict(row)


@pytest.mark.parametrize("watched_too", [False, True], ids=["steps", "steps and looks"])
def test_each_step_is_in_the_metrics_once_wherever_training_was_killed(
    live: Live, documents: Documents, phase: MakePhase, folder: Callable[[str], Path], watched_too: bool
) -> None:
    chosen = phase(epochs=3, checkpoint_every_steps=2, monitor={"every_steps": 3} if watched_too else None)

    def look(_: Trainer, step: int) -> dict[str, Any]:
        return {"accuracy": step / 8}

    expected = [0, 1, 2, 3, 3, 4, 5, 6, 6] if watched_too else [1, 2, 3, 4, 5, 6]
    for killed in range(1, len(expected)):
        for after_its_checkpoint in (False, True):
            work = folder(f"{killed}-{after_its_checkpoint}")
            metrics = work / "metrics.jsonl"
            trainer = Trainer(live(), documents, chosen, "fp32", work, look=look)
            append = write_metrics(metrics, trainer.resumed_from)
            running = trainer.run(Stop())
            for _ in range(killed):
                append(plain(next(running)))
            if after_its_checkpoint:
                next(running, None)  # the checkpoint of the last step, and a step that nobody reported
            running.close()
            with metrics.open("a") as out:
                out.write('{"step": 99, "lo')  # a line torn by the kill
            again = Trainer(live(), documents, chosen, "fp32", work, look=look)
            append = write_metrics(metrics, again.resumed_from)
            for row in again.run(Stop()):
                append(plain(row))
            assert steps_in(metrics) == expected


def test_metrics_are_never_cut_in_place(tmp_path: Path) -> None:
    """A kill while old lines are dropped must not lose the ones before them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    before = path.stat().st_ino
    with path.open() as held:
        write_metrics(path, 3)
        assert len(held.read().splitlines()) == 5, "the old file was replaced as a whole"
    assert path.stat().st_ino != before and steps_in(path) == [1, 2, 3]
