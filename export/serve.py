"""`distill serve`: an OpenAI-compatible server for one artifact, with a page to chat in.

Handlers live in an asyncio loop and only read, check, queue and write; the runtime's own thread runs the model. A
client that goes away frees its row at once. The first SIGTERM or SIGINT drains: new requests are refused, running
answers get their time, then the process ends with 143 or 130; a second signal ends it at once.
"""

import asyncio
import hmac
import json
import logging
import secrets
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from distill.errors import DistillError, EngineError, Interrupted
from distill.progress import say

from .runtime import Delta, Request, Runtime, Ticket, Usage
from .serve_limits import Connections, Gate, Limits
from .serve_metrics import Metrics
from .serve_page import PAGE, PAGE_HEADERS
from .serve_request import ApiError, ChatRequest, parse_chat

KEY_VARIABLE = "DISTILL_SERVE_API_KEY"
OPEN_PATHS = ("/", "/health")
"""What needs no key: a page without secrets, and whether the server is there."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("distill.serve")
_http_noise = logging.getLogger("distill.serve.http")
_http_noise.setLevel(logging.CRITICAL + 1)  # malformed requests are the clients' affair; our own errors are logged here


class Server:
    """The endpoints over one runtime."""

    def __init__(
        self, runtime: Runtime, limits: Limits, key: str = "", origin: str = "", local: bool = True, **sampling: float
    ) -> None:
        self.runtime = runtime
        self.limits = limits
        self.sampling: dict[str, float] = {"temperature": 0.6, "top_p": 0.95, **sampling}
        """Where a request names none."""
        self.metrics = Metrics()
        self.connections = Connections(limits.connections, limits.read_s)
        self.draining = False
        self.answering = 0
        """Chat completions that are being worked on."""
        self._key, self._origin, self._local = key, origin, local
        self._started = int(time.time())

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self.page)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics_page)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_post("/v1/chat/completions", self.completions)
        return app

    # --- every request

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Key, host and origin before anything else; errors become OpenAI's error objects; all is counted."""
        try:
            response = await self._checked(request, handler)
        except ApiError as error:
            response = web.json_response(error.body, status=error.status, headers=error.headers)
        except web.HTTPException as error:
            wrong = ApiError(error.status, f"{request.method} {request.path}: {error.reason}", "not_found")
            response = web.json_response(wrong.body, status=error.status, headers=_allow(error))
        except (asyncio.CancelledError, ConnectionError):
            self.metrics.requests[499] += 1  # the client went away
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            wrong = ApiError(500, "the server failed; its log says why", "internal_error", kind="server_error")
            response = web.json_response(wrong.body, status=500)
        self.metrics.requests[response.status] += 1
        if not response.prepared:
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers.update(self._cors(request))
        return response

    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._local and not self._key and request.host.rsplit(":", 1)[0].strip("[]") not in LOOPBACK:
            # a web page elsewhere can point a name of its own at this machine; with a key that gains it nothing
            raise ApiError(403, f"Host {request.host!r} is not this machine; set {KEY_VARIABLE}", "forbidden_host")
        if request.method == "OPTIONS" and self._origin and request.headers.get("Origin") == self._origin:
            return web.Response(status=204)
        if self._key and request.path not in OPEN_PATHS:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
                raise ApiError(401, "send the server's API key: Authorization: Bearer KEY", "invalid_api_key")
        return await handler(request)

    def _cors(self, request: web.Request) -> Mapping[str, str]:
        if not self._origin or request.headers.get("Origin") != self._origin:
            return {}
        return {
            "Access-Control-Allow-Origin": self._origin,
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Access-Control-Allow-Methods": "GET, POST",
            "Vary": "Origin",
        }

    # --- small endpoints

    async def page(self, _: web.Request) -> web.Response:
        """The chat page."""
        return web.Response(text=PAGE, content_type="text/html", headers=PAGE_HEADERS)

    async def health(self, _: web.Request) -> web.Response:
        """Whether requests are taken."""
        state = "draining" if self.draining else "ready"
        return web.json_response(
            {"status": state, "model": self.runtime.name, "running": self.runtime.running,
             "waiting": self.runtime.waiting},
            status=503 if self.draining else 200,
        )  # fmt: skip

    async def metrics_page(self, _: web.Request) -> web.Response:
        """Counters, as Prometheus reads them."""
        there = self.connections
        text = self.metrics.text(self.runtime.running, self.runtime.waiting, there.open, there.refused)
        return web.Response(text=text, content_type="text/plain", charset="utf-8")

    async def models(self, _: web.Request) -> web.Response:
        """The one model."""
        return web.json_response({"object": "list", "data": [self._model_object()]})

    async def model(self, request: web.Request) -> web.Response:
        """One model by its id."""
        self._check_model(request.match_info["model"])
        return web.json_response(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {"id": self.runtime.name, "object": "model", "created": self._started, "owned_by": "distill"}

    def _check_model(self, model: str) -> None:
        if model != self.runtime.name:
            raise ApiError(
                404, f"no model {model[:100]!r} here; it is {self.runtime.name!r}", "model_not_found", "model"
            )

    # --- chat completions

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat, whole or as a stream of events."""
        started = time.monotonic()
        self._refuse_while_draining()
        asked = parse_chat(await self._body(request))
        self._check_model(asked.model)
        requests = await self._requests(asked)
        self._refuse_while_draining()
        self._check_queue(len(requests))
        answer = Answering(self, requests, asked, started)
        self.answering += 1
        try:
            if asked.stream:
                return await answer.stream(request)
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._left_s(started)):
                return web.json_response(await answer.whole())
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self.answering -= 1
            answer.cancel()

    def _left_s(self, started: float) -> float:
        return max(0.0, started + self.limits.request_s - time.monotonic())

    def _too_slow(self) -> ApiError:
        return ApiError(
            504, f"no whole answer within {self.limits.request_s:g} s; ask for fewer tokens", "request_timeout",
            kind="server_error",
        )  # fmt: skip

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down", "draining", kind="server_error", retry_after_s=5)

    async def _body(self, request: web.Request) -> bytes:
        if request.content_type != "application/json":
            # a form of another page's could send anything else without asking
            raise ApiError(415, f"Content-Type {request.content_type}: send application/json", "unsupported_media_type")
        most, parts, size = self.limits.body_bytes, [], 0
        too_large = ApiError(413, f"the body is larger than {most:,} bytes", "body_too_large")
        if (request.content_length or 0) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.read_s):
                async for part in request.content.iter_any():
                    parts.append(part)
                    if (size := size + len(part)) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.limits.read_s:g} s", "body_timeout") from None
        return b"".join(parts)

    async def _requests(self, asked: ChatRequest) -> list[Request]:
        """One request for the runtime a choice."""
        limits, count = self.limits, asked.n or 1
        if count > limits.choices:
            raise ApiError(400, f"n is {count}; this server gives up to {limits.choices} choices", "invalid_value", "n")
        try:
            ids, opened = await asyncio.to_thread(self.runtime.prompt, [one.plain() for one in asked.messages])
        except DistillError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from error
        most = min(limits.prompt_tokens, self.runtime.max_tokens - 1)
        if not 0 < len(ids) <= most:
            why = f"the messages are {len(ids):,} tokens; this server takes 1 to {most:,}"
            raise ApiError(400, why, "context_length_exceeded", "messages")
        wanted = asked.max_completion_tokens or asked.max_tokens or limits.new_tokens
        first = secrets.randbits(63) if asked.seed is None else asked.seed % 2**63
        temperature = self.sampling["temperature"] if asked.temperature is None else asked.temperature
        return [
            Request(
                ids, min(wanted, limits.new_tokens), temperature, asked.top_p or self.sampling["top_p"], first + choice,
                asked.stops, asked.think_budget, opened,
            )
            for choice in range(count)
        ]  # fmt: skip

    def _check_queue(self, count: int) -> None:
        limits, there = self.limits, self.runtime
        free = limits.rows - there.running
        if there.waiting + count > limits.queue + max(0, free):
            mean = self.metrics.latency.sum / max(1, sum(self.metrics.latency.counts))
            wait = min(60, max(1, round(mean * (there.waiting + count) / limits.rows)))
            why = f"{there.waiting} requests wait already; try again in {wait} s"
            raise ApiError(429, why, "queue_full", kind="rate_limit_error", retry_after_s=wait)


class Answering:
    """One chat completion on its way: the parts of all its choices in the order in which they are written."""

    def __init__(self, server: Server, requests: Sequence[Request], asked: ChatRequest, started: float) -> None:
        self._server, self._asked, self._started = server, asked, started
        self._parts: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._first = True
        self._usages: list[Usage] = []
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.runtime.name}
        loop = asyncio.get_running_loop()

        def deliver_to(choice: int) -> Callable[[Delta], None]:
            def deliver(part: Delta) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._parts.put_nowait, (choice, part))

            return deliver

        self._open: list[Ticket] = [
            server.runtime.submit(request, deliver_to(choice)) for choice, request in enumerate(requests)
        ]

    def cancel(self) -> None:
        """Free the rows of whatever is not finished."""
        for ticket in self._open:
            if not ticket.ended:
                self._server.runtime.cancel(ticket)

    async def _all(self) -> AsyncIterator[tuple[int, Delta]]:
        """The parts of every choice until all have ended; raises ApiError if one fails."""
        missing = len(self._open)
        while missing:
            choice, part = await self._parts.get()
            self._count(part)
            if part.finish in ("error", "cancelled"):
                why = part.error or "the server is shutting down"
                raise ApiError(500 if part.error else 503, why, part.finish, kind="server_error")
            missing -= part.finish is not None
            yield choice, part

    def _count(self, part: Delta) -> None:
        metrics = self._server.metrics
        if self._first and (part.content or part.reasoning or part.finish):
            metrics.ttft.observe(time.monotonic() - self._started)
            self._first = False
        if part.finish is not None and part.usage is not None:
            self._usages.append(part.usage)
            metrics.finished[part.finish] += 1
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

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The answer as server-sent events; an error behind the first one becomes an event of its own."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff", **self._server._cors(request),
            }
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._server._left_s(self._started)):
                await response.prepare(request)
                async for chunk in self._chunks():
                    await response.write(_event(chunk))
                await response.write(b"data: [DONE]\n\n")
        except TimeoutError:
            await _last_words(response, self._server._too_slow())
        except ApiError as error:
            await _last_words(response, error)
        return response

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        with_usage = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        head = {**self._head, "object": "chat.completion.chunk", **({"usage": None} if with_usage else {})}

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
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage()}


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def _last_words(response: web.StreamResponse, error: ApiError) -> None:
    """Say in a running stream why it ends; a client that reads nothing is not waited for, and cannot go on with it."""
    response.force_close()
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(1):
            await response.write(_event(error.body))


def _allow(error: web.HTTPException) -> Mapping[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


# --- running it -------------------------------------------------------------------------------------------------------


def run(folder: Path, host: str, port: int, key: str, limits: Limits, **options: Any) -> None:
    """Serve until a signal comes; raises Interrupted (exit 143 or 130) once drained.

    `options`: variant, threads (the runtime's), origin, temperature, top_p (the server's). Raises EngineError if the
    address cannot be bound.
    """
    loading = {name: options.pop(name) for name in ("variant", "threads") if name in options}
    most = limits.prompt_tokens + limits.new_tokens
    with Runtime(folder, max_rows=limits.rows, max_tokens=most, cache_gb=limits.cache_gb, **loading) as runtime:
        if host not in LOOPBACK and not key:
            say(f"warning: {host} may be reached from other machines and no key is set; set {KEY_VARIABLE}")
        server = Server(runtime, limits, key, local=host in LOOPBACK, **options)
        signum = asyncio.run(_serve(server, host, port))
    raise Interrupted(signum)


async def listen(server: Server, host: str, port: int) -> tuple[web.AppRunner, asyncio.Server]:
    """Open the address; raises EngineError if it cannot be bound. Clean the runner up after closing the other."""
    runner = web.AppRunner(
        server.app(), handle_signals=False, handler_cancellation=True, access_log=None, logger=_http_noise,
        keepalive_timeout=server.limits.read_s, shutdown_timeout=1.0,
    )  # fmt: skip
    await runner.setup()
    http = runner.server
    assert http is not None
    try:
        opened = asyncio.get_running_loop().create_server(lambda: Gate(http(), server.connections), host, port)
        return runner, await opened
    except OSError as error:
        await runner.cleanup()
        raise EngineError(f"cannot listen at {host}:{port}: {error}; choose another --host or --port") from error


async def _serve(server: Server, host: str, port: int) -> int:
    """Listen until the first signal, then drain; returns its number."""
    runner, listener = await listen(server, host, port)
    signals: asyncio.Queue[int] = asyncio.Queue()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, signals.put_nowait, signum)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{listener.sockets[0].getsockname()[1]}"
    say(f"serving {server.runtime.name} ({server.runtime.graph.variant}) at {shown}/v1; chat page: {shown}/")
    first = await signals.get()
    await _drain(server, signals)
    listener.close()
    await runner.cleanup()
    return first


async def _drain(server: Server, signals: "asyncio.Queue[int]") -> None:
    """Refuse what is new and wait for what runs: until all is done, the time is over, or a second signal comes."""
    server.draining = True
    say(f"draining: {server.answering} answers have {server.limits.drain_s:g} s; a second signal ends them now")
    deadline = time.monotonic() + server.limits.drain_s
    while server.answering and time.monotonic() < deadline and signals.empty():
        await asyncio.sleep(0.05)
    if server.answering:
        say(f"{server.answering} answers were cut off")
