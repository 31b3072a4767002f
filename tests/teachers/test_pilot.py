"""The pilot: a random sample that the run finds again, and a forecast whose intervals hold what they say."""

import random
from dataclasses import replace
from typing import Any

import pytest

from distill.records import Message, Prompt
from distill.teachers import generate, pilot
from distill.teachers.pilot import Row, as_text, forecast


def problems(count: int) -> list[Prompt]:
    texts = [f"problem {number}" for number in range(count)]
    return [Prompt.of([Message(role="user", content=t)], gold=str(len(t)), source="sums") for t in texts]


def asking(server: Any, **more: Any) -> dict[str, Any]:
    endpoint = {"base_url": server.base_url, "concurrency": 4, "max_retries": 0, "timeout_s": 20}
    prices = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0}
    teacher = {"engine": "openai", "model": "r1", "endpoint": endpoint, "probe": False, "prices": prices}
    return teacher | {"sampling": {"temperature": 0.6}} | more


def test_a_pilot_forecasts_from_a_few_prompts_and_the_run_reuses_its_answers(chat: Any, lab: Any) -> None:
    with chat.ChatServer(lambda *_: chat.Reply(delay_s=0.01)) as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(50)))
        found = pilot.run(recipe, step, lab.options, 10)
        assert (found.prompts, found.of, found.samples, len(server.requests)) == (10, 50, 10, 10)
        assert not step.sealed
        assert found.total_usd.value == pytest.approx(50 * (7 * 1.0 + 20 * 2.0) / 1e6)
        assert found.output_tokens == (1000, 1000, 1000)  # every answer has twenty tokens
        assert 0 < found.in_flight <= 4.5 and found.hours is not None and found.hours.value > 0
        again = pilot.run(recipe, step, lab.options, 10)
        assert len(server.requests) == 10 and again.hours is None
        assert generate.run(recipe, step, lab.options).counts["asked"] == 40
    for words in ("dollars per accepted trace", "10 of 50 prompts", "hours at"):
        assert words in as_text(found)


def test_a_pilot_does_not_depend_on_the_order_of_the_prompts(chat: Any, lab: Any) -> None:
    asked = []
    for name, prompts in (("a", problems(30)), ("b", problems(30)[::-1])):
        with chat.ChatServer() as server:
            one = replace(lab, runs=lab.runs / name)
            recipe = one.recipe(asking(server))
            pilot.run(recipe, one.step(recipe, one.prompts(prompts)), one.options, 5)
            asked.append({body["messages"][-1]["content"] for body in server.requests})
    assert asked[0] == asked[1] and len(asked[0]) == 5
    assert asked[0] != {f"problem {number}" for number in range(5)}


def test_what_is_cut_off_or_has_no_reasoning_is_not_accepted(chat: Any, lab: Any) -> None:
    answer = lambda body: chat.completion({"content": "\\boxed{9}"})  # noqa: E731  # right, but no reasoning
    with chat.ChatServer(answer=answer) as server:
        recipe = lab.recipe(asking(server))
        found = pilot.run(recipe, lab.step(recipe, lab.prompts(problems(9))), lab.options, 9)
        assert (found.accepted, found.reasoning_missing, found.usd_per_accepted) == (0, 9, None)
        assert "unknown" in as_text(found)
        relaxed = lab.recipe(asking(server), select={"reasoning": "optional"})
        step = lab.step(relaxed, lab.prompts(problems(9)))
        assert pilot.run(relaxed, step, lab.options, 9).accepted == 9


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    dice = random.Random(3)
    everyone = [
        Row(1, int(dice.random() < 0.6), 50, round(dice.lognormvariate(6, 0.8)), 0.0, 1.0, 0) for _ in range(3000)
    ]
    tokens, accepted = sum(row.output_tokens for row in everyone), sum(row.accepted for row in everyone)
    held = {"tokens": 0, "yield": 0, "each": 0}
    for _ in range(120):
        found = forecast(dice.sample(everyone, 60), len(everyone), 0, 1.0)
        assert found.tokens_per_accepted is not None
        held["tokens"] += found.output_tokens.low <= tokens <= found.output_tokens.high
        held["yield"] += found.yield_.low <= accepted / len(everyone) <= found.yield_.high
        held["each"] += found.tokens_per_accepted.low <= tokens / accepted <= found.tokens_per_accepted.high
    assert all(0.85 * 120 <= count <= 120 for count in held.values()), held


def test_an_interval_from_all_right_answers_still_has_room_below() -> None:
    found = forecast([Row(1, 1, 1, 1, 0.0, 1.0, 0)] * 10, 100, 0, 1.0)
    assert found.yield_.value == 1.0 and found.yield_.low < 0.8
