"""Our OpenAI engine alone: requests in, completions out."""

import asyncio

from measure import SAMPLING, arguments, measured, question

from distill.config import Endpoint, FormatConfig, Sampling
from distill.engines import Request, stream
from distill.engines.openai import OpenAIEngine
from distill.records import Message, Prompt


async def ask_all(engine: OpenAIEngine, requests: list[Request]) -> None:
    """Ask every question once. Raises if one is not answered."""
    answered = 0
    async for completion in engine.generate(stream(requests)):
        assert completion.error is None, completion.error
        answered += 1
    assert answered == len(requests)


if __name__ == "__main__":
    given = arguments(__doc__)
    concurrency = given.concurrency if given.concurrency == "auto" else int(given.concurrency)
    endpoint = Endpoint(base_url=given.url, concurrency=concurrency)
    sampling = Sampling(temperature=SAMPLING["temperature"], top_p=SAMPLING["top_p"], max_new_tokens=1024)
    prompts = [Prompt.of([Message(role="user", content=question(number))]) for number in range(given.requests)]
    wanted = [Request(prompt, 0, sampling, seed=number) for number, prompt in enumerate(prompts)]
    with measured(given.requests):
        asyncio.run(ask_all(OpenAIEngine("bench", endpoint, FormatConfig()), wanted))
