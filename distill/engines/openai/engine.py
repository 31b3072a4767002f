"""The engine: pulls requests as there is room for them, asks a pool of servers, and tries again what can pass.

What can pass by itself (429, 5xx, time-outs, resets, empty or broken answers) is tried again, at once where there is
another server, else with full-jitter back-off. What cannot (a refused key, an unknown model, an invalid request) takes
its server out of the pool, and stops the run when it was the last. A prompt that a server will not answer (too long,
filtered) becomes a failed completion.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import suppress

import aiohttp

from distill.config import Endpoint, FormatConfig, TeacherConfig
from distill.engines import Completion, Probe, Request
from distill.runs import RunOptions

from .address import address_of
from .exchange import allow_connections, ask, open_session
from .pool import Lease, Pool, Server
from .probe import probe_all
from .trouble import Trouble, as_error

FIRST_DELAY_S = 0.5
"""Longest pause before the first retry; doubled for each further one."""
LONGEST_DELAY_S = 60.0
"""Longest pause of our own choosing."""
LONGEST_PUT_OFF_S = 3600.0
"""How long a request lets servers put it off that say when to come back; until then it costs no try."""


class OpenAIEngine:
    """Asks OpenAI-compatible servers of the same model, each as much at once as it takes."""

    name = "openai"
    version = "1"
    batch_size: int | None = None

    def __init__(
        self,
        model: str,
        endpoints: Endpoint | Sequence[Endpoint],
        format: FormatConfig,
        first_delay_s: float = FIRST_DELAY_S,
        where: str = "teacher",
    ) -> None:
        """`where` is the section of the recipe that names the endpoints, for errors about them."""
        if isinstance(endpoints, Endpoint):
            named = {f"{where}.endpoint": endpoints}
        else:
            named = {f"{where}.endpoints.{number}": endpoint for number, endpoint in enumerate(endpoints)}
        self.format = format
        self.first_delay_s = first_delay_s
        self.pool = Pool(list(named.values()), [address_of(e, model, name) for name, e in named.items()])
        self._random = random.Random()  # jitter must differ between clients, so it has no seed

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "OpenAIEngine":
        """The engine of a recipe's teacher. Raises EngineError for an unusable address or a missing key."""
        return cls(teacher.model, teacher.endpoints or teacher.endpoint, format)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer every request, in the order in which answers come.

        A request is pulled when a server has room for it, just before it is sent, and its room is free again when the
        caller has come back for more: never are more pulled and not dealt with than may be in flight. Raises
        EngineError where no request can succeed; whatever the iterable raises comes out here.
        """
        self.pool.raise_if_none_left()
        allow_connections(sum(server.limit.most for server in self.pool.live))
        async with open_session() as session:
            flow = Flow(self, session)
            feeder = asyncio.create_task(flow.feed(requests))
            try:
                while (item := await flow.finished.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item
                    flow.dealt_with()
            finally:
                await flow.stop(feeder)

    async def probe(self, longest: Request) -> Probe:
        """Send each server one cheap request and ask for its list of models.

        Raises EngineError with the remedy where the work could not succeed.
        """
        async with open_session() as session:
            return await probe_all(session, self.pool.servers, longest, self.format, self.delay_s)

    async def close(self) -> None:
        """Connections live only as long as one `generate`."""

    def delay_s(self, attempt: int, wait_s: float = 0.0) -> float:
        """Full jitter (a uniform part of a doubling ceiling), on top of what the server asked for."""
        ceiling_s = self.first_delay_s * 2.0 ** min(attempt - 1, 30)
        return wait_s + self._random.uniform(0, min(LONGEST_DELAY_S, ceiling_s))


class Tries:
    """What one request has been through."""

    def __init__(self) -> None:
        self.sent = 0
        self.failed = 0
        """Times that count against `max_retries`."""
        self.servers: set[Server] = set()
        """Where it need not go again: those it went to since it last waited."""
        self._put_off_since: float | None = None

    def count(self, server: Server, trouble: Trouble) -> None:
        """Remember another failure."""
        self.servers.add(server)
        if trouble.kind == "again":
            self.failed += 1
        elif trouble.kind == "later" and self._put_off_since is None:
            self._put_off_since = time.monotonic()

    def used_up(self, server: Server) -> bool:
        """Whether it is time to give up."""
        put_off_s = time.monotonic() - self._put_off_since if self._put_off_since is not None else 0.0
        return self.failed > server.endpoint.max_retries or put_off_s > LONGEST_PUT_OFF_S


class Flow:
    """One `generate`: requests that were pulled and not dealt with yet."""

    def __init__(self, engine: OpenAIEngine, session: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.pool = engine.pool
        self.session = session
        self.finished: asyncio.Queue[Completion | Exception | None] = asyncio.Queue()
        """None when all is done."""
        self._open = 0
        """Requests pulled and not dealt with."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self.pool.sources.add(self._room)

    async def feed(self, requests: AsyncIterable[Request]) -> None:
        """Pull requests as there is room, until there are none; answers come meanwhile, however long a pull waits."""
        try:
            source = aiter(requests)
            while True:
                await self._until_room()
                request = await anext(source, None)
                if request is None:
                    break
                self._send(request)
            await asyncio.gather(*self._tasks)
            self.finished.put_nowait(None)
        except Exception as error:  # the consumer raises it; a task of its own would keep it to itself
            self.finished.put_nowait(error)

    def dealt_with(self) -> None:
        """The caller has come back for more."""
        self._open -= 1
        self._room.set()

    async def stop(self, feeder: "asyncio.Task[None]") -> None:
        """Drop whatever is still going on."""
        self.pool.sources.discard(self._room)
        for task in (feeder, *self._tasks):
            task.cancel()
        await asyncio.gather(feeder, *self._tasks, return_exceptions=True)

    async def _until_room(self) -> None:
        while self._open >= self.pool.allowed or self.pool.pick(time.monotonic()) is None:
            self._room.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.pool.next_change_s(time.monotonic())):
                    await self._room.wait()

    def _send(self, request: Request) -> None:
        """Take a place at once where there is one, so that no more are pulled than can be sent."""
        server = self.pool.pick(now := time.monotonic())
        lease = server.lend(request, now) if server else None
        task = asyncio.create_task(self._serve(request, lease))
        self._open += 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if lease is not None:  # a task that is dropped before it has begun gives nothing back itself
            task.add_done_callback(lambda _: self.pool.give_back(lease))

    async def _serve(self, request: Request, lease: Lease | None) -> None:
        try:
            self.finished.put_nowait(await self._answer(request, lease))
        except Exception as error:
            self.finished.put_nowait(error)

    async def _answer(self, request: Request, lease: Lease | None) -> Completion:
        """One request with its retries. Raises EngineError when no server is left to ask."""
        tries = Tries()
        while True:
            lease = lease or await self.pool.lease(request, tries.servers)
            server, tries.sent = lease.server, tries.sent + 1
            outcome = await self._ask(request, lease, tries.sent)
            if isinstance(outcome, Completion):
                return outcome
            tries.count(server, outcome)
            if outcome.kind == "fatal":
                self.pool.take_out(server, as_error(outcome))
            elif outcome.kind == "refused":
                return failure(request, outcome.said, tries.sent, retryable=False)
            elif tries.used_up(server):
                return failure(request, f"{outcome.said} (tried {tries.sent} times)", tries.sent, retryable=True)
            elif not self.pool.has_another(tries.servers):
                tries.servers = {server}
                await asyncio.sleep(self.engine.delay_s(max(tries.failed, 1), outcome.wait_s))
            lease = None

    async def _ask(self, request: Request, lease: Lease, attempt: int) -> Completion | Trouble:
        """One try, with what it says of its server."""
        server = lease.server
        try:
            started = time.perf_counter()
            outcome = await ask(self.session, server, request, self.engine.format)
            if isinstance(outcome, Trouble):
                server.failed(lease, outcome)
                return outcome
            server.answered(lease, request, outcome.usage)
            return outcome._replace(
                latency_s=time.perf_counter() - started,
                attempts=attempt,
                cost_usd=server.cost_usd(outcome.usage, outcome.raw),
            )
        finally:
            self.pool.give_back(lease)


def failure(request: Request, said: str, attempts: int, retryable: bool) -> Completion:
    """A completion without an answer."""
    return Completion(request.key, finish_reason="error", error=said, attempts=attempts, retryable=retryable)
