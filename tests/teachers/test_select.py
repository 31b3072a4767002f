"""Selection: every trace judged, every drop counted with its reason, nothing deleted, the same result every time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, RecipeError, RunError
from distill.records import (
    Example,
    Flag,
    Message,
    Prompt,
    Teacher,
    Trace,
    Usage,
    Verdict,
    digest_json,
    read_records,
    write_records,
)
from distill.runs import SealedRun, Step, open_run
from distill.teachers import select
from distill.teachers.select import ADVICE, REASONS, THINK_STATES, Dropped


def prompt(number: int, source: str = "sums") -> Prompt:
    return Prompt.of([Message(role="user", content=f"{number} + 1?")], gold=str(number + 1), source=source)


def trace(number: int, sample: int = 0, answer: str | None = None, **fields: Any) -> Trace:
    """A right, closed trace of a problem, unless said otherwise."""
    answer = f"\\boxed{{{number + 1}}}" if answer is None else answer
    given: dict[str, Any] = {"reasoning": f"{number} and one, try {sample}", "think": "closed", "finish_reason": "stop"}
    return Trace(
        trace_id=f"t{number}.{sample}",
        prompt_id=prompt(number).prompt_id,
        cfg="c",
        sample=sample,
        answer=answer,
        teacher=Teacher(engine="test"),
        **given | fields,
    )


def generated(lab: Any, prompts: Step, traces: Sequence[Trace], failed: Sequence[Trace] = ()) -> Step:
    """A sealed generate run written by hand."""
    digest = digest_json([trace.result for trace in [*traces, *failed]])
    step = Step("generate", "generate", "r", digest[:16], {}, {"prompts": prompts}, lab.runs)
    with open_run(step, lab.options) as run:
        write_records(run.path("traces.jsonl"), traces)
        write_records(run.path("failed.jsonl"), failed)
        run.seal(digest, {"answered": len(traces), "failed": len(failed)})
    return step


def run(
    lab: Any, traces: Sequence[Trace], failed: Sequence[Trace] = (), sets: dict[str, Step] | None = None,
    heldout: Sequence[Prompt] = (), source: dict[str, Any] | None = None, train: Sequence[Prompt] | None = None,
    **config: Any,
) -> SealedRun:  # fmt: skip
    """Select from traces of problems 0..9."""
    prompts = lab.prompts([prompt(number) for number in range(10)] if train is None else train, heldout)
    upstream = {"traces": generated(lab, prompts, traces, failed), "prompts": prompts, **(sets or {})}
    recipe = lab.recipe({"engine": "solver"}, select=config, **(source or {}))
    identity = digest_json([config, source, {role: step.identity for role, step in upstream.items()}])[:16]
    step = Step("select", "select", "r", identity, {}, upstream, lab.runs)
    return select.run(recipe, step, lab.options)


def examples(sealed: SealedRun) -> list[str]:
    return [example.trace_id for example in read_records(sealed.path("examples.jsonl"), Example)]


def reasons(sealed: SealedRun) -> dict[str, str]:
    return {one.trace_id: one.reason for one in read_records(sealed.path("dropped.jsonl"), Dropped)}


def flags(sealed: SealedRun) -> list[tuple[str, str]]:
    return [(flag.trace_id, flag.flag) for flag in read_records(sealed.path("flags.jsonl"), Flag)]


GOOD = [trace(number) for number in range(10)]


# --- verdicts and what trains ---------------------------------------------------------------------------------------


def test_right_traces_train_in_prompt_order_with_their_reasoning(lab: Any) -> None:
    sealed = run(lab, GOOD)
    kept = list(read_records(sealed.path("examples.jsonl"), Example))
    assert [example.prompt for example in kept] == [prompt(number) for number in range(10)]
    assert (kept[3].reasoning, kept[3].answer) == ("3 and one, try 0", "\\boxed{4}")
    assert reasons(sealed) == {} and flags(sealed) == []
    assert (sealed.counts["examples"], sealed.counts["dropped"], sealed.counts["funnel"]) == (10, 0, [])


def test_wrong_answers_are_dropped_and_the_verdict_says_why(lab: Any, capfd: pytest.CaptureFixture[str]) -> None:
    sealed = run(lab, [trace(0), trace(1, answer="\\boxed{7}"), trace(2)])
    assert examples(sealed) == ["t0.0", "t2.0"]
    assert reasons(sealed) == {"t1.0": "wrong"}
    verdicts = list(read_records(sealed.path("verdicts.jsonl"), Verdict))
    assert [(v.trace_id, v.outcome) for v in verdicts] == [("t0.0", "correct"), ("t1.0", "wrong"), ("t2.0", "correct")]
    assert "select: dropped 1 of 3 traces: answer did not match the reference\n" in capfd.readouterr().err


def test_other_outcomes_train_only_where_the_recipe_lists_them(lab: Any) -> None:
    traces = [trace(0), trace(1, answer="\\boxed{7}")]
    assert examples(run(lab, traces, outcomes=["correct", "wrong"])) == ["t0.0", "t1.0"]
    only_wrong = run(lab, traces, outcomes=["wrong"])
    assert examples(only_wrong) == ["t1.0"] and reasons(only_wrong) == {"t0.0": "correct"}


def test_a_prompt_without_a_reference_is_unverifiable_not_wrong(lab: Any) -> None:
    train = [prompt(0), prompt(1).model_copy(update={"gold": None})]
    sealed = run(lab, [trace(0), trace(1)], train=train)
    assert reasons(sealed) == {"t1.0": "unverifiable"}


def test_verdicts_are_counted_by_source(lab: Any) -> None:
    train = [prompt(0), prompt(1, source="other")]
    sealed = run(lab, [trace(0), trace(1, 0, "\\boxed{9}"), trace(1, 1)], train=train)
    assert sealed.counts["outcomes"] == {"other": {"correct": 1, "wrong": 1}, "sums": {"correct": 1}}
    assert sealed.counts["correct"] == 2


def test_a_verifier_of_the_users_own_judges(lab: Any, tmp_path: Path) -> None:
    code = "from distill.verifiers import verdict_of\n" + (
        "def verify(prompt, trace):\n"
        "    return verdict_of(prompt, trace, 'correct' if 'try 1' in trace.reasoning else 'wrong')\n"
    )
    (tmp_path / "mine.py").write_text(code)
    source = {"verifier": {"file": str(tmp_path / "mine.py")}}
    sealed = run(lab, [trace(0, 0), trace(0, 1)], source=source)
    assert examples(sealed) == ["t0.1"]
    assert {v.verifier.partition("@")[0] for v in read_records(sealed.path("verdicts.jsonl"), Verdict)} == {
        "file:mine.py"
    }


def test_preflight_refuses_a_verifier_file_that_is_missing_or_broken(lab: Any, tmp_path: Path) -> None:
    step = Step("select", "select", "r", "0" * 16, {}, {}, lab.runs)
    (tmp_path / "broken.py").write_text("def verify(prompt, trace): return 7\n")
    for name, said in (("absent.py", "absent.py"), ("broken.py", "returned int")):
        recipe = lab.recipe({"engine": "solver"}, verifier={"file": str(tmp_path / name)})
        with pytest.raises(RecipeError, match=said):
            select.preflight(recipe, step, lab.options)
    select.preflight(lab.recipe({"engine": "solver"}), step, lab.options)
    assert not lab.runs.exists()


# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("think", ["closed", "unclosed", "absent", "empty", "multiple"])
@pytest.mark.parametrize("policy", ["required", "optional", "none"])
def test_what_counts_as_reasoning_is_the_recipes_choice(lab: Any, think: str, policy: str) -> None:
    texts = {"absent": None, "empty": ""}
    odd = trace(1, think=think, reasoning=texts.get(think, "hm"))
    sealed = run(lab, [trace(0), odd], reasoning=policy)
    passes = {
        "required": ["closed"],
        "optional": ["closed", "absent"],
        "none": ["closed", "absent", "empty", "multiple"],
    }[policy]
    assert examples(sealed) == (["t0.0", "t1.0"] if think in passes else ["t0.0"])
    assert reasons(sealed) == ({} if think in passes else {"t1.0": think})
    assert flags(sealed) == ([] if think in passes else [("t1.0", think)])


def test_without_reasoning_only_answers_train(lab: Any) -> None:
    sealed = run(lab, GOOD, reasoning="none")
    assert {example.reasoning for example in read_records(sealed.path("examples.jsonl"), Example)} == {None}
    with_it = run(lab, GOOD, reasoning="optional")
    assert None not in {example.reasoning for example in read_records(with_it.path("examples.jsonl"), Example)}


def test_truncated_and_too_long_traces_are_flagged_and_dropped(lab: Any) -> None:
    cut = trace(1, finish_reason="length", usage=Usage(output=64))
    long = trace(2, reasoning="x" * 200)
    sealed = run(lab, [trace(0), cut, long], max_chars=100)
    assert reasons(sealed) == {"t1.0": "truncated", "t2.0": "too-long"}
    details = {flag.trace_id: flag.detail for flag in read_records(sealed.path("flags.jsonl"), Flag)}
    assert details == {"t1.0": "after 64 tokens", "t2.0": "209 characters"}


def test_length_is_of_what_trains(lab: Any) -> None:
    long = trace(0, reasoning="x" * 200)
    assert examples(run(lab, [long], max_chars=100, reasoning="none")) == ["t0.0"]


def test_a_trace_with_several_flags_is_dropped_once_for_the_first_of_them(lab: Any) -> None:
    worst = trace(1, answer="", finish_reason="length", think="unclosed", reasoning="x" * 200)
    sealed = run(lab, [trace(0), worst], max_chars=100)
    assert flags(sealed) == [("t1.0", "truncated"), ("t1.0", "unclosed"), ("t1.0", "too-long")]
    assert reasons(sealed) == {"t1.0": "truncated"}


def test_failed_requests_are_flagged_counted_and_never_train(lab: Any) -> None:
    failed = trace(1, answer="", error="500 boom", think="absent", reasoning=None)
    missing = trace(2, answer="", error="no recorded trace", think="absent", reasoning=None)
    sealed = run(lab, [trace(0)], failed=[failed, missing])
    assert examples(sealed) == ["t0.0"]
    assert reasons(sealed) == {"t1.0": "api-error", "t2.0": "no-trace"}
    assert flags(sealed) == [("t1.0", "api-error"), ("t2.0", "no-trace")]
    assert sealed.counts["samples"] == 3


def test_equal_texts_of_one_prompt_train_once(lab: Any) -> None:
    same = [trace(0, sample, reasoning="same") for sample in range(3)]
    elsewhere = trace(1, reasoning="same")
    sealed = run(lab, [*same, elsewhere], per_prompt="all")
    assert examples(sealed) == ["t0.0", "t1.0"]
    assert reasons(sealed) == {"t0.1": "duplicate-of", "t0.2": "duplicate-of"}
    assert {flag.detail for flag in read_records(sealed.path("flags.jsonl"), Flag)} == {"t0.0"}


def test_a_copy_of_a_trace_that_cannot_train_takes_its_place(lab: Any) -> None:
    sealed = run(lab, [trace(0, 0, reasoning="same", finish_reason="length"), trace(0, 1, reasoning="same")])
    assert examples(sealed) == ["t0.1"]


def test_prompts_of_evaluation_sets_never_train(lab: Any) -> None:
    exam = lab.prompts([], heldout=[prompt(2), prompt(99)], label="prompts:exam")
    sealed = run(lab, GOOD, sets={"set:exam": exam})
    assert "t2.0" not in examples(sealed) and len(examples(sealed)) == 9
    assert reasons(sealed) == {"t2.0": "contaminated-by"}
    (flag,) = read_records(sealed.path("flags.jsonl"), Flag)
    assert (flag.flag, flag.detail) == ("contaminated-by", "exam")


def test_even_a_split_that_went_wrong_trains_on_no_held_out_prompt(lab: Any) -> None:
    sealed = run(lab, GOOD, heldout=[prompt(4)])
    assert reasons(sealed) == {"t4.0": "contaminated-by"}


# --- choosing -------------------------------------------------------------------------------------------------------

SEVERAL = [
    trace(0, 0, "\\boxed{0}"), trace(0, 1, reasoning="a longer one"), trace(0, 2, reasoning="short"),
    trace(0, 3, reasoning="brief"), trace(1, 0), trace(1, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("per_prompt", "kept"),
    [("first", ["t0.1", "t1.0"]), ("shortest", ["t0.2", "t1.0"]), ("all", ["t0.1", "t0.2", "t0.3", "t1.0", "t1.1"])],
)
def test_which_of_a_prompts_traces_train(lab: Any, per_prompt: str, kept: list[str]) -> None:
    sealed = run(lab, SEVERAL, per_prompt=per_prompt)
    assert examples(sealed) == kept
    others = {one.trace_id for one in SEVERAL} - set(kept) - {"t0.0"}
    assert reasons(sealed) == {"t0.0": "wrong"} | dict.fromkeys(others, "not-chosen")
    assert sealed.counts["prompts"] == 2


def test_a_limit_keeps_the_first_examples_in_prompt_order(lab: Any) -> None:
    sealed = run(lab, GOOD, limit=4)
    assert examples(sealed) == [f"t{number}.0" for number in range(4)]
    assert set(reasons(sealed).values()) == {"limit"} and len(reasons(sealed)) == 6


def test_a_limit_may_fall_between_the_traces_of_one_prompt(lab: Any) -> None:
    sealed = run(lab, SEVERAL, per_prompt="all", limit=2)
    assert examples(sealed) == ["t0.1", "t0.2"]
    assert reasons(sealed) == {"t0.0": "wrong", "t0.3": "limit", "t1.0": "limit", "t1.1": "limit"}


# --- the funnel -----------------------------------------------------------------------------------------------------


def test_the_funnel_accounts_for_every_trace_in_order(lab: Any) -> None:
    failed = [trace(9, answer="", error="500", think="absent", reasoning=None)]
    traces = [
        trace(0), trace(1, answer="\\boxed{0}"), trace(2, answer="\\boxed{0}"), trace(3, finish_reason="length"),
        trace(4, think="absent", reasoning=None), trace(5), trace(6),
    ]  # fmt: skip
    sealed = run(lab, traces, failed=failed, limit=2)
    funnel = json.loads(sealed.path("funnel.json").read_text())
    assert [(step["reason"], step["dropped"], step["remaining"]) for step in funnel["funnel"]] == [
        ("api-error", 1, 7), ("truncated", 1, 6), ("absent", 1, 5), ("wrong", 2, 3), ("limit", 1, 2),
    ]  # fmt: skip
    assert funnel["samples"] == len(examples(sealed)) + len(reasons(sealed)) == 8
    assert sealed.counts["funnel"] == funnel["funnel"]


def test_when_nothing_is_left_the_error_shows_the_funnel_and_what_helps(lab: Any) -> None:
    bad = [trace(0, finish_reason="length"), *(trace(number, answer="\\boxed{0}") for number in range(1, 4))]
    with pytest.raises(DataError) as caught:
        run(lab, bad)
    said = str(caught.value)
    assert "none of 4 traces can train (1 cut off at the token limit; 3 answer did not match the reference)" in said
    assert "distill inspect --wrong" in said
    assert "\n" not in said
    assert list(lab.runs.glob("select/*/stage.json")) == []


def test_selecting_again_gives_the_same_digest_and_another_choice_another(lab: Any) -> None:
    first = run(lab, SEVERAL)
    again = run(lab, SEVERAL)
    assert again.digest == first.digest
    assert len({first.digest, run(lab, SEVERAL, per_prompt="shortest").digest, run(lab, SEVERAL[1:]).digest}) == 3


def test_a_selection_that_was_interrupted_leaves_no_half_files_behind(lab: Any) -> None:
    sealed = run(lab, GOOD)
    kept = sealed.path("examples.jsonl").read_bytes()
    # as if a kill had come after some lines of a rerun were written aside
    sealed.path("stage.json").unlink()
    sealed.path("examples.jsonl.part").write_bytes(kept[: len(kept) // 2])
    sealed.path("flags.jsonl.part").write_text('{"half": ')
    again = run(lab, GOOD)
    assert again.path("examples.jsonl").read_bytes() == kept
    assert again.digest == sealed.digest
    assert [path.name for path in again.folder.iterdir() if path.suffix == ".part"] == []


def test_traces_that_are_not_the_prompts_are_refused(lab: Any) -> None:
    with pytest.raises(DataError, match=r"trace t50\.0 has no prompt"):
        run(lab, [trace(0), trace(50)])


def test_altered_traces_are_refused(lab: Any) -> None:
    prompts = lab.prompts([prompt(0)])
    step = generated(lab, prompts, [trace(0)])
    (step.folder / "traces.jsonl").write_text(trace(0, answer="\\boxed{8}").to_line())
    selection = Step("select", "select", "r", "0" * 16, {}, {"traces": step, "prompts": prompts}, lab.runs)
    with pytest.raises(RunError, match="other bytes than"):
        select.run(lab.recipe({"engine": "solver"}), selection, lab.options)


def test_every_reason_a_record_can_have_is_explained() -> None:
    states = {"closed", "unclosed", "absent", "empty", "multiple"}
    assert all(allowed <= states for allowed in THINK_STATES.values())
    assert states - {"closed"} <= set(REASONS)
    assert {"correct", "wrong", "unverifiable", "timeout", "error"} <= set(REASONS)
    assert set(ADVICE) <= set(REASONS)
