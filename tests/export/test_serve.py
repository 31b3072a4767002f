"""The server: what OpenAI's client expects, and what hostile, slow and vanishing clients get."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.export.runtime import Runtime
from distill.export.serve import KEY_VARIABLE, Server, listen
from distill.export.serve_limits import Limits
from distill.export.serve_metrics import RATE_WINDOW_S, Histogram, Rate
from distill.export.serve_request import ApiError, parse_chat
from distill.format import R1_TEMPLATE

ASKED = [{"role": "user", "content": "What is 2 + 2?"}]
LONG = 4000
"""Tokens of an answer that takes seconds even from the tiny model."""
LIMITS = Limits(read_s=20.0, rows=4, prompt_tokens=200, new_tokens=LONG)


class Served:
    """A server in this process, in a thread of its own."""

    def __init__(self, runtime: Runtime, limits: Limits = LIMITS, **options: Any) -> None:
        self.server = Server(runtime, limits, **options)
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        assert self._started.wait(20)

    async def _serve(self) -> None:
        runner, listener = await listen(self.server, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        listener.close()
        await runner.cleanup()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str = "/v1/chat/completions", data: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and body of one request, which is a POST where there is data."""
        body = data if isinstance(data, bytes) or data is None else json.dumps(data).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read().decode()

    def refused(self, data: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and error object of a chat completion that is refused."""
        status, _, body = self.ask(data=data, **headers)
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return status, error

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def runtime(altered: Callable[..., Path]) -> Iterator[Runtime]:
    """A model that never ends by itself."""
    with Runtime(altered(end_ids=[]), threads=1, max_rows=4) as one:
        yield one


@pytest.fixture(scope="module")
def served(runtime: Runtime) -> Iterator[Served]:
    one = Served(runtime)
    yield one
    one.close()


@pytest.fixture
def serving(runtime: Runtime) -> Iterator[Callable[..., Served]]:
    """A function from changed limits and options to a server of its own."""
    with ExitStack() as stack:

        def serve(key: str = "", origin: str = "", **changes: Any) -> Served:
            one = Served(runtime, replace(LIMITS, **changes), key=key, origin=origin)
            stack.callback(one.close)
            return one

        yield serve


@contextmanager
def client(served: Served, key: str = "none") -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as one:
        yield one


def asked(served: Served, **fields: Any) -> dict[str, Any]:
    return {"model": served.server.runtime.name, "messages": ASKED, "max_tokens": 8, "seed": 1, **fields}


def until(condition: Callable[[], bool]) -> None:
    patience = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < patience, "it never came true"
        time.sleep(0.01)


# --- with OpenAI's client ---------------------------------------------------------------------------------------------


def test_openais_client_gets_whole_answers_and_streams_that_are_the_same(served: Served) -> None:
    with client(served) as api:
        (model,) = api.models.list().data
        assert api.models.retrieve(model.id).id == model.id == served.server.runtime.name
        whole = api.chat.completions.create(**asked(served))
        (choice,) = whole.choices
        assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
        assert whole.usage.completion_tokens <= 8 and whole.usage.total_tokens > 8
        stream = api.chat.completions.create(**asked(served), stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
        assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [choice.finish_reason]
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_choices_differ_and_come_by_their_index(served: Served) -> None:
    with client(served) as api:
        answer = api.chat.completions.create(**asked(served, n=3, temperature=1.5, max_tokens=12))
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
        again = {0: "", 1: "", 2: ""}
        for chunk in api.chat.completions.create(**asked(served, n=3, temperature=1.5, max_tokens=12), stream=True):
            again[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert list(again.values()) == texts, "and the same seed gives the same texts"


def test_stop_sequences_cut_streams_and_answers_alike(served: Served) -> None:
    with client(served) as api:
        whole = api.chat.completions.create(**asked(served, max_tokens=40, temperature=0)).choices[0].message.content
        stop = whole[5:8]
        more = asked(served, max_tokens=40, temperature=0, stop=[stop])
        cut = api.chat.completions.create(**more).choices[0]
        assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
        streamed = [c.choices[0].delta.content or "" for c in api.chat.completions.create(**more, stream=True)]
        assert "".join(streamed) == cut.message.content


def test_reasoning_comes_in_a_field_of_its_own_within_its_budget(altered: Callable[..., Path]) -> None:
    with Runtime(altered(template=R1_TEMPLATE, end_ids=[]), threads=1) as runtime:
        served = Served(runtime)
        try:
            with client(served) as api:
                more = asked(served, max_tokens=60, temperature=0, extra_body={"think_budget": 8})
                whole = api.chat.completions.create(**more)
                message = whole.choices[0].message
                assert message.reasoning_content and message.content
                assert "think>" not in message.reasoning_content + message.content
                details = whole.usage.completion_tokens_details
                assert 8 <= details.reasoning_tokens < whole.usage.completion_tokens
                deltas = [c.choices[0].delta for c in api.chat.completions.create(**more, stream=True)]
                reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
                assert reasoning == message.reasoning_content
                assert "".join(delta.content or "" for delta in deltas) == message.content
        finally:
            served.close()


def test_the_client_sees_openais_errors(serving: Callable[..., Served]) -> None:
    import openai

    served = serving(key="right")
    with client(served, "wrong") as api, pytest.raises(openai.AuthenticationError):
        api.models.list()
    with client(served, "right") as api:
        assert api.models.list().data
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            api.chat.completions.create(**asked(served, model="other"))
        with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
            api.chat.completions.create(**asked(served), logprobs=True)


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"frobnicate": 1}, "unknown_parameter", "frobnicate"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 99}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"think_budget": -1}, "invalid_value", "think_budget"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop"),
        ({"stop": [""]}, "invalid_value", "stop"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "many words " * 300}]}, "context_length_exceeded", "messages"),
        ({"model": None}, "invalid_value", "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served: Served, fields: dict[str, Any], code: str, param: str) -> None:
    status, error = served.refused(asked(served, **fields))
    assert (status, error["code"]) == (400, code) and str(error["param"]).startswith(param), error


def test_fields_that_change_no_text_are_taken(served: Served) -> None:
    neutral = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "logprobs": False, "tools": None, "presence_penalty": 0.0,
        "response_format": {"type": "text"}, "logit_bias": None, "n": None, "stop": None, "stream": None,
        "max_completion_tokens": 3,
    }  # fmt: skip
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    for messages in (ASKED, [{"role": "user", "content": parts, "name": "me"}]):
        status, _, body = served.ask(data=asked(served, **neutral, messages=messages))
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] <= 3
    usual = parse_chat(json.dumps(asked(served, messages=[{"role": "developer", "content": "x"}])).encode())
    assert usual.messages[0].plain() == {"role": "system", "content": "x"}


def test_longer_answers_than_allowed_are_cut(serving: Callable[..., Served]) -> None:
    served = serving(new_tokens=5)
    status, _, body = served.ask(data=asked(served, max_tokens=10_000, temperature=0))
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"model": NaN}', b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_bodies_that_are_no_request_are_refused(served: Served, body: bytes) -> None:
    status, error = served.refused(body)
    assert status == 400 and error["type"] == "invalid_request_error"
    with pytest.raises(ApiError):
        parse_chat(body)


def test_only_json_is_read_so_that_no_form_of_another_page_gets_through(served: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert served.refused(asked(served), Content_Type=kind)[0] == 415


def test_paths_and_methods_that_are_not_there_get_an_error_object(served: Served) -> None:
    assert served.ask("/v1/nothing")[0] == 404
    status, headers, body = served.ask("/v1/chat/completions")
    assert status == 405 and headers["Allow"] == "POST" and json.loads(body)["error"]


# --- who asks ---------------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_but_the_page_and_health_is_there(serving: Callable[..., Served]) -> None:
    served = serving(key="sekret")
    for path, data in (("/v1/models", None), ("/metrics", None), ("/v1/chat/completions", asked(served))):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sekret"}, {"Authorization": "Bearer "}):
            status, _, body = served.ask(path, data, **given)
            assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        assert served.ask(path, data, Authorization="bearer sekret")[0] == 200
    assert served.ask("/health")[0] == 200 and "sekret" not in served.ask("/")[2]


def test_a_name_that_another_page_points_at_this_machine_is_refused(
    served: Served, serving: Callable[..., Served]
) -> None:
    assert served.ask("/v1/models", Host="evil.example")[0] == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8"):
        assert served.ask("/v1/models", Host=host)[0] == 200
    assert serving(key="k").ask("/v1/models", Host="my.proxy", Authorization="Bearer k")[0] == 200


def test_other_origins_are_let_in_by_name_only(served: Served, serving: Callable[..., Served]) -> None:
    assert "Access-Control-Allow-Origin" not in served.ask("/v1/models", Origin="http://a.example")[1]
    open_one = serving(origin="http://a.example", key="k")
    given = {"Origin": "http://a.example", "Authorization": "Bearer k"}
    assert open_one.ask("/v1/models", **given)[1]["Access-Control-Allow-Origin"] == "http://a.example"
    other = open_one.ask("/v1/models", Origin="http://b.example", Authorization="Bearer k")[1]
    assert "Access-Control-Allow-Origin" not in other
    preflight = urllib.request.Request(
        f"{open_one.url}/v1/chat/completions", method="OPTIONS", headers={"Origin": "http://a.example"}
    )
    with urllib.request.urlopen(preflight, timeout=10) as answer:
        assert answer.status == 204 and "authorization" in answer.headers["Access-Control-Allow-Headers"]


def test_the_page_holds_all_it_needs_and_its_policy_names_it(served: Served) -> None:
    import base64
    import hashlib

    _, headers, page = served.ask("/")
    policy = headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert text and base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "innerHTML" not in page and "://" not in page


# --- limits -----------------------------------------------------------------------------------------------------------


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=20)


def closed_within(sock: socket.socket, seconds: float) -> bytes:
    """What came until the server closed; fails if it does not within the time."""
    sock.settimeout(seconds)
    got = b""
    try:
        while part := sock.recv(65536):
            got += part
    except ConnectionError:
        pass
    return got


def test_a_body_that_is_too_large_is_refused_unread(serving: Callable[..., Served]) -> None:
    served = serving(body_bytes=1000)
    assert served.refused(asked(served, user="x" * 2000))[1]["code"] == "body_too_large"
    with connect(served) as sock:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(
            head + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n0\r\n\r\n"
        )
        assert b" 413 " in sock.recv(65536).splitlines()[0]


def test_slow_headers_and_bodies_are_cut_off_and_answers_are_not(serving: Callable[..., Served]) -> None:
    served = serving(read_s=0.5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(served) as silent, connect(served) as dripping, connect(served) as half, connect(served) as idle:
        dripping.sendall(head[:20])
        half.sendall(head + b"Content-Length: 100\r\n\r\n{")
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        started = time.monotonic()
        for _ in range(20):  # a byte at a time does not help
            time.sleep(0.05)
            try:
                dripping.sendall(b"x")
            except OSError:
                break
        assert closed_within(silent, 5) == b"" and b" 200 " not in closed_within(dripping, 5)
        assert b" 408 " in half.recv(65536)
        assert b'"ready"' in closed_within(idle, 5), "an idle connection is not kept either"
        assert time.monotonic() - started < 10
    started = time.monotonic()
    status, _, body = served.ask(data=asked(served, max_tokens=LONG, temperature=0))
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == LONG
    assert time.monotonic() - started > served.server.limits.read_s


def test_connections_beyond_the_limit_are_refused_and_come_free_again(serving: Callable[..., Served]) -> None:
    served = serving(connections=3)
    socks = [connect(served) for _ in range(3)]
    until(lambda: served.server.connections.open == 3)
    with connect(served) as fourth:
        assert b" 503 " in closed_within(fourth, 5)
    for sock in socks:
        sock.close()
    until(lambda: served.server.connections.open == 0)
    assert served.ask("/health")[0] == 200


def test_a_full_queue_says_when_to_come_again(serving: Callable[..., Served]) -> None:
    served = serving(queue=1)
    with ExitStack() as stack:
        for _ in range(5):  # four rows, and one that waits
            stack.enter_context(streaming(served))
        status, headers, body = served.ask(data=asked(served))
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
    until(lambda: served.ask(data=asked(served))[0] == 200)  # rows of clients that left come free in a moment


@contextmanager
def streaming(served: Served) -> Iterator[socket.socket]:
    """A connection on which a long answer is being written."""
    body = json.dumps(asked(served, stream=True, max_tokens=LONG)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    before = served.server.answering
    with connect(served) as sock:
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: served.server.answering > before)
        yield sock


def test_a_client_that_goes_away_frees_its_row(served: Served) -> None:
    with streaming(served) as sock:
        until(lambda: served.server.runtime.running == 1)
        assert sock.recv(100)
    until(lambda: served.server.runtime.running == 0 and served.server.answering == 0)
    assert served.ask(data=asked(served))[0] == 200


def test_an_answer_that_takes_too_long_ends_with_an_error(serving: Callable[..., Served]) -> None:
    served = serving(request_s=0.05)
    status, error = served.refused(asked(served, max_tokens=LONG))
    assert status == 504 and error["code"] == "request_timeout"
    _, _, body = served.ask(data=asked(served, max_tokens=LONG, stream=True))
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert json.loads(events[-1])["error"]["code"] == "request_timeout" and "[DONE]" not in events
    until(lambda: served.server.runtime.running == 0)


@pytest.mark.parametrize(
    "sent",
    [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ids=["binary", "version", "long-line", "many-headers", "tls", "negative", "smuggling"],
)  # fmt: skip
def test_what_is_no_http_ends_its_connection_and_nothing_else(
    serving: Callable[..., Served], sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serving(read_s=1.0)
    with connect(served) as sock:
        with suppress(ConnectionError):
            sock.sendall(sent)
        assert b" 200 " not in closed_within(sock, 10)
    assert served.ask("/health")[0] == 200
    assert capfd.readouterr().err == "", "and does not fill the log"


# --- what is counted --------------------------------------------------------------------------------------------------


def test_metrics_count_what_was_answered(serving: Callable[..., Served]) -> None:
    served = serving()
    for number in range(3):
        served.ask(data=asked(served, seed=number))
    served.refused(b"{")
    assert served.metric('distill_requests_total{status="200"}') == 3
    assert served.metric('distill_requests_total{status="400"}') == 1
    assert served.metric("distill_ttft_seconds_count") == served.metric("distill_request_seconds_count") == 3
    assert 0 < served.metric("distill_completion_tokens_total") <= 24
    assert served.metric("distill_tokens_per_second") > 0
    assert served.metric("distill_running_rows") == served.metric("distill_queue_depth") == 0
    text = served.ask("/metrics")[2]
    assert text.endswith("\n") and all(
        re.fullmatch(r'# (HELP|TYPE) .+|distill_\w+(\{\w+="[^"]*"\})? [0-9.e+-]+', line) for line in text.splitlines()
    )


def test_tokens_for_a_client_that_left_are_counted_and_its_times_are_not(serving: Callable[..., Served]) -> None:
    served = serving()
    with streaming(served) as sock:
        assert sock.recv(100)
        until(lambda: served.metric("distill_ttft_seconds_count") == 1)
    until(lambda: served.server.runtime.running == 0)
    until(lambda: served.metric('distill_answers_total{finish="cancelled"}') == 1)
    assert served.metric("distill_completion_tokens_total") > 0
    assert served.metric("distill_request_seconds_count") == 0


def test_a_histogram_counts_up_to_and_with_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.lines("x") == [
        'x_bucket{le="1.0"} 2', 'x_bucket{le="2.0"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 12.000000", "x_count 4",
    ]  # fmt: skip


def test_a_rate_forgets() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    rate.add(50)
    assert rate.per_second == 50 / RATE_WINDOW_S
    now[0] = RATE_WINDOW_S + 1
    assert rate.per_second == 0


# --- a process of its own ---------------------------------------------------------------------------------------------


@contextmanager
def process(artifact: Path, *options: str, port: int = 0, **environment: str) -> Iterator[tuple[Any, str]]:
    """`distill serve` and its address."""
    command = [sys.executable, "-m", "distill.cli", "serve", str(artifact), "--port", str(port), "--threads", "1"]
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as server:
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "serving" in line)
            found = re.search(r"http://[\d.]+:\d+", line)
            assert found, line
            yield server, found[0]
        finally:
            server.kill()


def get(url: str, data: Any = None) -> tuple[int, str]:
    body = None if data is None else json.dumps(data).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(exported: Callable[..., Path]) -> None:
    with process(exported(), "--max-new-tokens", "450") as (server, url):
        model = json.loads(get(f"{url}/v1/models")[1])["data"][0]["id"]
        long = {"model": model, "messages": ASKED, "max_tokens": 450, "temperature": 2, "seed": 5, "n": 8}
        got: list[tuple[int, str]] = []
        running = threading.Thread(target=lambda: got.append(get(f"{url}/v1/chat/completions", long)))
        running.start()
        until(lambda: json.loads(get(f"{url}/health")[1])["running"] > 0)
        server.send_signal(signal.SIGTERM)
        until(lambda: get(f"{url}/health")[0] == 503)
        assert get(f"{url}/v1/chat/completions", long)[0] == 503
        running.join()
        assert got[0][0] == 200 and json.loads(got[0][1])["usage"]["completion_tokens"] > 8
        assert server.wait(30) == 143


def test_a_second_signal_ends_at_once(exported: Callable[..., Path]) -> None:
    with process(exported(), "--max-new-tokens", "450") as (server, url):
        model = json.loads(get(f"{url}/v1/models")[1])["data"][0]["id"]
        long = {"model": model, "messages": ASKED, "max_tokens": 450, "temperature": 2, "n": 8}
        running = threading.Thread(target=get, args=(f"{url}/v1/chat/completions", long))
        running.start()
        until(lambda: json.loads(get(f"{url}/health")[1])["running"] > 0)
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130
        running.join()


def test_a_server_that_was_killed_comes_up_again_at_the_same_port(exported: Callable[..., Path]) -> None:
    with process(exported()) as (server, url):
        assert get(f"{url}/health")[0] == 200
        server.kill()
        server.wait()
        with process(exported(), port=int(url.rsplit(":", 1)[1])) as (_, again):
            assert again == url and get(f"{url}/health")[0] == 200


def test_an_address_that_is_taken_is_said_in_one_line(served: Served, exported: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "serve", str(exported()), "--port", str(served.port)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot listen at 127.0.0.1" in done.stderr and "Traceback" not in done.stderr


def test_an_open_address_without_a_key_is_warned_of(exported: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "distill.cli", "serve", str(exported()), "--host", "0.0.0.0", "--port", "0"]
    environment = {key: value for key, value in os.environ.items() if key != KEY_VARIABLE}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr and KEY_VARIABLE in server.stderr.readline()
        server.kill()
