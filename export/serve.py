"""`distill serve`: an OpenAI-compatible server for one artifact, with a page to chat in.

Handlers live in an asyncio loop and only read, check, queue and write; the runtime's own thread runs the model. A
client that goes away frees its row at once. The first SIGTERM or SIGINT drains: new requests are refused, running
answers get their time, then the process ends with 143 or 130; a second signal ends it at once.
"""

import asyncio
import hmac
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from distill.errors import DistillError, EngineError, Interrupted
from distill.progress import say

from .runtime import Request, Runtime
from .serve_answer import Answering, last_words
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
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        answer = Answering(self.runtime, self.metrics, requests, with_usage, started)
        self.answering += 1
        try:
            if asked.stream:
                return await self._stream(request, answer, started)
            async with asyncio.timeout(self._left_s(started)):
                return web.json_response(await answer.whole())
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self.answering -= 1
            answer.cancel()

    async def _stream(self, request: web.Request, answer: Answering, started: float) -> web.StreamResponse:
        """Server-sent events; an error behind the first one becomes an event of its own."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff", **self._cors(request),
            }
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._left_s(started)):
                await response.prepare(request)
                await answer.stream(response)
        except TimeoutError:
            await last_words(response, self._too_slow())
        except ApiError as error:
            await last_words(response, error)
        return response

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
