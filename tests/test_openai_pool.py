"""Several servers behind one engine, and servers that ask to be left alone: weights, failover, health, waits, caps."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distill.config import Endpoint, FormatConfig, Prices, Sampling, TeacherConfig
from distill.engines import Request
from distill.engines.openai import OpenAIEngine
from distill.engines.openai.pool import TRIP_AFTER
from distill.errors import EngineError
from distill.records import Message, Prompt
from distill.runs import RunOptions

spec = importlib.util.spec_from_file_location("openai_client", Path(__file__).parent / "openai_client.py")
assert spec and spec.loader
client_module = importlib.util.module_from_spec(spec)
sys.modules["openai_client"] = client_module
spec.loader.exec_module(client_module)
ChatServer, Reply, completion = client_module.ChatServer, client_module.Reply, client_module.completion
endpoint, engine, pool, requests = (
    client_module.endpoint, client_module.engine, client_module.pool, client_module.requests,
)  # fmt: skip
ask, one = client_module.ask, client_module.one

Plan = Callable[[int, dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def good(number: int, body: dict[str, Any]) -> Any:
    return Reply()


def slow(number: int, body: dict[str, Any]) -> Any:
    return Reply(delay_s=0.02)


def always(reply: Any) -> Plan:
    return lambda number, body: reply


@pytest.fixture
def servers() -> Iterator[Callable[..., list[Any]]]:
    with ExitStack() as stack:
        yield lambda *plans: [stack.enter_context(ChatServer(plan)) for plan in plans]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [16, "auto"])
@pytest.mark.parametrize("plan", [good, slow])
def test_requests_go_by_weight(concurrency: Any, plan: Plan, servers: Any) -> None:
    heavy, light = servers(plan, plan)
    client = pool(
        endpoint(heavy, weight=3, concurrency=concurrency), endpoint(light, weight=1, concurrency=concurrency)
    )
    assert len(ask(client, requests(240))) == 240
    assert 0.62 < len(heavy.requests) / 240 < 0.88


def test_of_equal_weights_a_slow_server_does_not_hold_a_fast_one_back(servers: Any) -> None:
    fast, lame = servers(good, always(Reply(delay_s=1.0)))
    assert len(ask(pool(endpoint(fast, concurrency=4), endpoint(lame, concurrency=4)), requests(200))) == 200
    assert len(lame.requests) <= 40


def test_shares_by_weight_hold_where_all_places_are_taken(servers: Any) -> None:
    heavy, light = servers(always(Reply(delay_s=0.03)), always(Reply(delay_s=0.01)))  # the light one is the faster
    client = pool(endpoint(heavy, weight=4, concurrency=4), endpoint(light, concurrency=4))
    assert len(ask(client, requests(200))) == 200
    assert 0.75 < len(heavy.requests) / 200 < 0.85


def test_every_server_is_asked_for_its_own_name_of_the_model_and_billed_by_its_own_prices(servers: Any) -> None:
    first, second = servers(good, good)
    prices = Prices(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
    client = pool(endpoint(first, model="org/r1", prices=prices), endpoint(second))
    done = ask(client, requests(10))
    assert {body["model"] for body in first.requests} == {"org/r1"}
    assert {body["model"] for body in second.requests} == {"r1"}
    assert {item.cost_usd for item in done if item.model == "org/r1"} == {47 / 1e6}  # 7 tokens in, 20 out
    assert {item.cost_usd for item in done if item.model == "r1"} == {None}


def test_a_recipe_names_its_pool(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = servers(good, good)
    endpoints = [Endpoint(base_url=first.base_url), Endpoint(base_url=second.base_url)]
    teacher = TeacherConfig(engine="openai", model="r1", endpoints=endpoints)
    client = OpenAIEngine.from_teacher(teacher, FormatConfig(), RunOptions())
    ask(client, requests(20))
    assert len(first.requests) + len(second.requests) == 20
    assert first.requests and second.requests
    with pytest.raises(EngineError, match=r"teacher\.endpoints\.1\.base_url"):
        OpenAIEngine("r1", [endpoints[0], Endpoint(base_url="nowhere")], FormatConfig())


# --- failover -------------------------------------------------------------------------------------------------------


def test_what_fails_at_one_server_is_tried_at_another_without_waiting(servers: Any) -> None:
    bad, fine = servers(always(Reply(500, b"broken")), good)
    client = OpenAIEngine("r1", [endpoint(bad), endpoint(fine)], FormatConfig(), first_delay_s=30)
    started = time.monotonic()
    done = ask(client, requests(40))
    assert time.monotonic() - started < 15  # a single back-off would take 15 s on average
    assert all(item.error is None and item.attempts <= 2 for item in done)


def test_a_server_that_fails_again_and_again_is_left_alone(servers: Any, capfd: pytest.CaptureFixture[str]) -> None:
    bad, fine = servers(always(Reply(500, b"broken")), good)
    client = pool(endpoint(bad, concurrency=4), endpoint(fine, concurrency=4))
    done = ask(client, requests(200))
    assert all(item.error is None for item in done)
    assert TRIP_AFTER <= len(bad.requests) <= TRIP_AFTER + 4
    said = capfd.readouterr().err
    assert said.count("failed 8 times in a row (500 broken)") == 1


def test_a_server_that_recovers_is_asked_again_after_its_cool_down(
    servers: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    recovering, fine = servers(lambda number, _: Reply(503) if number <= TRIP_AFTER else Reply(), slow)
    client = pool(endpoint(recovering, concurrency=2), endpoint(fine, concurrency=2))
    done = ask(client, requests(400))
    assert all(item.error is None for item in done)
    assert len(recovering.requests) > 20
    assert "answers again" in capfd.readouterr().err


def test_a_lone_server_in_trouble_is_asked_for_one_at_a_time(servers: Any) -> None:
    seen = []

    def plan(number: int, body: dict[str, Any]) -> Any:
        seen.append(server.in_flight)
        return Reply(500, delay_s=0.03)

    (server,) = servers(plan)
    done = ask(engine(server, concurrency=16, max_retries=0), requests(60))
    assert len(done) == 60 and all(item.retryable for item in done)
    assert max(seen[:16]) > 4
    assert max(seen[40:]) == 1


def test_an_endpoint_that_refuses_everything_is_taken_out_while_another_lives(
    servers: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    refusing, fine = servers(always(Reply(401, b"no")), slow)
    done = ask(pool(endpoint(refusing, max_retries=0), endpoint(fine, max_retries=0)), requests(60))
    assert all(item.error is None for item in done)
    assert len(fine.requests) == 60
    assert len(refusing.requests) <= 8
    said = capfd.readouterr().err
    assert said.count("set OPENAI_API_KEY to a valid one; going on without it: 1 of 2 endpoints remain") == 1


def test_the_last_endpoints_refusal_stops_the_run(servers: Any) -> None:
    client = pool(*(endpoint(server) for server in servers(always(Reply(401)), always(Reply(404)))))
    with pytest.raises(EngineError, match="refused the request") as caught:
        ask(client, requests(60))
    assert caught.value.__context__ is None
    with pytest.raises(EngineError, match="refused the request"):  # and it stays so
        ask(client, requests(1))


# --- waits ----------------------------------------------------------------------------------------------------------


def test_a_server_that_says_when_to_come_back_costs_no_tries(servers: Any) -> None:
    (server,) = servers(lambda number, _: Reply(429, b"", {"Retry-After": "0.05"}) if number <= 6 else Reply())
    done = one(server, max_retries=1)
    assert (done.error, done.attempts) == (None, 7)


def test_one_that_does_not_say_when_does(servers: Any) -> None:
    (server,) = servers(lambda number, _: Reply(429) if number <= 6 else Reply())
    done = one(server, max_retries=1)
    assert done.error and (done.attempts, done.retryable) == (2, True)


def test_nobody_is_sent_to_a_server_while_it_asks_to_be_left_alone(servers: Any) -> None:
    moments = []

    def plan(number: int, body: dict[str, Any]) -> Any:
        moments.append(time.monotonic())
        return Reply(429, b"", {"Retry-After": "0.6"}) if number == 1 else Reply(delay_s=0.01)

    (server,) = servers(plan)
    assert len(ask(engine(server, concurrency=1), requests(4))) == 4
    assert moments[1] - moments[0] >= 0.6


@pytest.mark.parametrize(
    "headers",
    [
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "600ms"},
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0.6s"},
    ],
)
def test_a_used_up_allowance_pauses_the_server_before_it_refuses(headers: dict[str, str], servers: Any) -> None:
    moments = []

    def plan(number: int, body: dict[str, Any]) -> Any:
        moments.append(time.monotonic())
        return Reply(headers=headers if number == 1 else {})

    (server,) = servers(plan)
    assert all(item.attempts == 1 for item in ask(engine(server, concurrency=1), requests(3)))
    assert moments[1] - moments[0] >= 0.55


def test_others_are_asked_while_one_is_paused(servers: Any) -> None:
    limited, fine = servers(always(Reply(429, b"", {"Retry-After": "30"})), good)
    started = time.monotonic()
    done = ask(pool(endpoint(limited, concurrency=1), endpoint(fine)), requests(50))
    assert all(item.error is None for item in done)
    assert time.monotonic() - started < 25
    assert len(limited.requests) == 1


# --- caps a minute --------------------------------------------------------------------------------------------------


def test_no_more_requests_a_minute_than_the_recipe_says(servers: Any) -> None:
    (server,) = servers(good)
    pulled = []

    def counted() -> Iterator[Request]:
        for request in requests(14):
            pulled.append(time.monotonic())
            yield request

    started = time.monotonic()
    ask(engine(server, concurrency=64, rpm=600), counted())
    assert time.monotonic() - started >= 0.3  # ten at once, then ten a second
    assert pulled[-1] - started >= 0.3  # what cannot be sent is not pulled either


def test_no_more_tokens_a_minute_than_the_recipe_says(servers: Any) -> None:
    (server,) = servers(good)
    long = Prompt.of([Message(role="user", content="x" * 400)])  # about 100 tokens; it answers with 7 + 20
    wanted = [Request(long, sample, Sampling(max_new_tokens=900), seed=sample) for sample in range(12)]
    started = time.monotonic()
    ask(engine(server, concurrency=1, tpm=6000), wanted)  # 100 tokens a second
    assert time.monotonic() - started >= 1.5  # 12 x 27 tokens, the first hundred at once
