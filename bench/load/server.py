"""A chat server as fast as Python allows, in a process of its own: it never is what a client benchmark measures.

    python bench/load/server.py [--median-s 4 --sigma 0.5 --seed 0]

Prints its port, then serves until its stdin closes. Every answer is the same kilobyte, ready made; it comes at once, or
after a log-normal latency. GET /stats says how many requests came and how many were answered. It reads no more of
HTTP than its own clients send: whole requests with a Content-Length, on kept connections.
"""

import argparse
import asyncio
import json
import math
import random
import sys
from collections.abc import Callable

ANSWER = "42"
"""What every answer ends with, boxed; the benchmarks' prompts have it as their gold."""
REASONING = "Let me think step by step. " * 36


def chat_completion() -> bytes:
    """A whole response: status line, headers, about a kilobyte of reasoning and answer."""
    message = {
        "role": "assistant",
        "reasoning_content": REASONING,
        "content": f"The answer is \\boxed{{{ANSWER}}}.",
    }
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    details = {"reasoning_tokens": 220}
    usage = {
        "prompt_tokens": 24,
        "completion_tokens": 240,
        "total_tokens": 264,
        "completion_tokens_details": details,
    }
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "bench", "choices": [choice], "usage": usage}
    return response(json.dumps(body).encode())


def response(body: bytes) -> bytes:
    """A 200 answer with a JSON body."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Load:
    """What all connections share: the answer, the latencies and the counts."""

    def __init__(self, median_s: float, sigma: float, seed: int) -> None:
        self.answer = chat_completion()
        self.started = self.completed = self.most_in_flight = 0
        rng = random.Random(seed)
        mu = math.log(median_s) if median_s else 0.0
        self.latency_s: Callable[[], float] | None = (lambda: rng.lognormvariate(mu, sigma)) if median_s else None

    def stats(self) -> bytes:
        """The counts as a response."""
        counts = {
            "started": self.started,
            "completed": self.completed,
            "in_flight": self.started - self.completed,
            "most_in_flight": self.most_in_flight,
        }
        return response(json.dumps(counts).encode())


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time on it."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every whole request in the buffer."""
        self.buffer = self.buffer + data if self.buffer else data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            total = end + 4 + content_length(self.buffer[:end])
            if len(self.buffer) < total:
                return
            request, self.buffer = self.buffer[:total], self.buffer[total:]
            self.serve(request)

    def serve(self, request: bytes) -> None:
        """Count and answer, now or later."""
        if request.startswith(b"GET /stats"):
            self.transport.write(self.load.stats())
            return
        if not request.startswith(b"POST"):
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        load = self.load
        load.started += 1
        load.most_in_flight = max(load.most_in_flight, load.started - load.completed)
        if load.latency_s is None:
            self.answer()
        else:
            asyncio.get_running_loop().call_later(load.latency_s(), self.answer)

    def answer(self) -> None:
        """Send the one answer there is; who has gone away gets none, but was asked for."""
        self.load.completed += 1
        if not self.transport.is_closing():
            self.transport.write(self.load.answer)


def content_length(head: bytes) -> int:
    """The length of a request's body; 0 where the head does not say."""
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def serve(load: Load) -> None:
    """Serve until stdin closes."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(load), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--median-s", type=float, default=0.0, help="median latency; 0 answers at once")
    parser.add_argument("--sigma", type=float, default=0.5, help="sigma of the log-normal latency")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    asyncio.run(serve(Load(given.median_s, given.sigma, given.seed)))


if __name__ == "__main__":
    main()
