"""The preflight over the network: what one cheap request and a list of models show before the work."""

import asyncio
import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.config import Endpoint, Sampling
from distill.engines import Probe, Probing, Request
from distill.engines.openai import OpenAIEngine
from distill.errors import EngineError
from distill.records import Message, Prompt

spec = importlib.util.spec_from_file_location("openai_client", Path(__file__).parent / "openai_client.py")
assert spec and spec.loader
client_module = importlib.util.module_from_spec(spec)
sys.modules["openai_client"] = client_module
spec.loader.exec_module(client_module)
ChatServer, Reply, completion = client_module.ChatServer, client_module.Reply, client_module.completion
endpoint, engine, pool, SECRET = (
    client_module.endpoint, client_module.engine, client_module.pool, client_module.SECRET,
)  # fmt: skip
answering = client_module.answering


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


LONG_PROMPT = Prompt.of([Message(role="user", content="Why? " * 2000)])
LONG = Request(LONG_PROMPT, 3, Sampling(temperature=0.6, max_new_tokens=4096), seed=17, system="be brief")


def probed(client: OpenAIEngine, longest: Request = LONG) -> Probe:
    assert isinstance(client, Probing)
    return asyncio.run(client.probe(longest))


def server_with(models: Any = None, message: Any = None, **more: Any) -> Any:
    message = message or {"reasoning_content": "hm", "content": None}
    return ChatServer(answer=lambda body: completion(message, "length", **more), models=models)


def notes(models: Any = None, message: Any = None, **more: Any) -> tuple[str, ...]:
    with server_with(models, message, **more) as server:
        return probed(engine(server)).notes


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_a_probe_is_one_cheap_request_like_those_of_the_run() -> None:
    with server_with() as server:
        found = probed(engine(server))
    (sent,) = server.requests
    assert found.notes == ()
    assert found.usage.model_dump() == {"input": 7, "output": 20, "reasoning": 12}
    assert (sent["model"], sent["temperature"], sent["top_p"], sent["seed"]) == ("r1", 0.6, 1.0, 17)
    assert sent["max_tokens"] == 64
    assert sent["messages"][0] == {"role": "system", "content": "be brief"}
    assert len(sent["messages"][1]["content"]) == 2000


def test_every_endpoint_is_probed_and_what_they_used_is_added_up() -> None:
    with server_with() as first, server_with() as second:
        found = probed(pool(endpoint(first), endpoint(second)))
    assert len(first.requests) == len(second.requests) == 1
    assert found.usage.output == 40


# --- model ----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_with_the_nearest_names() -> None:
    missing = Reply(404, b'{"error": {"message": "model does not exist"}}')
    models = [{"id": name} for name in ("deepseek-r1", "r1-distill", "llama")]
    with ChatServer(lambda *_: missing, models=models) as server:
        with pytest.raises(EngineError, match=r"'r1' is not among its models .it lists 3, nearest: deepseek-r1"):
            probed(engine(server))


def test_a_server_that_answers_as_another_model_is_said() -> None:
    (note,) = notes(model="r1-distill-llama-8b")
    assert note.startswith("model:") and "'r1-distill-llama-8b' answered" in note
    (note,) = notes(models=[{"id": "llama-8b"}, {"id": "qwen"}], model="r1")
    assert note.startswith("model:") and "does not list it" in note
    assert notes(models=[{"id": "r1"}], model="r1") == ()


@pytest.mark.parametrize(
    ("reply", "remedy"),
    [
        (Reply(401), "set OPENAI_API_KEY to a valid one"),
        (Reply(402), "add credit"),
        (Reply(400, b"'temperature' does not support 0.6 with this model"), "set teacher.sampling.temperature"),
        (Reply(400, b'{"detail": "top_p: extra inputs are not permitted"}'), "set teacher.sampling.top_p"),
        (Reply(400, b"unrecognized parameter: seed"), "drops seed"),
        (Reply(503, b"loading"), "did not answer a probe .503 loading, tried 3 times"),
    ],
    ids=["401", "402", "temperature", "top_p", "seed", "503"],
)
def test_what_would_fail_the_run_fails_the_probe(reply: Any, remedy: str) -> None:
    with ChatServer(lambda *_: reply) as server, pytest.raises(EngineError, match=remedy):
        probed(engine(server))


def test_trouble_that_passes_does_not_fail_the_probe() -> None:
    answer = completion({"reasoning_content": "hm", "content": None}, "length")
    plan = lambda number, _: Reply(500) if number < 3 else Reply()  # noqa: E731
    with ChatServer(plan, lambda body: answer) as server:
        assert probed(engine(server)).notes == ()


def test_in_a_pool_a_silent_server_is_a_note_and_a_refusing_one_an_error() -> None:
    with socket.socket() as held, server_with() as fine, ChatServer(lambda *_: Reply(401)) as refusing:
        held.bind(("127.0.0.1", 0))  # bound but not listening
        gone = Endpoint(base_url=f"http://127.0.0.1:{held.getsockname()[1]}/v1")
        (note,) = probed(pool(endpoint(fine), gone)).notes
        assert note.startswith("down:") and "did not answer a probe" in note
        with pytest.raises(EngineError, match="set OPENAI_API_KEY"):
            probed(pool(endpoint(fine), endpoint(refusing)))


def test_a_prompt_that_is_refused_is_a_note() -> None:
    with ChatServer(lambda *_: Reply(400, b"Content Exists Risk")) as server:
        (note,) = probed(engine(server)).notes
    assert note.startswith("refused:") and "Content Exists Risk" in note


# --- reasoning and parameters ---------------------------------------------------------------------------------------


def test_reasoning_that_is_billed_but_not_sent_is_said_with_the_remedy() -> None:
    (note,) = notes(message={"content": "The answer"})  # usage counts 12 reasoning tokens
    assert note.startswith("reasoning:") and "choose an endpoint that returns it" in note
    (note,) = notes(message={"content": None})  # tokens, and no text at all
    assert note.startswith("reasoning:")


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "hm", "content": "a"},
        {"reasoning": "hm", "content": None},
        {"content": "<think>\nI was just"},
        {"content": "hm</think>a"},
    ],
)
def test_reasoning_that_comes_in_any_dialect_needs_no_word(message: dict[str, Any]) -> None:
    assert notes(message=message) == ()


def test_a_limit_that_does_not_hold_is_said() -> None:
    (note,) = notes(usage={"prompt_tokens": 7, "completion_tokens": 500})
    assert note.startswith("max_tokens:") and "billed 500" in note


def test_parameters_that_are_ignored_are_said() -> None:
    with server_with() as server:
        (note,) = probed(engine(server, model="deepseek-reasoner")).notes
    assert note.startswith("ignored: temperature, top_p")
    (note,) = notes(models=[{"id": "r1", "supported_parameters": ["max_tokens", "reasoning", "temperature"]}])
    assert note.startswith("ignored: top_p, seed")
    assert notes(models=[{"id": "r1", "supported_parameters": ["max_tokens", "temperature", "top_p", "seed"]}]) == ()


# --- context --------------------------------------------------------------------------------------------------------

COUNTED = {"prompt_tokens": 502, "completion_tokens": 20}
"""Of the 2,008 characters of a probe: four a token, so 2,502 for all 10,008."""


@pytest.mark.parametrize(
    "listed",
    [
        {"id": "r1", "max_model_len": 6000},
        {"id": "r1", "context_length": 6000},
        {"id": "r1", "context_length": 128_000, "top_provider": {"context_length": 6000}},
        {"id": "model.gguf", "meta": {"n_ctx_train": 6000}},
    ],
    ids=["vllm", "openrouter", "openrouter-provider", "llama.cpp"],
)
def test_a_longest_prompt_that_cannot_fit_is_refused_before_the_work(listed: dict[str, Any]) -> None:
    with server_with([listed], usage=COUNTED, model="r1") as server:
        with pytest.raises(EngineError, match=r"about 2502 tokens .estimated.*together 6598, of a context of 6000"):
            probed(engine(server))


def test_a_context_that_is_nearly_too_small_is_said_and_a_larger_one_is_not() -> None:
    (note,) = notes(models=[{"id": "r1", "max_model_len": 7000}], usage=COUNTED)
    assert note.startswith("context:") and note.endswith("tight")
    assert notes(models=[{"id": "r1", "max_model_len": 8192}], usage=COUNTED) == ()


def test_without_a_count_the_estimate_refuses_only_what_surely_does_not_fit() -> None:
    (note,) = notes(models=[{"id": "r1", "max_model_len": 6000}], usage=None)
    assert note.startswith("context:") and "4 characters each" in note
    with server_with([{"id": "r1", "max_model_len": 5000}], usage=None) as server, pytest.raises(EngineError):
        probed(engine(server))


def test_an_answer_that_may_not_become_as_long_as_asked_is_said() -> None:
    (note,) = notes(models=[{"id": "r1", "top_provider": {"max_completion_tokens": 2048}}])
    assert note.startswith("context:") and "at most 2048 tokens" in note


@pytest.mark.parametrize("models", [[], [{}], [{"id": 3}], [{"id": "r1", "meta": None, "max_model_len": "many"}]])
def test_a_list_of_models_may_be_anything(models: Any) -> None:
    assert notes(models=models) == ()


def test_the_key_is_in_no_note_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    (note,) = notes(model=f"m-{SECRET}")
    assert SECRET not in note
    reply = Reply(401, json.dumps({"error": {"message": f"wrong key {SECRET}"}}).encode())
    with ChatServer(lambda *_: reply) as server, pytest.raises(EngineError) as caught:
        probed(engine(server))
    assert SECRET not in str(caught.value)
