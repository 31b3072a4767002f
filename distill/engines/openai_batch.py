"""The batch interface of OpenAI-compatible servers: half the price, answers within hours.

Requests are handed in by the thousand, as files; the server holds them, whether or not this process lives. So every
batch is written down before it is created, and a later process collects what an earlier one handed in: nothing is
submitted twice. A batch of which nobody knows whether it was created is looked for at the server, by name. Ctrl-C
leaves all batches where they are. What a batch leaves unanswered (it expired, was cancelled, or the server failed) is
a failure that may pass.
"""

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from distill.config import BatchOptions, Endpoint, FormatConfig, TeacherConfig
from distill.engines import Completion, Probe, Request
from distill.engines.batch_server import Batch, BatchServer, InDoubtError, NotThereError
from distill.engines.batch_state import BatchFolder, HandedIn, Held, ItemResult, custom_id
from distill.engines.openai import OpenAIEngine
from distill.engines.openai.exchange import open_session
from distill.engines.openai.trouble import Trouble, server_message, shown, trouble_of
from distill.engines.openai.wire import (
    BrokenAnswerError,
    ErrorInBodyError,
    completion_of,
    request_body,
    whole_answer,
)
from distill.errors import EngineError
from distill.interrupts import Stop, graceful
from distill.progress import say
from distill.runs import DigestCache, RunOptions

FIRST_POLL_S = 5.0
"""Pause before the first look at a batch; each further one is half as long again, up to `poll_s`."""
IN_DOUBT_S = 30.0
"""How long after a batch was asked for it may still turn up at the server."""
QUIET_S = 3.0
"""A batch that is not full is handed in once nothing has been asked for so long."""
STOP_POLL_S = 0.2
"""How soon a signal is noticed."""
LEAVE_S = 30.0
"""How long a batch that is being handed in when a signal comes may take."""
BYTES_PER_MB = 1_000_000
REMEDY = (
    "check teacher.model, lower teacher.batch.max_requests or max_open if it is too much for the account, then run the"
    " same command"
)
"""What to do about a batch that is refused as a whole."""
HTTP_OK = 200


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """Nothing local decides what a server answers."""
    return {}


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse an address or a key that cannot work; sends nothing.

    Raises EngineError with the remedy.
    """
    OpenAIBatchEngine.from_teacher(teacher, format, options)


class OpenAIBatchEngine:
    """Hands requests in as batches and collects their answers, also those of an earlier process."""

    name = "openai_batch"
    version = "1"
    batch_size: int | None = None

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        options: BatchOptions,
        format: FormatConfig,
        first_delay_s: float = 0.5,
        first_poll_s: float = FIRST_POLL_S,
        in_doubt_s: float = IN_DOUBT_S,
        quiet_s: float = QUIET_S,
    ) -> None:
        """`endpoint.prices` are those of single requests; a batch costs `options.price_ratio` of them."""
        self.options = options
        self.format = format
        self.first_delay_s = first_delay_s
        self.first_poll_s = first_poll_s
        self.in_doubt_s = in_doubt_s
        self.quiet_s = quiet_s
        self._chat = OpenAIEngine(model, endpoint, format)
        self.server = self._chat.pool.servers[0]
        self.folder: BatchFolder | None = None
        self.index: dict[str, Held] = {}
        """The batch that holds a request, by custom id; of several the last one."""

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "OpenAIBatchEngine":
        """The engine of a recipe's teacher. Raises EngineError for an unusable address or a missing key."""
        endpoint = teacher.endpoint.model_copy(update={"prices": teacher.endpoint.prices or teacher.prices})
        return cls(teacher.model, endpoint, teacher.batch, format)

    def keep_state_in(self, folder: Path) -> None:
        """Remember batches in this folder, and take over those that are remembered there.

        Raises EngineError if unfinished ones lie at another server, RunError if the folder is damaged.
        """
        self.folder = BatchFolder(folder)
        url = str(self.server.address)
        for path, record in self.folder.read():
            if record.ended is None and record.url != url:
                raise EngineError(
                    f"{path}: a batch of {len(record.items):,} requests lies at {record.url}, and"
                    f" teacher.endpoint.base_url is {url}; go back to that server to collect it, or delete the file and"
                    " its requests are asked again"
                )
            held = Held(path, record)
            self.index |= dict.fromkeys(record.items, held)

    def holds(self, request: Request) -> bool:
        """Whether a batch of an earlier process has the request or its answer, so that it is not asked again."""
        held = self.index.get(custom_id(request))
        return held is not None and (held.record.ended is None or self.completion(request, held).error is None)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer every request, as batches end.

        Raises EngineError where the server refuses a batch or cannot be reached, Interrupted after a signal; batches
        stay at the server in all cases.
        """
        if self.folder is None:
            raise EngineError(
                "engine: openai_batch answers only where it can remember its batches, in the generate stage; take"
                " engine: openai here"
            )
        with graceful() as stop:
            async with open_session() as session:
                flow = Flow(self, BatchServer(session, self.server, self.first_delay_s), self.folder, stop)
                try:
                    async for completion in flow.run(requests):
                        yield completion
                finally:
                    await flow.cancel()

    async def probe(self, longest: Request) -> Probe:
        """Try the server with one cheap request of the ordinary kind, at the ordinary price."""
        return await self._chat.probe(longest)

    async def close(self) -> None:
        """Connections live only as long as one `generate`."""

    def completion(self, request: Request, held: Held) -> Completion:
        """What an ended batch says to a request."""
        result = held.result(custom_id(request))
        outcome = self._read(request, result, held.record)
        if isinstance(outcome, Trouble):
            return Completion(request.key, error=outcome.said, retryable=outcome.kind != "refused")
        cost_usd = self.server.cost_usd(outcome.usage, outcome.raw)
        return outcome._replace(
            latency_s=max(0.0, time.time() - held.record.handed_in),
            cost_usd=None if cost_usd is None else cost_usd * self.options.price_ratio,
        )

    def _read(self, request: Request, result: ItemResult | None, batch: HandedIn) -> Completion | Trouble:
        address = self.server.address
        if result is None or result.response is None:
            why = shown(address, server_message(json.dumps({"error": result.error}))) if result else "no answer in it"
            return Trouble("again", f"batch {batch.batch_id} {batch.ended}: {why}")
        body = json.dumps(result.response.body, ensure_ascii=False)
        if result.response.status_code != HTTP_OK:
            return trouble_of(address, result.response.status_code, {}, body, proven=True)
        try:
            return completion_of(request, whole_answer(body.encode()), address, self.format)
        except BrokenAnswerError as broken:
            return Trouble("again", shown(address, str(broken)))
        except ErrorInBodyError as error:
            return Trouble("again", shown(address, server_message(error.body)))


class Chunk:
    """Requests on their way into a batch."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.bytes = 0

    def has_room(self, line: bytes, options: BatchOptions) -> bool:
        """Whether one more request fits; a first one always does."""
        fits = self.bytes + len(line) <= options.max_mb * BYTES_PER_MB and len(self.requests) < options.max_requests
        return fits or not self.requests

    def add(self, request: Request, line: bytes) -> None:
        """Take a request in."""
        self.requests[custom_id(request)] = request
        self.bytes += len(line)


class Flow:
    """One `generate`: what was pulled, and a task for each batch."""

    def __init__(self, engine: OpenAIBatchEngine, server: BatchServer, folder: BatchFolder, stop: Stop) -> None:
        self.engine = engine
        self.options = engine.options
        self.server = server
        self.folder = folder
        self.stop = stop
        self.chunk = Chunk()
        self.asked_s = time.monotonic()
        self.again: deque[Request] = deque()
        """Requests of batches that came to nothing, for the next one."""
        self.full = False
        """Whether the server takes no batch before another one has ended."""
        self.watched: dict[asyncio.Task[bool], Held] = {}
        """A task for each batch, which ends with it; its result is False where it came to nothing."""
        self.handing_in = 0
        """Batches that are being handed in at this moment."""
        self.pull: asyncio.Future[Request | None] | None = None
        self.exhausted = False
        """Whether everything has been pulled."""

    async def run(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Pull, hand in, wait, until nothing is owed."""
        source = aiter(requests)
        while not self.exhausted or self.watched or self.again or self.chunk.requests:
            if self.stop.requested:
                await self._leave()
            self._take_more(source)
            await self._wait()
            for completion in chain(self._pulled(), self._collected()):
                yield completion
            quiet_s = time.monotonic() - self.asked_s
            if not self.full and (self.exhausted or quiet_s > self.engine.quiet_s):
                self._hand_in()

    def _take_more(self, source: AsyncIterator[Request]) -> None:
        """Begin a pull, where there is room for another batch."""
        if self.full or len(self.watched) >= self.options.max_open:
            return
        while self.again:
            self._add(self.again.popleft())
        if self.pull is None and not self.exhausted:
            self.pull = asyncio.ensure_future(anext(source, None))

    async def _wait(self) -> None:
        """Until a request or the end of a batch has come, but not for long."""
        if going_on := self._going_on():
            await asyncio.wait(going_on, timeout=STOP_POLL_S, return_when=asyncio.FIRST_COMPLETED)

    def _going_on(self) -> list[asyncio.Future[Any]]:
        return [*self.watched, *([self.pull] if self.pull else [])]

    def _pulled(self) -> Iterator[Completion]:
        """Take in a request that has come."""
        if self.pull is None or not self.pull.done():
            return
        request, self.pull = self.pull.result(), None
        self.exhausted = request is None
        if request is not None and (completion := self._take(request)) is not None:
            yield completion

    def _collected(self) -> Iterator[Completion]:
        """The answers of batches that have ended; raises what stopped one."""
        for task in [task for task in self.watched if task.done()]:
            yield from self._collect(task)

    def _take(self, request: Request) -> Completion | None:
        """Find a request the batch that has it, or a place in the next one; its answer if that is there already."""
        self.asked_s = time.monotonic()
        held = self.engine.index.get(custom_id(request))
        if held is not None and held.record.ended is not None:
            completion = self.engine.completion(request, held)
            if completion.error is None:
                return completion
            held = None  # it was answered with a failure: asked again means asked again
        if held is None:
            self._add(request)
        else:
            held.waiting[custom_id(request)] = request
            if held not in self.watched.values():
                self._watch(held)
        return None

    def _add(self, request: Request) -> None:
        line = self._line(request)
        if not self.chunk.has_room(line, self.options):
            self._hand_in()
        self.chunk.add(request, line)

    def _line(self, request: Request) -> bytes:
        body = json.loads(request_body(self.server.address.model, request, stream=False))
        item = {"custom_id": custom_id(request), "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(item, ensure_ascii=False).encode() + b"\n"

    # --- one batch ---

    def _hand_in(self) -> None:
        """Make a batch of what was pulled."""
        if not self.chunk.requests:
            return
        waiting, self.chunk = self.chunk.requests, Chunk()
        name = f"distill-{secrets.token_hex(8)}"
        record = HandedIn(
            name=name, url=str(self.server.address), input_file_id="", handed_in=0.0, items=tuple(waiting)
        )
        held = Held(self.folder.path(name), record, waiting)
        self.engine.index |= dict.fromkeys(waiting, held)
        self._watch(held)

    def _watch(self, held: Held) -> None:
        self.watched[asyncio.create_task(self._see_through(held))] = held

    async def _see_through(self, held: Held) -> bool:
        """Wait until a batch has ended and its results are here; False if it was never created, or came too soon."""
        if not held.record.input_file_id:
            self.handing_in += 1
            try:
                await self._create(held)
            finally:
                self.handing_in -= 1
        elif held.record.batch_id is None and not await self._created_after_all(held):
            held.forget()
            return False
        try:
            batch = await self._wait_for(held)
            for file_id, path in zip((batch.output_file_id, batch.error_file_id), held.files):
                if file_id:
                    await self.server.download(file_id, path)
        except NotThereError as error:
            raise EngineError(
                f"{self.server.address} does not know batch {held.record.batch_id}, or its results, any more ({error});"
                f" use the account that handed it in, or delete {held.path} and its requests are asked again"
            ) from None
        held.remember(ended=batch.status.lower())
        for left_by_a_kill in held.path.parent.glob(f"{held.record.name}.*.part"):
            left_by_a_kill.unlink(missing_ok=True)
        if held.record.ended != "failed" or batch.output_file_id:
            return True
        said = f"{self.server.address} refused batch {batch.id}: {shown(self.server.address, batch.refusal)}"
        others = [task for task, other in self.watched.items() if other is not held and not task.done()]
        if not (batch.came_too_soon and others):
            raise EngineError(f"{said}; {REMEDY}")
        say(f"{said}; its requests wait until another batch has ended")
        self.full = True
        return False

    async def _create(self, held: Held) -> None:
        """Upload, write down, create, write down: in this order, so that a kill between any two loses nothing."""
        lines = b"".join(self._line(request) for request in held.waiting.values())
        input_file_id = await self.server.upload(held.record.name, lines)
        attempt, tries = 0, self.server.server.endpoint.max_retries + 1
        while held.record.batch_id is None:
            held.remember(input_file_id=input_file_id, handed_in=time.time())
            try:
                batch = await self.server.create(held.record.name, input_file_id, self.options.completion_window)
                held.remember(batch_id=batch.id)
            except InDoubtError as doubt:
                attempt += 1
                if not await self._created_after_all(held) and attempt == tries:
                    raise EngineError(
                        f"{self.server.address}: a batch could not be created: {doubt} (tried {tries} times);"
                        " run the same command to go on"
                    ) from None
        say(f"batch {held.record.batch_id} with {len(held.record.items):,} requests is at {self.server.address}")

    async def _created_after_all(self, held: Held) -> bool:
        """Look for a batch that may have been created, for as long as it may still turn up."""
        attempt = 0
        while True:
            late = time.time() >= held.record.handed_in + self.engine.in_doubt_s
            found = await self.server.find(held.record.name, held.record.input_file_id, held.record.handed_in)
            if found is not None:
                held.remember(batch_id=found.id)
                return True
            if late:
                return False
            await asyncio.sleep(self.server.delay_s(attempt))
            attempt += 1

    async def _wait_for(self, held: Held) -> Batch:
        """Look now and then until a batch has ended."""
        assert held.record.batch_id is not None
        pause_s = self.engine.first_poll_s
        while not (batch := await self.server.look(held.record.batch_id)).ended:
            await asyncio.sleep(min(pause_s, self.options.poll_s))
            pause_s *= 1.5
        return batch

    def _collect(self, task: asyncio.Task[bool]) -> Iterator[Completion]:
        """The answers of one batch."""
        held = self.watched.pop(task)
        waiting, held.waiting = held.waiting, {}
        if not task.result():
            self.again.extend(waiting.values())
            return
        self.full = False
        say(f"batch {held.record.batch_id} is {held.record.ended}: {len(waiting):,} of its requests are dealt with")
        for request in waiting.values():
            yield self.engine.completion(request, held)

    # --- the end ---

    async def _leave(self) -> None:
        """Stop waiting; what is being handed in is handed in first. Raises Interrupted."""
        latest_s = time.monotonic() + LEAVE_S
        while self.handing_in and time.monotonic() < latest_s:
            await asyncio.sleep(STOP_POLL_S)
        requests = sum(len(held.waiting) for held in self.watched.values())
        if requests:
            say(
                f"stopping: {len(self.watched):,} batches with {requests:,} requests stay at {self.server.address},"
                " which goes on with them; run the same command to collect their answers"
            )
        self.stop.raise_if_requested()

    async def cancel(self) -> None:
        """Drop what this process does; the server's part goes on."""
        for future in self._going_on():
            future.cancel()
        await asyncio.gather(*self._going_on(), return_exceptions=True)
