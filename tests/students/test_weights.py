"""Weights that an optimizer works on: what bf16 must not lose, and what goes in and out by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.attention import PER_DOCUMENT
from distill.config import Lora, SftPhase
from distill.errors import TrainingError
from distill.models import find_model, load_model
from distill.students.adapters import with_adapters
from distill.students.distributed import World
from distill.students.objective import StudentObjective
from distill.students.weights import Replica, make_weights, trained_names

Live = Callable[..., Any]
MakePhase = Callable[..., SftPhase]


def nudged(weight: Any, steps: int) -> None:
    """AdamW with a gradient of one and a rate of 1e-4: each step takes 1e-4 off every weight."""
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


# --- bf16 with fp32 masters -----------------------------------------------------------------------------------------


def test_updates_below_the_resolution_of_bf16_add_up_in_the_masters() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    weights = Replica(model, torch.bfloat16)
    nudged(weights.params[0], 60)
    weights.publish()
    assert model.weight.dtype == torch.bfloat16
    assert weights.params[0].detach().flatten().tolist() == pytest.approx([1 - 60e-4] * 3, abs=1e-6)
    # bf16 has 8 bits: below 1 its numbers are 1/256 = 0.0039 apart
    assert model.weight.detach().flatten().tolist() == [1 - 2 / 256] * 3


def test_plain_bf16_weights_lose_the_same_updates() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    nudged(weight, 60)
    assert weight.tolist() == [1.0] * 3


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    weights = Replica(model, torch.bfloat16)
    # 1 + 600 times 2**-10: in bf16 every addition to 1 would be lost
    for size in [1.0] + [2.0**-10] * 600:
        (model(torch.ones(1, 1, dtype=torch.bfloat16)) * size).sum().backward()
    assert weights.params[0].grad is not None and weights.params[0].grad.item() == 1 + 600 * 2.0**-10
    assert model.weight.grad is None
    plain = torch.nn.Linear(1, 1, bias=False).bfloat16()
    for size in [1.0] + [2.0**-10] * 600:
        (plain(torch.ones(1, 1, dtype=torch.bfloat16)) * size).sum().backward()
    assert plain.weight.grad is not None and plain.weight.grad.item() == 1


def test_the_mean_over_tokens_is_taken_in_fp32_and_clipped_there() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    weights = Replica(model, torch.bfloat16)
    [master] = weights.params
    master.grad = torch.tensor([[3.0, 4.0]])
    assert weights.average(300, clip=1.0) == pytest.approx(5 / 300)
    assert master.grad.tolist()[0] == pytest.approx([3 / 300, 4 / 300], rel=1e-7)
    master.grad = torch.tensor([[300.0, 400.0]])
    assert weights.average(10, clip=2.0) == pytest.approx(50)
    assert master.grad.tolist()[0] == pytest.approx([1.2, 1.6], rel=1e-5)
    assert abs(torch.tensor(1 / 300, dtype=torch.bfloat16).item() * 300 - 1) > 1e-3, "what bf16 would make of 1/300"


def test_the_norm_is_that_of_all_parameters_together() -> None:
    model = torch.nn.Linear(2, 1)
    weights = Replica(model, torch.float32)
    model.weight.grad, model.bias.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0])
    assert weights.average(1, clip=3.5) == pytest.approx(7)
    assert model.weight.grad.tolist()[0] == pytest.approx([1.0, 1.5], rel=1e-6)
    assert model.bias.grad.tolist() == pytest.approx([3.0], rel=1e-6)


def test_tied_weights_stay_one_parameter_with_one_master(live: Live) -> None:
    model = live()
    weights = Replica(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(weights.params) == len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    assert len(set(weights.names)) == len(weights.names) == len(weights.params)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_that_trains_is_bit_for_bit_the_model_that_will_be_loaded(
    live: Live, tmp_path: Path, family: str
) -> None:
    """Above all its rotary frequencies, which `model.to(bfloat16)` would round: other angles at position 400."""
    model = live(family)
    rounded = live(family).to(torch.bfloat16)
    Replica(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path)), "bfloat16", "cpu", PER_DOCUMENT)
    ids = torch.randint(3, 512, (1, 500), generator=torch.Generator().manual_seed(0))
    bounds = {"cu_seq_lens_q": [0, 500], "use_cache": False}
    with torch.no_grad():
        ours, theirs, wrong = (m(ids, **bounds).logits for m in (model, loaded, rounded))
    assert torch.equal(ours, theirs)
    assert float((ours - wrong).abs().max()) > 0.1, "the check sees rounded frequencies"


def test_in_fp32_the_model_is_its_own_master(live: Live) -> None:
    model = live()
    weights = Replica(model, torch.float32)
    assert all(a is b for a, b in zip(weights.params, model.parameters(), strict=True))


# --- in and out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_is_a_whole_fp32_copy_by_name_and_comes_back_into_the_model(live: Live, dtype: Any) -> None:
    model, exact = live(seed=1), dict(live(seed=1).named_parameters())
    weights = Replica(model, dtype)
    state = weights.state()
    assert list(state) == weights.names == trained_names(model)
    assert all(torch.equal(state[name], exact[name]) and state[name].dtype == torch.float32 for name in exact)
    with torch.no_grad():
        for p in weights.params:
            p.add_(1)
    assert all(torch.equal(state[name], exact[name]) for name in exact), "a copy that training does not reach"

    other = live(seed=2)
    Replica(other, dtype).load(state)
    assert all(torch.equal(p, exact[name].to(dtype)) for name, p in other.named_parameters())


def test_only_what_trains_is_kept_and_all_of_the_model_computes_in_bf16(live: Live) -> None:
    model = with_adapters(live(), Lora(rank=2), 0)
    weights = Replica(model, torch.bfloat16)
    assert weights.names and all("lora_" in name for name in weights.names)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in weights.params} == {torch.float32}
    assert list(weights.state()) == weights.names


# --- which ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["auto", "ddp"])
def test_one_process_trains_a_replica(live: Live, phase: MakePhase, parallel: str) -> None:
    made = make_weights(StudentObjective(live(), phase()), "bf16", parallel, World())
    assert isinstance(made, Replica) and made.separate and not made.lockstep


def test_shards_take_several_processes(live: Live, phase: MakePhase) -> None:
    with pytest.raises(TrainingError, match=r"the only process; start it with torchrun .* or set student\.parallel"):
        make_weights(StudentObjective(live(), phase()), "bf16", "fsdp", World())


def test_with_several_processes_every_parameter_takes_part_in_the_sum() -> None:
    """One without a pack would else send fewer numbers than the others, and the sums would mix parameters."""

    class Two(World):
        def sum_(self, tensors: Any) -> None:
            summed.append([tensor.clone() for tensor in tensors])

    summed: list[list[Any]] = []
    model = torch.nn.Linear(2, 1)
    weights = Replica(model, torch.float32, Two(rank=1, size=2))
    model.weight.grad = torch.ones(1, 2)
    weights.average(1, clip=9)
    assert [tensor.tolist() for tensor in summed[0]] == [[[1, 1]], [0]]
