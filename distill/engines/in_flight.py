"""Answering requests independently, a bounded number at a time: for engines whose own scheduler does the rest."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from distill.engines import Completion, Request


async def at_most(
    most: int, requests: AsyncIterable[Request], answer: Callable[[Request], Awaitable[Completion]]
) -> AsyncIterator[Completion]:
    """Answers as they are ready, at most `most` requests being answered at a time, however long a pull waits.

    What `requests` or `answer` raises comes out here, and what was going on is cancelled.
    """
    source, exhausted = aiter(requests), False
    pulls: set[asyncio.Future[Any]] = set()
    answering: set[asyncio.Future[Any]] = set()
    try:
        while not exhausted or answering:
            if not (pulls or exhausted) and len(answering) < most:
                pulls = {asyncio.ensure_future(anext(source, None))}
            await asyncio.wait([*pulls, *answering], return_when=asyncio.FIRST_COMPLETED)
            for pull in [pull for pull in pulls if pull.done()]:
                pulls = set()
                if (request := pull.result()) is None:
                    exhausted = True
                else:
                    answering.add(asyncio.ensure_future(answer(request)))
            for answered in [future for future in answering if future.done()]:
                answering.discard(answered)
                yield answered.result()
    finally:
        for future in (*pulls, *answering):
            future.cancel()
        await asyncio.gather(*pulls, *answering, return_exceptions=True)
