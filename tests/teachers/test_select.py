"""Selection: every trace judged, every drop counted with its reason, nothing deleted, the same result every time."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import Select, recipe_from
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
from distill.teachers.assess import capped, drawn
from distill.teachers.funnel import ADVICE, REASONS, THINK_STATES, actions
from distill.teachers.select import Dropped
from distill.verifiers import resolve


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


def generated(
    lab: Any, prompts: Step, traces: Sequence[Trace], failed: Sequence[Trace] = (), stored: Sequence[Verdict] = ()
) -> Step:
    """A sealed generate run written by hand."""
    digest = digest_json([*(trace.result for trace in [*traces, *failed]), *(v.model_dump() for v in stored)])
    step = Step("generate", "generate", "r", digest[:16], {}, {"prompts": prompts}, lab.runs)
    with open_run(step, lab.options) as run:
        write_records(run.path("traces.jsonl"), traces)
        write_records(run.path("failed.jsonl"), failed)
        write_records(run.path("verdicts.jsonl"), stored)
        run.seal(digest, {"answered": len(traces), "failed": len(failed)})
    return step


def run(
    lab: Any, traces: Sequence[Trace], failed: Sequence[Trace] = (), sets: dict[str, Step] | None = None,
    heldout: Sequence[Prompt] = (), source: dict[str, Any] | None = None, train: Sequence[Prompt] | None = None,
    stored: Sequence[Verdict] = (), **config: Any,
) -> SealedRun:  # fmt: skip
    """Select from traces of problems 0..9."""
    prompts = lab.prompts([prompt(number) for number in range(10)] if train is None else train, heldout)
    upstream = {"traces": generated(lab, prompts, traces, failed, stored), "prompts": prompts, **(sets or {})}
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


def test_a_wrong_answer_given_twice_is_wrong_twice(lab: Any) -> None:
    wrong = [trace(1, sample, "\\boxed{7}", reasoning="same") for sample in range(2)]
    assert reasons(run(lab, [trace(0), *wrong])) == {"t1.0": "wrong", "t1.1": "wrong"}


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


LONG = "Add the ones, then the tens, and write the carry above the next column before going on to it, as always. "
"""Wording long enough for 8-grams."""


def worded(number: int, text: str, gold: str | None = None, source: str = "sums") -> Prompt:
    """A problem of its own wording whose traces are those of `number`."""
    return Prompt.of([Message(role="user", content=text)], gold=gold or str(number + 1), source=source)


def answered(prompts: Sequence[Prompt], **fields: Any) -> list[Trace]:
    """A right trace of each of these prompts, which are those of 0, 1, ….."""
    return [trace(n, **fields).model_copy(update={"prompt_id": p.prompt_id}) for n, p in enumerate(prompts)]


def test_a_prompt_that_overlaps_an_evaluation_problem_never_trains(lab: Any) -> None:
    story = "Ada buys seven red apples and gives three of them to her brother Tom on Sunday. How many has she?"
    train = [worded(0, f"Please solve this. {story} Explain."), worded(1, "Something else altogether, with two pears?")]
    exam = lab.prompts([], heldout=[worded(0, story)], label="prompts:exam")
    sealed = run(lab, answered(train), sets={"set:exam": exam}, train=train)
    assert reasons(sealed) == {"t0.0": "overlaps"}
    (flag,) = read_records(sealed.path("flags.jsonl"), Flag)
    assert "exam" in flag.detail and "seven red apples" in flag.detail
    counted = run(lab, answered(train), sets={"set:exam": exam}, train=train, decontamination={"action": "flag"})
    assert examples(counted) == ["t0.0", "t1.0"] and flags(counted) == [("t0.0", "overlaps")]
    ignored = run(lab, answered(train), sets={"set:exam": exam}, train=train, decontamination={"action": "ignore"})
    assert flags(ignored) == []


def test_the_prompt_of_an_evaluation_set_is_kept_apart_even_where_overlaps_are_ignored(lab: Any) -> None:
    sealed = run(lab, GOOD, heldout=[prompt(4)], decontamination={"action": "ignore"})
    assert reasons(sealed) == {"t4.0": "contaminated-by"}


def test_generated_problems_may_share_their_wording_with_held_out_ones(lab: Any) -> None:
    def made(number: int, name: str) -> Prompt:
        text = f"{LONG}The eldest child of {name} and Maria has a dog called Rex. How many legs has it?"
        return worded(number, text, "4").model_copy(update={"row": {"question": text, "task": "legs", "entry": {}}})

    train, heldout = [made(0, "Tom"), made(1, "Jim")], [made(2, "Bob")]
    right = answered(train, answer="\\boxed{4}")
    assert reasons(run(lab, right, train=train, heldout=heldout)) == {}
    collected = [[prompt.model_copy(update={"row": {}}) for prompt in side] for side in (train, heldout)]
    with pytest.raises(DataError, match="2 the prompt's text overlaps an evaluation problem"):
        run(lab, right, train=collected[0], heldout=collected[1])


def test_of_prompts_nearly_alike_the_first_that_was_answered_right_trains(lab: Any) -> None:
    text = LONG * 3 + "Ada has 7 apples and eats 3. How many are left"
    train = [worded(0, f"{text} then?", "4"), worded(1, f"{text} over?", "4"), worded(2, f"{text} for her?", "4")]
    wrong, *right = answered(train, answer="\\boxed{4}")
    wrong = wrong.model_copy(update={"answer": "\\boxed{5}"})
    sealed = run(lab, [wrong, *right], train=train)
    assert examples(sealed) == ["t1.0"]
    assert reasons(sealed) == {"t0.0": "wrong", "t2.0": "near-duplicate-prompt"}
    (flag,) = read_records(sealed.path("flags.jsonl"), Flag)
    assert flag.detail.startswith(f"prompt {train[1].prompt_id}, similarity 0.9")


def test_prompts_alike_with_other_numbers_or_another_reference_are_different_problems(lab: Any) -> None:
    text = LONG * 3 + "Ada has {} apples and eats 3. How many are left{}"
    numbers = [worded(0, text.format(7, "?"), "4"), worded(1, text.format(8, "?"), "4")]
    golds = [worded(0, text.format(7, "?"), "4"), worded(1, text.format(7, " then?"), "5")]
    for train in (numbers, golds):
        traces = [t.model_copy(update={"answer": f"\\boxed{{{p.gold}}}"}) for t, p in zip(answered(train), train)]
        assert examples(run(lab, traces, train=train)) == ["t0.0", "t1.0"]


def test_traces_of_a_prompt_nearly_alike_train_once_where_several_may(lab: Any) -> None:
    text = " ".join(f"Then we look at the {name} column and go on." for name in "abcdefghijklmnopqrstuvwxyz")
    traces = [trace(0, 0, reasoning=f"{text} So."), trace(0, 1, reasoning=f"{text} Thus."), trace(0, 2), trace(1)]
    sealed = run(lab, traces, per_prompt="all")
    assert examples(sealed) == ["t0.0", "t0.2", "t1.0"] and reasons(sealed) == {"t0.1": "near-duplicate-trace"}
    kept = run(lab, traces, per_prompt="all", near_duplicates={"traces": "ignore"})
    assert examples(kept) == ["t0.0", "t0.1", "t0.2", "t1.0"]
    elsewhere = [trace(0, 0, reasoning=f"{text} 1, 2. So."), trace(1, 0, reasoning=f"{text} 1, 2. Thus.")]
    assert examples(run(lab, elsewhere, per_prompt="all")) == ["t0.0", "t1.0"]
    across = run(lab, elsewhere, near_duplicates={"across": "source"})
    assert reasons(across) == {"t1.0": "near-duplicate-trace"}


def test_what_the_text_shows_is_flagged_and_dropped_or_only_counted(
    lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    mixed = trace(1, reasoning="first 首先计算面积然后相加 then")
    assert reasons(run(lab, [trace(0), mixed])) == {"t1.0": "language-mix"}
    capfd.readouterr()
    counted = run(lab, [trace(0), mixed], language_mix={"action": "flag"})
    assert examples(counted) == ["t0.0", "t1.0"] and flags(counted) == [("t1.0", "language-mix")]
    assert counted.counts["flags"] == {"language-mix": 1} and counted.counts["funnel"] == []
    assert "flagged 1 of 2 traces and let them pass: slips into a script" in capfd.readouterr().err
    assert flags(run(lab, [trace(0), mixed], language_mix={"action": "ignore"})) == []


def test_a_secret_is_in_none_of_the_files_that_selection_writes(lab: Any) -> None:
    key = "sk-" + "qR7tZk2mVx9bLw4nHs8dJf3cPa6y"
    sealed = run(lab, [trace(0), trace(1, reasoning=f"with {key} it works")])
    assert reasons(sealed) == {"t1.0": "secret"}
    texts = [path.read_bytes() for path in sealed.folder.rglob("*") if path.is_file()]
    assert not any(key[3:15].encode() in text for text in texts)


def test_a_trace_too_short_is_dropped(lab: Any) -> None:
    sealed = run(lab, [trace(0), trace(1, reasoning="x" * 200)], min_chars=100)
    assert reasons(sealed) == {"t0.0": "too-short"}


# --- verdicts made before -------------------------------------------------------------------------------------------


def said(of: Trace, outcome: Any, verifier: str | None = None, gold: str | None = None) -> Verdict:
    """A stored verdict, not the one that the verifier would give."""
    number, verifier = int(of.trace_id[1:].partition(".")[0]), verifier or resolve("number").label
    return Verdict(trace_id=of.trace_id, gold=gold or str(number + 1), verifier=verifier, outcome=outcome)


def test_verdicts_made_beside_generation_are_taken_over(lab: Any, capfd: pytest.CaptureFixture[str]) -> None:
    sealed = run(lab, GOOD, stored=[said(GOOD[2], "wrong"), said(GOOD[7], "unverifiable")])
    assert reasons(sealed) == {"t2.0": "wrong", "t7.0": "unverifiable"}, "or they were judged anew"
    assert "took over 2 of 10 verdicts that were made before" in capfd.readouterr().err


def test_a_verdict_of_another_version_or_reference_or_of_a_bad_moment_is_made_anew(lab: Any) -> None:
    stored = [
        said(GOOD[1], "wrong", verifier="number@0"), said(GOOD[2], "wrong", verifier="math@1"),
        said(GOOD[3], "wrong", gold="77"), said(GOOD[4], "timeout"), said(GOOD[5], "error"), said(GOOD[6], "wrong"),
    ]  # fmt: skip
    assert reasons(run(lab, GOOD, stored=stored)) == {"t6.0": "wrong"}


def test_verdicts_of_an_attempt_that_ended_early_are_taken_over(lab: Any) -> None:
    good = run(lab, GOOD[:3])
    verdicts = good.path("verdicts.jsonl")
    kept = verdicts.read_text()
    good.path("stage.json").unlink()
    verdicts.write_text(kept.replace('"correct"', '"unverifiable"', 1))
    assert reasons(run(lab, GOOD[:3])) == {"t0.0": "unverifiable"}


def test_a_judge_is_asked_for_the_verdicts_that_are_missing_and_never_twice(
    lab: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none-is-needed")
    reply = chat.completion({"content": "I think.\nVERDICT: WRONG"})
    with chat.ChatServer(answer=lambda _: reply) as server:
        endpoint = {"base_url": server.base_url, "concurrency": 4, "max_retries": 0}
        source = {"verifier": {"judge": {"model": "the-judge", "endpoint": endpoint}}}
        label = resolve(lab.recipe({"engine": "solver"}, **source).prompts[0].verifier).label
        stored = [said(GOOD[2], "correct", label), said(GOOD[3], "correct", label)]
        sealed = run(lab, GOOD[:5], stored=stored, source=source)
        assert examples(sealed) == ["t2.0", "t3.0"] and len(server.requests) == 3
        run(lab, GOOD[:5], stored=stored, source=source, per_prompt="all")
        assert len(server.requests) == 3, "another selection, but the judge has said it before"


@given(st.lists(st.tuples(st.integers(0, 29), st.booleans()), max_size=30, unique_by=lambda one: one[0]))
def test_any_part_of_the_verdicts_can_be_known(known: list[tuple[int, bool]]) -> None:
    traces, wrong = [trace(number) for number in range(30)], {number for number, right in known if not right}
    lines = [said(traces[number], "wrong" if number in wrong else "correct") for number, _ in sorted(known)]
    found = select.KnownVerdicts({}, [Stored(lines)])
    outcomes = [found.of(prompt(number), one) for number, one in enumerate(traces)]
    assert [n for n, verdict in enumerate(outcomes) if verdict] == sorted(number for number, _ in known)
    assert {n for n, verdict in enumerate(outcomes) if verdict and not verdict.correct} == wrong


class Stored(select.StoredVerdicts):
    """Verdicts without a file."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self._verdicts = iter(verdicts)
        self._next = next(self._verdicts, None)


# --- choosing -------------------------------------------------------------------------------------------------------


def first_drawn(*trace_ids: str) -> str:
    return min(trace_ids, key=lambda trace_id: drawn(0, trace_id))


SEVERAL = [
    trace(0, 0, "\\boxed{0}"), trace(0, 1, reasoning="a longer one"), trace(0, 2, reasoning="short"),
    trace(0, 3, reasoning="brief"), trace(1, 0), trace(1, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("per_prompt", "kept"),
    [
        ("first", ["t0.1", "t1.0"]),
        ("shortest", ["t0.2", "t1.0"]),
        ("all", ["t0.1", "t0.2", "t0.3", "t1.0", "t1.1"]),
        ("random", [first_drawn("t0.1", "t0.2", "t0.3"), first_drawn("t1.0", "t1.1")]),
    ],
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


def test_a_random_choice_is_the_seeds_and_falls_on_every_fit_trace(lab: Any) -> None:
    assert examples(run(lab, SEVERAL, per_prompt="random")) == examples(run(lab, SEVERAL, per_prompt="random"))
    kept = {examples(run(lab, SEVERAL, per_prompt="random", seed=seed))[0] for seed in range(12)}
    assert kept == {"t0.1", "t0.2", "t0.3"}


TWO_SOURCES = [prompt(number, "a" if number < 8 else "b") for number in range(10)]


def two_sources(lab: Any, **config: Any) -> Counter[str]:
    """Examples by source, of eight right traces of `a` and two of `b`."""
    prompts = lab.prompts(TWO_SOURCES)
    recipe = recipe_from(
        {
            "name": "r", "teacher": {"engine": "solver"}, "select": config,
            "prompts": [{"name": "a", "file": "a.jsonl"}, {"name": "b", "file": "b.jsonl"}],
        }
    )  # fmt: skip
    upstream = {"traces": generated(lab, prompts, GOOD), "prompts": prompts}
    step = Step("select", "select", "r", digest_json(config)[:16], {}, upstream, lab.runs)
    sealed = select.run(recipe, step, lab.options)
    assert set(reasons(sealed).values()) <= {"source-cap", "limit"}
    return Counter(one.prompt.source for one in read_records(sealed.path("examples.jsonl"), Example))


@pytest.mark.parametrize(
    ("cap", "kept"),
    [
        (3, {"a": 3, "b": 2}),
        ({"a": 5}, {"a": 5, "b": 2}),
        ({"b": 1}, {"a": 8, "b": 1}),
        (0.5, {"a": 2, "b": 2}),
        ({"a": 0.75}, {"a": 6, "b": 2}),
        ({"a": 0.75, "b": 1}, {"a": 3, "b": 1}),
        (100, {"a": 8, "b": 2}),
    ],
)
def test_a_source_gives_no_more_than_its_number_or_share(lab: Any, cap: Any, kept: dict[str, int]) -> None:
    assert two_sources(lab, max_per_source=cap) == kept


def test_which_examples_stay_under_a_cap_is_the_seeds_choice_and_a_limit_comes_after_it(lab: Any) -> None:
    assert two_sources(lab, max_per_source=3, limit=4) == {"a": 3, "b": 1}
    first = sorted((f"t{number}.0" for number in range(8)), key=lambda trace_id: drawn(0, trace_id))[:3]
    two_sources(lab, max_per_source=3)
    folder = max(lab.runs.glob("select/*"), key=lambda path: path.stat().st_mtime_ns)
    of_a = [one.trace_id for one in read_records(folder / "examples.jsonl", Example) if one.prompt.source == "a"]
    assert of_a == sorted(first)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2000), min_size=1),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 500) | st.floats(0.3, 0.99), min_size=1),
)
def test_caps_are_kept_by_what_stays_and_leave_out_no_more_than_they_must(
    counts: dict[str, int], caps: dict[str, Any]
) -> None:
    room = capped(Select(max_per_source=caps), counts)
    total = sum(room.values())
    for source, kept in room.items():
        cap = caps.get(source)
        most = counts[source] if cap is None else cap if isinstance(cap, int) else cap * total + 1
        assert 0 <= kept <= min(counts[source], most)
        if kept < counts[source]:
            assert cap is not None and kept + 1 > (cap if isinstance(cap, int) else cap * total)


def test_caps_that_no_data_set_can_keep_are_refused() -> None:
    base = {"prompts": [{"name": "gsm8k", "file": "a.jsonl"}], "teacher": {"engine": "solver"}}
    for cap, message in (
        (0.5, r"shares of all sources add up to 0\.5; they must reach 1"),
        ({"gsm": 3}, r"no prompt source is called 'gsm' \(did you mean 'gsm8k'\?\)"),
        (0, r"max_per_source: 0 is neither"), (1.5, r"max_per_source: 1\.5 is neither"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            recipe_from({**base, "select": {"max_per_source": cap}})
    with pytest.raises(RecipeError, match=r"min_chars \(9\) is above max_chars \(5\)"):
        recipe_from({**base, "select": {"min_chars": 9, "max_chars": 5}})


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


FIELDS: dict[str, list[dict[str, Any]]] = {
    "answer": [{}, {}, {"answer": "\\boxed{-1}"}, {"answer": "I'm sorry, but I can't help with that."}],
    "reasoning": [{}, {"reasoning": "same"}, {"reasoning": "x" * 300}, {"reasoning": "然后首先计算面积"}],
    "think": [{}, {}, {"think": "unclosed"}, {"think": "multiple"}, {"think": "absent", "reasoning": None}],
    "finish": [{}, {}, {"finish_reason": "length"}],
}
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "outcomes": st.sampled_from([["correct"], ["correct", "wrong"], ["correct", "wrong", "unverifiable"]]),
        "reasoning": st.sampled_from(["required", "optional", "none"]),
        "per_prompt": st.sampled_from(["all", "first", "shortest", "random"]),
        "max_chars": st.integers(1, 400),
        "min_chars": st.just(1),
        "limit": st.integers(1, 12),
        "max_per_source": st.sampled_from([1, 4, {"sums": 3}]),
        "language_mix": st.fixed_dictionaries({"action": st.sampled_from(["drop", "flag", "ignore"])}),
        "refusals": st.fixed_dictionaries({"action": st.sampled_from(["drop", "flag", "ignore"])}),
        "near_duplicates": st.fixed_dictionaries({"traces": st.sampled_from(["drop", "flag", "ignore"])}),
    },
)
TRACES = st.lists(
    st.tuples(st.integers(0, 4), st.booleans(), *(st.sampled_from(choices) for choices in FIELDS.values())), max_size=12
)


@given(TRACES, CONFIGS, st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_wrong_with_traces_each_trains_or_is_dropped_for_one_reason(
    lab: Any, drawn_traces: list[Any], config: dict[str, Any], contaminated: bool
) -> None:
    answered_ones, failed = [trace(9)], []
    for sample, (number, fails, *fields) in enumerate(sorted(drawn_traces, key=lambda one: one[0])):
        changes = {key: value for found in fields for key, value in found.items()}
        error = {"error": "500", "think": "absent", "reasoning": None} if fails else {}
        (failed if fails else answered_ones).append(trace(number, sample, **changes | error))
    answered_ones.sort(key=lambda one: int(one.trace_id[1]))
    try:
        sealed = run(lab, answered_ones, failed=failed, heldout=[prompt(3)] if contaminated else [], **config)
    except DataError as error:
        assert "can train" in str(error)
        return
    funnel = json.loads(sealed.path("funnel.json").read_text())
    ids = [*examples(sealed), *reasons(sealed)]
    assert sorted(ids) == sorted(one.trace_id for one in [*answered_ones, *failed]), "each once"
    assert funnel["samples"] == len(ids) == funnel["examples"] + funnel["dropped"]
    assert funnel["dropped"] == sum(step["dropped"] for step in funnel["funnel"])
    assert funnel["examples"] == (funnel["funnel"][-1]["remaining"] if funnel["funnel"] else funnel["samples"])
    assert Counter(reasons(sealed).values()) == {step["reason"]: step["dropped"] for step in funnel["funnel"]}
    only_counted = {flag for flag, action in actions(Select.model_validate(config)).items() if action != "drop"}
    assert not {flag for _, flag in flags(sealed) if flag not in only_counted} - set(REASONS)
    assert not only_counted & set(reasons(sealed).values())
    assert Counter(flag for _, flag in flags(sealed)) == funnel["flags"]


def test_when_nothing_is_left_the_error_shows_the_funnel_and_what_helps(lab: Any) -> None:
    bad = [trace(0, finish_reason="length"), *(trace(number, answer="\\boxed{0}") for number in range(1, 4))]
    with pytest.raises(DataError) as caught:
        run(lab, bad)
    error = str(caught.value)
    assert "none of 4 traces can train (1 cut off at the token limit; 3 answer did not match the reference)" in error
    assert "distill inspect --wrong" in error
    assert "\n" not in error
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
    assert set(ADVICE) <= set(REASONS) and set(actions(Select())) <= set(REASONS)
    leave_something = {
        "duplicate-of", "near-duplicate-prompt", "near-duplicate-trace", "not-chosen", "limit",
    }  # fmt: skip
    assert set(REASONS) - set(ADVICE) == leave_something
