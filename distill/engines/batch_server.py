"""The batch interface of an OpenAI-compatible server: upload, create, look, find, download.

What can pass by itself is tried again with back-off. Only creating a batch is never tried again blindly: where nobody
knows whether it was made, `create` says so and the caller looks for it by its name.
"""

import asyncio
import io
import json
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError
from yarl import URL

from distill.engines.openai.exchange import CONNECTION_ERRORS, LARGEST_ERROR, connection_trouble, start_of
from distill.engines.openai.pool import Server
from distill.engines.openai.trouble import Trouble, as_error, server_message, shown, trouble_of
from distill.errors import EngineError

HTTP_OK = 200
NAME_KEY = "distill_batch"
"""Key under which a batch carries the name that we gave it."""
LISTED_AT_ONCE = 100
CLOCKS_DIFFER_S = 24 * 3600
"""How much older than we think a batch may look: clocks differ."""
LONGEST_DELAY_S = 60.0
PART_BYTES = 1 << 20
ENDED = {"completed", "failed", "expired", "cancelled"}
FULL = re.compile(r"token_limit_exceeded|enqueued|rate.?limit|too many", re.I)
"""Words with which a batch is refused because others are not done yet."""

ResultT = TypeVar("ResultT")


class BatchErrors(BaseModel):
    """Why a whole batch was refused."""

    data: list[dict[str, Any]] = []


class Batch(BaseModel):
    """A batch as the server tells of it; what we do not read is ignored."""

    id: str
    status: str = ""
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: BatchErrors | None = None
    metadata: dict[str, Any] | None = None
    created_at: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status.lower() in ENDED

    @property
    def refusal(self) -> str:
        """Why the server did not take it, as it says itself."""
        told = [f"{error.get('code')}: {error.get('message')}" for error in (self.errors or BatchErrors()).data]
        return "; ".join(told) or f"status {self.status}, without a reason"

    @property
    def came_too_soon(self) -> bool:
        """Whether it was refused because the account has as much handed in as it may."""
        return self.status.lower() == "failed" and FULL.search(self.refusal) is not None


class BatchPage(BaseModel):
    """A part of the list of batches, newest first."""

    data: list[Batch] = []
    has_more: bool = False


class StoredFile(BaseModel):
    """A file at the server."""

    id: str


class PassingError(Exception):
    """Trouble that can pass by itself."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.said)
        self.trouble = trouble


class NotThereError(EngineError):
    """The server has no such thing: no batches at all, or not this one any more."""


class InDoubtError(Exception):
    """A batch may have been made, and may not."""


class BatchServer:
    """One server's batch interface, over an open session."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, first_delay_s: float) -> None:
        self.session = session
        self.server = server
        self.address = server.address
        self.first_delay_s = first_delay_s

    async def upload(self, name: str, lines: bytes) -> str:
        """Store a file of requests; returns its id. Twice is once too often, but costs nothing."""

        async def send() -> str:
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", io.BytesIO(lines), filename=f"{name}.jsonl", content_type="application/jsonl")
            return read(StoredFile, await self._ask("POST", "files", data=form)).id

        return await self._until_answered(send)

    async def create(self, name: str, input_file_id: str, completion_window: str) -> Batch:
        """Have a stored file answered; this is what is paid for.

        Raises InDoubtError where the batch may have been made, EngineError where it was refused.
        """
        body = {
            "input_file_id": input_file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": completion_window,
            "metadata": {NAME_KEY: name},
        }

        async def ask() -> Batch:
            try:
                return read(Batch, await self._ask("POST", "batches", json=body))
            except PassingError as passing:
                if passing.trouble.kind == "later":  # it said when to come back, so it has made nothing
                    raise
                raise InDoubtError(str(passing)) from None

        return await self._until_answered(ask)

    async def look(self, batch_id: str) -> Batch:
        """How a batch stands."""

        async def ask() -> Batch:
            return read(Batch, await self._ask("GET", "batches", batch_id))

        return await self._until_answered(ask)

    async def find(self, name: str, input_file_id: str, handed_in: float) -> Batch | None:
        """The batch of a name or of an input file, if there is one; `handed_in` is when it was made at the earliest."""
        after: str | None = None
        while True:
            page = await self._page(after)
            for batch in page.data:
                if batch.input_file_id == input_file_id or (batch.metadata or {}).get(NAME_KEY) == name:
                    return batch
                if batch.created_at is not None and batch.created_at < handed_in - CLOCKS_DIFFER_S:
                    return None
            if not (page.has_more and page.data):
                return None
            after = page.data[-1].id

    async def _page(self, after: str | None) -> BatchPage:
        params = {"limit": str(LISTED_AT_ONCE)} | ({"after": after} if after else {})

        async def ask() -> BatchPage:
            return read(BatchPage, await self._ask("GET", "batches", params=params))

        return await self._until_answered(ask)

    async def download(self, file_id: str, target: Path) -> None:
        """Store a file of results; it is there whole or not at all."""
        part = target.with_name(f"{target.name}.{os.getpid()}.part")

        async def fetch() -> None:
            url = self.address.at("files", file_id, "content")
            with part.open("wb") as out:
                await self._ask_at("GET", url, write=out.write)
                out.flush()
                os.fsync(out.fileno())
            if not ends_whole(part):
                raise PassingError(Trouble("again", f"file {file_id} broke off"))
            os.replace(part, target)

        try:
            await self._until_answered(fetch)
        finally:
            part.unlink(missing_ok=True)

    # --- one exchange ---

    async def _ask(self, method: str, *path: str, **more: Any) -> bytes:
        return await self._ask_at(method, self.address.at(*path), **more)

    async def _ask_at(self, method: str, url: URL, write: Callable[[bytes], int] | None = None, **more: Any) -> bytes:
        """The body of a good answer, or its parts to `write`. Raises PassingError or EngineError."""
        # a form brings a content type of its own
        headers = {name: value for name, value in self.address.headers.items() if name != "Content-Type"}
        try:
            async with self.session.request(
                method,
                url,
                headers=headers,
                timeout=self.server.timeout,
                proxy=self.server.proxy,
                allow_redirects=False,
                **more,
            ) as response:
                if response.status != HTTP_OK:
                    body = (await start_of(response, LARGEST_ERROR)).decode(errors="replace")
                    raise self._refused(response.status, response.headers, body)
                if write is None:
                    return await response.read()
                async for part in response.content.iter_chunked(PART_BYTES):
                    write(part)
                return b""
        except CONNECTION_ERRORS as error:
            raise self._as_error(connection_trouble(self.server, error)) from None

    def _refused(self, status: int, headers: Mapping[str, str], body: str) -> Exception:
        if status in (404, 405):
            said = f"{status} {shown(self.address, server_message(body))}".strip()
            return NotThereError(
                f"{self.address} has no batch interface ({said}); check its base_url (up to /v1), or use engine: openai"
            )
        if status == 413:
            return EngineError(f"{self.address}: the batch is too large ({status}); lower teacher.batch.max_mb")
        return self._as_error(trouble_of(self.address, status, headers, body, proven=False))

    def _as_error(self, trouble: Trouble) -> Exception:
        return PassingError(trouble) if trouble.kind in ("again", "later") else as_error(trouble)

    async def _until_answered(self, ask: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """What `ask` gives, tried again while the trouble can pass. Raises EngineError when it does not."""
        tries = self.server.endpoint.max_retries + 1
        said = ""
        for attempt in range(tries):
            try:
                return await ask()
            except PassingError as passing:
                said = passing.trouble.said
                if attempt + 1 < tries:
                    await asyncio.sleep(self.delay_s(attempt, passing.trouble.wait_s))
        raise EngineError(
            f"{self.address}: {said} (tried {tries} times); batches that were handed in stay at the server: run the"
            " same command to go on"
        )

    def delay_s(self, attempt: int, wait_s: float = 0.0) -> float:
        """Full jitter on top of what the server asked for."""
        return wait_s + random.uniform(0, min(LONGEST_DELAY_S, self.first_delay_s * 2**attempt))


ModelT = TypeVar("ModelT", bound=BaseModel)


def read(kind: type[ModelT], body: bytes) -> ModelT:
    """A body as what it should be. Raises PassingError for anything else: gateways send odd pages on bad days."""
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        raise PassingError(Trouble("again", f"not a {kind.__name__}: {body[:80].decode(errors='replace')!r}")) from None


def ends_whole(path: Path) -> bool:
    """Whether the last line of a JSON Lines file is whole; an empty file is."""
    last = b""
    with path.open("rb") as lines:
        for line in lines:
            last = line
    try:
        return not last.strip() or isinstance(json.loads(last), dict)
    except ValueError:
        return False
