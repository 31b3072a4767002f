"""A real HTTP server that speaks the chat dialect, counts what it is asked, and can be told to misbehave."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEEP_ALIVES = 3


@dataclass
class Reply:
    """What the server does with one request; the default is a good answer."""

    status: int = 200
    body: bytes | None = None
    """None answers as a model would: in one piece, or in events where the request asks for a stream."""
    headers: dict[str, str] = field(default_factory=dict)
    how: str = "whole"
    """`whole`, `reset` (connection reset), `truncated` (half the body, then closed), `hang`, `stall` (half the body,
    then silence), `blank-lines` (keep-alives first: blank lines, or comments in a stream), `endless` (never stops
    sending); of streams also `duplicate` (every chunk twice), `no-done` (no `[DONE]`)."""
    delay_s: float = 0.0
    """Before the answer, or before each keep-alive."""


def answer_of(body: dict[str, Any]) -> dict[str, Any]:
    """A deterministic answer: reasoning in a field of its own, the prompt's length as the result."""
    question = body["messages"][-1]["content"]
    message = {
        "content": f"\\boxed{{{len(question)}}}",
        "reasoning_content": f"I count {question!r} by {body['seed']}.",
    }
    return completion(message, model=body["model"])


def completion(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion body."""
    usage = {"prompt_tokens": 7, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 12}}
    return {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage, **more}


def counted(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer whose usage counts a token for each chunk that a stream of it has."""
    message = answer["choices"][0]["message"]
    tokens = sum(len(words(message.get(key))) for key in message)
    return answer | {"usage": answer["usage"] | {"completion_tokens": tokens}}


def words(text: str | None) -> list[str]:
    """A text in pieces that join to it again."""
    return re.findall(r"\s*\S+\s*\Z|\s*\S+", text or "")


def chunks_of(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer: a word each, the finish reason, the usage."""
    choice, usage = answer["choices"][0], answer.get("usage")
    rest = {key: value for key, value in answer.items() if key not in ("choices", "usage")}
    deltas = [{"role": "assistant", "content": ""}]
    for name in ("reasoning_content", "reasoning", "content"):
        deltas += [{name: word} for word in words(choice["message"].get(name))]
    for delta in deltas:
        yield rest | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield rest | {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    yield rest | {"choices": [], "usage": usage}


class ChatServer:
    """Serve on a free port in threads; `requests` holds the bodies in the order in which they came."""

    def __init__(
        self,
        plan: Callable[[int, dict[str, Any]], Reply] = lambda number, body: Reply(),
        answer: Callable[[dict[str, Any]], dict[str, Any]] = answer_of,
        models: list[dict[str, Any]] | None = None,
    ) -> None:
        """`models` is what GET /v1/models lists; None knows no such path."""
        self.plan = plan
        self.answer = answer
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.in_flight = self.most_in_flight = self.connections = 0
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def asked(self) -> Counter[tuple[str, int]]:
        """How often each (question, seed) was asked."""
        return Counter((body["messages"][-1]["content"], body["seed"]) for body in self.requests)

    def take(self, body: dict[str, Any], authorization: str | None) -> Reply:
        with self._lock:
            self.requests.append(body)
            self.authorizations.append(authorization)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return self.plan(len(self.requests), body)

    def done(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def connected(self) -> None:
        with self._lock:
            self.connections += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, chat: ChatServer) -> None:
        self.chat = chat
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle of a request are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.chat.connected()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = self.server.chat.models
        if self.path != "/v1/models" or models is None:
            self._send(404, b'{"error": {"message": "no such path"}}', {})
            return
        self._send(200, json.dumps({"object": "list", "data": models}).encode(), {})

    def do_POST(self) -> None:
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, b'{"error": {"message": "no such path"}}', {})
            return
        reply = chat.take(body, self.headers.get("Authorization"))
        time.sleep(reply.delay_s)
        if reply.how == "hang":
            chat.released.wait(60)
        chat.done()  # before the client can know, so that its next request is not counted beside this one
        self._reply(reply, chat, body)

    def _reply(self, reply: Reply, chat: ChatServer, body: dict[str, Any]) -> None:
        if reply.how in ("hang", "reset"):
            self.close_connection = True
            # linger 0 sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif body.get("stream") and reply.body is None:
            self._stream(reply, [*chunks_of(chat.answer(body))], body)
        elif reply.how == "endless":
            self._send_chunks(reply, "application/json", self._endless(b" " * 65536))
        else:
            payload = json.dumps(chat.answer(body)).encode() if reply.body is None else reply.body
            kept_alive = KEEP_ALIVES if reply.how == "blank-lines" else 0
            self._send(reply.status, payload, reply.headers, reply.how, kept_alive, reply.delay_s)

    def _stream(self, reply: Reply, chunks: list[dict[str, Any]], body: dict[str, Any]) -> None:
        if not body.get("stream_options", {}).get("include_usage"):
            chunks.pop()
        events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
        if reply.how == "duplicate":
            events = [event for event in events for _ in range(2)]
        if reply.how != "no-done":
            events.append(b"data: [DONE]\n\n")
        if reply.how == "endless":
            self._send_chunks(reply, "text/event-stream", self._endless(events[1]))
            return
        comments = [b": keep-alive\n\n"] * (KEEP_ALIVES if reply.how == "blank-lines" else 0)
        self._send_chunks(reply, "text/event-stream", [*comments, *events])

    def _endless(self, part: bytes) -> Iterator[bytes]:
        while not self.server.chat.released.is_set():
            yield part

    def _send_chunks(self, reply: Reply, kind: str, parts: Any) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Type": kind, "Transfer-Encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(parts) // 2 if reply.how in ("truncated", "stall") else None
        for part in parts if half is None else parts[:half]:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            if part.startswith(b":"):
                time.sleep(reply.delay_s)
        self._after_half(reply.how)
        if half is None:
            self.wfile.write(b"0\r\n\r\n")

    def _send(
        self,
        status: int,
        payload: bytes,
        headers: dict[str, str],
        how: str = "whole",
        blank_lines: int = 0,
        every_s: float = 0.0,
    ) -> None:
        self.send_response(status)
        length = str(blank_lines + len(payload))
        for name, value in {"Content-Type": "application/json", "Content-Length": length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for _ in range(blank_lines):
            self.wfile.write(b"\n")
            time.sleep(every_s)
        self.wfile.write(payload[: len(payload) // 2] if how in ("truncated", "stall") else payload)
        self._after_half(how)

    def _after_half(self, how: str) -> None:
        if how == "stall":
            self.server.chat.released.wait(60)
        self.close_connection = self.close_connection or how in ("truncated", "stall")
