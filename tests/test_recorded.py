"""Recorded traces as a teacher: found by their question, ordered by their content, and never an error that trains."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import FormatConfig, PromptSource, Sampling, TeacherConfig
from distill.engines import Completion, Request, open_engine, stream
from distill.engines.recorded import NO_TRACE, RecordedEngine, no_answer, normalised, roots
from distill.errors import DataError
from distill.prompts import read_source
from distill.records import Message, Prompt, Teacher, Trace, Verdict
from distill.runs import DigestCache, RunOptions
from distill.verifiers import math, number

GREEDY = Sampling()


def saved(folder: Path, rows: list[dict[str, Any]], name: str = "traces.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def teacher(*files: Path, **recorded: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"engine": "recorded", "recorded": {"files": files, **recorded}})


def engine(*files: Path, **recorded: Any) -> RecordedEngine:
    return RecordedEngine.from_teacher(teacher(*files, **recorded), FormatConfig(), RunOptions())


def asked(question: str, text: str | None = None) -> Prompt:
    return Prompt.of([Message(role="user", content=text or question)], row={"question": question})


def answers(of: RecordedEngine, question: str, n: int) -> list[Completion]:
    return [of.answer(Request(asked(question), sample, GREEDY, seed=0)) for sample in range(n)]


def replies(*texts: str, question: str = "q") -> list[dict[str, Any]]:
    return [{"question": question, "response": text} for text in texts]


# --- finding a prompt's answers -------------------------------------------------------------------------------------


def test_a_prompt_finds_its_answer_by_its_bare_question(tmp_path: Path) -> None:
    of = engine(saved(tmp_path, replies("<think>\nAdd.\n</think>\n\n2", question="1 +  1\n= ?")))
    templated = asked("1 + 1 = ?", text="1 + 1 = ?\nPut the answer in a box.")
    found = of.answer(Request(templated, 0, GREEDY, seed=0))
    assert found.key == (templated.prompt_id, 0)
    assert (found.reasoning, found.answer, found.think, found.error) == ("Add.", "2", "closed", None)
    assert found.raw == "<think>\nAdd.\n</think>\n\n2"


def test_a_question_is_compared_in_one_spelling_of_its_characters() -> None:
    assert normalised("cafe\u0301  au\nlait") == normalised("caf\u00e9 au lait")
    assert normalised("a") != normalised("A")


def test_a_prompt_that_was_not_recorded_is_a_failed_completion(tmp_path: Path) -> None:
    of = engine(saved(tmp_path, replies("<think>a</think>b")))
    assert answers(of, "another", 1)[0].error == NO_TRACE
    assert [completion.error for completion in answers(of, "q", 2)] == [None, NO_TRACE]


@given(st.permutations(range(6)))
def test_the_order_of_rows_and_rows_that_stand_twice_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    rows = replies(*(f"<think>way {n}</think>{n}" for n in range(5))) + replies("<think>way 0</think>0")
    folder = tmp_path_factory.mktemp("rows")
    expected = answers(engine(saved(folder, rows)), "q", 6)
    assert {completion.answer for completion in expected[:5]} == set("01234")
    assert expected[5].error == NO_TRACE, "six rows, five answers"
    assert answers(engine(saved(folder, [rows[index] for index in order])), "q", 6) == expected


def test_several_files_are_one_set_of_traces(tmp_path: Path) -> None:
    first = saved(tmp_path, replies("<think>a</think>1"), "a.jsonl")
    second = saved(tmp_path, replies("<think>b</think>2"), "b.jsonl")
    assert answers(engine(first, second), "q", 2) == answers(engine(second, first), "q", 2)


def test_the_engine_is_opened_by_name_and_answers_every_request(tmp_path: Path) -> None:
    path = saved(tmp_path, replies("<think>a</think>1", "<think>b</think>2"))
    opened = open_engine(teacher(path), FormatConfig(), RunOptions())
    requests = [Request(asked(question), sample, GREEDY, seed=0) for question in ("q", "?") for sample in range(2)]

    async def gather() -> list[Completion]:
        try:
            return [completion async for completion in opened.generate(stream(requests))]
        finally:
            await opened.close()

    completions = asyncio.run(gather())
    assert [completion.key for completion in completions] == [request.key for request in requests]
    assert [completion.error for completion in completions] == [None, None, NO_TRACE, NO_TRACE]
    assert opened.batch_size is None and opened.name == "recorded"


# --- dialects -------------------------------------------------------------------------------------------------------


def test_reasoning_of_its_own_column_is_kept_apart_and_rejoined_in_the_raw_text(tmp_path: Path) -> None:
    rows = [{"problem": "q", "thinking": "Add.\n", "content": "2"}]
    of = engine(
        saved(tmp_path, rows), question_column="problem", reasoning_column="thinking", response_column="content"
    )
    found = answers(of, "q", 1)[0]
    assert (found.reasoning, found.answer, found.think) == ("Add.", "2", "closed")
    assert found.raw == "<think>\nAdd.\n\n</think>\n\n2"


def test_columns_of_lists_hold_several_samples(tmp_path: Path) -> None:
    rows = [{"question": "q", "thinking": ["a", "b", None], "output": ["1", "2", "3"]}]
    path = saved(tmp_path, rows)
    found = answers(engine(path, reasoning_column="thinking", response_column="output"), "q", 4)
    assert {(c.reasoning, c.answer, c.think) for c in found[:3]} == {
        ("a", "1", "closed"),
        ("b", "2", "closed"),
        (None, "3", "absent"),
    }
    assert found[3].error == NO_TRACE
    uneven = saved(tmp_path, [{"question": "q", "thinking": ["a"], "output": ["1", "2"]}], "uneven.jsonl")
    with pytest.raises(DataError, match=r"uneven\.jsonl:1: 1 values in column 'thinking', but 2 in 'output'"):
        engine(uneven, reasoning_column="thinking", response_column="output")


def test_a_repeated_prompt_is_dropped_where_the_recipe_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path, replies("Q: 1 + 1?\n<think>\nAdd.\n</think>\n\n2", "Q: 1 + 1?\n<think>\ncut off"))
    found = {c.think: c for c in answers(engine(path, strip_prompt=True), "q", 2)}
    assert found["closed"].raw == "<think>\nAdd.\n</think>\n\n2"
    assert found["unclosed"].raw == "<think>\ncut off"
    assert found["unclosed"].answer == ""


def test_text_without_markers_is_cut_off_reasoning_where_the_others_were_opened_by_the_prompt(tmp_path: Path) -> None:
    opened = saved(tmp_path, replies("a\n</think>\n\n1", "b\n</think>\n\n2", "c, and so 3"), "opened.jsonl")
    states = {c.think: c for c in answers(engine(opened), "q", 3)}
    assert states["unclosed"].reasoning == "c, and so 3" and states["unclosed"].answer == ""
    # negative control: where the text opens its own reasoning, one without markers never reasoned
    own = saved(tmp_path, replies("<think>a</think>1", "<think>b</think>2", "c, and so 3"), "own.jsonl")
    assert {c.think for c in answers(engine(own), "q", 3)} == {"closed", "absent"}


def test_other_markers_are_those_of_the_recipes_format(tmp_path: Path) -> None:
    path = saved(tmp_path, replies("[[Add.]]2"))
    of = RecordedEngine.from_teacher(teacher(path), FormatConfig(open_marker="[[", close_marker="]]"), RunOptions())
    found = of.answer(Request(asked("q"), 0, GREEDY, seed=0))
    assert (found.reasoning, found.answer) == ("Add.", "2")


# --- what is no answer ----------------------------------------------------------------------------------------------

ERRORS = [
    "Error after 6 attempts: Error code: 500 - {'error': {'message': 'Internal Server Error'}}",
    '{"error": {"message": "Rate limit reached", "type": "rate_limit_error"}}',
    "Error: Request timed out.",
    "openai.APIConnectionError: Connection error.",
    "HTTP 503 Service Unavailable",
    "Error 429: Too Many Requests",
    "500 Internal Server Error",
    "Error after 3 attempts",
    "<html><head><title>502 Bad Gateway</title></head></html>",
    "Traceback (most recent call last):\n  ...\nrequests.exceptions.ConnectionError: Connection refused",
    "API error: insufficient_quota",
    "Request failed with status code 401",
]
ANSWERS = [
    "Error analysis asks how far off the estimate is: 5%.",
    "The server returns 500 plates, so the answer is 500.",
    "Errors are rare: \\boxed{3}",
    "Time is 5 hours.",
    "The rate limit of the road is 50 km/h, so \\boxed{2} hours.",
    "Connection between the two: y = 2x.",
    "Failed attempts: he succeeds after 3 attempts.",
    "450 is the quota.",
    "{1, 2, 3}",
    "4",
]


@pytest.mark.parametrize("text", ERRORS)
def test_a_saved_error_is_no_answer(text: str) -> None:
    assert (no_answer(text, "</think>") or "").startswith("saved API error: ")


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_that_speaks_of_errors_is_one(text: str) -> None:
    assert no_answer(text, "</think>") is None


def test_long_or_reasoned_text_is_an_answer_whatever_it_opens_with() -> None:
    assert no_answer(f"{ERRORS[0]}\n</think>\n\nSo the code is 500.", "</think>") is None
    assert no_answer(ERRORS[0] + " and on" * 500, "</think>") is None


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_text_is_no_answer(tmp_path: Path, text: str | None) -> None:
    of = engine(saved(tmp_path, [{"question": "q", "response": text}]))
    assert answers(of, "q", 1)[0].error == "empty answer"


def test_an_error_stands_behind_the_real_answers_and_keeps_its_text(tmp_path: Path) -> None:
    real = [f"<think>{n}</think>{n}" for n in range(8)]
    found = answers(engine(saved(tmp_path, replies(ERRORS[0], *real, ""))), "q", 10)
    assert [completion.error is None for completion in found] == [True] * 8 + [False] * 2
    failed = {completion.raw: completion for completion in found[8:]}
    assert set(failed) == {ERRORS[0], ""}
    assert all(c.finish_reason == "error" and not c.answer and c.reasoning is None for c in failed.values())


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "recorded", "message"),
    [
        ({"question": "q"}, {}, r"traces\.jsonl:1: no column 'response'; columns here: question"),
        ({"q": "q", "response": "r"}, {}, r"traces\.jsonl:1: no column 'question'"),
        ({"question": "", "response": "r"}, {}, r"column 'question' holds no text"),
        ({"question": "q", "response": {"a": 1}}, {}, r"column 'response' holds dict; it must be text or texts"),
        ({"question": "q", "response": [1]}, {}, r"column 'response' holds int"),
        ({"question": "q", "resp": "r"}, {"response_column": "rsp"}, r"no column 'rsp' \(did you mean 'resp'\?\)"),
    ],
)
def test_rows_that_cannot_be_read_are_named(
    tmp_path: Path, row: dict[str, Any], recorded: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        engine(saved(tmp_path, [row]), **recorded)


def test_roots_follow_the_content_and_order_of_the_files(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    first = saved(tmp_path, replies("a"), "a.jsonl")
    second = saved(tmp_path, replies("b"), "b.jsonl")
    before = roots(teacher(first, second), cache)
    assert set(before) == {"recorded", "recorded.0", "recorded.1"}
    saved(tmp_path, replies("c"), "b.jsonl")
    after = roots(teacher(first, second), cache)
    assert before["recorded.0"] == after["recorded.0"] and before["recorded.1"] != after["recorded.1"]
    with pytest.raises(DataError, match="no such file"):
        roots(teacher(tmp_path / "absent.jsonl"), cache)


# --- real traces ----------------------------------------------------------------------------------------------------

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.exists(), reason="no real traces beside the checkout (shared/data)")


def judge_file(name: str, recorded: dict[str, Any], **source: Any) -> list[tuple[Prompt, Completion, Verdict, Verdict]]:
    """Every recorded answer of a file's own prompts, with the verdicts of `number` and `math`."""
    prompts = read_source(PromptSource.model_validate({"name": "real", "file": TRACES / name, **source}))
    of = engine(TRACES / name, **recorded)
    judged = []
    for prompt in prompts:
        for sample in range(len(of.samples[normalised(prompt.row["question"])])):
            found = of.answer(Request(prompt, sample, GREEDY, seed=0))
            trace = Trace(
                trace_id=f"{prompt.prompt_id}-{sample}", prompt_id=prompt.prompt_id, cfg="real", sample=sample,
                reasoning=found.reasoning, answer=found.answer, think=found.think, error=found.error,
                teacher=Teacher(engine="recorded"),
            )  # fmt: skip
            judged.append((prompt, found, number(prompt, trace), math(prompt, trace)))
    return judged


def outcomes(verdicts: list[Verdict]) -> Counter[str]:
    return Counter(verdict.outcome for verdict in verdicts)


@needs_traces
@pytest.mark.parametrize(("name", "errors"), [("gsm8k_deepseek_r1.jsonl", 1), ("gsm8k_r1_distill_qwen_32b.jsonl", 0)])
def test_real_r1_answers_to_gsm8k_are_separated_verified_and_cleared_of_errors(name: str, errors: int) -> None:
    judged = judge_file(name, {}, gold="after_hashes")
    assert len(judged) == 400
    failed = [found for _, found, _, _ in judged if found.error]
    assert len(failed) == errors and all("Error code: 500" in (found.error or "") for found in failed)
    assert Counter(found.think for _, found, _, _ in judged if not found.error) == {"closed": 400 - errors}
    assert all(found.reasoning and found.answer for _, found, _, _ in judged if not found.error)
    for verdicts in ([v for _, _, v, _ in judged], [v for _, _, _, v in judged]):
        assert outcomes(verdicts)["correct"] >= 370
        assert outcomes(verdicts)["error"] == errors
    assert [v.outcome for _, _, v, _ in judged] == [v.outcome for _, _, _, v in judged], "both verifiers agree here"


@needs_traces
def test_real_answers_that_repeat_the_prompt_are_closed_or_cut_off_and_only_closed_ones_are_right() -> None:
    columns = {"question_column": "problem_text", "gold_column": "ground_truth_solution", "gold": "boxed"}
    recorded = {"question_column": "problem_text", "response_column": "generated_cot", "strip_prompt": True}
    judged = judge_file("math_train_r1_distill_qwen_1.5b.jsonl", recorded, **columns)
    assert Counter(found.think for _, found, _, _ in judged) == {"closed": 219, "unclosed": 81}
    assert all(found.raw.startswith("<think>") for _, found, _, _ in judged)
    assert {v.outcome for _, found, _, v in judged if found.think == "unclosed"} == {"wrong"}
    assert outcomes([v for _, _, _, v in judged])["correct"] >= 190
    for prompt, found, by_number, by_math in judged:
        if by_number.correct:
            assert by_math.correct, f"{prompt.gold}: {found.answer[-100:]}"


@needs_traces
def test_real_answers_with_reasoning_in_a_field_of_its_own_are_read() -> None:
    columns = {"question_column": "problem", "gold_column": "gtruth_answer"}
    recorded = {
        "question_column": "problem",
        "reasoning_column": "message_thinking",
        "response_column": "message_content",
    }
    judged = judge_file("dialect_message_thinking.json", recorded, **columns)
    assert [(found.think, by_number.correct, by_math.correct) for _, found, by_number, by_math in judged] == [
        ("closed", True, True)
    ] * 5


@needs_traces
def test_real_answers_in_lists_are_three_samples_a_riddle() -> None:
    recorded = {
        "question_column": "prompt",
        "reasoning_column": "thinking",
        "response_column": "output",
        "records_path": "results",
    }
    judged = judge_file(
        "riddles_deepseek_r1_separate_fields.json", recorded, question_column="prompt", gold_column=None
    )
    assert Counter(prompt.prompt_id for prompt, _, _, _ in judged).most_common()[0][1] == 3
    assert len(judged) == 39 and {found.think for _, found, _, _ in judged} == {"closed"}
    assert {by_number.outcome for _, _, by_number, _ in judged} == {"unverifiable"}
