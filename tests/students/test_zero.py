"""DeepSpeed as the holder of the weights: the same numbers as without it, and refusals where it cannot give them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.config import Lora, Monitor, SftPhase
from distill.errors import MissingExtraError, TrainingError
from distill.processes import shared_by
from distill.students.distributed import World
from distill.students.objective import StudentObjective
from distill.students.throughput import shape_of
from distill.students.weights import make_weights
from distill.students.zero import STAGES, ZeroSharded, check_zero, configuration

TinyModel = Callable[[str], Path]
MakePhase = Callable[..., SftPhase]
Live = Callable[..., Any]

spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
assert spec is not None and spec.loader is not None
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)
launch, trained, difference = ranks.launch, ranks.trained, ranks.difference

INSTALLED = importlib.util.find_spec("deepspeed") is not None


def with_deepspeed(test: Any) -> Any:
    """Several processes and a package that few environments have."""
    missing = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed: pip install 'distill[deepspeed]'")
    return pytest.mark.full(missing(test))


# --- refused, before any work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", STAGES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer": "adafactor"}, r"optimizer adafactor does not work on flat shards; take adamw"),
        ({"ema_decay": 0.9}, r"ema_decay needs .* remove it"),
        ({"compile": True}, r"compile .* set compile=false"),
        ({"lora": Lora(quantize="nf4")}, r"lora\.quantize nf4 .* set lora\.quantize=none"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(
    parallel: str, changes: dict[str, Any], reason: str, phase: MakePhase
) -> None:
    with pytest.raises(TrainingError, match=rf"{parallel} \(DeepSpeed\): {reason}.*or set student\.parallel=ddp"):
        check_zero(parallel, phase(**changes), 2)
    check_zero("fsdp", phase(**changes), 2)


def test_adapters_whose_model_is_scattered_write_no_answers(phase: MakePhase) -> None:
    watched = phase(lora=Lora(), monitor=Monitor(sets=["heldout"]))
    with pytest.raises(TrainingError, match=r"lora trains a part; remove monitor\.sets"):
        check_zero("zero3", watched, 2)


def test_shards_take_several_processes(live: Live, phase: MakePhase) -> None:
    with pytest.raises(
        TrainingError, match=r"accelerate launch --use_deepspeed --zero_stage 3 .* set student\.parallel=auto"
    ):
        make_weights(StudentObjective(live(), phase()), "bf16", "zero3", World())


@pytest.mark.skipif(INSTALLED, reason="deepspeed is installed")
def test_a_missing_package_is_named_with_its_extra(phase: MakePhase) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'distill\[deepspeed\]'"):
        check_zero("zero2", phase(), 2)


# --- what accelerate was told ---------------------------------------------------------------------------------------


def told(monkeypatch: pytest.MonkeyPatch, **said: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in said.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)


def test_without_deepspeed_the_recipe_decides() -> None:
    assert [shared_by(word) for word in ("auto", "fsdp", "zero2")] == ["auto", "fsdp", "zero2"]


@pytest.mark.parametrize(
    ("said", "chosen"), [({"ZERO_STAGE": "1"}, "zero1"), ({"ZERO_STAGE": "3"}, "zero3"), ({}, "zero2")]
)
def test_the_launcher_chooses_the_stage(said: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, OFFLOAD_OPTIMIZER_DEVICE="none", OFFLOAD_PARAM_DEVICE="none", **said)
    assert shared_by("auto") == shared_by(chosen) == chosen


@pytest.mark.parametrize(
    ("parallel", "said", "reason"),
    [
        ("fsdp", {"ZERO_STAGE": "2"}, r"DeepSpeed \(zero2\), but student\.parallel is fsdp; launch without"),
        ("zero3", {"ZERO_STAGE": "2"}, r"but student\.parallel is zero3; .* or set student\.parallel=auto"),
        ("auto", {"ZERO_STAGE": "0"}, r"ZeRO stage 0; launch with --zero_stage 1, 2 or 3"),
        ("auto", {"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, r"--offload_optimizer_device cpu, .* launch without it"),
        ("auto", {"OFFLOAD_PARAM_DEVICE": "nvme"}, r"--offload_param_device nvme, .* launch without it"),
        ("auto", {"CONFIG_FILE": "/etc/Zero.json"}, r"settings from /etc/Zero\.json, .* --zero_stage alone"),
    ],
)
def test_a_launcher_that_was_told_more_is_refused(
    parallel: str, said: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, **said)
    with pytest.raises(TrainingError, match=reason):
        shared_by(parallel)


# --- gradients ------------------------------------------------------------------------------------------------------


class Engine:
    """What DeepSpeed's engine does with gradients once they are added up: a norm of all, then a step group by group."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base = optimizer
        self.optimizer = SimpleNamespace(_global_grad_norm=0.0)

    def step(self) -> None:
        groups = self.base.param_groups
        gradients = [p.grad for group in groups for p in group["params"]]
        self.optimizer._global_grad_norm = torch.cat([g.flatten() for g in gradients]).norm()
        for group in groups:
            self.base.param_groups = [group]
            self.base.step()
        self.base.param_groups = groups

    def get_global_grad_norm(self) -> Any:
        return self.optimizer._global_grad_norm


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_become_clipped_means_over_the_weight_right_before_each_group_steps(stage: int) -> None:
    model = torch.nn.Linear(1, 1)
    weights = ZeroSharded(model, torch.float32, World(0, 2), stage)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=1.0)
    optimizer.register_step_pre_hook(weights._finish_gradients)
    weights.engine = Engine(optimizer)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    # over a weight of 300, sums of 900 and 1200 are means of 3 and 4; stage 3 gives half the sums, of two processes
    share = 0.5 if stage == 3 else 1.0
    model.weight.grad, model.bias.grad = torch.tensor([[900.0 * share]]), torch.tensor([1200.0 * share])
    assert weights.step(optimizer, 300, clip=2.0) == pytest.approx(5)
    assert model.weight.item() == pytest.approx(-1.2, rel=1e-5) and model.bias.item() == pytest.approx(-1.6, rel=1e-5)


def test_the_settings_leave_the_loop_to_us() -> None:
    made = configuration(2, torch.bfloat16, 64)
    assert made["gradient_clipping"] == 0 and made["managed_gradient_accumulation"] is False
    assert made["communication_data_type"] == "fp32" and made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert configuration(3, torch.float32, 64)["bf16"]["enabled"] is False


def test_a_partitioned_model_counts_as_a_whole_one(live: Live) -> None:
    """Stage 3 leaves a parameter empty between passes; speed is measured against the whole model."""
    model = live()
    whole = shape_of(model)
    for p in model.parameters():
        p.ds_numel = p.numel()
        p.data = torch.empty(0)
    assert shape_of(model) == whole


def test_parts_that_stage_3_keeps_join_to_the_whole_where_the_last_is_shorter() -> None:
    model, value = torch.nn.Linear(5, 2, bias=False), torch.arange(1.0, 11.0).view(2, 5)
    kept = SimpleNamespace(ds_tensor=torch.empty(4))
    parts = [ZeroSharded(model, torch.float32, World(rank, 3), 3)._own_part(kept, value) for rank in range(3)]
    assert [part.tolist() for part in parts] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]


# --- two processes with DeepSpeed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(1, tiny_model("qwen3"), tmp_path_factory.mktemp("alone") / "work", "ddp-plain", "fp32")


@with_deepspeed
@pytest.mark.parametrize("strategy", STAGES)
def test_two_processes_train_what_one_does_without_deepspeed(
    strategy: str, alone: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    both = trained(2, tiny_model("qwen3"), tmp_path / "work", f"{strategy}-plain", "fp32")
    assert both["world"] == 2 and any(packs % 2 for *_, packs in both["losses"]), "some have one pack more"
    assert both["own_moments"] < 0.6 * alone["own_moments"]
    assert bool(both["gone"]) == (strategy == "zero3")
    assert difference(both, alone) < 1e-5


@with_deepspeed
def test_a_mean_over_processes_in_place_of_tokens_would_be_seen(alone: dict[str, Any]) -> None:
    wrong = {**alone, "losses": [[step, loss, norm / 2, packs] for step, loss, norm, packs in alone["losses"]]}
    assert difference(wrong, alone) > 0.1


@with_deepspeed
@pytest.mark.parametrize("strategy", STAGES)
def test_bf16_keeps_fp32_masters_and_adds_gradients_up_in_fp32(
    strategy: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    ours = trained(2, tiny_model("llama"), tmp_path / "ours", "ddp-plain", "bf16")
    both = trained(2, tiny_model("llama"), tmp_path / "both", f"{strategy}-plain", "bf16")
    assert all(w.dtype == torch.float32 for w in both["weights"].values())
    # the same passes on the same rounded weights: the first step has the same gradients but for the order of sums
    assert both["losses"][0][1:3] == pytest.approx(ours["losses"][0][1:3], rel=1e-5)
    assert max(abs(a[1] - b[1]) for a, b in zip(ours["losses"], both["losses"], strict=True)) < 0.02


@with_deepspeed
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "zero1"), (2, "zero1")),
        ((2, "zero2"), (2, "zero2")),
        ((2, "zero3"), (2, "zero3")),
        ((2, "zero3"), (1, "ddp")),
        ((1, "ddp"), (2, "zero1")),
        ((2, "zero1"), (3, "zero3")),
        ((2, "fsdp"), (3, "zero2")),
    ],
)
def test_a_training_goes_on_in_another_number_of_processes_and_any_way_of_sharing(
    before: tuple[int, str], after: tuple[int, str], alone: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    stopped = launch(before[0], tiny_model("qwen3"), tmp_path / "work", f"{before[1]}-plain", "fp32", stop_after=3)
    assert stopped.code != 0 and (tmp_path / "work.stopped").exists(), stopped.err
    rest = trained(after[0], tiny_model("qwen3"), tmp_path / "work", f"{after[1]}-plain", "fp32")
    assert rest["losses"][0][0] == 4 and rest["losses"][-1][0] == alone["losses"][-1][0]
    rest["losses"] = alone["losses"][:3] + rest["losses"]
    assert difference(rest, alone) < 1e-5


@with_deepspeed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STAGES)
def test_a_gradient_that_is_not_finite_ends_the_training_before_it_reaches_the_weights(
    strategy: str, precision: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    ended = launch(2, tiny_model("llama"), tmp_path / "work", f"{strategy}-plain-poisoned", precision)
    assert ended.code != 0 and "step 3" in ended.err and "gradient norm inf: not finite" in ended.err
    left = torch.load(tmp_path / "work.poisoned", weights_only=True)
    assert left and all(bool(torch.isfinite(w).all()) for w in left.values())


@with_deepspeed
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("extra", ["lora", "recompute"])
def test_adapters_and_recomputed_activations_train_too(
    strategy: str, extra: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    one = trained(1, tiny_model("llama"), tmp_path / "one", f"ddp-plain-{extra}", "fp32")
    both = trained(2, tiny_model("llama"), tmp_path / "both", f"{strategy}-plain-{extra}", "fp32")
    assert extra != "lora" or all("lora_" in name for name in both["weights"])
    assert difference(both, one) < 1e-5
