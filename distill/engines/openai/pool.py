"""The servers of one engine: which of them gets the next request, and which are left alone for a while.

Of servers of equal weight each is kept as full as it will be; unequal weights are kept to as shares of the requests,
by holding the others back, as long as all are healthy. A server that fails several times in a row is given none until a
cool-down is over (doubled each time), then one at a time until an answer comes; one that asks to be left alone is
paused; one that refuses every request is taken out while another lives. Where no server is healthy, the tries of the
requests themselves are the trials, one at a time at each server, and their back-off is the wait.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter

import aiohttp

from distill.config import Endpoint
from distill.engines import Request
from distill.errors import EngineError
from distill.progress import say
from distill.records import Usage

from .address import Address
from .limits import CHARS_PER_TOKEN, Adaptive, Bucket, Fixed, Forecast, Limit, Ticket
from .trouble import Trouble
from .wire import chars_of

CONNECT_TIMEOUT_S = 30.0
"""Longest time to reach a server; the endpoint's own time-out where that is shorter."""
TRIP_AFTER = 8
"""Failures in a row after which a server is left alone."""
FIRST_COOL_DOWN_S = 1.0
LONGEST_COOL_DOWN_S = 60.0
LONG_PAUSE_S = 10.0
"""A pause that a server asks for is said from this length on."""
LEAD = 4
"""Requests that the lightest server may be ahead of its share, so that a full one does not stop the others at once."""
TOKENS_PER_MTOK = 1_000_000


@dataclass(eq=False, slots=True)
class Lease:
    """A request's place at a server."""

    server: "Server"
    ticket: Ticket
    sent_at: float
    expected_tokens: float
    over: bool = False


class Server:
    """One endpoint while it is used: what it takes, and how it is doing."""

    def __init__(self, endpoint: Endpoint, address: Address) -> None:
        now, silence_s = time.monotonic(), endpoint.timeout_s
        self.endpoint = endpoint
        self.address = address
        self.chat_url = address.at("chat", "completions")
        self.proxy = address.proxy
        self.timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=min(CONNECT_TIMEOUT_S, silence_s), sock_read=silence_s
        )
        auto = endpoint.concurrency == "auto"
        self.limit: Limit = Adaptive(endpoint.max_concurrency) if auto else Fixed(int(endpoint.concurrency))
        self.requests = Bucket(endpoint.rpm, now) if endpoint.rpm else None
        self.tokens = Bucket(endpoint.tpm, now) if endpoint.tpm else None
        self.forecast = Forecast()
        self.in_flight = 0
        self.turns = 0.0
        """Requests it was given, divided by its weight."""
        self.proven = False
        """Whether it has ever given a good answer."""
        self.failures = 0
        """In a row."""
        self._cool_down_s = 0.0
        self._open_since = self._open_until = self._paused_until = 0.0

    def __repr__(self) -> str:
        return f"Server({self.address})"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries; made anew, so that nothing that can be shown holds the key."""
        return self.address.headers

    @property
    def tripped(self) -> bool:
        """Whether it has failed so often in a row that one request at a time is enough."""
        return self.failures >= TRIP_AFTER

    @property
    def allowed(self) -> int:
        """Most requests in flight now."""
        return 1 if self.tripped else self.limit.allowed

    def rest_s(self, now: float) -> float:
        """Seconds until the cool-down is over."""
        return max(self._open_until - now, 0.0) if self.tripped else 0.0

    def healthy(self, now: float) -> bool:
        """Whether it should get requests: it answers, or it is time to see whether it does again."""
        return self.rest_s(now) == 0.0

    def open(self, now: float) -> bool:
        """Whether it is healthy and not to be waited for, be it full or not."""
        return self.healthy(now) and self.wait_s(now) == 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until it may be asked, as far as pauses and caps go."""
        wait_s = self._paused_until - now
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                wait_s = max(wait_s, bucket.wait_s(now))
        return max(wait_s, 0.0)

    def pause(self, seconds: float) -> None:
        """Leave it alone for so long."""
        if seconds <= 0:
            return
        until = time.monotonic() + seconds
        if seconds >= LONG_PAUSE_S and until > self._paused_until + 1:
            say(f"{self.address} asks to be left alone for {seconds:.0f} s")
        self._paused_until = max(self._paused_until, until)

    def lend(self, request: Request, now: float) -> Lease:
        """Count a request that is about to be sent."""
        self.in_flight += 1
        self.turns += 1 / self.endpoint.weight
        expected = 0.0
        if self.requests is not None:
            self.requests.take(1)
        if self.tokens is not None:
            expected = self.forecast.tokens(chars_of(request), request.sampling.max_new_tokens)
            self.tokens.take(expected)
        return Lease(self, self.limit.sent(self.in_flight), now, expected)

    def answered(self, lease: Lease, request: Request, usage: Usage) -> None:
        """A good answer came."""
        if self.tripped:
            say(f"{self.address} answers again")
        self.proven, self.failures, self._cool_down_s = True, 0, 0.0
        self.limit.answered(lease.ticket, time.monotonic() - lease.sent_at)
        if self.tokens is not None:
            self.forecast.learn(chars_of(request), usage)
            self.tokens.take(usage.input + usage.output - lease.expected_tokens)

    def failed(self, lease: Lease, trouble: Trouble) -> None:
        """No answer came, for a reason that can pass."""
        if self.tokens is not None:
            self.tokens.take(-lease.expected_tokens)
        if trouble.overload:
            self.limit.pushed_back(lease.ticket)
        self.pause(trouble.wait_s)
        if trouble.kind == "again":
            self.failures += 1
            if self.tripped and lease.sent_at >= self._open_since:
                self._open(trouble)

    def _open(self, trouble: Trouble) -> None:
        """Leave it alone until the cool-down is over."""
        if self._cool_down_s == 0.0:
            self.limit.restart()
            say(f"{self.address} failed {self.failures} times in a row ({trouble.said}): it is tried now and then")
        self._cool_down_s = min(max(FIRST_COOL_DOWN_S, 2 * self._cool_down_s), LONGEST_COOL_DOWN_S)
        self._open_since = time.monotonic()
        self._open_until = self._open_since + self._cool_down_s

    def cost_usd(self, usage: Usage, raw: str) -> float | None:
        """Dollars of one answer by the endpoint's own prices, tokens guessed where nobody counted; None without."""
        prices = self.endpoint.prices
        if prices is None:
            return None
        output = usage.output or -(-len(raw) // CHARS_PER_TOKEN)
        dollars = usage.input * prices.input_usd_per_mtok + output * prices.output_usd_per_mtok
        return dollars / TOKENS_PER_MTOK


class Pool:
    """All servers, and who waits for room at one."""

    def __init__(self, endpoints: Sequence[Endpoint], addresses: Sequence[Address]) -> None:
        self.servers = [Server(endpoint, address) for endpoint, address in zip(endpoints, addresses)]
        self.live = list(self.servers)
        self.sources: set[asyncio.Event] = set()
        """Set when there may be room for a request that nobody has pulled yet."""
        weights = [endpoint.weight for endpoint in endpoints]
        self._lead = LEAD / min(weights) if len(set(weights)) > 1 else math.inf
        """Turns that a server may be ahead of the one that is due."""
        self._waiting: dict[asyncio.Future[None], None] = {}
        """Requests that were pulled and have no place, in order."""
        self._last_error: EngineError | None = None

    @property
    def allowed(self) -> int:
        """Most requests in flight now."""
        return sum(server.allowed for server in self.live)

    def pick(self, now: float, tried: AbstractSet[Server] = frozenset()) -> Server | None:
        """The server for the next request, one that was not tried if there is one; None where there is no room now."""
        if len(self.live) == 1:
            (server,) = self.live
            return server if server.in_flight < server.allowed and server.wait_s(now) == 0.0 else None
        candidates = [server for server in self.live if server.open(now)]
        if not candidates:  # none is healthy, or all are paused: the request's own back-off is wait enough
            unpaused = [server for server in self.live if server.wait_s(now) == 0.0]
            candidates = [] if any(server.healthy(now) for server in self.live) else unpaused
        if not candidates:
            return None
        due = min(server.turns for server in candidates)
        if len(candidates) < len(self.live):
            self._forget_missed_turns(candidates, due)
        if tried:
            candidates = [server for server in candidates if server not in tried] or candidates
        free = [s for s in candidates if s.in_flight < s.allowed and s.turns <= due + self._lead]
        return min(free, key=attrgetter("turns"), default=None)

    def _forget_missed_turns(self, candidates: Sequence[Server], due: float) -> None:
        """A server that is left alone does not get all that it missed when it is back."""
        for server in self.live:
            if server not in candidates:
                server.turns = max(server.turns, due)

    def has_another(self, tried: AbstractSet[Server]) -> bool:
        """Whether there is a server in good health that was not tried."""
        now = time.monotonic()
        return any(server not in tried and server.open(now) for server in self.live)

    async def lease(self, request: Request, tried: AbstractSet[Server]) -> Lease:
        """A place at a server, as soon as there is one. Raises EngineError when no server is left."""
        while (server := self.pick(now := time.monotonic(), tried)) is None:
            self.raise_if_none_left()
            await self._until_room(now)
        return server.lend(request, now)

    def give_back(self, lease: Lease) -> None:
        """The request is over, in whatever way; to say so twice does no harm."""
        if not lease.over:
            lease.over = True
            lease.server.in_flight -= 1
            self.wake()

    def next_change_s(self, now: float) -> float | None:
        """Seconds until a server can be asked again that cannot be now; None where only an answer changes that."""
        waits = [wait_s for server in self.live for wait_s in (server.wait_s(now), server.rest_s(now)) if wait_s > 0]
        return min(waits, default=None)

    def wake(self) -> None:
        """Let all who wait look again; requests that were pulled already come before new ones."""
        for waiting in self._waiting:
            waiting.set_result(None)
        self._waiting.clear()
        for source in self.sources:
            source.set()

    async def _until_room(self, now: float) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[waiting] = None
        try:
            await asyncio.wait([waiting], timeout=self.next_change_s(now))
        finally:
            self._waiting.pop(waiting, None)

    def take_out(self, server: Server, error: EngineError) -> None:
        """Ask a server no more that refuses everything. Raises the error when it was the last."""
        if server in self.live:
            self.live.remove(server)
            self._last_error = error
            if self.live:
                say(f"{error}; going on without it: {len(self.live)} of {len(self.servers)} endpoints remain")
        self.raise_if_none_left()

    def raise_if_none_left(self) -> None:
        """Raise the error of the last server that was taken out."""
        if not self.live:
            assert self._last_error is not None
            raise self._last_error
