"""What the tests of the OpenAI-compatible client share: the local server, and short ways to ask it."""

import asyncio
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.config import Endpoint, FormatConfig, Sampling
from distill.engines import Completion, Request, stream
from distill.engines.openai import OpenAIEngine
from distill.records import Message, Prompt

spec = importlib.util.spec_from_file_location("chat_server", Path(__file__).parent / "chat_server.py")
assert spec and spec.loader
server_module = importlib.util.module_from_spec(spec)
sys.modules["chat_server"] = server_module  # dataclasses look their module up
spec.loader.exec_module(server_module)
ChatServer, Reply = server_module.ChatServer, server_module.Reply
answer_of, completion, counted = server_module.answer_of, server_module.completion, server_module.counted

SECRET = "sk-very-secret-0123456789"


def endpoint(server: Any, **fields: Any) -> Endpoint:
    return Endpoint(**{"base_url": server.base_url, "timeout_s": 20, "max_retries": 3} | fields)


def engine(server: Any, **fields: Any) -> OpenAIEngine:
    return OpenAIEngine("r1", endpoint(server, **fields), FormatConfig(), first_delay_s=0.01)


def pool(*endpoints: Endpoint) -> OpenAIEngine:
    return OpenAIEngine("r1", endpoints, FormatConfig(), first_delay_s=0.01)


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
