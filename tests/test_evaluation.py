"""Evaluation: every problem once, equal items after any kill, and summaries that a hand can check."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import evaluation
from distill.config import EvalSet, Evaluate, FileVerifier, PromptSource, Recipe, Sampling, recipe_from
from distill.engines import Completion, Request
from distill.errors import DataError, EngineError, ModelError, RecipeError
from distill.evaluation import by_problem, difference, evaluate, load_summary, read_items, set_prompts, summarise
from distill.records import Item, Message, Prompt, Teacher, Trace, Usage, Verdict, digest_json, write_records
from distill.runs import RunOptions, Step, open_run, open_sealed
from distill.statistics import bootstrap_mean, paired_difference, wilson

TinyModel = Callable[[str], Path]
OPTIONS = RunOptions(threads=1, quiet=True, device="cpu")


def problems(count: int, **fields: Any) -> list[Prompt]:
    texts = [f"What is {a} + {a % 7}?" + " Think." * (a % 3) for a in range(count)]
    return [
        Prompt.of([Message(role="user", content=text)], **({"gold": str(a + a % 7), "verifier": "number"} | fields))
        for a, text in enumerate(texts)
    ]


class Scripted:
    """An engine that answers by a script; with batches, its text also says which requests shared the batch."""

    name, version = "scripted", "1"

    def __init__(self, batch_size: int | None, script: Callable[[Request], Completion] | None = None) -> None:
        self.batch_size = batch_size
        self.script = script or right_or_wrong
        self.asked: list[list[tuple[str, int]]] = []
        self.closed = 0

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        batch = [request async for request in requests]
        self.asked.append([request.key for request in batch])
        together = digest_json([request.key for request in batch])[:8]
        for request in reversed(batch):  # any order is allowed
            answer = self.script(request)
            yield answer._replace(raw=f"{answer.raw} {together}") if self.batch_size else answer

    async def close(self) -> None:
        self.closed += 1


def reply(request: Request, text: str, tokens: int = 10, **fields: Any) -> Completion:
    given = {"finish_reason": "stop", "usage": Usage(input=5, output=tokens), "latency_s": 0.5} | fields
    return Completion(request.key, answer=text, raw=text, **given)


def right_or_wrong(request: Request) -> Completion:
    """Right for an even gold answer."""
    gold = int(request.prompt.gold or 0)
    return reply(request, str(gold if gold % 2 == 0 else gold + 1))


def run_evaluation(engine: Any, prompts: list[Prompt], folder: Path, **config: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return evaluate(engine, prompts, Evaluate(**config), "student", "heldout", folder, OPTIONS)


def results(folder: Path) -> list[dict[str, Any]]:
    return [item.result for item in read_items(folder)]


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 4, 100])
def test_every_problem_is_asked_once_and_judged(tmp_path: Path, batch_size: int | None) -> None:
    prompts, engine = problems(13), Scripted(batch_size)
    summary = run_evaluation(engine, prompts, tmp_path)
    asked = [key for batch in engine.asked for key in batch]
    assert sorted(asked) == sorted((prompt.prompt_id, 0) for prompt in prompts)
    assert all(len(batch) <= (batch_size or 13) for batch in engine.asked)
    items = list(read_items(tmp_path))
    assert {item.prompt.prompt_id for item in items} == {prompt.prompt_id for prompt in prompts}
    for item in items:
        even = int(item.prompt.gold or 0) % 2 == 0
        assert item.verdict.outcome == ("correct" if even else "wrong")
        assert (item.model, item.set, item.trace.teacher.engine) == ("student", "heldout", "scripted")
    assert load_summary(tmp_path) == summary and engine.closed == 1


def test_batches_hold_prompts_of_like_length_whatever_the_order_of_the_list(tmp_path: Path) -> None:
    prompts = problems(12)
    one, other = Scripted(4), Scripted(4)
    run_evaluation(one, prompts, tmp_path / "one")
    run_evaluation(other, prompts[::-1], tmp_path / "other")
    assert one.asked == other.asked
    lengths = {prompt.prompt_id: len(prompt.text) for prompt in prompts}
    sizes = [lengths[key] for batch in one.asked for key, _ in batch]
    assert sizes == sorted(sizes)


@settings(max_examples=40)
@given(st.floats(0, 1), st.sampled_from([None, 1, 3, 8]), st.integers(1, 2))
def test_an_evaluation_killed_at_any_byte_goes_on_to_equal_items(
    tmp_path_factory: pytest.TempPathFactory, share: float, batch_size: int | None, n: int
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    prompts = problems(11)
    config = {"sampling": Sampling(n=n, temperature=0.5 * (n > 1))}
    whole = run_evaluation(Scripted(batch_size), prompts, folder, **config)
    expected = results(folder)
    path = folder / "items.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    kept = data[: int(share * len(data))].count(b"\n")
    (folder / "summary.json").unlink()

    again = Scripted(batch_size)
    assert run_evaluation(again, prompts, folder, **config) == whole
    assert sorted(results(folder), key=digest_json) == sorted(expected, key=digest_json)
    asked = sum(len(batch) for batch in again.asked)
    if batch_size is None:
        assert asked == len(expected) - kept, "an answer that reached us is not asked for again"
    else:
        assert results(folder) == expected and all(
            len(batch) in (batch_size, 11 * n % batch_size) for batch in again.asked
        )


def test_batches_cut_from_what_is_left_would_change_the_text(tmp_path: Path) -> None:
    """Why a batch is generated again as a whole: the scripted engine's text, like a real one's, knows its batch."""
    prompts = problems(8)
    run_evaluation(Scripted(4), prompts, tmp_path / "whole")
    run_evaluation(Scripted(4), prompts[1:], tmp_path / "less")
    whole = {item["prompt_id"]: item for item in results(tmp_path / "whole")}
    assert any(whole[item["prompt_id"]] != item for item in results(tmp_path / "less"))


def test_each_sample_has_a_seed_of_its_own_that_depends_on_nothing_else(tmp_path: Path) -> None:
    seeds: dict[tuple[str, int], int] = {}

    def note(request: Request) -> Completion:
        seeds[request.key] = request.seed
        return right_or_wrong(request)

    prompts = problems(5)
    sampling = Sampling(n=3, temperature=0.7)
    run_evaluation(Scripted(4, note), prompts, tmp_path / "all", sampling=sampling)
    assert len(set(seeds.values())) == len(seeds) == 15
    first = dict(seeds)
    seeds.clear()
    run_evaluation(Scripted(None, note), prompts[2:], tmp_path / "some", sampling=sampling)
    assert seeds.items() <= first.items()
    run_evaluation(Scripted(None, note), prompts, tmp_path / "other", sampling=sampling.model_copy(update={"seed": 1}))
    assert not set(seeds.values()) & set(first.values())


def test_the_engine_is_closed_when_evaluation_fails(tmp_path: Path) -> None:
    def refuse(request: Request) -> Completion:
        raise EngineError("no key")

    engine = Scripted(None, refuse)
    with pytest.raises(EngineError, match="no key"):
        run_evaluation(engine, problems(3), tmp_path)
    assert engine.closed == 1


def test_evaluation_works_where_an_event_loop_is_running(tmp_path: Path) -> None:
    async def notebook() -> dict[str, Any]:
        return run_evaluation(Scripted(4), problems(3), tmp_path)

    assert asyncio.run(notebook())["problems"] == 3


def test_verifiers_are_the_recipes_own_not_those_of_an_earlier_path(tmp_path: Path) -> None:
    verifier = tmp_path / "always.py"
    verifier.write_text(
        "from distill.verifiers import verdict_of\n"
        "def verify(prompt, trace):\n    return verdict_of(prompt, trace, 'correct', '', 'always@1')\n"
    )
    prompts = problems(2, verifier="file:/gone/with/the/old/folder.py", source="sums")
    folder = tmp_path / "eval"
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"folder\.py"):
        run_evaluation(Scripted(None), prompts, folder)
    source = PromptSource(name="sums", file=Path("sums.jsonl"), verifier=FileVerifier(file=verifier))
    summary = evaluate(Scripted(None), prompts, Evaluate(), "student", "heldout", folder, OPTIONS, [source])
    assert summary["accuracy"] == 1.0


# --- summaries ------------------------------------------------------------------------------------------------------


def item(problem: int, correct: bool, tokens: int = 10, sample: int = 0, **trace: Any) -> Item:
    prompt = Prompt.of([Message(role="user", content=str(problem))], gold="1")
    made = Trace(
        trace_id=f"{problem}-{sample}", prompt_id=prompt.prompt_id, cfg="m", sample=sample, usage=Usage(output=tokens),
        teacher=Teacher(engine="e"), **({"finish_reason": "stop", "latency_s": 0.5, "think": "closed"} | trace),
    )  # fmt: skip
    outcome = "error" if made.failed else ("correct" if correct else "wrong")
    verdict = Verdict(trace_id=made.trace_id, gold="1", verifier="number@1", outcome=outcome)
    return Item(model="m", set="s", prompt=prompt, trace=made, verdict=verdict)


def test_a_summary_by_hand() -> None:
    items = [
        item(1, True, tokens=8),
        item(2, True, tokens=40),
        item(3, True, tokens=100),
        item(4, False, tokens=20, think="absent"),
        item(5, False, tokens=132, finish_reason="length", think="unclosed"),
    ]
    found = summarise(items, [8, 39, 40, 1000])
    interval = wilson(3, 5)
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == tuple(interval)
    assert found["accuracy_within_tokens"] == {"8": 0.2, "39": 0.2, "40": 0.4, "1000": 0.6}
    assert (found["stop_rate"], found["truncation_rate"]) == (0.8, 0.2)
    assert (found["tokens"], found["mean_tokens"], found["seconds"], found["tokens_per_s"]) == (300, 60, 2.5, 120)
    assert found["outcomes"] == {"correct": 3, "wrong": 2}
    assert found["think"] == {"absent": 1, "closed": 3, "unclosed": 1}
    assert (found["available"], found["problems"], found["samples"], found["failed"]) == (True, 5, 5, 0)


def test_failed_requests_count_as_wrong_and_not_as_tokens() -> None:
    found = summarise([item(1, True, tokens=30), item(2, False, tokens=0, error="429", finish_reason="error")], [100])
    assert found["failed"] == 1 and found["accuracy"] == 0.5
    assert found["mean_tokens"] == 30 and found["stop_rate"] == 1.0
    assert found["accuracy_within_tokens"] == {"100": 0.5}


def test_a_teacher_that_answers_nothing_is_unavailable_and_says_why(tmp_path: Path) -> None:
    """Recorded traces that do not cover the set: that is not an accuracy of zero."""
    engine = Scripted(None, lambda request: Completion(request.key, error="no recorded trace for this prompt"))
    summary = run_evaluation(engine, problems(4), tmp_path)
    assert summary == {"available": False, "reason": "no recorded trace for this prompt", "problems": 4}
    assert summarise([], [8])["available"] is False


def test_a_teacher_that_fails_on_some_is_available(tmp_path: Path) -> None:
    def flaky(request: Request) -> Completion:
        return right_or_wrong(request) if request.prompt.gold != "0" else Completion(request.key, error="500")

    summary = run_evaluation(Scripted(None, flaky), problems(4), tmp_path)
    assert summary["available"] and summary["failed"] == 1


def test_several_samples_are_grouped_by_problem_and_bootstrapped() -> None:
    items = [item(p, (p + s) % 3 == 0, sample=s) for p in range(20) for s in range(4)]
    means = [sum((p + s) % 3 == 0 for s in range(4)) / 4 for p in range(20)]
    found = summarise(items, [])
    assert found["accuracy"] == pytest.approx(sum(means) / 20) and found["samples"] == 80
    interval = bootstrap_mean(means)
    assert found["accuracy_high"] - found["accuracy_low"] == pytest.approx(interval.high - interval.low, abs=0.02)
    assert list(by_problem(items[::-1]).values()) == list(by_problem(items).values())


def test_a_difference_is_paired_by_problem_whatever_the_order_of_the_items() -> None:
    right_1, right_2 = {1, 2, 3, 4, 5, 6}, {1, 2, 3, 9}
    first = [item(p, p in right_1) for p in range(10)]
    second = [item(p, p in right_2) for p in reversed(range(10))]
    found = difference(first, second)
    assert found.value == pytest.approx(0.2)
    expected = paired_difference([p in right_1 for p in range(10)], [p in right_2 for p in range(10)])
    assert found.low == pytest.approx(expected.low, abs=0.11) and found.high == pytest.approx(expected.high, abs=0.11)
    assert difference(first, first) == (0, 0, 0)
    with pytest.raises(DataError, match="cover different problems"):
        difference(first, second[:-1])


# --- the stage ------------------------------------------------------------------------------------------------------


def base_recipe(init: Path | str) -> Recipe:
    return recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "sums", "file": "sums.jsonl", "heldout": 6}],
            "student": {"init": str(init), "precision": "fp32"},
            "evaluate": {"models": ["base"], "sampling": {"max_new_tokens": 8}, "batch_size": 4},
        }
    )


def eval_step(runs: Path, prompts: list[Prompt]) -> Step:
    held_out = Step("prompts", "prompts", "r", digest_json([p.prompt_id for p in prompts])[:16], {}, {}, runs)
    with open_run(held_out, OPTIONS) as run:
        write_records(run.path("heldout.jsonl"), prompts)
        run.seal("d", {})
    args = {"model": "base", "set": "heldout"}
    return Step("eval", "eval:base:heldout", "r-base-heldout", "e" * 16, {}, {"prompts": held_out}, runs, args)


def test_a_base_is_evaluated_and_a_killed_run_seals_the_same_digest(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = base_recipe(tiny_model("llama"))
    whole, killed = (eval_step(tmp_path / name, problems(6)) for name in ("whole", "killed"))
    evaluation.preflight(recipe, whole, OPTIONS)
    evaluation.run(recipe, whole, OPTIONS)
    data = (whole.folder / "items.jsonl").read_bytes()
    killed.folder.mkdir(parents=True)
    (killed.folder / "items.jsonl").write_bytes(data[: len(data) * 4 // 9])
    evaluation.run(recipe, killed, OPTIONS)
    sealed = [open_sealed(step.folder) for step in (whole, killed)]
    assert sealed[0].digest == sealed[1].digest
    assert results(whole.folder) == results(killed.folder)
    assert sealed[1].counts == json.loads(sealed[1].path("summary.json").read_text())
    assert sealed[1].counts["problems"] == 6 and sealed[1].counts["mean_tokens"] <= 8


def test_a_base_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = base_recipe(tmp_path / "nowhere")
    step = eval_step(tmp_path / "runs", problems(2))
    with pytest.raises(ModelError, match="no such model file or folder"):
        evaluation.preflight(recipe, step, OPTIONS)
    assert not step.folder.exists()


def test_a_set_is_cut_to_its_limit_and_must_not_be_empty(tmp_path: Path) -> None:
    prompts = problems(5)
    write_records(tmp_path / "heldout.jsonl", prompts)
    config = Evaluate(sets={"heldout": EvalSet(), "few": EvalSet(limit=2)})
    assert set_prompts(config, "heldout", tmp_path / "heldout.jsonl") == prompts
    assert set_prompts(config, "few", tmp_path / "heldout.jsonl") == prompts[:2]
    write_records(tmp_path / "heldout.jsonl", [])
    with pytest.raises(DataError, match="evaluation set 'few' has no problems"):
        set_prompts(config, "few", tmp_path / "heldout.jsonl")
