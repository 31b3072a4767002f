"""Continuous batching with transformers' own scheduler: a text that ends makes room for the next one at once.

It saves what batches waste on texts that have ended, and pays for it in attention: each token of a step is compared
with the whole cache, its own text and all others, so a step's cost grows with the square of the texts at once times
their length. On a processor it wins where lengths differ much and loses where texts are long. Tokens are drawn from one
stream in the order in which steps happen to be made: sampled text does not come out the same again.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from distill.config import FormatConfig, Sampling
from distill.engines import Completion, Request
from distill.engines.in_flight import at_most
from distill.engines.transformers import completion_of, context_of, end_ids, no_room, own_config
from distill.errors import EngineError
from distill.format import encode_prompt, render_prompt, with_own_system
from distill.models import seeded

PAGE_TOKENS = 128
"""Tokens of a page of the cache."""
PROMPT_TOKENS = 1024
"""Room in the cache for the prompt of each text; longer ones take what others leave."""
LOOK_S = 2.0
"""How often it is made sure that the scheduler is still there."""
STOPPED = "transformers' scheduler has stopped; its log above says why; continuous_batching: false does without it"
STEP_TOKENS = 512
"""Most tokens in a step: prompts are read in pieces of that size."""


class ContinuousEngine:
    """Generation with a transformers model, up to `texts` texts at once."""

    name = "transformers"
    batch_size: int | None = None

    def __init__(self, model: Any, tokenizer: Any, format: FormatConfig, texts: int) -> None:
        import transformers

        self.version: str = transformers.__version__
        self.model = model
        self.tokenizer = tokenizer
        self.format = format
        self.texts = texts

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer requests as they are done; all are drawn at the temperature and top_p of the first.

        Raises EngineError where transformers' scheduler is missing or dies.
        """
        with ExitStack() as held:
            writer: Writer | None = None

            async def answer(request: Request) -> Completion:
                nonlocal writer
                if writer is None:
                    writer = held.enter_context(writing(self.model, request.sampling, self.texts, request.seed))
                return await self._answer(writer, request)

            async for completion in at_most(self.texts, requests, answer):
                yield completion

    async def close(self) -> None:
        """Free the model."""
        self.model = None

    async def _answer(self, writer: "Writer", request: Request) -> Completion:
        started = time.perf_counter()
        text = render_prompt(self.tokenizer, with_own_system(request.prompt.messages, request.system), self.format)
        ids, context = encode_prompt(self.tokenizer, text), context_of(self.model)
        if not 0 < len(ids) < context:
            return Completion(request.key, error=no_room(len(ids), context))
        try:
            new_ids = await writer.write(ids, min(request.sampling.max_new_tokens, context - len(ids)))
        except ValueError as error:
            return Completion(request.key, error=f"transformers: {error}", retryable=True)
        latency_s = time.perf_counter() - started
        ends = end_ids(self.model)
        return completion_of(self.tokenizer, self.format, request, text, len(ids), new_ids, latency_s, ends)


class Writer:
    """Texts being written together, in a thread of transformers'; use `writing`."""

    def __init__(self, manager: Any, ends: Sequence[int]) -> None:
        self._manager = manager
        self._ends = list(ends) or -1
        self._numbers = itertools.count()

    async def write(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """New ids of a prompt, the end token included where one came.

        Raises ValueError where this text failed, EngineError where nothing can be written any more.
        """
        written: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        name = str(next(self._numbers))

        def keep(output: Any) -> None:
            if not written.done():
                written.set_result(output)

        self._manager.register_result_handler(name, keep)
        self._manager.add_request(list(prompt), name, max_new_tokens=max_new_tokens, eos_token_id=self._ends)
        try:
            while not written.done():
                await asyncio.wait([written], timeout=LOOK_S)
                if not written.done() and not self._manager.is_running():
                    raise EngineError(STOPPED)
        except asyncio.CancelledError:
            self._manager.cancel_request(name)
            raise
        output = written.result()
        if output.error is not None:
            raise ValueError(output.error)
        return list(output.generated_tokens)


@contextmanager
def writing(model: Any, sampling: Sampling, texts: int, seed: int) -> Iterator[Writer]:
    """Write up to `texts` texts at once with a model while the block runs; all are drawn as `sampling` says.

    Raises EngineError where the installed transformers has no continuous batching.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
    except ImportError:
        raise EngineError("continuous_batching takes a newer transformers: pip install -U 'transformers<6'") from None
    context = context_of(model)
    room = min(context, sampling.max_new_tokens + PROMPT_TOKENS)
    draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=end_ids(model) or None,
        **(draw if sampling.temperature > 0 else {"do_sample": False}),
    )
    memory = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=texts * math.ceil(room / PAGE_TOKENS) + 1,
        max_batch_tokens=max(STEP_TOKENS, texts),
        max_requests_per_batch=texts,
        seed=seed,
    )
    with seeded(seed, str(model.device)), own_config(model, config):
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=memory)
        manager.start()
        try:
            yield Writer(manager, end_ids(model))
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
