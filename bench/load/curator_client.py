"""curator: its `LLM` on a list of prompts as users call it, or only its processor's `call_single_request`, in lanes."""

import asyncio
import datetime
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from measure import SAMPLING, arguments, measured, question

UNLIMITED = 1_000_000_000


def stay_on_this_machine() -> None:
    """What is read when curator is imported: nothing is sent or fetched, and nothing is drawn."""
    litellm = importlib.util.find_spec("litellm")
    assert litellm and litellm.origin
    os.environ |= {
        "TIKTOKEN_CACHE_DIR": str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"),
        "TELEMETRY_ENABLED": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HF_HUB_OFFLINE": "1",
        "CURATOR_DISABLE_RICH_DISPLAY": "1",
        "CURATOR_DISABLE_CACHE": "true",
    }


def whole_run(url: str, requests: int, concurrency: int) -> None:
    """Ask every question through `curator.LLM`."""
    from bespokelabs import curator

    prompts = [question(number) for number in range(requests)]
    with tempfile.TemporaryDirectory() as folder, measured(requests):
        llm = curator.LLM(
            model_name="bench", backend="openai", backend_params=backend(url, concurrency), generation_params=SAMPLING
        )
        answered = llm(prompts, working_dir=folder)
        assert len(answered.dataset) == requests


def client_alone(url: str, requests: int, concurrency: int) -> None:
    """Ask every question through the request processor's own call."""
    from bespokelabs.curator.request_processor.config import OnlineRequestProcessorConfig
    from bespokelabs.curator.request_processor.online.openai_online_request_processor import (
        OpenAIOnlineRequestProcessor,
    )

    config = OnlineRequestProcessorConfig(model="bench", **backend(url, concurrency))
    processor = OpenAIOnlineRequestProcessor(config)
    with measured(requests):
        asyncio.run(lanes(processor, requests, concurrency))


async def lanes(processor: Any, requests: int, concurrency: int) -> None:
    """So many calls at once."""
    from bespokelabs.curator.request_processor.online.base_online_request_processor import APIRequest
    from bespokelabs.curator.types.generic_request import GenericRequest

    numbers = iter(range(requests))
    async with processor.aiohttp_connector(concurrency) as session:

        async def lane() -> None:
            for number in numbers:
                messages = [{"role": "user", "content": question(number)}]
                request = GenericRequest(
                    model="bench", messages=messages, original_row={}, original_row_idx=number,
                    generation_params=SAMPLING, is_multimodal_prompt=False,
                )  # fmt: skip
                body = processor.create_api_specific_request_online(request)
                call = APIRequest(
                    task_id=number, generic_request=request, api_specific_request=body, attempts_left=1,
                    prompt_formatter=None, created_at=datetime.datetime.now(),
                )  # fmt: skip
                response = await processor.call_single_request(call, session, status_tracker=None)
                assert response.response_message

        await asyncio.gather(*(lane() for _ in range(concurrency)))


def backend(url: str, concurrency: int) -> dict[str, Any]:
    """curator's own limits, out of the way."""
    return {
        "base_url": url,
        "api_key": "none",
        "max_concurrent_requests": concurrency,
        "max_requests_per_minute": UNLIMITED,
        "max_tokens_per_minute": UNLIMITED,
    }


if __name__ == "__main__":
    given = arguments(__doc__, "--part")
    stay_on_this_machine()
    run = client_alone if given.part == "client" else whole_run
    run(given.url, given.requests, int(given.concurrency))
