"""The train stage: from examples to a plain checkpoint that says the same everywhere, whatever interrupted it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from distill.attention import PER_DOCUMENT
from distill.config import Recipe, StudentConfig, recipe_from
from distill.engines.transformers import end_ids, generate_ids
from distill.errors import FormatError, Interrupted, ModelError, RunError
from distill.format import render_completion, render_prompt
from distill.models import find_model, load_model, load_tokenizer
from distill.records import Example, Message, Prompt, digest_json, write_records
from distill.runs import STAGE_FILE, RunOptions, SealedRun, Step, open_run, open_sealed
from distill.students import train

TinyModel = Callable[[str], Path]
PHASE = {"kind": "sft", "lr": 3e-3, "step_tokens": 256, "micro_batch_tokens": 128, "epochs": 3, "warmup_ratio": 0.1}


def example(a: int, b: int) -> Example:
    prompt = Prompt.of([Message(role="user", content=f"{a} + {b}?")], gold=str(a + b))
    return Example(
        prompt=prompt, trace_id=prompt.prompt_id, reasoning=f"{a} + {b} = {a + b}", answer=f"\\boxed{{{a + b}}}"
    )


EXAMPLES = [example(a, b) for a in (1, 20, 33) for b in (4, 17, 58, 70)]


class Lab:
    """A run store, its options, and the train steps of a recipe in it."""

    def __init__(self, runs: Path) -> None:
        self.options = RunOptions(runs=runs, device="cpu", threads=1, quiet=True)

    def examples(self, examples: list[Example]) -> Step:
        """A sealed select run."""
        digest = digest_json([one.model_dump(mode="json") for one in examples])
        step = Step("select", "select", "r", digest[:16], {}, {}, self.options.runs)
        if not step.sealed:
            with open_run(step, self.options) as run:
                write_records(run.path("examples.jsonl"), examples)
                run.seal(digest, {})
        return step

    def steps(self, recipe: Recipe, examples: list[Example] = EXAMPLES) -> list[Step]:
        """One step a phase, each starting from the one before."""
        assert recipe.student is not None
        made: list[Step] = []
        for index, phase in enumerate(recipe.student.phases):
            upstream: dict[str, Step] = {"examples": self.examples(examples)} | ({"model": made[-1]} if made else {})
            fields = phase.model_dump(mode="json") | {"precision": recipe.student.precision}
            identity = digest_json([fields, *(one.identity for one in upstream.values())])[:16]
            made.append(
                Step("train", f"train:{index}", "r", identity, fields, upstream, self.options.runs, {"phase": index})
            )
        return made

    def train(self, recipe: Recipe, examples: list[Example] = EXAMPLES) -> SealedRun:
        """Run all phases; the last one's sealed run."""
        steps = self.steps(recipe, examples)
        for step in steps:
            if not step.sealed:
                train.run(recipe, step, self.options)
        return open_sealed(steps[-1].folder)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


def recipe(init: Path, *phases: Mapping[str, Any], format: Mapping[str, Any] | None = None, **student: Any) -> Recipe:
    return recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "sums", "file": "sums.jsonl"}],
            "teacher": {"engine": "solver"},
            "format": {"max_tokens": 256} | dict(format or {}),
            "student": {"init": str(init), "phases": [PHASE | dict(p) for p in phases or ({},)]} | student,
        }
    )


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


# --- what is saved --------------------------------------------------------------------------------------------------

OUTSIDER = """
import json, sys
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
asked = [{"role": "user", "content": "1 + 4?"}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
print(json.dumps({
    "ids": ids, "class": type(model).__name__, "dtype": str(model.dtype),
    "attention": model.config._attn_implementation,
    "ends": [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id],
    "pads": [tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id],
}))
"""


def test_the_student_is_a_plain_checkpoint_that_loads_without_us_and_agrees_with_itself(
    lab: Lab, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = copy_of(tiny_model("qwen3"), tmp_path / "base")
    # as instruct models have it: an end of the model's own beside the tokenizer's, advice on sampling, no pad token
    edit_json(
        base / "generation_config.json", eos_token_id=[0, 2], repetition_penalty=1.3, top_p=0.8, pad_token_id=None
    )
    edit_json(base / "tokenizer_config.json", pad_token=None)
    result = lab.train(recipe(base, {"gradient_checkpointing": True}))
    folder = result.path("model")
    said = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", OUTSIDER, str(folder)],
        capture_output=True, text=True, check=True, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    seen = json.loads(said.stdout)
    assert (seen["class"], seen["dtype"], seen["attention"]) == ("Qwen3ForCausalLM", "torch.bfloat16", "sdpa")
    assert seen["ends"] == [2, [2, 0], [2, 0]], "the end that was trained comes first; the model's own other one stays"
    assert seen["pads"] == [2, 2, 2]
    tokenizer = load_tokenizer(find_model(str(base)))
    assert seen["ids"] == tokenizer("<|im_start|>user\n1 + 4?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    assert PER_DOCUMENT not in "".join(path.read_text() for path in folder.glob("*.json"))
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    advice = json.loads((folder / "generation_config.json").read_text())
    assert not {"repetition_penalty", "top_p", "temperature"} & advice.keys(), "that advice was for another model"
    assert not list(result.folder.glob("*.unfinished")) and not (result.folder / "work").exists()


def test_the_counts_of_the_run_are_those_of_its_documents_and_metrics(lab: Lab, tiny_model: TinyModel) -> None:
    result = lab.train(recipe(tiny_model("llama")))
    rows = [json.loads(line) for line in result.path("metrics.jsonl").read_text().splitlines()]
    counts = result.counts
    assert counts["documents"] == len(EXAMPLES) and counts["too_long"] == 0
    assert counts["steps"] == len(rows) == rows[-1]["step"]
    tokenizer = load_tokenizer(find_model(str(tiny_model("llama"))))
    lengths = []
    for one in EXAMPLES:
        prompt = f"<|im_start|>user\n{one.prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        completion = f"<think>\n{one.reasoning}\n</think>\n\n{one.answer}"
        lengths.append((len(tokenizer(prompt)["input_ids"]), len(tokenizer(completion)["input_ids"]) + 1))
    assert counts["tokens"] == sum(row["tokens"] for row in rows) == 3 * sum(a + b for a, b in lengths)
    assert counts["supervised_tokens"] == sum(row["supervised"] for row in rows) == 3 * sum(b for _, b in lengths)
    assert counts["packing_efficiency"] == pytest.approx(
        counts["tokens"] / 128 / sum(r["packs"] for r in rows), abs=1e-4
    )
    assert counts["last_loss"] == rows[-1]["loss"] < counts["first_loss"] == rows[0]["loss"]


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("qwen2", "bf16"), ("qwen3", "bf16")])
def test_a_student_that_overfits_writes_its_examples_and_stops(
    lab: Lab, tiny_model: TinyModel, family: str, precision: str
) -> None:
    few = EXAMPLES[:4]
    chosen = recipe(tiny_model(family), {"lr": 1e-2, "epochs": 250}, precision=precision)
    source = find_model(str(lab.train(chosen, few).path("model")))
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    prompts = [render_prompt(tokenizer, one.prompt.messages, chosen.format) for one in few]
    written = generate_ids(model, [tokenizer(prompt)["input_ids"] for prompt in prompts], 100)
    expected = [render_completion(o.reasoning, o.answer, p, chosen.format) for o, p in zip(few, prompts, strict=True)]
    assert [tokenizer.decode(ids) for ids in written] == [text + "<|im_end|>" for text in expected]


def test_a_phase_starts_from_the_one_before(lab: Lab, tiny_model: TinyModel) -> None:
    from safetensors.torch import load_file

    still = {"lr": 1e-30, "epochs": 1}
    chosen = recipe(tiny_model("llama"), {"lr": 1e-2}, still)
    lab.train(chosen)
    first, second = (load_file(step.folder / "model" / "model.safetensors") for step in lab.steps(chosen))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    base = load_file(tiny_model("llama") / "model.safetensors")
    assert not any(base[name].bfloat16().equal(first[name]) for name in first if "layernorm" not in name)


def test_equal_recipes_give_equal_students_and_another_seed_another(
    lab: Lab, tiny_model: TinyModel, tmp_path: Path
) -> None:
    one = lab.train(recipe(tiny_model("llama")))
    assert Lab(tmp_path / "elsewhere").train(recipe(tiny_model("llama"))).digest == one.digest
    assert lab.train(recipe(tiny_model("llama"), {"seed": 1})).digest != one.digest


# --- interruptions --------------------------------------------------------------------------------------------------


def terminate_after(metrics: Path, lines: int) -> threading.Thread:
    """Send this process SIGTERM as soon as metrics.jsonl has so many lines."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_stopped_by_sigterm_ends_as_if_it_had_not_been(
    lab: Lab, tiny_model: TinyModel, tmp_path: Path, precision: str
) -> None:
    chosen = recipe(tiny_model("qwen2"), {"epochs": 12}, precision=precision)
    whole = Lab(tmp_path / "whole").train(chosen)
    [step] = lab.steps(chosen)
    sender = terminate_after(step.folder / "metrics.jsonl", 2)
    with pytest.raises(Interrupted) as stopped:
        train.run(chosen, step, lab.options)
    sender.join()
    assert stopped.value.exit_code == 143
    assert not step.sealed and list((step.folder / "work").glob("checkpoint-*.pt"))
    with pytest.raises(RunError, match="not finished"):
        open_sealed(step.folder)
    result = lab.train(chosen)
    assert result.digest == whole.digest
    rows = [json.loads(line) for line in result.path("metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, whole.counts["steps"] + 1))
    assert {k: v for k, v in result.counts.items() if k != "train_seconds"} == {
        k: v for k, v in whole.counts.items() if k != "train_seconds"
    }


def test_leftovers_of_a_kill_while_saving_are_replaced(lab: Lab, tiny_model: TinyModel) -> None:
    chosen = recipe(tiny_model("llama"))
    [step] = lab.steps(chosen)
    for name in ("model", "model.unfinished"):
        (step.folder / name).mkdir(parents=True)
        (step.folder / name / "model.safetensors").write_bytes(b"half")
        (step.folder / name / "stray.json").write_text("{}")
    result = lab.train(chosen)
    assert not result.path("model.unfinished").exists() and not result.path("model/stray.json").exists()
    load_model(find_model(str(result.path("model"))))


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(lab: Lab, chosen: Recipe, error: type[Exception], message: str) -> None:
    """Preflight says so, and has written nothing."""
    [step] = lab.steps(chosen)
    with pytest.raises(error, match=message):
        train.preflight(chosen, step, lab.options)
    assert not step.folder.exists()


def test_what_could_not_be_trained_is_refused_before_any_work(lab: Lab, tiny_model: TinyModel, tmp_path: Path) -> None:
    good = recipe(tiny_model("llama"))
    train.preflight(good, lab.steps(good)[0], lab.options)

    refused(lab, recipe(tmp_path / "nowhere"), ModelError, "no such model file or folder")
    long = recipe(tiny_model("llama"), format={"max_tokens": 513})
    refused(lab, long, FormatError, r"context is 512 tokens; set format\.max_tokens=512")

    bare = copy_of(tiny_model("llama"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    refused(lab, recipe(bare), FormatError, r"no chat template; set format\.template=r1")
    train.preflight(recipe(bare, format={"template": "r1"}), lab.steps(recipe(bare))[0], lab.options)

    endless = copy_of(tiny_model("llama"), tmp_path / "endless")
    edit_json(endless / "tokenizer_config.json", eos_token=None)
    refused(lab, recipe(endless), ModelError, "no eos_token")


def test_a_later_phase_leaves_the_checks_to_the_first(lab: Lab, tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "nowhere", {}, {})
    train.preflight(chosen, lab.steps(chosen)[1], lab.options)


def test_a_tokenizer_of_another_model_is_refused_before_training(
    lab: Lab, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = copy_of(tiny_model("llama"), tmp_path / "base")
    small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, vocab_size=300))
    small.save_pretrained(base)
    with pytest.raises(RuntimeError, match="the model has embeddings for 300 tokens only"):
        lab.train(recipe(base))


# --- ends -----------------------------------------------------------------------------------------------------------


def test_tokenizer_and_model_are_made_to_agree_on_their_ends(tiny_model: TinyModel) -> None:
    model, tokenizer = (
        load_model(find_model(str(tiny_model("llama")))),
        load_tokenizer(find_model(str(tiny_model("llama")))),
    )
    for before, after in ((None, 2), (2, 2), (0, [2, 0]), ([0, 2], [2, 0]), ([5, 6], [2, 5, 6])):
        model.config.eos_token_id = None
        model.generation_config.eos_token_id = before
        train.agree_on_end(model, tokenizer)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == after
        assert end_ids(model) == (after if isinstance(after, list) else [after])
    model.generation_config.eos_token_id, model.config.eos_token_id = None, 5
    train.agree_on_end(model, tokenizer)
    assert end_ids(model) == [2, 5], "the configuration speaks where generation_config does not"


def test_a_base_whose_own_generation_config_cannot_be_saved_still_makes_a_student(
    lab: Lab, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A temperature without do_sample: transformers loads it and refuses to save it, after all the training."""
    base = copy_of(tiny_model("llama"), tmp_path / "base")
    edit_json(base / "generation_config.json", temperature=0.6, do_sample=False)
    assert lab.train(recipe(base, {"max_steps": 1})).counts["steps"] == 1


def test_a_saved_folder_that_disagrees_is_refused(lab: Lab, tiny_model: TinyModel, tmp_path: Path) -> None:
    chosen = recipe(tiny_model("llama"), {"max_steps": 1})
    good = lab.train(chosen).path("model")
    tokenizer = load_tokenizer(find_model(str(tiny_model("llama"))))
    prompt = EXAMPLES[0].prompt
    train.check_saved(good, tokenizer, prompt, chosen)
    for name in ("config.json", "generation_config.json"):
        bad = copy_of(good, tmp_path / f"bad-{name}")
        edit_json(bad / name, eos_token_id=[0, 5])
        with pytest.raises(FormatError, match=rf"{name}: does not stop at the trained end token 2"):
            train.check_saved(bad, tokenizer, prompt, chosen)
    bad = copy_of(good, tmp_path / "bad-template")
    (bad / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(FormatError, match="gives other prompt ids than training used"):
        train.check_saved(bad, tokenizer, prompt, chosen)


def test_attention_is_per_document_unless_flash_attention_can_be_had() -> None:
    def chosen(attention: str, device: str, precision: str = "bf16") -> str:
        return train.attention_for(
            StudentConfig.model_validate({"init": "x", "attention": attention, "precision": precision}), device
        )

    assert chosen("auto", "cpu") == PER_DOCUMENT
    assert chosen("auto", "cuda") in (PER_DOCUMENT, "flash_attention_2")
    assert chosen("auto", "cuda", "fp32") == PER_DOCUMENT
    assert chosen("per_document", "cuda") == PER_DOCUMENT
    assert chosen("flash_attention_2", "cuda:1") == "flash_attention_2"
    with pytest.raises(ModelError, match=r"computes in bf16; set student\.precision=bf16"):
        chosen("flash_attention_2", "cuda", "fp32")


def test_stage_file_lists_everything_a_consumer_needs(lab: Lab, tiny_model: TinyModel) -> None:
    result = lab.train(recipe(tiny_model("llama"), {"max_steps": 1}))
    files = json.loads((result.folder / STAGE_FILE).read_text())["files"]
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f"model/{name}" for name in needed | {"chat_template.jinja"}} | {"metrics.jsonl"} <= files.keys()
