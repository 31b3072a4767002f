"""A real HTTP server that speaks the chat dialect, counts what it is asked, and can be told to misbehave."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request; the default is a good answer."""

    status: int = 200
    body: bytes | None = None
    """None answers as a model would."""
    headers: dict[str, str] = field(default_factory=dict)
    how: str = "whole"
    """`whole`, `reset` (connection reset), `truncated` (half the body, then closed), `hang`, `blank-lines`."""
    delay_s: float = 0.0


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


class ChatServer:
    """Serve on a free port in threads; `requests` holds the bodies in the order in which they came."""

    def __init__(
        self,
        plan: Callable[[int, dict[str, Any]], Reply] = lambda number, body: Reply(),
        answer: Callable[[dict[str, Any]], dict[str, Any]] = answer_of,
    ) -> None:
        self.plan = plan
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.in_flight = self.most_in_flight = 0
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

    def log_message(self, *_: object) -> None:
        pass

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
            return
        payload = json.dumps(chat.answer(body)).encode() if reply.body is None else reply.body
        blank = b"\n\n\n" if reply.how == "blank-lines" else b""
        self._send(reply.status, blank + payload, reply.headers, cut=reply.how == "truncated")

    def _send(self, status: int, payload: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if cut else payload)
        self.close_connection = self.close_connection or cut
