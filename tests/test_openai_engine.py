"""The OpenAI-compatible client against a real local server that counts what it is asked and misbehaves on request."""

import asyncio
import importlib.util
import logging
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.config import Endpoint, FormatConfig, Sampling, TeacherConfig
from distill.engines import Completion, Request, open_engine, stream
from distill.engines.openai import OpenAIEngine, preflight, retry_after_s, server_message
from distill.errors import EngineError
from distill.records import Message, Prompt
from distill.runs import RunOptions

spec = importlib.util.spec_from_file_location("chat_server", Path(__file__).parent / "chat_server.py")
assert spec and spec.loader
server_module = importlib.util.module_from_spec(spec)
sys.modules["chat_server"] = server_module  # dataclasses look their module up
spec.loader.exec_module(server_module)
ChatServer, Reply, completion = server_module.ChatServer, server_module.Reply, server_module.completion

SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("TEACHER_KEY", raising=False)


def endpoint(server: Any, **fields: Any) -> Endpoint:
    return Endpoint(**{"base_url": server.base_url, "timeout_s": 20, "max_retries": 3} | fields)


def engine(server: Any, **fields: Any) -> OpenAIEngine:
    return OpenAIEngine("r1", endpoint(server, **fields), FormatConfig(), first_delay_s=0.01)


def requests(count: int, system: str | None = None, **sampling: Any) -> Iterator[Request]:
    for number in range(count):
        prompt = Prompt.of([Message(role="user", content=f"question {number}")])
        yield Request(prompt, 0, Sampling(**sampling), seed=100 + number, system=system)


def ask(client: OpenAIEngine, wanted: Iterable[Request]) -> list[Completion]:
    async def collect() -> list[Completion]:
        return [done async for done in client.generate(stream(wanted))]

    return asyncio.run(collect())


def one(server: Any, **fields: Any) -> Completion:
    (done,) = ask(engine(server, **fields), requests(1))
    return done


def answering(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> Any:
    return ChatServer(answer=lambda body: completion(message, finish, **more))


def failing(first: int, reply: Any) -> Any:
    """A server whose first replies are bad."""
    return ChatServer(lambda number, body: reply if number <= first else Reply())


# --- what is sent and what comes back -------------------------------------------------------------------------------


def test_every_sampling_option_the_model_and_the_system_prompt_are_sent() -> None:
    with ChatServer() as server:
        ask(engine(server), requests(1, system="be brief", temperature=0.6, top_p=0.95, max_new_tokens=77))
    assert server.requests == [
        {
            "model": "r1",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question 0"}],
            "temperature": 0.6,
            "top_p": 0.95,
            "max_tokens": 77,
            "seed": 100,
        }
    ]


def test_without_a_system_prompt_only_the_prompt_is_sent() -> None:
    with ChatServer() as server:
        ask(engine(server), requests(1))
    assert [message["role"] for message in server.requests[0]["messages"]] == ["user"]


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "think a", "content": "answer b"},
        {"reasoning": "think a", "content": "answer b"},
        {"content": "<think>\nthink a\n</think>\n\nanswer b"},
        {"content": "think a\n</think>\n\nanswer b"},
        {"content": "<think>think a</think>answer b", "reasoning_content": None},
    ],
)
def test_reasoning_is_read_in_every_dialect(message: dict[str, Any]) -> None:
    with answering(message) as server:
        done = one(server)
    assert (done.reasoning, done.answer, done.think, done.error) == ("think a", "answer b", "closed", None)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_the_raw_text_of_separate_fields_reads_back_as_the_same_fields(field: str) -> None:
    from distill.format import parse_completion

    with answering({field: "think a", "content": "answer b"}) as server:
        done = one(server)
    assert parse_completion(done.raw) == (done.reasoning, done.answer, done.think)


def test_reasoning_cut_off_by_the_token_limit_is_unclosed_and_not_an_error() -> None:
    with answering({"reasoning_content": "I was just about", "content": None}, "length") as server:
        done = one(server)
    assert (done.think, done.finish_reason, done.answer, done.error) == ("unclosed", "length", "", None)
    assert done.raw == "<think>\nI was just about"


def test_an_answer_without_reasoning_is_absent_not_empty() -> None:
    with answering({"content": "just 4"}) as server:
        done = one(server)
    assert (done.reasoning, done.answer, done.think) == (None, "just 4", "absent")


@pytest.mark.parametrize(
    ("said", "meant"),
    [("stop", "stop"), ("length", "length"), ("max_tokens", "length"), (None, "unknown"), ("tool_calls", "unknown")],
)
def test_finish_reasons_are_mapped(said: str | None, meant: str) -> None:
    with answering({"content": "4"}, said) as server:
        assert one(server).finish_reason == meant


def test_usage_model_and_fingerprint_are_recorded_as_the_server_says_them() -> None:
    with answering({"content": "4"}, model="r1-0528", system_fingerprint="fp_7") as server:
        done = one(server)
    assert done.usage.model_dump() == {"input": 7, "output": 20, "reasoning": 12}
    assert (done.model, done.revision) == ("r1-0528", "fp_7")
    assert done.latency_s > 0


def test_a_server_that_reports_no_usage_is_read_all_the_same() -> None:
    with answering({"content": "4"}, usage=None) as server:
        done = one(server)
    assert (done.answer, done.usage.output, done.usage.reasoning) == ("4", 0, None)


# --- concurrency ----------------------------------------------------------------------------------------------------


def test_no_more_requests_than_the_concurrency_are_ever_pulled_or_in_flight() -> None:
    pulled = answered = most = 0

    def counted() -> Iterator[Request]:
        nonlocal pulled, most
        for request in requests(40):
            pulled += 1
            most = max(most, pulled - answered)
            yield request

    async def collect(client: OpenAIEngine) -> None:
        nonlocal answered
        async for _ in client.generate(stream(counted())):
            await asyncio.sleep(0.002)  # while an answer is being dealt with, it still takes its room
            answered += 1

    with ChatServer(lambda number, body: Reply(delay_s=0.01)) as server:
        asyncio.run(collect(engine(server, concurrency=5)))
        assert server.most_in_flight == 5
    assert (answered, most) == (40, 5)


def test_completions_come_as_they_finish_not_in_the_order_asked() -> None:
    with ChatServer(lambda number, body: Reply(delay_s=0.3 if body["seed"] == 100 else 0)) as server:
        done = ask(engine(server, concurrency=4), requests(8))
    assert done[-1].key == next(requests(1)).key
    assert {item.key for item in done} == {request.key for request in requests(8)}


def test_one_engine_serves_several_event_loops() -> None:
    with ChatServer() as server:
        client = engine(server)
        assert [len(ask(client, requests(3))) for _ in range(2)] == [3, 3]


def test_an_error_of_the_callers_own_iterable_reaches_the_caller() -> None:
    def broken() -> Iterator[Request]:
        yield from requests(2)
        raise OSError("the prompts' disk is gone")

    with ChatServer() as server, pytest.raises(OSError, match="disk is gone"):
        ask(engine(server, concurrency=2), broken())


# --- trouble that passes --------------------------------------------------------------------------------------------

PASSING = [
    Reply(429, b'{"error": {"message": "slow down"}}'),
    Reply(500, b"oops"),
    Reply(503, b""),
    Reply(how="reset"),
    Reply(how="truncated"),
    Reply(200, b""),
    Reply(200, b"<html>bad gateway</html>"),
    Reply(200, b'{"error": {"message": "overloaded"}}'),
    Reply(200, b'{"choices": []}'),
    Reply(200, b'{"choices": [{"message": {"content": "half of'),
    Reply(200, b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'),
    Reply(
        200, b'{"choices": [{"message": {"content": "so"}, "finish_reason": "insufficient_system_resource"}]}'
    ),
]  # fmt: skip


@pytest.mark.parametrize("reply", PASSING, ids=lambda reply: f"{reply.status}-{reply.how}-{(reply.body or b'')[:24]!r}")
def test_trouble_that_passes_is_tried_again(reply: Any) -> None:
    with failing(2, reply) as server:
        done = one(server)
    assert (done.error, done.answer, done.attempts) == (None, "\\boxed{10}", 3)
    assert len(server.requests) == 3


def test_blank_keep_alive_lines_before_the_body_do_no_harm() -> None:
    with failing(1, Reply(how="blank-lines")) as server:
        assert one(server).attempts == 1


def test_a_server_that_hangs_is_given_up_after_the_time_out_and_asked_again() -> None:
    with failing(1, Reply(how="hang")) as server:
        done = one(server, timeout_s=0.3)
    assert (done.error, done.attempts) == (None, 2)


def test_retry_after_is_honoured() -> None:
    with failing(1, Reply(429, b"", {"Retry-After": "0.4"})) as server:
        started = time.monotonic()
        assert one(server).error is None
    assert time.monotonic() - started >= 0.4


def test_retry_after_is_read_as_seconds_or_as_a_date_and_never_trusted_without_bound() -> None:
    import httpx

    def given(value: str) -> float:
        return retry_after_s(httpx.Response(429, headers={"retry-after": value}))

    assert given("3") == 3
    assert given("-3") == 0
    assert given("soon") == 0
    assert given("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert given("Wed, 21 Oct 2215 07:28:00 GMT") == given("1e9") == 600


def test_back_off_is_full_jitter_under_a_doubling_ceiling() -> None:
    with ChatServer() as server:
        client = OpenAIEngine("r1", endpoint(server), FormatConfig(), first_delay_s=1.0)
    for attempt, ceiling in [(1, 1), (2, 2), (3, 4), (20, 60)]:
        delays = [client._delay_s(attempt, 0) for _ in range(300)]
        assert 0 <= min(delays) < 0.2 * ceiling
        assert 0.8 * ceiling < max(delays) <= ceiling


def test_when_the_retries_are_used_up_the_request_is_a_record_and_the_others_go_on() -> None:
    bad = lambda number, body: Reply(500, b"still broken") if body["seed"] == 101 else Reply()  # noqa: E731
    with ChatServer(bad) as server:
        done = {item.key: item for item in ask(engine(server), requests(4))}
    errors = [item.error for item in done.values() if item.error]
    assert errors == ["500 still broken (tried 4 times)"]
    assert len(done) == 4
    assert max(server.asked.values()) == 4  # max_retries=3: the first try and three more


def test_a_server_that_is_not_there_gives_failures_not_a_crash() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening
        gone = Endpoint(base_url=f"http://127.0.0.1:{held.getsockname()[1]}/v1", max_retries=1)
        (done,) = ask(OpenAIEngine("r1", gone, FormatConfig(), first_delay_s=0.01), requests(1))
    assert done.error and "connection failed" in done.error and "tried 2 times" in done.error


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, b'{"error": {"message": "This model\'s maximum context length is 4096 tokens"}}'),
        Reply(400, b'{"error": {"message": "Content Exists Risk"}}'),
        Reply(413, b"too much"),
        Reply(200, b'{"choices": [{"message": {"content": "no"}, "finish_reason": "content_filter"}]}'),
    ],
    ids=["context", "risk", "413", "filter"],
)
def test_a_prompt_the_server_will_not_answer_is_one_failure_without_retries(reply: Any) -> None:
    with ChatServer(lambda number, body: reply if body["seed"] == 100 else Reply()) as server:
        done = ask(engine(server), requests(3))
    assert sorted(item.error is None for item in done) == [False, True, True]
    assert max(server.asked.values()) == 1


def test_twenty_per_cent_of_mixed_faults_leave_every_request_answered_exactly_once() -> None:
    faults = PASSING[:9]

    def plan(number: int, body: dict[str, Any]) -> Any:
        return faults[number % len(faults)] if number % 5 == 0 else Reply()

    with ChatServer(plan) as server:
        done = ask(engine(server, max_retries=8), requests(100))
    assert sorted(item.key for item in done) == sorted(request.key for request in requests(100))
    assert all(item.error is None for item in done)


# --- trouble that does not pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, "check teacher.model, teacher.sampling"),
        (401, "set TEACHER_KEY to a valid one"),
        (402, "add credit"),
        (403, "may not use model 'r1'"),
        (404, "has the model 'r1'"),
        (422, "check teacher.model"),
        (301, "moved to https://elsewhere"),
    ],
)
def test_what_cannot_pass_stops_the_run_at_once_with_the_remedy(
    status: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    reply = Reply(status, b'{"error": {"message": "no"}}', {"Location": "https://elsewhere"})
    with ChatServer(lambda number, body: reply) as server:
        with pytest.raises(EngineError, match=remedy) as caught:
            ask(engine(server, api_key_env="TEACHER_KEY", concurrency=2), requests(50))
        assert len(server.requests) <= 2  # nothing after what was in flight
    assert caught.value.exit_code == 2


def test_an_empty_account_stops_the_run_though_it_comes_as_429() -> None:
    reply = Reply(429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}')
    with ChatServer(lambda number, body: reply) as server, pytest.raises(EngineError, match="add credit"):
        one(server)


# --- the key --------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_only_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", f" {SECRET}\n")
    with ChatServer() as server:
        one(server, api_key_env="TEACHER_KEY")
    assert server.authorizations == [f"Bearer {SECRET}"]


def everything_said_about(error: BaseException) -> str:
    """All texts that an exception and its chain show."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(error)


ECHO = f'{{"error": {{"message": "{"x" * 270} Incorrect API key: {SECRET}"}}}}'.encode()
"""So long that the quoted part ends inside the key."""


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_server_that_echoes_the_key_does_not_get_it_into_an_error(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ChatServer(lambda number, body: Reply(status, ECHO)) as server:
        with pytest.raises(EngineError) as caught:
            one(server)
    assert str(status) in str(caught.value)
    assert SECRET[:8] not in everything_said_about(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("reply", [Reply(500, ECHO), Reply(200, ECHO), Reply(413, ECHO)], ids=["500", "200", "413"])
def test_a_server_that_echoes_the_key_does_not_get_it_into_a_failure_record(
    reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ChatServer(lambda number, body: reply) as server:
        done = one(server, max_retries=0)
    assert done.error and SECRET[:8] not in repr(done)


def test_a_model_that_echoes_the_key_does_not_get_it_into_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    echo = {"content": f"your key is {SECRET}", "reasoning": f"hm {SECRET}"}
    with answering(echo, model=f"m-{SECRET}", system_fingerprint=SECRET) as server:
        done = one(server)
    assert SECRET not in repr(done)
    assert done.answer == "your key is <OPENAI_API_KEY>"


def test_a_placeholder_key_is_not_cut_out_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with answering({"content": "none of them"}) as server:
        assert one(server).answer == "none of them"


def test_neither_the_log_nor_the_engine_itself_shows_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with ChatServer() as server:
        client = engine(server)
        ask(client, requests(2))
    assert "POST" in caplog.text  # the client library does log
    assert SECRET not in caplog.text
    assert SECRET not in repr(vars(client))


@pytest.mark.parametrize("value", ["sk-with space-0123", "sk-ünïcode-0123456", "sk-ctrl-\x07-0123456"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(EngineError, match="OPENAI_API_KEY holds characters") as caught:
        OpenAIEngine("r1", Endpoint(), FormatConfig())
    assert value not in everything_said_about(caught.value)


def test_a_missing_key_is_refused_for_a_public_server_and_not_needed_for_a_local_one() -> None:
    teacher = TeacherConfig(engine="openai", model="r1", endpoint=Endpoint(base_url="https://api.example.com/v1"))
    with pytest.raises(EngineError, match="set the environment variable OPENAI_API_KEY"):
        preflight(teacher, FormatConfig(), RunOptions())
    for host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0", "192.168.1.7", "gpu.localhost"):
        OpenAIEngine("r1", Endpoint(base_url=f"http://{host}:8000/v1"), FormatConfig())


def test_the_engine_opens_by_name_from_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    opened = open_engine(TeacherConfig(engine="openai", model="r1"), FormatConfig(), RunOptions())
    assert (opened.name, opened.batch_size) == ("openai", None)


@pytest.mark.parametrize(
    "address",
    ["api.example.com/v1", "ftp://x/v1", "http://", "https://x/v1/chat/completions", "http://x:port/v1"],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(EngineError, match=r"teacher\.endpoint\.base_url"):
        OpenAIEngine("r1", Endpoint(base_url=address), FormatConfig())


@pytest.mark.parametrize("address", [f"https://me:{SECRET}@x.com/v1", f"https://x.com/v1?api-key={SECRET}"])
def test_a_secret_in_the_address_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(EngineError) as caught:
        OpenAIEngine("r1", Endpoint(base_url=address), FormatConfig())
    assert SECRET not in str(caught.value)


def test_a_servers_message_is_found_in_every_usual_place() -> None:
    import httpx

    bodies = [b'{"error": {"message": "a"}}', b'{"error": "a"}', b'{"message": "a"}', b'{"detail": "a"}', b" a\n"]
    assert {server_message(httpx.Response(400, content=body)) for body in bodies} == {"a"}
    assert server_message(httpx.Response(400, content=b"")) == "Bad Request"
