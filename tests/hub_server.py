"""As much of the Hugging Face hub as uploading a folder needs, on this machine."""

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "qR7tZk2mVx9bLw4nHs8dJf3cPa6yGe1uT5"


class Hub(ThreadingHTTPServer):
    """One repository, with files of an earlier push; what was committed lies in `files`."""

    token = TOKEN

    def __init__(self, earlier: Sequence[str] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = dict.fromkeys(earlier, b"of an earlier push")
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few addresses that the client asks."""

    server: Hub

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.files]
            self._answer(files)
        else:
            self._answer({"id": "ada/set", "sha": "0" * 40, "siblings": [{"rfilename": f} for f in self.server.files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self._answer({"error": f"no rights for {TOKEN}"}, 403)
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            kind = "datasets/" if self.server.created[-1].get("type") == "dataset" else ""
            self._answer({"url": f"{self.server.url}/{kind}ada/set"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self._answer({"commitUrl": f"{self.server.url}/ada/set/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def running(earlier: Sequence[str] = ()) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub(earlier) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
