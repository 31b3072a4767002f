"""Engines: the one seam through which text is produced.

The teacher, evaluation, the artifact and later the judge and on-policy training all speak to an `Engine`. Each is a
module imported late by name, so that a recipe without a GPU engine never loads one. A failed request is a completion
with an `error`, never an exception; an engine raises only where going on makes no sense (EngineError).
"""

import asyncio
import importlib
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from distill.config import FormatConfig, Sampling, TeacherConfig
from distill.errors import RecipeError
from distill.records import FinishReason, Prompt, ThinkState, Usage, digest_json
from distill.runs import RunOptions

ResultT = TypeVar("ResultT")

ENGINES = {
    "openai": "distill.engines.openai:OpenAIEngine",
    "openai_batch": "distill.engines.openai_batch:OpenAIBatchEngine",
    "vllm": "distill.engines.vllm:VllmEngine",
    "transformers": "distill.engines.transformers:TransformersEngine",
    "onnx": "distill.engines.onnx:OnnxEngine",
    "solver": "distill.engines.solver:SolverEngine",
    "recorded": "distill.engines.recorded:RecordedEngine",
}


class Request(NamedTuple):
    """One sample to produce."""

    prompt: Prompt
    sample: int
    sampling: Sampling
    seed: int
    system: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What the answer is filed under: prompt id and sample index."""
        return (self.prompt.prompt_id, self.sample)


class Completion(NamedTuple):
    """What came back for one request."""

    key: tuple[str, int]
    reasoning: str | None = None
    answer: str = ""
    raw: str = ""
    think: ThinkState = "absent"
    finish_reason: FinishReason = "unknown"
    usage: Usage = Usage()
    latency_s: float = 0.0
    token_ids: tuple[int, ...] | None = None
    error: str | None = None
    retryable: bool = False
    """Of an error: whether asking again later may help (an outage, not a refusal)."""
    model: str | None = None
    """The model that the server says answered, where it does."""
    revision: str | None = None
    """The revision or system fingerprint that the server says answered, where it does."""
    attempts: int = 1
    cost_usd: float | None = None
    """What the engine knows it cost; None leaves it to the recipe's prices."""


class Probe(NamedTuple):
    """What one cheap request to each server showed before the work."""

    notes: tuple[str, ...] = ()
    """Findings worth saying: parameters that are ignored, a context that is nearly too small."""
    usage: Usage = Usage()
    """What the probes used; they are paid for like all other requests."""


class Engine(Protocol):
    """Anything that answers requests.

    `batch_size` is None where requests are independent. Otherwise text may depend on which requests share a batch:
    the caller then cuts batches of that size from its whole list, never from what is left after a kill.
    """

    name: str
    version: str
    batch_size: int | None

    def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer every request once, in any order.

        Requests are pulled as they are sent, so an engine with its own concurrency never holds more than are in
        flight; one with a `batch_size` is given a batch. A pull may wait: what is asked next can depend on answers
        that were given before.
        """

    async def close(self) -> None:
        """Free what is held."""


@runtime_checkable
class Probing(Protocol):
    """An engine whose servers can be tried before the work."""

    async def probe(self, longest: Request) -> Probe:
        """Send each server one cheap request; `longest` is the longest of what will be asked.

        Raises EngineError with the remedy where the work could not succeed.
        """


@runtime_checkable
class Stateful(Protocol):
    """An engine with work that outlives a process, such as batches that a server holds for hours."""

    def keep_state_in(self, folder: Path) -> None:
        """Keep what a later process needs in this folder, which belongs to the ledger of what is asked."""


async def stream(requests: Iterable[Request]) -> AsyncIterator[Request]:
    """Requests that are all there, as an engine takes them."""
    for request in requests:
        yield request


async def in_batches(requests: AsyncIterable[Request], size: int) -> AsyncIterator[list[Request]]:
    """The requests in lists of `size`, in order; the last may be shorter."""
    batch: list[Request] = []
    async for request in requests:
        batch.append(request)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one sample, 31 bits: derived, so that it depends neither on order nor on what else is asked."""
    return int(digest_json([seed, prompt_id, sample])[:8], 16) & 0x7FFFFFFF


def run_async(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of a coroutine, from ordinary code; in a notebook, whose own event loop is running, in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


def open_engine(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> Engine:
    """The engine a recipe's teacher names.

    Raises MissingExtraError, ModelError or EngineError with the remedy if it cannot be used here.
    """
    return load(ENGINES[teacher.engine]).from_teacher(teacher, format, options)  # type: ignore[no-any-return]


def load(where: str) -> Any:
    """The object at `module:name`, imported now."""
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise RecipeError(f"{where}: the module has no {name}") from None
