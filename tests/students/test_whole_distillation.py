"""Logit and on-policy distillation as a user runs it: recipes with teachers, caches that fit and caches that do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
from distill.errors import DataError, DistillError, ModelError, RecipeError, TrainingError
from distill.logprobs import LogprobCache
from distill.models import find_model, load_model

Cli = Callable[..., Any]
TinyModel = Callable[..., Path]
NewModel = Callable[..., Path]
WriteRecipe = Callable[..., Path]

PHASE = {
    "kind": "kd", "lr": 5e-3, "epochs": 2, "step_tokens": 256, "micro_batch_tokens": 256, "checkpoint_every_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, new_model: NewModel) -> Path:
    """Another model with the students' tokenizer."""
    folder = new_model(tmp_path_factory.mktemp("teacher"), "llama", seed=5, num_hidden_layers=3)
    model = load_model(find_model(str(folder)))
    with torch.no_grad():  # as it was drawn it says nothing: all tokens are equally likely
        model.get_input_embeddings().weight.mul_(12)
    model.save_pretrained(folder)
    return folder


def sections(student: Path, teacher: Path, *phases: dict[str, Any], **logprobs: Any) -> dict[str, Any]:
    """Sums from the built-in teacher, a tiny student, and a model whose distribution it learns."""
    task = {
        "task": "basic_arithmetic", "size": 40, "seed": 3,
        "params": {"operators": ["+"], "max_terms": 2, "allow_parentheses": False, "allow_negation": False},
    }  # fmt: skip
    own = {"teachers": [{"name": "big", "model": str(teacher), "precision": "fp32"}], "k": 8, "draws": 20}
    return {
        "name": "distilled",
        "prompts": [{"name": "sums", "reasoning_gym": task, "heldout": 6}],
        "teacher": {"engine": "solver"},
        "format": {"max_tokens": 256},
        "logprobs": own | logprobs,
        "student": {"init": str(student), "precision": "fp32", "phases": [PHASE | p for p in phases or ({},)]},
    }


def metrics(outcome: Any, label: str = "train:0") -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.results[label].path("metrics.jsonl").read_text().splitlines()]


def weights(outcome: Any, label: str = "train:0") -> dict[str, Any]:
    folder = outcome.results[label].path("model")
    return dict(load_model(find_model(str(folder))).state_dict())


@pytest.mark.parametrize("form", ["topk", "sampled", "hybrid"])
def test_a_student_learns_from_a_cache_of_every_form(
    form: str, tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, {"lr": 2e-2, "epochs": 4}, form=form))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert "score:big" in outcome.executed
    cache = LogprobCache(outcome.results["score:big"].folder)
    cache.check_bytes()
    assert len(cache) == outcome.results["score:big"].counts["documents"] == 33
    assert cache.manifest["teacher"]["name"] == "big" and cache.facts.form == form
    losses = [row["loss"] for row in metrics(outcome)]
    assert 0 < losses[-1] < 0.9 * losses[0]


def test_a_teacher_in_memory_gives_what_a_whole_cache_gives(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """With all tokens in the head the cache is the distribution itself, but for fp16."""
    runs = tmp_path / "runs"
    phases = [{"teacher": "cache"}, {"teacher": "memory"}]
    found = []
    for phase in phases:
        made = sections(tiny_model("llama"), teacher, phase | {"batching": "bucketed"}, form="topk", k=512)
        recipe = write_recipe(**made)
        found.append(distill.run(recipe, runs=runs, threads=1, quiet=True))
    ours, theirs = (metrics(outcome) for outcome in found)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-3)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=0.02)
    assert "score:big" not in found[1].plan.steps


@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_a_model_that_learns_from_itself_has_nothing_to_learn(
    form: str, tiny_model: TinyModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    itself = tiny_model("llama")
    recipe = write_recipe(**sections(itself, itself, {"max_steps": 1}, form=form, k=512, draws=50))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    row = metrics(outcome)[0]
    if form == "topk":
        assert abs(row["loss"]) < 1e-4 and row["grad_norm"] < 1e-3
    else:
        assert row["loss"] > 1, "the entropy of the teacher"


def test_a_killed_scoring_goes_on_and_gives_the_same_cache(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.teachers import score

    monkeypatch.setattr(score, "SHARD_ROWS", 400)
    recipe = write_recipe(**sections(tiny_model("llama"), teacher))
    whole = distill.score(recipe, runs=tmp_path / "whole", threads=1, quiet=True).results["score:big"]
    written: list[Path] = []
    write = score.write_shard

    def cut_off(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(score, "write_shard", cut_off)
    with pytest.raises(KeyboardInterrupt):
        distill.score(recipe, runs=tmp_path / "cut", threads=1, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(score, "write_shard", write)
    resumed = distill.score(recipe, runs=tmp_path / "cut", threads=1, quiet=True).results["score:big"]
    assert resumed.digest == whole.digest and len(before) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "these were not scored again"


def test_two_teachers_are_scored_apart_and_mixed_by_weight(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    both = [
        {"name": "big", "model": str(teacher), "precision": "fp32", "weight": 3},
        {"name": "twin", "model": str(tiny_model("llama")), "precision": "fp32"},
    ]
    made = sections(tiny_model("llama"), teacher, {"max_steps": 1}, teachers=both, form="topk", k=512)
    outcome = distill.run(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)
    assert {"score:big", "score:twin"} <= set(outcome.executed)
    alone = sections(tiny_model("llama"), teacher, {"max_steps": 1}, form="topk", k=512)
    single = distill.run(write_recipe(**alone), runs=tmp_path / "runs", threads=1, quiet=True)
    assert "score:big" not in single.executed, "the same teacher's cache is used again, whatever its weight"
    # the twin is the student itself, from which nothing is to be learned
    assert metrics(outcome)[0]["loss"] == pytest.approx(0.75 * metrics(single)[0]["loss"], rel=1e-3)


def test_a_cache_that_does_not_fit_is_refused_with_the_reason(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    made = sections(tiny_model("llama"), teacher)
    outcome = distill.score(write_recipe(**made), runs=runs, threads=1, quiet=True)
    manifest = outcome.results["score:big"].path("manifest.json")
    stage = outcome.results["score:big"].path("stage.json")
    for name, value, reason in (
        ("temperature", 2.0, "temperature is 2.0, needed is 1.0"),
        ("tokenizer", "0" * 64, "another tokenizer or chat template"),
        ("alignment", "row i: something else", "alignment"),
    ):
        before = manifest.read_text()
        changed = json.loads(before) | {name: value}
        manifest.write_text(json.dumps(changed))
        sealed = json.loads(stage.read_text())
        from distill.runs import file_digest

        sealed["files"]["manifest.json"]["sha256"] = file_digest(manifest)
        held = stage.read_text()
        stage.write_text(json.dumps(sealed))
        from distill.logprobs import open_cache

        open_cache.cache_clear()
        with pytest.raises(DataError, match=reason):
            distill.run(write_recipe(**made), "train", runs=runs, threads=1, quiet=True)
        manifest.write_text(before)
        stage.write_text(held)
    open_cache.cache_clear()
    distill.run(write_recipe(**made), "train", runs=runs, threads=1, quiet=True)


@pytest.mark.parametrize("divergence", ["reverse_kl", "sampled_reverse_kl", "jsd"])
def test_a_student_learns_on_what_it_writes_itself(
    divergence: str, tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    phase = {
        "kind": "on_policy", "divergence": divergence, "max_new_tokens": 12, "min_stop_rate": 0, "max_steps": 4,
        "on_policy_fraction": 1.0 if divergence == "sampled_reverse_kl" else 0.5, "batch_size": 3, "guard_window": 4,
    }  # fmt: skip
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, phase))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    again = distill.run(recipe, runs=tmp_path / "again", threads=1, quiet=True)
    assert outcome.results["train:0"].digest == again.results["train:0"].digest
    assert len(metrics(outcome)) == 4 and metrics(outcome)[-1]["stop_rate"] >= 0


def test_a_student_that_does_not_stop_is_sent_back_to_supervised_training(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    phase = {"kind": "on_policy", "max_new_tokens": 4, "guard_window": 2}
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, phase))
    with pytest.raises(TrainingError, match="needs an sft phase"):
        distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)


def test_teachers_of_another_family_and_unequal_ends_are_refused(
    tiny_model: TinyModel, new_model: NewModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    other = new_model(tmp_path / "other", "llama", tokens=400)
    made = sections(tiny_model("llama"), other)
    with pytest.raises(ModelError, match=r"not the student's.*alignment: spans"):
        distill.run(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)
    assert not list((tmp_path / "runs").glob("score/*/*.safetensors"))
    ends = new_model(tmp_path / "ends", "llama")
    other_end(ends)
    made = sections(tiny_model("llama"), ends, {"kind": "on_policy", "max_new_tokens": 4})
    with pytest.raises(ModelError, match="equal end tokens"):
        distill.run(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)


def other_end(folder: Path) -> None:
    """Let a model end its answers as an instruct twin of another base would."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))


@pytest.mark.parametrize("place", ["cache", "memory"])
def test_a_teacher_that_ends_otherwise_speaks_for_the_students_end_token(
    place: str, tiny_model: TinyModel, new_model: NewModel, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """The teacher is the student with its two end tokens exchanged: there is nothing to learn."""
    twin = new_model(tmp_path / "twin", "llama")
    other_end(twin)
    model = load_model(find_model(str(twin)))
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows.copy_(load_model(find_model(str(tiny_model("llama")))).get_input_embeddings().weight)
        head = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False)
        head.weight.copy_(rows)
        head.weight[[0, 2]] = rows[[2, 0]]  # <|endoftext|> and <|im_end|>
    model.config.tie_word_embeddings = False
    model.lm_head = head
    model.save_pretrained(twin)
    phase = {"max_steps": 1, "teacher": place}
    recipe = write_recipe(**sections(tiny_model("llama"), twin, phase, form="topk", k=512))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert abs(metrics(outcome)[0]["loss"]) < 1e-4
    if place == "cache":
        assert outcome.results["score:big"].counts["ends_exchanged"] == [2, 0]


def test_generate_and_score_know_when_nothing_is_to_be_scored(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, {"teacher": "memory"}))
    outcome = distill.generate(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert list(outcome.results) == ["prompts", "generate"]
    with pytest.raises(RecipeError, match=r"a kd phase that reads their cache"):
        distill.score(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    cached = write_recipe(**sections(tiny_model("llama"), teacher))
    assert "score:big" in distill.generate(cached, runs=tmp_path / "runs", threads=1, quiet=True).results


def test_a_cache_serves_every_student_with_the_same_tokenizer(
    tiny_model: TinyModel, new_model: NewModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    other = new_model(tmp_path / "other", "qwen2", seed=9)
    steps = []
    for student, changes in ((tiny_model("llama"), {}), (other, {}), (other, {"k": 5}), (other, {"draws": 21})):
        made = sections(student, teacher, **changes)
        steps.append(distill.make_plan(write_recipe(**made), runs=tmp_path / "runs").steps["score:big"].identity)
    assert steps[0] == steps[1] == steps[2] != steps[3], "k is nothing to drawn tokens"


@pytest.mark.parametrize(
    ("phase", "logprobs", "reason"),
    [
        ({"temperature": 2}, {}, "a cache serves the temperature that it was made at"),
        ({"divergence": "jsd"}, {"form": "sampled"}, "give forward_kl only"),
        ({"label_smoothing": 0.1}, {}, "belong to sft phases"),
        ({"hidden": {}}, {}, "set teacher: memory"),
        ({}, {"form": "sampled", "alignment": "spans"}, "set form: topk"),
        ({"kind": "on_policy", "ce_weight": 0.5}, {}, "the tokens are the student's own"),
        ({"kind": "on_policy", "loss_weights": {"think": 2}}, {}, "not split into parts"),
        ({"kind": "on_policy", "divergence": "sampled_reverse_kl", "temperature": 2}, {}, "own draws alone"),
        ({"replay": [{"name": "chats", "file": "chats.jsonl"}]}, {}, "its chats are in no cache"),
        ({"taid_start": 0.5, "taid_end": 0.5}, {}, "must be above taid_start"),
        ({"monitor": {"kl": True}}, {}, "set heldout_traces above 0"),
        ({"kind": "on_policy", "sync_every_steps": 2}, {}, "set writer: vllm"),
        ({"kind": "on_policy", "writer": "vllm", "vllm": {"tensor_parallel_size": 2}}, {}, "student's own device"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused_before_any_work(
    phase: dict[str, Any], logprobs: dict[str, Any], reason: str, tiny_model: TinyModel, teacher: Path,
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:  # fmt: skip
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, phase, **logprobs))
    with pytest.raises(RecipeError, match=reason):
        distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_phase_that_learns_distributions_takes_teachers(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    made = sections(tiny_model("llama"), teacher)
    del made["logprobs"]
    with pytest.raises(DistillError, match="add a logprobs section"):
        distill.run(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)


def test_hidden_states_of_a_teacher_can_be_learned_and_leave_no_trace(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    phase = {"teacher": "memory", "hidden": {"attention": 0.5, "weight": 2.0}, "epochs": 6}
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, phase))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    plain = sections(tiny_model("llama"), teacher, {"teacher": "memory", "epochs": 6})
    other = distill.run(write_recipe(**plain), runs=tmp_path / "runs", threads=1, quiet=True)
    losses = [row["loss"] for row in metrics(outcome)]
    assert losses[-1] < losses[0] and losses[0] > metrics(other)[0]["loss"]
    assert not any("hidden_match" in name for name in weights(outcome))
    assert not torch.equal(weights(outcome)["model.norm.weight"], weights(other)["model.norm.weight"])


def test_a_teacher_with_another_tokenizer_is_aligned_by_characters(
    new_model: NewModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    student = new_model(tmp_path / "student", "qwen2", seed=2, tokens=400)
    made = sections(student, teacher, {"ce_weight": 0.2}, form="topk", alignment="spans")
    outcome = distill.run(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)
    counts = outcome.results["score:big"].counts
    cache = LogprobCache(outcome.results["score:big"].folder)
    assert 0.5 < counts["coverage"] < 1 and 300 < counts["tokens_alike"] <= 400
    assert cache.manifest["coverage"] == counts["coverage"]
    assert metrics(outcome)[-1]["loss"] < metrics(outcome)[0]["loss"]
    made = sections(student, teacher, form="topk", alignment="spans", min_coverage=0.999)
    with pytest.raises(DataError, match=r"min_coverage is 100%"):
        distill.run(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)


def test_spans_of_the_same_tokenizer_are_the_plain_cache(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Every position is covered, and every token but the special ones is spelled alike."""
    found = []
    for alignment in ("same_tokenizer", "spans"):
        made = sections(tiny_model("llama"), teacher, form="topk", alignment=alignment)
        outcome = distill.score(write_recipe(**made), runs=tmp_path / "runs", threads=1, quiet=True)
        found.append(LogprobCache(outcome.results["score:big"].folder))
    plain, spans = found
    assert spans.manifest["coverage"] == 1 and len(plain) == len(spans)
    from safetensors.numpy import load_file

    one, two = (load_file(cache.folder / "shard-00000.safetensors") for cache in found)
    assert np.array_equal(one["keys"], two["keys"]) and np.array_equal(one["row_bounds"], two["row_bounds"])
    same = (one["head_ids"] == two["head_ids"]).all(axis=(1, 2)).mean()
    assert same > 0.9, "but for rows where a special token is among the likeliest"


@pytest.mark.parametrize("phase", [{"teacher": "cache"}, {"kind": "on_policy"}], ids=str)
def test_the_monitor_measures_the_kl_from_the_teacher_on_held_out_traces(
    phase: dict[str, Any], tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    watched = {"monitor": {"every_steps": 4, "kl": True}, "heldout_traces": 5, "lr": 2e-2, "epochs": 3}
    own = {"max_new_tokens": 6, "min_stop_rate": 0, "divergence": "sampled_reverse_kl", "max_steps": 1}
    phase = phase | watched | (own if "kind" in phase else {})
    outcome = distill.run(
        write_recipe(**sections(tiny_model("llama"), teacher, phase, form="topk", k=512)),
        runs=tmp_path / "runs", threads=1, quiet=True,
    )  # fmt: skip
    looks = [row for row in metrics(outcome) if "loss" not in row]
    if "kind" not in phase:
        assert looks[-1]["heldout_kl"] < 0.9 * looks[0]["heldout_kl"]
    # before any step it is a property of the two models and the traces alone
    first = dense_kl(tiny_model("llama"), teacher, outcome, 5)
    assert looks[0]["step"] == 0 and looks[0]["heldout_kl"] == pytest.approx(first, rel=2e-3)


def dense_kl(student: Path, teacher: Path, outcome: Any, aside: int) -> float:
    """KL(teacher || student) of the traces that a phase of seed 0 sets aside, from whole float64 distributions."""
    import random

    from distill.config import FormatConfig
    from distill.format import encode_document
    from distill.models import load_tokenizer
    from distill.records import Example, read_records

    tokenizer = load_tokenizer(find_model(str(student)))
    examples = list(read_records(outcome.results["select"].path("examples.jsonl"), Example))
    order = list(range(len(examples)))
    random.Random("heldout:0").shuffle(order)
    models = [load_model(find_model(str(folder))).double() for folder in (student, teacher)]
    found = []
    for number in order[:aside]:
        example = examples[number]
        document = encode_document(
            tokenizer, example.prompt.messages, example.reasoning, example.answer, FormatConfig(max_tokens=256)
        )
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            log_q, log_p = (model(ids).logits[0, document.prompt_tokens - 1 : -1].log_softmax(-1) for model in models)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(found).mean())


def test_a_teacher_that_is_not_there_is_refused_by_its_key_of_the_recipe(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    both = [{"name": "big", "model": str(teacher)}, {"name": "gone", "model": "/nowhere/model"}]
    for phase in ({}, {"teacher": "memory"}):
        recipe = write_recipe(**sections(tiny_model("llama"), teacher, phase, teachers=both))
        with pytest.raises(ModelError, match=r"^logprobs\.teachers\.1\.model: /nowhere/model: no such model"):
            distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    assert not (tmp_path / "runs").exists()


def test_the_card_names_whose_distributions_were_learned(
    tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    named = [{"name": "big", "model": str(teacher), "precision": "fp32", "licence": "cc-by-nc-4.0"}]
    recipe = write_recipe(**sections(tiny_model("llama"), teacher, {"max_steps": 1}, teachers=named))
    outcome = distill.run(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    card = outcome.results["train:0"].path("model/README.md").read_text()
    assert "### Distributions" in card and "| big |" in card and "20 tokens drawn" in card
    assert "cc-by-nc-4.0" in card and str(teacher) not in card


def test_check_looks_at_a_distilling_phase_without_its_cache(
    cli: Cli, tiny_model: TinyModel, teacher: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**sections(tiny_model("llama"), teacher))
    said = cli("check", recipe, "--runs", tmp_path / "runs", "--threads", 1, "--json", "-q")
    assert said.code == 0, said.err
    found = {one["name"]: one for one in said.json}
    assert "with cross-entropy" in found["cost"]["detail"]
    assert not (tmp_path / "runs" / "score").exists()
