"""The least a client can do: asyncio and aiohttp, so many lanes, each asks and reads the JSON, nothing is kept."""

import asyncio
import json

import aiohttp
from measure import SAMPLING, arguments, measured, question


async def ask_all(url: str, requests: int, concurrency: int) -> None:
    """Ask every question once. Raises if one is not answered."""
    numbers = iter(range(requests))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def lane() -> None:
            for number in numbers:
                messages = [{"role": "user", "content": question(number)}]
                body = {"model": "bench", "messages": messages, "seed": number, **SAMPLING}
                async with session.post(f"{url}/chat/completions", json=body) as response:
                    assert response.status == 200
                    assert json.loads(await response.read())["choices"]

        await asyncio.gather(*(lane() for _ in range(concurrency)))


if __name__ == "__main__":
    given = arguments(__doc__)
    with measured(given.requests):
        asyncio.run(ask_all(given.url, given.requests, int(given.concurrency)))
