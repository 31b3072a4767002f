"""Who writes a student's answers: what each is given, and that vLLM writes with the weights of now."""

import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import Lora, OnPolicyPhase
from distill.documents import Documents
from distill.errors import MissingExtraError, TrainingError
from distill.students.adapters import merged_weights, with_adapters
from distill.students.distributed import World
from distill.students.on_policy import Guard, Rollouts
from distill.students.writers import Batch, checkpoint_weights, require_writer

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
NewModel = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


class Noted:
    """A writer that ends every answer at once, and notes what it was asked for."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.batches: list[list[Batch]] = []

    def sync(self, model: Any) -> None:
        self.said.append("sync")

    def write(self, batches: Any) -> list[list[list[int]]]:
        self.said.append("write")
        self.batches.append(list(batches))
        return [[[7, 2] for _ in batch.prompts] for batch in batches]

    def close(self) -> None:
        self.said.append("close")


@pytest.mark.parametrize(
    ("every", "said"),
    [(1, ["sync", "write"] * 4), (2, ["sync", "write", "write", "sync", "write", "write"])],
)
def test_weights_are_handed_over_before_answers_every_so_many_steps_and_after_a_resume(
    every: int, said: list[str], live: Live, make_documents: MakeDocuments
) -> None:
    documents = make_documents([20, 15, 18], [6, 4, 5])
    phase = OnPolicyPhase(kind="on_policy", writer="vllm", sync_every_steps=every, max_new_tokens=8, batch_size=2)
    writer, model = Noted(), live(attention="sdpa")
    rollouts = Rollouts(phase, writer, Guard.of(phase), 512)
    for step in range(4):
        rollouts.documents(model, documents, [0, 1, 2], step, World())
    assert writer.said == said
    seeds = [[batch.seed for batch in batches] for batches in writer.batches]
    assert [len(one) for one in seeds] == [2] * 4 and len({seed for one in seeds for seed in one}) == 8
    resumed = Noted()
    Rollouts(phase, resumed, Guard.of(phase), 512).documents(model, documents, [0, 1, 2], 3, World())
    assert resumed.said == ["sync", "write"] and [batch.seed for batch in resumed.batches[0]] == seeds[3]


@pytest.mark.parametrize("saved", [[], ["lm_head"]], ids=str)
def test_adapters_are_handed_over_merged_and_stay_as_they_are(saved: list[str], live: Live) -> None:
    lora = Lora(rank=3, alpha=12, modules_to_save=saved)
    model = with_adapters(live(attention="sdpa", tie_word_embeddings=not saved), lora, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value.detach().clone() for name, value in checkpoint_weights(model)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = model.merge_and_unload().state_dict()
    assert given.keys() == plain.keys()
    assert all(torch.allclose(given[name], plain[name], atol=1e-6) for name in plain)
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.weight"], before_merge(before))


def before_merge(state: dict[str, Any]) -> Any:
    """A weight that adapters change, without them."""
    return state["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]


def test_a_tied_head_is_handed_over_by_its_own_name(live: Live) -> None:
    model = live(attention="sdpa")
    given = dict(checkpoint_weights(model))
    assert torch.equal(given["lm_head.weight"], given["model.embed_tokens.weight"])
    assert merged_weights.__doc__ and not given["lm_head.weight"].requires_grad


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_vllm_that_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"vllm is not installed; add it with: pip install 'distill\[vllm\]'"):
        require_writer(OnPolicyPhase(kind="on_policy", writer="vllm"))
    require_writer(OnPolicyPhase(kind="on_policy"))


def test_several_processes_that_would_each_start_a_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes train"):
        require_writer(OnPolicyPhase(kind="on_policy", writer="vllm"))


# --- a real vLLM ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    """The Python of an environment with vLLM; skips where there is none."""
    python = Path(os.environ.get("DISTILL_VLLM_PYTHON") or ROOT / "build/venvs/vllm/bin/python")
    if not python.exists():
        pytest.skip(f"no vLLM at {python} (make vllm-env)")
    return python


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
SHAPE = {"hidden_size": 128, "head_dim": 32}
"""Of models that vLLM's attention on processors takes."""


@pytest.mark.full
@pytest.mark.timeout(900)
def test_vllm_writes_with_the_weights_it_was_given_last(vllm_python: Path, new_model: NewModel, tmp_path: Path) -> None:
    folder = new_model(tmp_path / "student", "llama", **SHAPE)
    script = Path(__file__).with_name("vllm_beside_student.py")
    done = subprocess.run([vllm_python, script, folder], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in ("tied", "untied", "adapted"):
        assert found[kind] == {"differ": 4, "first_is_old": True, "unsynced_is_old": True, "synced_is_new": True}, kind
    assert found["draws"]["again"] and not found["draws"]["other"] and found["draws"]["highest"] < 100


class OnPolicy:
    """`distill train` of an on-policy phase with vLLM as the writer, in a process and run store of its own."""

    def __init__(self, python: Path, recipe: Path, runs: Path) -> None:
        command = [python, "-m", "distill", "train", recipe, "--threads", "1", "--runs", runs]
        self.command = list(map(str, command))
        self.runs = runs

    def start(self) -> "subprocess.Popen[str]":
        log = self.runs.with_suffix(".log").open("a")
        with log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, text=True, env=ENVIRONMENT, cwd=ROOT)

    def finish(self) -> dict[str, Any]:
        """Run to the end; stage.json of the on-policy phase."""
        assert self.start().wait() == 0, self.runs.with_suffix(".log").read_text()
        [sealed] = self.runs.glob("train/*/stage.json")
        return dict(json.loads(sealed.read_text()))

    def rows(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        found = [path.read_text() for path in self.runs.glob("train/*/metrics.jsonl")]
        lines = "".join(found).splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture
def recipe(new_model: NewModel, write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny student that learns from what vLLM writes for it, and a teacher that is sure of itself."""
    from distill.models import find_model, load_model

    student = new_model(tmp_path / "student", "llama", **SHAPE)
    teacher = new_model(tmp_path / "teacher", "llama", seed=5, **SHAPE)
    model = load_model(find_model(str(teacher)))
    with torch.no_grad():  # as it was drawn it says nothing: all tokens are equally likely
        model.get_input_embeddings().weight.mul_(12)
    model.save_pretrained(teacher)
    task = {
        "task": "basic_arithmetic", "size": 60, "seed": 3,
        "params": {"operators": ["+"], "max_terms": 2, "allow_parentheses": False, "allow_negation": False},
    }  # fmt: skip
    phase = {
        "kind": "on_policy", "writer": "vllm", "max_new_tokens": 12, "min_stop_rate": 0, "lr": 1e-2, "epochs": 4,
        "step_tokens": 512, "micro_batch_tokens": 512, "checkpoint_every_steps": 2,
        "vllm": {"enforce_eager": True, "kv_cache_gb": 0.05, "max_num_seqs": 16},
    }  # fmt: skip
    return write_recipe(
        name="written", prompts=[{"name": "sums", "reasoning_gym": task}], teacher={"engine": "solver"},
        format={"max_tokens": 256}, student={"init": str(student), "precision": "fp32", "phases": [phase]},
        logprobs={"teachers": [{"name": "big", "model": str(teacher), "precision": "fp32"}]},
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_student_that_vllm_writes_for_learns_and_ends_complete_after_a_kill(
    vllm_python: Path, recipe: Path, tmp_path: Path
) -> None:
    whole = OnPolicy(vllm_python, recipe, tmp_path / "whole")
    sealed = whole.finish()
    losses = [row["loss"] for row in whole.rows()]
    assert len(losses) == sealed["counts"]["steps_planned"] > 12
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses

    killed = OnPolicy(vllm_python, recipe, tmp_path / "killed")
    process = killed.start()
    while len(killed.rows()) < 5:
        assert process.poll() is None, killed.runs.with_suffix(".log").read_text()
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not list(killed.runs.glob("train/*/stage.json"))
    resumed = killed.finish()
    assert [row["step"] for row in killed.rows()] == [row["step"] for row in whole.rows()]
    assert resumed["counts"]["steps"] == sealed["counts"]["steps"]
    assert resumed["digest"] == sealed["digest"], "in one thread vLLM computes the same passes again"
