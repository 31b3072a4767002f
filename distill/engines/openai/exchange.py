"""One HTTP exchange with one server: send a request, read what comes within bounds, say what it is."""

import asyncio
import resource
from contextlib import suppress

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from distill.config import FormatConfig
from distill.engines import Completion, Request
from distill.progress import say

from .events import Assembly, Events
from .pool import Server
from .trouble import Trouble, server_message, shown, trouble_of
from .waits import used_up_s
from .wire import Answer, BrokenAnswerError, ErrorInBodyError, completion_of, request_body, whole_answer

LARGEST_ANSWER = 16 * 1024 * 1024
"""Bytes of an answer; the longest ones of today's models are a tenth of it."""
LARGEST_ERROR = 256 * 1024
"""Bytes that are read of any other answer."""
KEPT_OPEN_S = 4.0
"""Idle connections are closed before a server does so (many do after five seconds) with a request on its way."""
LAST_BYTES_S = 0.5
"""How long the end of a stream may take after its last event, so that the connection can be used again."""
OTHER_FILES = 256
"""Files that a process may want open beside its connections."""
HTTP_OK = 200

CONNECTION_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError)
"""Whatever can happen to a connection; time-outs are OSErrors."""


def open_session() -> aiohttp.ClientSession:
    """A session for all servers: any number of connections, no cookies, nothing read from the environment."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_OPEN_S)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


async def ask(
    session: aiohttp.ClientSession, server: Server, request: Request, format: FormatConfig
) -> Completion | Trouble:
    """Send a request and read its answer; whatever goes wrong comes back as trouble."""
    address, stream = server.address, server.endpoint.stream
    try:
        async with session.post(
            server.chat_url,
            data=request_body(address.model, request, stream),
            headers=server.headers,
            timeout=server.timeout,
            proxy=server.proxy,
            allow_redirects=False,
        ) as response:
            server.pause(used_up_s(response.headers))
            if response.status != HTTP_OK:
                body = (await start_of(response, LARGEST_ERROR)).decode(errors="replace")
                return trouble_of(address, response.status, response.headers, body, server.proven)
            answer = await read_answer(response, stream)
    except BrokenAnswerError as broken:
        return Trouble("again", shown(address, str(broken)))
    except ErrorInBodyError as error:
        if error.status:
            return trouble_of(address, error.status, {}, error.body, server.proven)
        return Trouble("again", f"an error instead of an answer: {shown(address, server_message(error.body))}")
    except CONNECTION_ERRORS as error:
        return connection_trouble(server, error)
    return completion_of(request, answer, address, format)


async def read_answer(response: aiohttp.ClientResponse, stream: bool) -> Answer:
    """The answer in a 200 response, streamed or whole, whichever it turns out to be.

    Raises BrokenAnswerError or ErrorInBodyError.
    """
    if response.content_type == "text/event-stream" or (stream and response.content_type != "application/json"):
        return await streamed_answer(response)
    return whole_answer(await whole_body(response))


async def whole_body(response: aiohttp.ClientResponse) -> bytes:
    """A body in one piece. Raises BrokenAnswerError if it is larger than any answer."""
    length = response.content_length
    if length is not None and length <= LARGEST_ANSWER and "Content-Encoding" not in response.headers:
        return await response.read()
    body = await start_of(response, LARGEST_ANSWER + 1)
    if len(body) > LARGEST_ANSWER:
        raise BrokenAnswerError(f"a body of more than {LARGEST_ANSWER:,} bytes")
    return body


async def start_of(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The first bytes of a body; a longer one is not read on."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) >= most:
            response.close()
            break
    return bytes(body[:most])


async def streamed_answer(response: aiohttp.ClientResponse) -> Answer:
    """Read events until the server is done. Raises BrokenAnswerError or ErrorInBodyError."""
    events, assembly = Events(), Assembly()
    try:
        async for received in response.content.iter_any():
            for event in events.feed(received):
                assembly.add(event)
            if events.held + assembly.held > LARGEST_ANSWER:
                raise BrokenAnswerError(f"a stream of more than {LARGEST_ANSWER:,} bytes")
            if assembly.done:
                await last_bytes(response)
                break
        for event in events.end():
            assembly.add(event)
    except CONNECTION_ERRORS:
        if not assembly.whole:
            raise
    return assembly.answer()


async def last_bytes(response: aiohttp.ClientResponse) -> None:
    """Read to the end of a response that is about to end."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_BYTES_S):
            await response.content.read()


def connection_trouble(server: Server, error: Exception) -> Trouble:
    """What an exception of the connection means."""
    address = server.address
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return Trouble("again", f"no connection within {server.timeout.sock_connect:g} s", overload=True)
    if isinstance(error, TimeoutError):
        return Trouble("again", f"no answer within {server.endpoint.timeout_s:g} s", overload=True)
    said = shown(address, f"{type(error).__name__}: {error}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        remedy = "check base_url, or set SSL_CERT_FILE to the certificates it is to be trusted by"
        return Trouble("fatal", f"{address} cannot be trusted ({said}): {remedy}")
    return Trouble("again", f"connection failed: {said}")


def allow_connections(count: int) -> None:
    """Raise this process's limit of open files so that so many connections fit, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        say(f"only {hard:,} files may be open (ulimit -Hn): fewer than {count:,} requests fit at once")
