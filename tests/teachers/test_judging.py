"""Judges: asked once, kept in a ledger of their own, counted against the budget."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from distill.config import recipe_from
from distill.errors import BudgetError, EngineError
from distill.records import Message, Prompt, Teacher, Trace, Verdict, read_records
from distill.teachers import generate
from distill.teachers.generate import specs_of
from distill.teachers.judging import Judges, open_judges

PRICES = {"input_usd_per_mtok": 0, "output_usd_per_mtok": 1000}


def problems(count: int) -> list[Prompt]:
    texts = [f"problem {number}" for number in range(count)]
    return [Prompt.of([Message(role="user", content=t)], gold=str(len(t)), source="sums") for t in texts]


def answer_to(prompt: Prompt) -> Trace:
    teacher = Teacher(model="r1", engine="openai")
    return Trace(trace_id=prompt.prompt_id, prompt_id=prompt.prompt_id, cfg="c", sample=0, answer="9", teacher=teacher)


def recipe_of(server: Any, judge: Any = None, until: Mapping[str, int] | None = None, **teacher: Any) -> Any:
    endpoint = {"base_url": server.base_url, "concurrency": 4, "max_retries": 0, "timeout_s": 20}
    judge_endpoint = endpoint | {"base_url": (judge or server).base_url}
    verifier = {"judge": {"model": "the-judge", "endpoint": judge_endpoint, "prices": PRICES}}
    fields = {"engine": "openai", "model": "r1", "endpoint": endpoint, "sampling": {"temperature": 0.6}, "probe": False}
    fields |= {"until": until} if until else {}
    source = {"name": "sums", "file": "sums.jsonl", "verifier": verifier}
    return recipe_from({"name": "r", "prompts": [source], "teacher": fields | teacher})


def judge_server(chat: Any, verdict: str = "CORRECT", **plan: Any) -> Any:
    return chat.ChatServer(answer=lambda _: chat.completion({"content": f"I think.\nVERDICT: {verdict}"}), **plan)


def test_a_judge_is_asked_beside_generation_and_never_again(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server, judge_server(chat) as judge:
        recipe = recipe_of(server, judge)
        step = lab.step(recipe, lab.prompts(problems(6)))
        sealed = generate.run(recipe, step, lab.options)
        assert (len(server.requests), len(judge.requests)) == (6, 6)
        verdicts = list(read_records(sealed.path("verdicts.jsonl"), Verdict))
        assert {verdict.outcome for verdict in verdicts} == {"correct"} and len(verdicts) == 6
        assert {verdict.verifier.partition("@")[0] for verdict in verdicts} == {"judge"}
        assert "problem 0" in str(judge.requests[0]["messages"]) or len(judge.requests) == 6
        # the judge's own ledger outlives the run and even the memory of its verdicts
        for path in lab.runs.glob("ledger/*/verdicts.jsonl"):
            path.unlink()
        grown = lab.step(recipe, lab.prompts(problems(7)))
        generate.run(recipe, grown, lab.options)
        assert (len(server.requests), len(judge.requests)) == (7, 7)


def test_what_a_judge_says_decides_when_until_is_satisfied(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server, judge_server(chat, "WRONG") as judge:
        recipe = recipe_of(server, judge, until={"correct": 1, "tries": 3})
        sealed = generate.run(recipe, lab.step(recipe, lab.prompts(problems(2))), lab.options)
        assert (sealed.counts["answered"], sealed.counts["satisfied"], len(judge.requests)) == (6, 0, 6)


def test_what_a_judge_costs_counts_against_the_budget(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server, judge_server(chat) as judge:
        recipe = recipe_of(server, judge, budget={"usd": 0.1}, prices=PRICES)  # two cents an answer, two a verdict
        with pytest.raises(BudgetError, match=r"budget\.usd of 0\.1"):
            generate.run(recipe, lab.step(recipe, lab.prompts(problems(20))), lab.options)
        assert (len(server.requests), len(judge.requests)) == (2, 2)  # a third of both would be beyond the limit


def test_a_judge_that_cannot_be_asked_says_so_to_every_answer_that_comes_later(chat: Any, lab: Any) -> None:
    with judge_server(chat, plan=lambda *_: chat.Reply(401, b"no")) as judge:
        recipe = recipe_of(judge)
        specs = list(specs_of(recipe).values())

        async def ask(judges: Judges) -> None:
            for prompt in problems(3):
                with pytest.raises(EngineError, match=r"verifier judge.*401"):
                    await asyncio.wait_for(judges.verdict(specs[0], prompt, answer_to(prompt)), timeout=20)
            await judges.close()

        with open_judges(specs, recipe.format, lab.options) as judges:
            asyncio.run(ask(judges))
        assert len(judge.requests) == 1


def test_answers_in_flight_are_kept_when_a_judge_cannot_be_asked(chat: Any, lab: Any) -> None:
    slow = chat.ChatServer(plan=lambda number, _: chat.Reply(delay_s=0.0 if number == 1 else 0.5))
    with slow as server, judge_server(chat, plan=lambda *_: chat.Reply(401, b"no")) as judge:
        recipe = recipe_of(server, judge)
        step = lab.step(recipe, lab.prompts(problems(12)))
        with pytest.raises(EngineError, match=r"verifier judge.*401"):
            generate.run(recipe, step, lab.options)
        assert (asked := len(server.requests)) < 12
        judge.plan = lambda *_: chat.Reply()
        assert generate.run(recipe, step, replace(lab.options)).counts["answered"] == 12
        assert len(server.requests) == 12 and asked >= 4


def test_a_judge_that_cannot_be_asked_at_all_stops_the_run_and_keeps_the_answers(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server, judge_server(chat, plan=lambda *_: chat.Reply(401, b"no")) as judge:
        recipe = recipe_of(server, judge)
        step = lab.step(recipe, lab.prompts(problems(6)))
        with pytest.raises(EngineError, match=r"verifier judge.*401"):
            generate.run(recipe, step, lab.options)
        asked = len(server.requests)
        judge.plan = lambda *_: chat.Reply()
        assert generate.run(recipe, step, replace(lab.options)).counts["answered"] == 6
        assert len(server.requests) - asked <= 6
