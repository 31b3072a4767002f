"""Rates, optimizers and running means by hand, and optimizer state by parameter name."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import SftPhase
from distill.documents import Documents
from distill.errors import MissingExtraError, TrainingError
from distill.interrupts import Stop
from distill.students.loop import StepReport, Trainer
from distill.students.optimizers import (
    RunningMean,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from distill.students.weights import Replica, Sharded

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
MakePhase = Callable[..., SftPhase]

# --- learning rate --------------------------------------------------------------------------------------------------


def rates(phase: SftPhase, total: int) -> list[float]:
    return [learning_rate(phase, step, total) for step in range(total)]


def test_the_learning_rate_by_hand() -> None:
    # 8 steps, a quarter of them warm-up: 2 steps of 0.5 and 1 times the peak, then 6 steps from 1 to the floor of 0.1
    cosine = SftPhase(kind="sft", lr=2.0, warmup_ratio=0.25, min_lr_ratio=0.1)
    falling = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2) for k in range(6)]
    assert rates(cosine, 8) == pytest.approx([1.0, 2.0, *falling])
    assert learning_rate(cosine, 5, 8) == pytest.approx(2 * (0.1 + 0.9 / 2)), "half way down after half of the steps"
    linear = cosine.model_copy(update={"schedule": "linear"})
    assert rates(linear, 8) == pytest.approx([1.0, 2.0, 2.0, 1.7, 1.4, 1.1, 0.8, 0.5])
    constant = cosine.model_copy(update={"schedule": "constant"})
    assert rates(constant, 8) == [1.0] + [2.0] * 7


def test_warmup_stable_decay_by_hand() -> None:
    # 10 steps: 1 of warm-up, 4 of decay (40 %), the 5 between at the peak; then 1 - sqrt(k / 4) for k = 0, 1, 2, 3
    phase = SftPhase(kind="sft", lr=2.0, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.4, min_lr_ratio=0.0)
    assert rates(phase, 10) == pytest.approx(
        [2.0] * 6 + [2.0, 1.0, 2 * (1 - math.sqrt(0.5)), 2 * (1 - math.sqrt(0.75))]
    )
    floored = phase.model_copy(update={"min_lr_ratio": 0.5})
    assert rates(floored, 10)[7:] == pytest.approx([1.5, 1 + 1 - math.sqrt(0.5), 1 + 1 - math.sqrt(0.75)])
    slow = phase.model_copy(update={"warmup_ratio": 0.5})
    assert rates(slow, 10) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, *rates(phase, 10)[6:]])


def test_a_decay_as_long_as_the_training_starts_after_the_warm_up() -> None:
    phase = SftPhase(kind="sft", lr=1.0, schedule="wsd", warmup_ratio=0.5, decay_ratio=1.0, min_lr_ratio=0.0)
    assert rates(phase, 4) == pytest.approx([0.5, 1.0, 1.0, 1 - math.sqrt(0.5)])
    assert rates(phase.model_copy(update={"warmup_ratio": 0.0}), 1) == [1.0]


def test_warm_up_rounds_up_but_not_beyond_a_whole_number_of_steps() -> None:
    def first_at_peak(ratio: float, total: int) -> int:
        phase = SftPhase(kind="sft", lr=1.0, warmup_ratio=ratio, schedule="constant")
        return rates(phase, total).index(1.0)

    assert first_at_peak(0, 10) == 0
    assert first_at_peak(0.05, 10) == 0, "one step of warm-up is a step at the peak"
    assert first_at_peak(0.11, 10) == 1
    assert first_at_peak(0.07, 100) == 6, "0.07 * 100 is 7.000000000000001 in floating point"


# --- optimizers -----------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 4.0]]))
        self.vector = torch.nn.Parameter(torch.tensor([3.0, -1.0]))


def given_gradients(weights: Replica) -> None:
    for p in weights.params:
        p.grad = torch.sin(p.detach() * 5)


def test_adamw_by_hand_with_decay_on_matrices_only() -> None:
    weights = Replica(Small(), torch.float32)
    phase = SftPhase(kind="sft", lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    optimizer = make_optimizer(weights, phase)
    expected = [p.detach().clone() for p in weights.params]
    first, second = ([torch.zeros_like(p) for p in weights.params] for _ in range(2))
    for step in (1, 2, 3):
        given_gradients(weights)
        for i, decay in enumerate((0.5, 0.0)):
            gradient = weights.params[i].grad
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.9 * second[i] + 0.1 * gradient**2
            corrected = first[i] / (1 - 0.8**step), (second[i] / (1 - 0.9**step)).sqrt()
            expected[i] = expected[i] * (1 - 0.1 * decay) - 0.1 * corrected[0] / (corrected[1] + 1e-8)
        optimizer.step()
    for ours, theirs in zip(weights.params, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_adamw_is_torchs_fused_one() -> None:
    optimizer = make_optimizer(Replica(Small(), torch.float32), SftPhase(kind="sft"))
    assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)


def test_adapters_without_vectors_make_one_group() -> None:
    model = Small()
    model.vector.requires_grad_(False)
    optimizer = make_optimizer(Replica(model, torch.bfloat16), SftPhase(kind="sft", weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_eight_bit_adamw_without_its_library_says_what_to_install() -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(MissingExtraError, match=r"bitsandbytes is not installed; .*distill\[gpu\]"):
        make_optimizer(Replica(Small(), torch.float32), SftPhase(kind="sft", optimizer="adamw_8bit"))


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_what_cannot_work_on_shards_is_refused(name: str) -> None:
    shards = object.__new__(Sharded)
    shards.names, shards.params = ["w"], [torch.zeros(2, 2, requires_grad=True)]
    with pytest.raises(TrainingError, match=rf"optimizer {name} does not work on shards; take adamw, or .*=ddp"):
        make_optimizer(shards, SftPhase(kind="sft", optimizer=name))


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_goes_by_name_and_comes_back_equal(live: Live, name: str, dtype: Any) -> None:
    phase = SftPhase(kind="sft", lr=0.01, optimizer=name)
    weights = Replica(live("qwen2"), dtype)
    optimizer = make_optimizer(weights, phase)
    for _ in range(2):
        given_gradients(weights)
        optimizer.step()
    state = optimizer_state(optimizer, weights)
    assert list(state) == weights.names
    for own, p in zip(state.values(), weights.params, strict=True):
        assert own["step"] == 2 and any(isinstance(v, torch.Tensor) and v.numel() > 1 for v in own.values())
        kept = optimizer.state[p]
        assert all(torch.equal(own[key], kept[key]) and own[key] is not kept[key] for key in kept)

    other = Replica(live("qwen2"), dtype)
    other.load(weights.state())
    resumed = make_optimizer(other, phase)
    load_optimizer_state(resumed, other, state)
    for one, its_weights in ((optimizer, weights), (resumed, other)):
        given_gradients(its_weights)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(weights.params, other.params, strict=True))
    fresh = make_optimizer(other, phase)
    given_gradients(other)
    given_gradients(weights)
    fresh.step()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(weights.params, other.params, strict=True)), "state matters"


def test_state_before_the_first_step_is_empty() -> None:
    weights = Replica(Small(), torch.float32)
    assert optimizer_state(make_optimizer(weights, SftPhase(kind="sft")), weights) == {}


LENGTHS, PROMPTS = [9, 14, 5, 6, 20, 12, 7, 11, 16, 8], [3, 1, 4, 2, 11, 6, 2, 5, 8, 4]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adafactor_learns_and_goes_on_after_a_stop(
    live: Live, make_documents: MakeDocuments, phase: MakePhase, tmp_path: Path, precision: str
) -> None:
    documents = make_documents(LENGTHS, PROMPTS)
    chosen = phase(optimizer="adafactor", lr=0.02, epochs=6, checkpoint_every_steps=3, weight_decay=0.01)

    def trainer(name: str, seed: int = 7) -> Trainer:
        (tmp_path / name).mkdir(exist_ok=True)
        return Trainer(live(seed=seed), documents, chosen, precision, tmp_path / name)

    whole = trainer("whole")
    losses = [report.loss for report in whole.run(Stop()) if isinstance(report, StepReport)]
    assert losses[-1] < 0.8 * losses[0]
    running = trainer("stopped").run(Stop())
    for _ in range(5):
        next(running)
    running.close()
    again = trainer("stopped", seed=1)
    assert again.resumed_from == 3
    assert [report.loss for report in again.run(Stop()) if isinstance(report, StepReport)] == losses[3:]
    ours, theirs = again.weights.state(), whole.weights.state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- running mean ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_running_mean_by_hand(decay: float) -> None:
    seen = [torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.5]), torch.tensor([-3.0, 8.0]), torch.tensor([2.0, 2.0])]
    mean = RunningMean([torch.zeros(2)], decay)
    for t, weights in enumerate(seen, 1):
        mean.update([weights])
        weighted = sum(decay ** (t - i) * one.double() for i, one in enumerate(seen[:t], 1))
        expected = (1 - decay) / (1 - decay**t) * weighted
        assert mean.updates == t
        assert mean.means[0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_first_mean_is_the_first_weights_and_needs_no_gradient() -> None:
    weights = torch.tensor([0.1, 1e-8, -3e5], requires_grad=True)
    mean = RunningMean([weights], 0.999)
    mean.update([weights])
    assert torch.equal(mean.means[0], weights.detach()) and not mean.means[0].requires_grad


def test_without_correction_the_mean_would_start_near_zero() -> None:
    mean = RunningMean([torch.zeros(1)], 0.99)
    for _ in range(3):
        mean.update([torch.ones(1)])
    assert mean.means[0].item() == pytest.approx(1) and 1 - 0.99**3 < 0.03
