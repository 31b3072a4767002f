"""Bodies, streams and headers of OpenAI-compatible servers, read without a server."""

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from distill.engines.openai.events import Assembly, Event, Events
from distill.engines.openai.trouble import server_message
from distill.engines.openai.waits import asked_wait_s, duration_s, used_up_s
from distill.engines.openai.wire import Answer, BrokenAnswerError, ErrorInBodyError, whole_answer

# --- streams --------------------------------------------------------------------------------------------------------


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"delta": delta, "finish_reason": finish}], **more}).encode()


def usage(tokens: int) -> bytes:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}).encode()


def stream_of(*data: bytes) -> bytes:
    return b"".join(b"data: " + part + b"\n\n" for part in data)


def read(text: bytes, step: int = 1 << 30) -> Answer:
    """The answer in a stream that arrives `step` bytes at a time."""
    events, assembly = Events(), Assembly()
    for start in range(0, len(text), step):
        for event in events.feed(text[start : start + step]):
            assembly.add(event)
    for event in events.end():
        assembly.add(event)
    return assembly.answer()


PLAIN = stream_of(chunk("an"), chunk("swer"), chunk(finish="stop"), usage(2), b"[DONE]")

DIALECTS = {
    "plain": PLAIN,
    "no space after the colon": PLAIN.replace(b"data: ", b"data:"),
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "CR": PLAIN.replace(b"\n", b"\r"),
    "comments": b": keep-alive\n\n:\n\n" + PLAIN.replace(b"\n\n", b"\n\n: keep-alive\n\n"),
    "other fields": PLAIN.replace(b"data: ", b"event: message\nid: 7\nretry: 10\ndata: "),
    "several data lines": PLAIN.replace(b'{"choices"', b'{\ndata: "choices"'),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "blank keep-alive lines": b"\n\n\n" + PLAIN,
    "no [DONE]": PLAIN.replace(b"data: [DONE]\n\n", b""),
    "no last blank line": PLAIN.removesuffix(b"\n\n"),
    "no last line end": PLAIN.removesuffix(b"\n\n") + b"\n",
    "no blank lines between events": PLAIN.replace(b"\n\n", b"\n"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("step", [1, 2, 7, 1 << 30])
def test_events_are_read_in_every_dialect_however_they_are_cut(dialect: str, step: int) -> None:
    answer = read(DIALECTS[dialect], step)
    assert (answer.content, answer.finish, answer.reasoning) == ("answer", "stop", None)
    assert answer.usage is not None and answer.usage.completion_tokens == 2


@given(st.lists(st.text()), st.integers(1, 40))
def test_any_text_in_any_pieces_is_put_together_again(texts: list[str], step: int) -> None:
    parts = [chunk(text) for text in texts]
    answer = read(stream_of(*parts, chunk(finish="stop"), b"[DONE]"), step)
    assert answer.content == "".join(texts)


def test_a_stream_that_ends_without_a_finish_reason_is_broken() -> None:
    with pytest.raises(BrokenAnswerError, match="ended before the answer did"):
        read(stream_of(chunk("half of")))
    with pytest.raises(BrokenAnswerError, match="not a chunk"):
        read(stream_of(chunk("half of")) + b'data: {"choices": [{"del')


def test_an_error_in_the_middle_of_a_stream_is_no_answer() -> None:
    with pytest.raises(ErrorInBodyError) as caught:
        read(stream_of(chunk("half of"), b'{"error": {"message": "upstream died", "code": 502}}', b"[DONE]"))
    assert caught.value.status == 502 and "upstream died" in caught.value.body


def test_a_stream_that_ends_with_the_whole_message_is_not_read_twice() -> None:
    whole = json.dumps({"choices": [{"message": {"content": "answer"}, "finish_reason": "stop"}]}).encode()
    assert read(stream_of(chunk("an"), chunk("swer"), whole, b"[DONE]")).content == "answer"


# --- chunks that come twice -----------------------------------------------------------------------------------------


def test_equal_neighbours_are_kept_where_nothing_says_that_they_came_twice() -> None:
    ha = chunk("ha")
    assert read(stream_of(ha, ha, chunk(finish="stop"), b"[DONE]")).content == "haha"
    assert read(stream_of(ha, ha, chunk(finish="stop"), usage(2), b"[DONE]")).content == "haha"


@pytest.mark.parametrize(
    "mark",
    [{"usage": {"completion_tokens": 1}}, {"obfuscation": "aB3xQ"}],
    ids=["running usage", "obfuscation"],
)
def test_a_chunk_with_a_mark_of_its_own_is_read_once(mark: dict[str, Any]) -> None:
    ha = chunk("ha", **mark)
    assert read(stream_of(ha, ha, chunk(finish="stop"), b"[DONE]")).content == "ha"


def test_a_chunk_with_the_event_id_of_the_one_before_is_read_once() -> None:
    ha = chunk("ha")
    twice = b"id: 4\ndata: " + ha + b"\n\nid: 4\ndata: " + ha + b"\n\n"
    other = b"id: 5\ndata: " + ha + b"\n\n"
    assert read(twice + other + stream_of(chunk(finish="stop"), b"[DONE]")).content == "haha"


def test_more_chunks_than_tokens_give_away_those_that_came_twice() -> None:
    parts = [part for text in ("a", "b", "c") for part in (chunk(text), chunk(text))]
    assert read(stream_of(*parts, chunk(finish="stop"), usage(3), b"[DONE]")).content == "abc"


def test_where_only_some_equal_neighbours_came_twice_the_answer_is_broken() -> None:
    parts = [chunk("a"), chunk("a"), chunk("b"), chunk("b")]  # three tokens: is it aab or abb?
    with pytest.raises(BrokenAnswerError, match="1 of 2 equal chunks"):
        read(stream_of(*parts, chunk(finish="stop"), usage(3), b"[DONE]"))


def test_a_server_that_counts_fewer_tokens_than_chunks_is_not_disbelieved() -> None:
    parts = [chunk("a"), chunk("b"), chunk("c"), chunk("c")]
    assert read(stream_of(*parts, chunk(finish="stop"), usage(1), b"[DONE]")).content == "abcc"
    assert read(stream_of(*parts[:3], chunk(finish="stop"), usage(1), b"[DONE]")).content == "abc"


def test_several_tokens_a_chunk_hide_what_came_twice() -> None:
    """What cannot be seen: said in the module's own words."""
    parts = [chunk("a b"), chunk("a b")]
    assert read(stream_of(*parts, chunk(finish="stop"), usage(4), b"[DONE]")).content == "a ba b"


# --- bodies ---------------------------------------------------------------------------------------------------------


def body(message: dict[str, Any]) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({"reasoning_content": "a"}, "a"),
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": None, "reasoning": "a"}, "a"),
        ({"reasoning_content": ""}, ""),
        ({"reasoning": {"effort": "high"}}, None),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "a"}, {"text": "b"}]}, "ab"),
        ({"reasoning": None, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, None),
        ({"reasoning_details": "what"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_reasoning_is_read_from_whichever_field_holds_it(fields: dict[str, Any], reasoning: str | None) -> None:
    assert whole_answer(body({"content": "4", **fields})).reasoning == reasoning


def test_a_servers_message_is_found_in_every_usual_place() -> None:
    bodies = ['{"error": {"message": "a"}}', '{"error": "a"}', '{"message": "a"}', '{"detail": "a"}', " a\n"]
    assert {server_message(text) for text in bodies} == {"a"}
    assert server_message("") == ""


# --- waits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1), ("6m0s", 360), ("20ms", 0.02), ("1m26.4s", 86.4), ("2h3m4s", 7384), ("1d", 86400), ("7.66s", 7.66),
        ("3", 3), ("0.5", 0.5), ("-3", -3), ("soon", None), ("", None), ("1m2x", None),
    ],
)  # fmt: skip
def test_durations_are_read_as_servers_write_them(text: str, seconds: float | None) -> None:
    assert duration_s(text) == (seconds if seconds is None else pytest.approx(seconds))


def test_moments_are_read_as_servers_write_them() -> None:
    moment = datetime.now(UTC) + timedelta(seconds=100)
    unix = moment.timestamp()
    for text in (format_datetime(moment, usegmt=True), moment.isoformat(), f"{unix:.0f}", f"{unix * 1000:.0f}"):
        assert duration_s(text) == pytest.approx(100, abs=2)
    assert duration_s("2025-10-21T07:28:00") is None  # no time zone: whose?


def wait(headers: dict[str, str], body: str = "") -> float:
    return asked_wait_s(CIMultiDict(headers), body)


def test_a_wait_is_never_trusted_without_bound() -> None:
    assert wait({"Retry-After": "3"}) == 3
    assert wait({"Retry-After": "-3"}) == wait({"Retry-After": "soon"}) == wait({}) == 0
    assert wait({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert wait({"Retry-After": "Wed, 21 Oct 2215 07:28:00 GMT"}) == wait({"Retry-After": "1e8"}) == 600
    assert wait({"Retry-After": "5", "retry-after-ms": "250"}) == 0.25


def test_an_allowance_that_is_used_up_says_when_it_is_there_again() -> None:
    def used_up(**headers: str) -> float:
        return used_up_s(CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()}))

    assert used_up(X_RateLimit_Remaining_Requests="0", X_RateLimit_Reset_Requests="1s") == 1
    assert used_up(X_RateLimit_Remaining_Tokens="0", X_RateLimit_Reset_Tokens="6m0s") == 360
    assert used_up(X_RateLimit_Remaining_Requests="1", X_RateLimit_Reset_Requests="1s") == 0
    assert used_up(X_RateLimit_Remaining_Tokens="-1", X_RateLimit_Reset_Tokens="0") == 0  # Azure's «no limit»
    millis = f"{(time.time() + 30) * 1000:.0f}"
    assert used_up(X_RateLimit_Remaining="0", X_RateLimit_Reset=millis) == pytest.approx(30, abs=2)


def test_openrouter_says_so_in_the_body() -> None:
    millis = f"{(time.time() + 30) * 1000:.0f}"
    headers = {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": millis}
    body = json.dumps({"error": {"message": "limit", "code": 429, "metadata": {"headers": headers}}})
    assert wait({}, body) == pytest.approx(30, abs=2)
    assert wait({}, '{"error": {"metadata": {"headers": 3}}}') == wait({}, "metadata") == 0


def test_events_hold_no_more_than_one_unfinished_event() -> None:
    events = Events()
    assert list(events.feed(b"data: a\n\ndata: b")) == [Event(b"a")]
    assert events.held == len(b"data: b")
