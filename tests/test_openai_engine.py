"""The OpenAI-compatible client against a real local server that counts what it is asked and misbehaves on request."""

import asyncio
import gzip
import importlib.util
import json
import logging
import resource
import socket
import sys
import time
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.config import Endpoint, FormatConfig, TeacherConfig
from distill.engines import Request, open_engine, stream
from distill.engines.openai import OpenAIEngine, preflight
from distill.engines.openai.address import address_of
from distill.engines.openai.exchange import allow_connections
from distill.errors import EngineError
from distill.runs import RunOptions

spec = importlib.util.spec_from_file_location("openai_client", Path(__file__).parent / "openai_client.py")
assert spec and spec.loader
client_module = importlib.util.module_from_spec(spec)
sys.modules["openai_client"] = client_module
spec.loader.exec_module(client_module)
ChatServer, Reply, completion = client_module.ChatServer, client_module.Reply, client_module.completion
answer_of, counted, answering, failing = (
    client_module.answer_of, client_module.counted, client_module.answering, client_module.failing,
)  # fmt: skip
endpoint, engine, requests = client_module.endpoint, client_module.engine, client_module.requests
ask, one, SECRET = client_module.ask, client_module.one, client_module.SECRET


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("TEACHER_KEY", raising=False)


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


@pytest.mark.parametrize("concurrency", [1, 4, "auto"])
def test_a_pull_that_waits_for_earlier_answers_holds_nobody_up(concurrency: Any) -> None:
    answered = asyncio.Event()

    async def one_after_the_other() -> AsyncIterator[Request]:
        for request in requests(4):
            yield request
            await answered.wait()  # what is asked next depends on this answer
            answered.clear()

    async def collect(client: OpenAIEngine) -> int:
        count = 0
        async for _ in client.generate(one_after_the_other()):
            count += 1
            answered.set()
        return count

    # the first try of each fails: retries must get through while a pull waits
    with ChatServer(lambda number, body: Reply(500) if number % 2 else Reply()) as server:
        assert asyncio.run(collect(engine(server, concurrency=concurrency))) == 4


def test_a_caller_who_stops_early_leaves_nothing_running() -> None:
    async def first_only(client: OpenAIEngine) -> int:
        completions = client.generate(stream(requests(50)))
        await anext(completions)
        await completions.aclose()
        return len(asyncio.all_tasks()) - 1

    with ChatServer(lambda number, body: Reply(delay_s=0.01 * (number > 1))) as server:
        client = engine(server, concurrency=8)
        assert asyncio.run(first_only(client)) == 0
        assert client.pool.servers[0].in_flight == 0
        assert len(ask(client, requests(3))) == 3  # and can be used again


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

    with ChatServer() as server:
        with pytest.raises(OSError, match="disk is gone"):
            ask(engine(server, concurrency=2), broken())


def test_a_request_that_is_dropped_before_it_was_sent_gives_its_place_back() -> None:
    async def cancelled_while_pulling(client: OpenAIEngine) -> None:
        me, two = asyncio.current_task(), list(requests(2))
        assert me

        async def source() -> AsyncIterator[Request]:
            yield two[0]
            me.cancel()  # before the task of the second request can begin
            yield two[1]

        async for _ in client.generate(source()):
            pass

    with ChatServer() as server:
        client = engine(server, concurrency=4)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled_while_pulling(client))
    assert client.pool.servers[0].in_flight == 0


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
    Reply(200, b'{"error": {"message": "upstream", "code": 502}}'),
    Reply(200, b'{"choices": [{"message": {"content": ""}, "finish_reason": "error"}], "error": {"code": 503}}'),
    Reply(429, b"", {"Retry-After": "0.01"}),
    Reply(408, b""), Reply(409, b""), Reply(425, b""), Reply(529, b"overloaded"),
]  # fmt: skip


@pytest.mark.parametrize("reply", PASSING, ids=lambda reply: f"{reply.status}-{reply.how}-{(reply.body or b'')[:24]!r}")
def test_trouble_that_passes_is_tried_again(reply: Any) -> None:
    with failing(2, reply) as server:
        done = one(server)
    assert (done.error, done.answer, done.attempts) == (None, "\\boxed{10}", 3)
    assert len(server.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_keep_alives_before_the_answer_reset_the_idle_time_out(stream: bool) -> None:
    with failing(1, Reply(how="blank-lines", delay_s=0.5)) as server:  # four times, so 2 s in all
        done = one(server, timeout_s=1.5, stream=stream)
    assert (done.attempts, done.answer) == (1, "\\boxed{10}")


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_falls_silent_in_the_middle_is_given_up_and_asked_again(stream: bool) -> None:
    with failing(1, Reply(how="stall")) as server:
        done = one(server, timeout_s=1, stream=stream)
    assert (done.error, done.attempts, done.answer) == (None, 2, "\\boxed{10}")


BOMB = Reply(200, gzip.compress(b" " * 100_000_000), {"Content-Encoding": "gzip"})


@pytest.mark.parametrize(
    ("reply", "stream", "said"),
    [
        (Reply(how="endless"), False, "a body of more than 16,777,216 bytes"),
        (Reply(how="endless"), True, "a stream of more than 16,777,216 bytes"),
        (BOMB, False, "a body of more than 16,777,216 bytes"),
        (Reply(500, b"x" * 100_000_000), False, "500 xxxx"),
    ],
    ids=["body", "stream", "packed", "error"],
)
def test_a_server_that_sends_without_end_fills_no_memory(reply: Any, stream: bool, said: str) -> None:
    wordy = lambda body: completion({"content": "x" * 100_000})  # noqa: E731
    with ChatServer(lambda *_: reply, wordy) as server:
        tracemalloc.start()
        done = one(server, stream=stream, max_retries=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert done.error and done.error.startswith(said) and done.retryable
    assert peak < 70_000_000


def test_retry_after_is_honoured() -> None:
    with failing(1, Reply(429, b"", {"Retry-After": "0.4"})) as server:
        started = time.monotonic()
        assert one(server).error is None
    assert time.monotonic() - started >= 0.4


def test_back_off_is_full_jitter_under_a_doubling_ceiling() -> None:
    with ChatServer() as server:
        client = OpenAIEngine("r1", endpoint(server), FormatConfig(), first_delay_s=1.0)
    for attempt, ceiling in [(1, 1), (2, 2), (3, 4), (20, 60)]:
        delays = [client.delay_s(attempt) for _ in range(300)]
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
    assert done.retryable


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
    assert not any(item.retryable for item in done)
    assert max(server.asked.values()) == 1


def test_an_invalid_request_of_a_server_that_answers_others_is_that_prompts_own() -> None:
    bad = lambda number, body: Reply(400, b"strange text") if body["seed"] == 102 else Reply()  # noqa: E731
    with ChatServer(bad) as server:
        done = ask(engine(server, concurrency=1), requests(5))
    assert [item.error for item in done if item.error] == ["400 strange text"]
    assert len(done) == 5


FAULTS = [
    Reply(429, b"", {"Retry-After": "0.05"}),
    Reply(500, b"oops"),
    Reply(how="reset"),
    Reply(how="hang"),
    Reply(how="stall"),
    Reply(200, b""),
    Reply(how="blank-lines"),
    Reply(how="truncated"),
    Reply(how="duplicate"),
    Reply(how="no-done"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_with_faults_in_a_fifth_of_the_requests_every_prompt_is_answered_or_failed_once(stream: bool) -> None:
    poisoned = {103, 150, 333}

    def plan(number: int, body: dict[str, Any]) -> Any:
        if body["seed"] in poisoned:
            return Reply(500, b"never")
        return FAULTS[number // 5 % len(FAULTS)] if number % 5 == 0 else Reply()

    with ChatServer(plan, answer=lambda body: counted(answer_of(body))) as server:
        done = ask(engine(server, max_retries=6, timeout_s=1.5, stream=stream, concurrency=24), requests(300))
    wanted = {request.key: request for request in requests(300)}
    assert sorted(item.key for item in done) == sorted(wanted)  # none lost, none doubled
    failed = [item for item in done if item.error]
    assert {wanted[item.key].seed for item in failed} == poisoned
    assert all(item.retryable and item.error == "500 never (tried 7 times)" for item in failed)
    for item in done:
        if not item.error:
            question = wanted[item.key].prompt.text
            assert item.answer == f"\\boxed{{{len(question)}}}"
            assert item.reasoning == f"I count {question!r} by {wanted[item.key].seed}."


# --- streams --------------------------------------------------------------------------------------------------------

ANSWERS = [
    completion(
        {"reasoning_content": "think  a\n\nb ", "content": "answer\n b"}, model="r1-0528", system_fingerprint="f"
    ),
    completion({"reasoning": "think a", "content": "answer b"}, "length"),
    completion({"content": "<think>\nthink a\n</think>\n\nanswer b"}),
    completion({"content": "think a\n</think>\n\nänswer 🙂 b"}),
    completion({"reasoning_content": "cut off in the", "content": None}, "length"),
    completion({"content": "just 4"}, usage=None),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_a_streamed_answer_equals_the_same_answer_in_one_piece(answer: dict[str, Any]) -> None:
    with ChatServer(answer=lambda body: answer) as server:
        whole, streamed = one(server), one(server, stream=True)
    assert streamed._replace(latency_s=0) == whole._replace(latency_s=0)
    assert [body.get("stream") for body in server.requests] == [None, True]
    assert server.requests[1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("how", ["truncated", "reset", "hang"])
def test_a_stream_that_breaks_off_is_asked_for_again(how: str) -> None:
    with failing(2, Reply(how=how)) as server:
        done = one(server, stream=True, timeout_s=1)
    assert (done.error, done.attempts, done.answer) == (None, 3, "\\boxed{10}")


def test_a_stream_whose_chunks_all_come_twice_is_read_once() -> None:
    with ChatServer(lambda *_: Reply(how="duplicate"), lambda body: counted(answer_of(body))) as server:
        done = one(server, stream=True)
    assert (done.reasoning, done.answer, done.attempts) == ("I count 'question 0' by 100.", "\\boxed{10}", 1)


def test_a_server_that_streams_unasked_or_does_not_stream_when_asked_is_read_all_the_same() -> None:
    events = b'data: {"choices": [{"delta": {"content": "4"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    with ChatServer(lambda *_: Reply(200, events, {"Content-Type": "text/event-stream"})) as server:
        assert one(server).answer == "4"
    with ChatServer(lambda *_: Reply(200, b'{"choices": [{"message": {"content": "4"}}]}')) as server:
        assert one(server, stream=True).answer == "4"


def test_streams_keep_their_connections() -> None:
    with ChatServer() as server:
        assert len(ask(engine(server, concurrency=1, stream=True), requests(12))) == 12
        assert server.connections == 1


# --- trouble that does not pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, "check teacher.model, teacher.sampling"),
        (401, "set TEACHER_KEY to a valid one"),
        (402, "add credit"),
        (403, "may not use model 'r1'"),
        (404, "has the model 'r1'"),
        (405, "check teacher.model"),
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


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Unsupported value: 'temperature' does not support 0.6 with this model", "teacher.sampling.temperature"),
        ("body.top_p: Extra inputs are not permitted", "teacher.sampling.top_p"),
        ("Unrecognized request argument supplied: seed", "gateway that drops seed"),
        ("'max_tokens' is not supported, use 'max_completion_tokens' instead", "do not send their reasoning"),
        ("unknown field stream_options", "stream: false"),
    ],
)
def test_a_parameter_that_the_server_does_not_take_is_named_with_its_remedy(message: str, remedy: str) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    with ChatServer(lambda *_: Reply(400, body)) as server, pytest.raises(EngineError, match=remedy):
        one(server)


def test_a_fatal_error_object_in_a_good_status_stops_the_run_too() -> None:
    reply = Reply(200, b'{"error": {"message": "no auth", "code": 401}}')
    with ChatServer(lambda *_: reply) as server, pytest.raises(EngineError, match="set OPENAI_API_KEY"):
        one(server)


def test_a_key_is_not_sent_on_to_where_a_server_redirects() -> None:
    with ChatServer() as elsewhere:
        moved = Reply(307, b"", {"Location": f"{elsewhere.base_url}/chat/completions"})
        with ChatServer(lambda *_: moved) as server, pytest.raises(EngineError, match="moved to"):
            one(server)
    assert elsewhere.requests == []


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
    assert caplog.records  # somebody does log
    assert SECRET not in caplog.text
    assert SECRET not in repr(vars(client)) + repr(vars(client.pool)) + repr(vars(client.pool.servers[0]))


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


def test_the_environments_proxy_is_used_but_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", "direct.example.com")

    def proxy(base_url: str) -> str | None:
        return address_of(Endpoint(base_url=base_url), "r1", "teacher.endpoint").proxy

    assert proxy("https://api.example.com/v1") == "http://proxy.example.com:3128"
    assert proxy("https://direct.example.com/v1") is None
    assert proxy("http://127.0.0.1:8000/v1") is None


def test_as_many_files_may_be_open_as_requests_are_in_flight() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
        allow_connections(1024)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(1024, before[1])
        allow_connections(10)  # and is not taken back
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(1024, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
