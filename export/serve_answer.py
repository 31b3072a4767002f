"""One chat completion on its way from the runtime's thread to a client: whole, or as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

from .runtime import Delta, Request, Runtime, Ticket, Usage
from .serve_metrics import Metrics
from .serve_request import ApiError


class Answering:
    """One chat completion on its way: the parts of all its choices in the order in which they are written."""

    def __init__(
        self, runtime: Runtime, metrics: Metrics, requests: Sequence[Request], with_usage: bool, started: float
    ) -> None:
        self._runtime, self._metrics, self._with_usage, self._started = runtime, metrics, with_usage, started
        self._parts: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._first = True
        self._usages: list[Usage] = []
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": runtime.name}
        loop = asyncio.get_running_loop()

        def deliver_to(choice: int) -> Callable[[Delta], None]:
            def deliver(part: Delta) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._take, choice, part)

            return deliver

        self._open: list[Ticket] = [
            runtime.submit(request, deliver_to(choice)) for choice, request in enumerate(requests)
        ]

    def cancel(self) -> None:
        """Free the rows of whatever is not finished."""
        for ticket in self._open:
            if not ticket.ended:
                self._runtime.cancel(ticket)

    async def _all(self) -> AsyncIterator[tuple[int, Delta]]:
        """The parts of every choice until all have ended; raises ApiError if one fails."""
        missing = len(self._open)
        while missing:
            choice, part = await self._parts.get()
            if part.finish in ("error", "cancelled"):
                why = part.error or "the server is shutting down"
                raise ApiError(500 if part.error else 503, why, part.finish, kind="server_error")
            missing -= part.finish is not None
            yield choice, part

    def _take(self, choice: int, part: Delta) -> None:
        """Count a part as it comes, also where the client has left and nobody waits for it."""
        self._count(part)
        self._parts.put_nowait((choice, part))

    def _count(self, part: Delta) -> None:
        metrics = self._metrics
        whole = part.finish in ("stop", "length")
        if self._first and (part.content or part.reasoning or whole):
            metrics.ttft.observe(time.monotonic() - self._started)
            self._first = False
        if part.finish is not None and part.usage is not None:
            self._usages.append(part.usage)
            metrics.finished[part.finish] += 1
            if whole:
                metrics.latency.observe(time.monotonic() - self._started)
            metrics.prompt_tokens += part.usage.prompt
            metrics.shared_tokens += part.usage.shared
            metrics.completion_tokens += part.usage.completion
            metrics.reasoning_tokens += part.usage.reasoning
            metrics.rate.add(part.usage.completion)

    def _usage(self) -> dict[str, Any]:
        """Usage of all choices; the prompt counts once."""
        prompt, completion = self._usages[0].prompt, sum(usage.completion for usage in self._usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._usages[0].shared},
            "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning for usage in self._usages)},
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [{"reasoning_content": "", "content": ""} for _ in self._open]
        finishes: list[str] = ["stop"] * len(texts)
        async for choice, part in self._all():
            texts[choice]["reasoning_content"] += part.reasoning
            texts[choice]["content"] += part.content
            finishes[choice] = part.finish or finishes[choice]
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", **text, "reasoning_content": text["reasoning_content"] or None},
                "finish_reason": finish,
                "logprobs": None,
            }
            for index, (text, finish) in enumerate(zip(texts, finishes))
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def stream(self, response: web.StreamResponse) -> None:
        """The answer as server-sent events."""
        async for chunk in self._chunks():
            await response.write(_event(chunk))
        await response.write(b"data: [DONE]\n\n")

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        head = {**self._head, "object": "chat.completion.chunk", **({"usage": None} if self._with_usage else {})}

        def chunk(choice: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": choice, "delta": delta, "finish_reason": finish, "logprobs": None}]}

        for choice in range(len(self._open)):
            yield chunk(choice, {"role": "assistant", "content": ""})
        async for choice, part in self._all():
            if part.reasoning:
                yield chunk(choice, {"reasoning_content": part.reasoning})
            if part.content:
                yield chunk(choice, {"content": part.content})
            if part.finish:
                yield chunk(choice, {}, part.finish)
        if self._with_usage:
            yield {**head, "choices": [], "usage": self._usage()}


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def last_words(response: web.StreamResponse, error: ApiError) -> None:
    """Say in a running stream why it ends; a client that reads nothing is not waited for, and cannot go on with it."""
    response.force_close()
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(1):
            await response.write(_event(error.body))
