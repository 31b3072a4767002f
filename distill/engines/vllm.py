"""Local generation with vLLM in this process: continuous batching, tensor, pipeline and data parallel.

Prompts are rendered and tokenized here, by the recipe's template, and handed over as ids; answers come back as ids and
are read here. So the prefix that is generated from is the one a student is trained on, and vLLM needs no tokenizer.
Requests are independent and pulled as there is room for them. Each carries its own seed, but its bits depend on what
it shares a step with: sampled text, and greedy text at near ties, need not come out the same again.
"""

import asyncio
import importlib.util
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.config import FormatConfig, TeacherConfig, VllmOptions
from distill.engines import Completion, Request
from distill.engines.in_flight import at_most
from distill.engines.transformers import completion_of, end_ids_of, no_room
from distill.errors import EngineError, MissingExtraError, ModelError
from distill.format import encode_prompt, render_prompt, set_template, with_own_system
from distill.models import ModelSource, find_model, load_tokenizer, model_digest
from distill.runs import DigestCache, RunOptions

MOST_LOGPROBS = 1024
"""Most alternatives a place that `score` can be asked for."""
BYTES_PER_GB = 1_000_000_000
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout holds results
}
"""What vLLM reads when it is imported; a user's own setting wins."""


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """The content of the model."""
    return {"model": model_digest(find_model(teacher.model, teacher.revision or "main"), cache)}


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse to go on without vLLM, and a model that is not there or that it cannot load.

    Raises MissingExtraError or ModelError.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    model_source(teacher)


def model_source(teacher: TeacherConfig) -> ModelSource:
    """Where the model lies. Raises ModelError for a GGUF file."""
    source = find_model(teacher.model, teacher.revision or "main")
    if source.gguf:
        raise ModelError(f"{source.name}: vLLM loads folders and hub ids, not GGUF files; give one, or another engine")
    return source


WATCHER = """
import os, signal, sys, time
sys.stdin.read()
for signum in (signal.SIGTERM, signal.SIGKILL):
    for pid in map(int, sys.argv[1:]):
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
    time.sleep(5)
"""
"""A process that ends others when the one that holds the other end of its standard input is gone."""


class Scores(NamedTuple):
    """What a model makes of a text, in nats (natural logarithms); row i is about the token at `positions[i]`."""

    token_logprobs_P: NDArray[np.float32]
    """Of the token that stands there, given all before it; shape [positions]."""
    top_ids_PK: NDArray[np.int32]
    """The most likely tokens there, most likely first; shape [positions, top_k]."""
    top_logprobs_PK: NDArray[np.float32]
    """Their logprobs, normalised over the whole vocabulary; same shape."""


class VllmEngine:
    """Generates with a vLLM engine, which `start` makes when the first request comes."""

    name = "vllm"
    batch_size: int | None = None

    def __init__(
        self, start: Callable[[], Any], tokenizer: Any, format: FormatConfig, ends: Sequence[int], most: int
    ) -> None:
        """`start` gives an object with vLLM's asynchronous interface; `ends` are the ids that end an answer; `most`
        requests are in flight at once.
        """
        import vllm

        self.version: str = vllm.__version__
        self.start = start
        self.tokenizer = tokenizer
        self.format = format
        self.ends = list(ends)
        self.most = most
        self._llm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "VllmEngine":
        """The recipe's teacher with its own template; the model is loaded with the first request.

        Raises MissingExtraError, ModelError, or EngineError where this vLLM has no such device.
        """
        preflight(teacher, format, options)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        source = model_source(teacher)
        check_device(options)
        tokenizer = load_tokenizer(source)
        set_template(tokenizer, format)
        most = teacher.vllm.max_num_seqs * teacher.vllm.data_parallel_size
        return cls(lambda: start_vllm(source, teacher.vllm), tokenizer, format, read_ends(source), most)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer requests as they are done, at most `most` at a time.

        Raises EngineError if vLLM cannot start or dies.
        """
        self._started()
        async for completion in at_most(self.most, requests, self._answer):
            yield completion

    async def score(self, token_ids: Sequence[int], positions: Sequence[int], top_k: int) -> Scores:
        """Logprobs at places of a text, each from 1 (the first token has nothing before it) to its last token.

        Raises ValueError for places that are not in the text, a text that does not fit, or `top_k` that is not from 1
        to 1024.
        """
        from vllm import SamplingParams

        llm = self._started()
        context = int(llm.model_config.max_model_len)
        if not 0 < len(token_ids) < context:
            raise ValueError(no_room(len(token_ids), context))
        if not all(0 < place < len(token_ids) for place in positions) or not 0 < top_k <= MOST_LOGPROBS:
            raise ValueError(f"positions are 1 to {len(token_ids) - 1} and top_k 1 to {MOST_LOGPROBS} for this text")
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=top_k, detokenize=False)
        output = await self._last_output(llm, token_ids, params)
        return scores_at(output.prompt_logprobs, token_ids, positions, top_k)

    async def close(self) -> None:
        """Stop vLLM's processes and free the model."""
        self._stop()

    def _stop(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
            self._watcher = None

    def _started(self) -> Any:
        """vLLM's engine, which belongs to the event loop that it was made in."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._stop()
        if self._llm is None:
            before = set(multiprocessing.active_children())
            with own_interrupts():
                self._llm, self._loop = self.start(), loop
                self._watcher = end_with_us(set(multiprocessing.active_children()) - before)
        return self._llm

    async def _answer(self, request: Request) -> Completion:
        started = time.perf_counter()
        llm = self._llm
        text = render_prompt(self.tokenizer, with_own_system(request.prompt.messages, request.system), self.format)
        ids = encode_prompt(self.tokenizer, text)
        context = int(llm.model_config.max_model_len)
        if not 0 < len(ids) < context:
            return Completion(request.key, error=no_room(len(ids), context))
        try:
            output = await self._last_output(llm, ids, self._params(request, context - len(ids)))
        except Exception as error:
            said = f"vLLM: {type(error).__name__}: {error}"
            if llm.errored:
                raise EngineError(f"{said}; its log above says why; run the same command to go on") from error
            return Completion(request.key, error=said, retryable=not isinstance(error, ValueError))
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            return Completion(request.key, error=f"vLLM ended the answer: {answer.finish_reason}", retryable=True)
        latency_s = time.perf_counter() - started
        new_ids = list(answer.token_ids)
        return completion_of(self.tokenizer, self.format, request, text, len(ids), new_ids, latency_s, self.ends)

    def _params(self, request: Request, room: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            max_tokens=min(request.sampling.max_new_tokens, room),
            seed=request.seed,
            stop_token_ids=self.ends,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _last_output(self, llm: Any, ids: Sequence[int], params: Any) -> Any:
        prompt = {"type": "token", "prompt_token_ids": list(ids)}
        outputs = [output async for output in llm.generate(prompt, params, str(next(self._numbers)))]
        return outputs[-1]


def scores_at(
    logprobs: Sequence[Mapping[int, Any] | None], token_ids: Sequence[int], positions: Sequence[int], top_k: int
) -> Scores:
    """vLLM's logprobs of a prompt (a place's most likely tokens, and the one that stands there) as arrays."""
    rows = [logprobs[place] or {} for place in positions]
    own = [row[token_ids[place]].logprob for row, place in zip(rows, positions)]
    ranked = [sorted(row.items(), key=lambda item: -item[1].logprob)[:top_k] for row in rows]
    shape = (len(rows), top_k)
    return Scores(
        np.array(own, np.float32),
        np.array([[token for token, _ in row] for row in ranked], np.int32).reshape(shape),
        np.array([[found.logprob for _, found in row] for row in ranked], np.float32).reshape(shape),
    )


# --- starting -------------------------------------------------------------------------------------------------------


def start_vllm(source: ModelSource, options: VllmOptions) -> Any:
    """A running vLLM engine; to be called in the event loop that will use it. Raises EngineError."""
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    arguments = {
        "model": source.where,
        "revision": None if source.folder else source.revision,
        "max_logprobs": MOST_LOGPROBS,
        **arguments_of(options),
    }
    try:
        return AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**arguments))
    except Exception as error:  # every way in which a model, a device or memory can fail; the log has the details
        first = (str(error).strip().splitlines() or [""])[0]
        raise EngineError(
            f"vLLM cannot start with {source.name}: {type(error).__name__}: {first}; its log above says why, and"
            " its options are under vllm (max_model_len, gpu_memory_utilization, kv_cache_gb, …)"
        ) from error


def arguments_of(options: VllmOptions) -> dict[str, Any]:
    """What a vLLM that is given token ids is started with, but for its model."""
    from vllm.platforms import current_platform

    arguments = {
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **options.model_dump(exclude={"kv_cache_gb"}),
    }
    if options.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gb * BYTES_PER_GB)
    if current_platform.device_type == "cpu":
        # a prompt that is read in pieces sets its sampler's random state back, which ends vLLM on a processor
        arguments["enable_chunked_prefill"] = False
    return arguments


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from the processes that are started inside: vLLM's would drop what is in flight, and it is for us to
    say when they end. They inherit what this thread blocks.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_us(processes: Iterable[BaseProcess]) -> "subprocess.Popen[bytes] | None":
    """See to it that processes end when this one does, be it by kill -9: vLLM's would keep their memory for ever."""
    pids = [str(process.pid) for process in processes]
    return subprocess.Popen([sys.executable, "-c", WATCHER, *pids], stdin=subprocess.PIPE) if pids else None


def check_device(options: RunOptions) -> None:
    """Refuse a device that this vLLM was not built for. Raises EngineError."""
    from vllm.platforms import current_platform

    kind: str = current_platform.device_type
    if options.device not in ("auto", kind):
        raise EngineError(
            f"--device {options.device}: the vLLM that is installed runs on {kind!r}; leave --device out (the variable"
            " CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )


def read_ends(source: ModelSource) -> list[int]:
    """Token ids that the model's generation stops at, by its generation_config.json or else its config.json."""
    from transformers import AutoConfig, GenerationConfig

    where = {} if source.folder else {"revision": source.revision}
    try:
        generation = GenerationConfig.from_pretrained(source.where, **where)
    except OSError:  # there is none
        generation = None
    return end_ids_of(generation, AutoConfig.from_pretrained(source.where, **where))
