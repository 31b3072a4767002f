"""A real HTTP server with a batch interface: it counts what is paid for, misbehaves or kills its client on request."""

import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Line = dict[str, Any]


def answered(item: Line) -> Line:
    """A good line of results: reasoning in a field of its own, the length of the question as the answer."""
    question = item["body"]["messages"][-1]["content"]
    message = {"content": f"\\boxed{{{len(question)}}}", "reasoning_content": f"I count {question!r}."}
    usage = {"prompt_tokens": 100, "completion_tokens": 1000, "completion_tokens_details": {"reasoning_tokens": 900}}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage, "model": "r1-2025"}
    return {"custom_id": item["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def failed(item: Line, status: int, message: str) -> Line:
    """A line of failures with a status of its own."""
    response = {"status_code": status, "body": {"error": {"message": message}}}
    return {"custom_id": item["custom_id"], "response": response, "error": None}


@dataclass
class Ending:
    """How a batch ends: its status, its lines of answers and of failures, and why it was refused as a whole."""

    status: str = "completed"
    answers: Callable[[list[Line]], list[Line]] = lambda items: [answered(item) for item in items]
    failures: Callable[[list[Line]], list[Line]] = lambda items: []
    refusal: tuple[str, str] | None = None


@dataclass
class Trick:
    """What the server does with one request beside answering it."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    how: str = ""
    """`reset` (act, then reset the connection), `reset-before` (do not act), `half` (half the body, then close), `torn`
    (half the body, as if it were whole), `kill` (act, then kill the client), `half-kill` (half the body, then kill)."""


@dataclass
class Stored:
    """A batch at the server."""

    number: int
    document: dict[str, Any]
    items: list[Line]
    others_open: int
    """Batches that were going on when it was created."""
    looks: int = 0


class BatchServer:
    """Serve on a free port in threads.

    `ending(number, items)` says how the batch of a number (from 1) ends; `trick(what, number)` what happens to the
    n-th `upload`, `create`, `look`, `list` or `download`. A batch ends once it was looked at `looks(number)` times.
    """

    def __init__(
        self,
        ending: Callable[[int, list[Line]], Ending] = lambda number, items: Ending(),
        trick: Callable[[str, int], Trick] = lambda what, number: Trick(),
        looks: Callable[[int], int] = lambda number: 2,
    ) -> None:
        self.ending = ending
        self.trick = trick
        self.looks = looks
        self.client: int | None = None
        """Process to kill."""
        self.batches: dict[str, Stored] = {}
        self.files: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.authorizations: set[str | None] = set()
        self.hold = threading.Event()
        self.hold.set()
        """While it is clear, no batch ends."""
        self.lock = threading.RLock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "BatchServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def bought(self) -> Counter[str]:
        """How often each request was part of a batch that the server took."""
        return Counter(item["custom_id"] for batch in self.batches.values() for item in batch.items)

    @property
    def questions(self) -> Counter[str]:
        """How often each question was bought."""
        stored = self.batches.values()
        return Counter(item["body"]["messages"][-1]["content"] for batch in stored for item in batch.items)

    # --- what it does ---

    def store(self, content: bytes) -> dict[str, Any]:
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = content
        return {"id": file_id, "object": "file", "bytes": len(content)}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        number = len(self.batches) + 1
        assert body["endpoint"] == "/v1/chat/completions"
        items = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        kept = {name: body[name] for name in ("input_file_id", "completion_window", "metadata")}
        document = {"id": f"batch_{number}", "status": "validating", "created_at": int(time.time()), **kept}
        others_open = sum(not self.over(batch) for batch in self.batches.values())
        self.batches[document["id"]] = Stored(number, document, items, others_open)
        return document

    def over(self, batch: Stored) -> bool:
        return batch.document["status"] in ("completed", "failed", "expired", "cancelled")

    def look(self, batch: Stored) -> dict[str, Any]:
        batch.looks += 1
        if not self.over(batch):
            batch.document["status"] = "in_progress"
            if batch.looks >= self.looks(batch.number) and self.hold.is_set():
                self.finish(batch)
        return batch.document

    def finish(self, batch: Stored) -> None:
        ending = self.ending(batch.number, batch.items)
        batch.document["status"] = ending.status
        if ending.refusal is not None:
            code, message = ending.refusal
            batch.document["errors"] = {"object": "list", "data": [{"code": code, "message": message}]}
            batch.items.clear()  # nothing of it is answered, and nothing is paid
            return
        for name, lines in (("output_file_id", ending.answers), ("error_file_id", ending.failures)):
            if found := lines(batch.items):
                content = "".join(json.dumps(line) + "\n" for line in found).encode()
                batch.document[name] = self.store(content)["id"]

    def listed(self, query: dict[str, list[str]]) -> dict[str, Any]:
        newest_first = [batch.document for batch in reversed(self.batches.values())]
        after = query.get("after", [None])[0]
        start = next((at + 1 for at, document in enumerate(newest_first) if document["id"] == after), 0)
        end = start + min(2, int(query["limit"][0]))  # small pages, so that they are turned
        return {"object": "list", "data": newest_first[start:end], "has_more": end < len(newest_first)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, state: BatchServer) -> None:
        self.state = state
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle of a request are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state, url = self.server.state, urlsplit(self.path)
        if url.path == "/v1/batches":
            self._answer("list", lambda: json.dumps(state.listed(parse_qs(url.query))).encode())
        elif found := re.fullmatch(r"/v1/batches/(.+)", url.path):
            self._answer("look", lambda: json.dumps(state.look(state.batches[found[1]])).encode())
        elif found := re.fullmatch(r"/v1/files/(.+)/content", url.path):
            self._answer("download", lambda: state.files[found[1]])
        else:
            self._send(404, b'{"error": {"message": "no such path"}}', {})

    def do_POST(self) -> None:
        state = self.server.state
        body = self._body()
        if self.path == "/v1/files":
            content = self._file_of(body)
            self._answer("upload", lambda: json.dumps(state.store(content)).encode())
        elif self.path == "/v1/batches":
            self._answer("create", lambda: json.dumps(state.create(json.loads(body))).encode())
        elif self.path == "/v1/chat/completions":
            item = {"custom_id": "", "body": json.loads(body)}
            self._answer("chat", lambda: json.dumps(answered(item)["response"]["body"]).encode())
        else:
            self._send(404, b'{"error": {"message": "no such path"}}', {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _file_of(self, body: bytes) -> bytes:
        """The uploaded file of a multipart form."""
        boundary = self.headers.get_boundary().encode()
        parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)]
        [content] = [text for head, _, text in parts if b'name="file"' in head]
        assert any(b'name="purpose"' in head and text == b"batch\r\n" for head, _, text in parts)
        return content.removesuffix(b"\r\n")

    def _answer(self, what: str, act: Callable[[], bytes]) -> None:
        state = self.server.state
        with state.lock:
            state.calls[what] += 1
            state.authorizations.add(self.headers.get("Authorization"))
            trick = state.trick(what, state.calls[what])
            if trick.status != 200:
                self._send(trick.status, b'{"error": {"message": "scripted trouble"}}', trick.headers)
                return
            payload = b"" if trick.how == "reset-before" else act()
        if trick.how.startswith("half"):
            self._send(200, payload, {}, cut=True)
        if trick.how.endswith("kill"):
            assert state.client is not None
            os.kill(state.client, signal.SIGKILL)
        if trick.how.startswith("reset") or trick.how == "kill":
            self.close_connection = True
            # linger 0 sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif trick.how in ("", "torn"):
            self._send(200, payload[: len(payload) // 2] if trick.how else payload, {})

    def _send(self, status: int, payload: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if cut else payload)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut
