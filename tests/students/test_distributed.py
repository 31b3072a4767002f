"""Several processes as one: the same numbers as one process, whatever shards, stops and comes back."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TinyModel = Callable[[str], Path]

spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
assert spec is not None and spec.loader is not None
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)
launch, trained, difference = ranks.launch, ranks.trained, ranks.difference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(1, tiny_model("qwen3"), tmp_path_factory.mktemp("alone") / "work", "ddp")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(
    strategy: str, alone: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    both = trained(2, tiny_model("qwen3"), tmp_path / "work", strategy)
    assert both["world"] == 2 and alone["world"] == 1
    assert both["dtensors"] == (len(both["weights"]) if strategy == "fsdp" else 0)
    assert any(packs % 2 for _, _, _, packs in both["losses"]), "some steps leave one process without a last pack"
    assert difference(both, alone) < 1e-6


def test_two_processes_with_other_seeds_would_be_seen(
    alone: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    other = trained(1, tiny_model("llama"), tmp_path / "work", "ddp", "bf16")
    assert abs(other["losses"][-1][1] - alone["losses"][-1][1]) > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_in_two_processes_stays_near_one_process_in_bf16(
    strategy: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    one = trained(1, tiny_model("llama"), tmp_path / "one", "ddp", "bf16")
    both = trained(2, tiny_model("llama"), tmp_path / "both", strategy, "bf16")
    assert [packs for *_, packs in one["losses"]] == [packs for *_, packs in both["losses"]]
    assert max(abs(a[1] - b[1]) for a, b in zip(one["losses"], both["losses"], strict=True)) < 0.02
    assert all(w.dtype == torch.float32 for w in both["weights"].values()), "masters"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "fsdp"), (1, "ddp")),
        pytest.param((1, "ddp"), (2, "fsdp"), marks=pytest.mark.full),
        pytest.param((2, "ddp"), (2, "fsdp"), marks=pytest.mark.full),
    ],
)
def test_a_training_goes_on_with_another_number_of_processes(
    before: tuple[int, str], after: tuple[int, str], alone: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    stopped = launch(before[0], tiny_model("qwen3"), tmp_path / "work", before[1], stop_after=3)
    assert stopped.code != 0 and (tmp_path / "work.stopped").exists(), stopped.err
    assert list((tmp_path / "work").glob("checkpoint-*.pt"))
    rest = trained(after[0], tiny_model("qwen3"), tmp_path / "work", after[1])
    assert rest["losses"][0][0] == 4 and rest["losses"][-1][0] == alone["losses"][-1][0]
    rest["losses"] = alone["losses"][:3] + rest["losses"]
    assert difference(rest, alone) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(("parallel", "kind"), [("ddp", "kd"), ("fsdp", "kd"), ("ddp", "onpolicy")])
def test_two_processes_distil_what_one_does(parallel: str, kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    one = trained(1, tiny_model("llama"), tmp_path / "one", f"ddp-{kind}-plain")
    both = trained(2, tiny_model("llama"), tmp_path / "both", f"{parallel}-{kind}-plain")
    assert both["world"] == 2 and difference(both, one) < 1e-6


@pytest.mark.full
def test_adapters_train_in_shards_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    one = trained(1, tiny_model("llama"), tmp_path / "one", "ddp-lora")
    both = trained(2, tiny_model("llama"), tmp_path / "both", "fsdp-lora")
    assert all("lora_" in name for name in both["weights"]) and both["dtensors"] == len(both["weights"])
    assert difference(both, one) < 1e-6
