"""What a client may take: sizes, times, places in the queue, connections.

`Gate` stands between the sockets and the HTTP server: it refuses connections beyond the limit and closes those that do
not send the headers of their first request in time. Everything later is the HTTP server's and the handlers' to time.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

HEADERS_END = b"\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    body_bytes: int = 1 << 20
    """Largest request body."""
    prompt_tokens: int = 4096
    new_tokens: int = 2048
    """Most tokens of one answer; asked for more, it is cut there."""
    choices: int = 8
    """Largest `n`."""
    queue: int = 128
    """Requests that wait for a place in the batch; further ones are refused with 429."""
    rows: int = 64
    """Texts written at once."""
    request_s: float = 600.0
    """Seconds for a whole answer, waiting included."""
    read_s: float = 10.0
    """Seconds for the headers of a request, and again for its body; also how long an idle connection is kept."""
    connections: int = 512
    drain_s: float = 30.0
    """Seconds that running answers have to finish after SIGTERM or SIGINT."""
    cache_gb: float = 4.0
    """Memory for keys and values."""


@dataclass
class Connections:
    """How many are open, and how many may be."""

    most: int
    read_s: float
    open: int = 0
    refused: int = 0


@dataclass
class Gate(asyncio.Protocol):
    """One connection in front of the HTTP server's protocol `inner`."""

    inner: Any
    connections: Connections
    _first: bytes = b""
    _timer: asyncio.TimerHandle | None = None
    _admitted: bool = field(default=False)

    def connection_made(self, transport: Any) -> None:
        """Admit or refuse."""
        if self.connections.open >= self.connections.most:
            self.connections.refused += 1
            transport.write(TOO_MANY)
            transport.close()
            return
        self.connections.open += 1
        self._admitted = True
        self._timer = asyncio.get_running_loop().call_later(self.connections.read_s, transport.abort)
        self.inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Pass on, and stop the clock when the first headers are whole."""
        if not self._admitted:
            return
        if self._timer is not None:
            self._first = (self._first + data)[-(len(data) + len(HEADERS_END)) :]
            if HEADERS_END in self._first:
                self._stop_clock()
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass on."""
        return bool(self.inner.eof_received()) if self._admitted else None

    def pause_writing(self) -> None:
        """Pass on."""
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on."""
        self.inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """Free the place."""
        self._stop_clock()
        if self._admitted:
            self.connections.open -= 1
            self.inner.connection_lost(error)

    def _stop_clock(self) -> None:
        self._first = b""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
