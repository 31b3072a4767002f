"""An OpenAI-compatible chat endpoint: bounded concurrency, retries, reasoning in every dialect.

What can pass by itself (429, 5xx, time-outs, resets, empty or broken 200 bodies) is tried again with full-jitter
back-off; what cannot (a refused key, an unknown model, an invalid request) stops the run at once with the remedy; a
prompt that the server will not answer (too long, filtered) becomes a failed completion. The key is read from the
environment, goes into one header, and is cut out of everything the server says before anybody sees it.
"""

import asyncio
import ipaddress
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from distill.config import Endpoint, FormatConfig, TeacherConfig
from distill.engines import Completion, Request
from distill.errors import EngineError
from distill.format import parse_fields, with_system
from distill.records import FinishReason, Usage
from distill.runs import DigestCache, RunOptions

FIRST_DELAY_S = 0.5
"""Longest pause before the first retry; doubled for each further one."""
LONGEST_DELAY_S = 60.0
"""Longest pause of our own choosing."""
LONGEST_RETRY_AFTER_S = 600.0
"""Longest pause a server may ask for."""
CONNECT_TIMEOUT_S = 30.0
"""Longest time to reach a server; the endpoint's own time-out where that is shorter."""
PASSING_STATUS = {408, 409, 425, 429}
"""Statuses below 500 that can pass by themselves."""
SHORTEST_SECRET = 8
"""A shorter key (`EMPTY`, `none`) is a placeholder for a server without keys, and may well stand in an answer."""
SHOWN_CHARS = 300
"""How much of a server's message is quoted."""

FINISH: dict[str | None, FinishReason] = {
    "stop": "stop", "eos": "stop", "end_turn": "stop", "stop_sequence": "stop", "length": "length",
    "max_tokens": "length",
}  # fmt: skip
"""Servers' words for why an answer ended; any other is `unknown`."""

ONE_PROMPT = re.compile(r"context.{0,10}(length|window|size)|too long|content.{0,20}(filter|risk)", re.I)
"""Messages of a 400 that concern this prompt only: it does not fit, or a filter refuses it."""


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """Nothing local decides what a server answers."""
    return {}


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse an address or a key that cannot work; sends nothing.

    Raises EngineError with the remedy.
    """
    OpenAIEngine.from_teacher(teacher, format, options)


# --- address and key ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ApiKey:
    """A key and the environment variable it came from; only the latter is ever shown."""

    env: str
    value: str = field(repr=False)

    def cut_from(self, text: str) -> str:
        """The text with the variable's name wherever the key stood."""
        return text.replace(self.value, f"<{self.env}>") if len(self.value) >= SHORTEST_SECRET else text


def checked_address(base_url: str) -> httpx.URL:
    """The endpoint's address. Raises EngineError if it is none, or holds something secret."""
    where = "teacher.endpoint.base_url"
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise EngineError(f"{where}: not an address ({error}); give it like https://api.deepseek.com/v1") from None
    if url.userinfo or url.query or url.fragment:
        raise EngineError(
            f"{where}: it carries a user, query or fragment; give the bare address up to /v1, and the key in the"
            " environment variable that teacher.endpoint.api_key_env names"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise EngineError(f"{where} is {base_url!r}; give it like https://api.deepseek.com/v1")
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise EngineError(f"{where} is {base_url!r}; leave out /chat/completions, it is added")
    return url


def is_local(host: str) -> bool:
    """Whether a host is this machine or a private network, where servers need no key."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_private or address.is_loopback or address.is_unspecified


def key_from_environment(endpoint: Endpoint, url: httpx.URL) -> ApiKey | None:
    """The key; None where there is none and none is needed.

    Raises EngineError naming the variable, never its value.
    """
    name = endpoint.api_key_env
    value = os.environ.get(name, "").strip()
    if not value:
        if is_local(url.host):
            return None
        raise EngineError(
            f"{url} needs a key: set the environment variable {name} (or name another one in"
            " teacher.endpoint.api_key_env); any text will do for a server that asks for none"
        )
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise EngineError(f"the environment variable {name} holds characters that no key has; set it again")
    return ApiKey(name, value)


# --- what servers answer --------------------------------------------------------------------------------------------


class TokenDetails(BaseModel):
    """Parts of the output tokens."""

    reasoning_tokens: int | None = None


class TokenUsage(BaseModel):
    """Tokens as the server counted them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: TokenDetails | None = None


class ChatMessage(BaseModel):
    """The answer; servers call the field of the reasoning by either name, or leave it in the content."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(BaseModel):
    """One sample."""

    message: ChatMessage
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    """The body of a good answer; what we do not read is ignored."""

    choices: list[Choice] = Field(min_length=1)
    usage: TokenUsage | None = None
    model: str | None = None
    system_fingerprint: str | None = None


class TransientError(Exception):
    """Trouble that can pass by itself."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class PromptRefusedError(Exception):
    """One prompt that will not be answered, however often it is asked."""


def server_message(response: httpx.Response) -> str:
    """What the server says went wrong, in one line."""
    try:
        body: Any = response.json()
    except ValueError:
        body = response.text
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    return " ".join(str(body).split()) or response.reason_phrase


def retry_after_s(response: httpx.Response) -> float:
    """Seconds the server asks to wait, by number or by date; 0 where it does not say."""
    given = response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date either, or one without a time zone
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


# --- the engine -----------------------------------------------------------------------------------------------------


class OpenAIEngine:
    """Asks one OpenAI-compatible server, `endpoint.concurrency` requests at a time."""

    name = "openai"
    version = "1"
    batch_size: int | None = None

    def __init__(
        self, model: str, endpoint: Endpoint, format: FormatConfig, first_delay_s: float = FIRST_DELAY_S
    ) -> None:
        self.model = model
        self.endpoint = endpoint
        self.format = format
        self.first_delay_s = first_delay_s
        self.url = checked_address(endpoint.base_url)
        self._key = key_from_environment(endpoint, self.url)
        self._random = random.Random()  # jitter must differ between clients, so it has no seed

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "OpenAIEngine":
        """The engine of a recipe's teacher. Raises EngineError for an unusable address or a missing key."""
        return cls(teacher.model, teacher.endpoint, format)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer every request, in the order in which answers come.

        A request is pulled when there is room for it, just before it is sent, and its room is free again when the
        caller has come back for more: never are more than `concurrency` pulled and not yet dealt with. Raises
        EngineError where no request can succeed; whatever the iterable raises comes out here.
        """
        source, room = _Source(requests), asyncio.Semaphore(self._lanes)
        finished: asyncio.Queue[Completion | Exception | None] = asyncio.Queue()
        trusted = httpx.create_ssl_context()
        running = self._lanes
        lanes = [asyncio.create_task(self._lane(trusted, source, room, finished)) for _ in range(running)]
        try:
            while running:
                item = await finished.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
                    room.release()
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    @property
    def _lanes(self) -> int:
        return 16 if self.endpoint.concurrency == "auto" else self.endpoint.concurrency

    async def close(self) -> None:
        """Connections live only as long as one `generate`."""

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent for one request."""
        return {
            "model": self.model,
            "messages": with_system(request.prompt.messages, request.system),
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "max_tokens": request.sampling.max_new_tokens,
            "seed": request.seed,
        }

    def _client(self, trusted: ssl.SSLContext) -> httpx.AsyncClient:
        """A client for one lane: one connection, idle time-outs, no redirects.

        A client for all lanes would search its pool for every request: 64 lanes then take ten times the processor time
        a request, 1,024 lanes fifteen times.
        """
        timeout_s = self.endpoint.timeout_s
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self._key.value}"} if self._key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            limits=httpx.Limits(max_connections=1),
            verify=trusted,
            trust_env=not is_local(self.url.host),  # a proxy of the environment cannot reach this machine's servers
        )

    async def _lane(
        self,
        trusted: ssl.SSLContext,
        source: "_Source",
        room: asyncio.Semaphore,
        finished: asyncio.Queue[Completion | Exception | None],
    ) -> None:
        """Pull, ask, hand over, until there is nothing to pull."""
        try:
            async with self._client(trusted) as client:
                while await room.acquire() and (request := await source.next()) is not None:
                    finished.put_nowait(await self._answer(client, request))
        except Exception as error:  # the consumer raises it; a task of its own would keep it to itself
            finished.put_nowait(error)
        room.release()
        finished.put_nowait(None)

    async def _answer(self, client: httpx.AsyncClient, request: Request) -> Completion:
        """One request with its retries."""
        tries = self.endpoint.max_retries + 1
        trouble = ""
        for attempt in range(1, tries + 1):
            started = time.perf_counter()
            try:
                completion = await self._ask(client, request)
                return completion._replace(latency_s=time.perf_counter() - started, attempts=attempt)
            except PromptRefusedError as refusal:
                return Completion(request.key, finish_reason="error", error=str(refusal), attempts=attempt)
            except TransientError as again:
                trouble = str(again)
                if attempt < tries:
                    await asyncio.sleep(self._delay_s(attempt, again.after_s))
        return Completion(request.key, finish_reason="error", error=f"{trouble} (tried {tries} times)", attempts=tries)

    def _delay_s(self, attempt: int, after_s: float) -> float:
        """Full jitter (a uniform part of a doubling ceiling), on top of what the server asked for."""
        return after_s + self._random.uniform(0, min(LONGEST_DELAY_S, self.first_delay_s * 2 ** (attempt - 1)))

    async def _ask(self, client: httpx.AsyncClient, request: Request) -> Completion:
        """One HTTP exchange. Raises TransientError, PromptRefusedError or EngineError."""
        try:
            response = await client.post("chat/completions", json=self.body(request))
        except httpx.TimeoutException:
            raise TransientError(f"no answer within {self.endpoint.timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise TransientError(self._clean(f"connection failed: {type(error).__name__}: {error}")) from None
        if response.status_code != httpx.codes.OK:
            raise self._trouble(response)
        try:
            body = ChatCompletion.model_validate_json(response.content)
        except ValidationError:
            raise TransientError(f"not a chat completion: {self._said(response)!r}") from None
        return self._read(request, body)

    def _trouble(self, response: httpx.Response) -> Exception:
        """What an answer other than 200 means: try again, give this prompt up, or stop."""
        status = response.status_code
        said = f"{status} {self._said(response)}"
        if status == httpx.codes.TOO_MANY_REQUESTS and "insufficient_quota" in response.text:
            return self._fatal(httpx.codes.PAYMENT_REQUIRED, said)
        if status in PASSING_STATUS or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return TransientError(said, retry_after_s(response))
        if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE or (status == 400 and ONE_PROMPT.search(response.text)):
            return PromptRefusedError(said)
        if response.is_redirect:
            said = f"{status}, moved to {self._clean(response.headers.get('location', '?'))}"
        return self._fatal(status, said)

    def _fatal(self, status: int, said: str) -> EngineError:
        key = f"the key in {self.endpoint.api_key_env}" if self._key else "no key"
        remedy = {
            401: f"it was sent {key}; set {self.endpoint.api_key_env} to a valid one",
            402: f"add credit to the account of {key}",
            403: f"{key} may not use model {self.model!r} here; check teacher.model and the account's permissions",
            404: f"check teacher.endpoint.base_url (up to /v1) and that the server has the model {self.model!r}",
        }.get(status, "check teacher.model, teacher.sampling and teacher.endpoint")
        return EngineError(f"{self.url} refused the request ({said}): {remedy}")

    def _read(self, request: Request, body: ChatCompletion) -> Completion:
        """The fields of a good answer. Raises TransientError or PromptRefusedError for one that only looks good."""
        message, finish = body.choices[0].message, body.choices[0].finish_reason
        usage = usage_of(body.usage)
        content = self._clean(message.content or "")
        reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
        reasoning = None if reasoning is None else self._clean(reasoning)
        if finish == "content_filter":
            raise PromptRefusedError("the server's content filter cut the answer off")
        if finish == "insufficient_system_resource" or not (content or reasoning or usage.output):
            raise TransientError(f"an empty answer (finish_reason {finish})")
        markers = {"open_marker": self.format.open_marker, "close_marker": self.format.close_marker}
        parsed = parse_fields(reasoning, content, **markers)
        return Completion(
            key=request.key,
            reasoning=parsed.reasoning,
            answer=parsed.answer,
            raw=rejoined(reasoning, content, self.format),
            think=parsed.think,
            finish_reason=FINISH.get(finish, "unknown"),
            usage=usage,
            model=body.model and self._clean(body.model),
            revision=body.system_fingerprint and self._clean(body.system_fingerprint),
        )

    def _said(self, response: httpx.Response) -> str:
        """The server's message, cut short only after the key was cut out, so that no part of one is left."""
        return self._clean(server_message(response))[:SHOWN_CHARS]

    def _clean(self, text: str) -> str:
        return self._key.cut_from(text) if self._key else text


class _Source:
    """Requests for several lanes, pulled one after the other."""

    def __init__(self, requests: AsyncIterable[Request]) -> None:
        self._requests = aiter(requests)
        self._one = asyncio.Lock()

    async def next(self) -> Request | None:
        async with self._one:
            return await anext(self._requests, None)


def usage_of(usage: TokenUsage | None) -> Usage:
    """The server's counts as ours; zeros where it gives none."""
    if usage is None:
        return Usage()
    details = usage.completion_tokens_details
    return Usage(
        input=usage.prompt_tokens or 0,
        output=usage.completion_tokens or 0,
        reasoning=details.reasoning_tokens if details else None,
    )


def rejoined(reasoning: str | None, content: str, format: FormatConfig) -> str:
    """The text a model would have written in one piece: reasoning of a separate field between the markers."""
    if not reasoning:
        return content
    closed = f"\n{format.close_marker}\n\n{content}" if content.strip() else ""
    return f"{format.open_marker}\n{reasoning}{closed}"
