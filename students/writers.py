"""Who writes a student's own answers in on-policy training: the model that trains, or a vLLM beside it.

vLLM runs in the training's process and on its device. It starts with no weights of its own and is handed the student's
under the names of a plain checkpoint, adapters merged, through its own reloading; what it remembers of prompts is
forgotten with the weights it was computed by.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from distill.config import OnPolicyPhase, WriterOptions
from distill.engines.transformers import end_ids, generate_ids
from distill.errors import EngineError, MissingExtraError, TrainingError
from distill.models import quiet_loading
from distill.processes import launched

from .adapters import merged_weights


class Batch(NamedTuple):
    """Prompts that are answered together."""

    prompts: Sequence[Sequence[int]]
    most: int
    """Limit of an answer's tokens; the longest prompt has room for them."""
    seed: int
    """Of the draws: follows from the phase's seed, the step and the batch's place in it."""


class Writer(Protocol):
    """Answers prompts with a student's weights."""

    def sync(self, model: Any) -> None:
        """Write with the model's weights as they are now."""

    def write(self, batches: Sequence[Batch]) -> list[list[list[int]]]:
        """New ids of each prompt of each batch, the end token included where one came."""

    def close(self) -> None:
        """Free what writing takes."""


class TransformersWriter:
    """The model that trains, by transformers' generation."""

    def __init__(self, temperature: float, pad_id: int, vocabulary: int) -> None:
        """Tokens from `vocabulary` on are not drawn: the teachers do not know them."""
        self.temperature = temperature
        self.pad_id = pad_id
        self.vocabulary = vocabulary
        self._model: Any = None

    def sync(self, model: Any) -> None:
        """See `Writer`; the weights are the model's own."""
        self._model = model

    def write(self, batches: Sequence[Batch]) -> list[list[list[int]]]:
        """See `Writer`."""
        with quiet_loading():
            return [self._answers(batch) for batch in batches]

    def _answers(self, batch: Batch) -> list[list[int]]:
        return generate_ids(
            self._model,
            batch.prompts,
            batch.most,
            self.temperature,
            seed=batch.seed,
            pad_id=self.pad_id,
            vocabulary=self.vocabulary,
        )

    def close(self) -> None:
        """See `Writer`."""
        self._model = None


class VllmWriter:
    """A vLLM in this process, made when the first weights come; it batches requests by itself."""

    def __init__(self, temperature: float, options: WriterOptions, context: int, vocabulary: int) -> None:
        """`context` is the longest prompt and answer together; tokens from `vocabulary` on are not drawn."""
        self.temperature = temperature
        self.options = options
        self.context = context
        self.vocabulary = vocabulary
        self._llm: Any = None
        self._ends: list[int] = []
        self._allowed: list[int] | None = None

    def sync(self, model: Any) -> None:
        """See `Writer`. Raises EngineError where vLLM cannot start or keeps what old weights made of prompts."""
        if self._llm is None:
            self._llm = start_beside(model, self.options, self.context)
            self._ends = end_ids(model)
            if self.vocabulary < model.config.vocab_size:
                self._allowed = list(range(self.vocabulary))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(model)})
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM keeps what older weights made of prompts; set vllm.enable_prefix_caching: false")

    def write(self, batches: Sequence[Batch]) -> list[list[list[int]]]:
        """See `Writer`; every request has a seed of its own."""
        prompts = [{"prompt_token_ids": list(prompt)} for batch in batches for prompt in batch.prompts]
        params = [self._params(batch, place) for batch in batches for place in range(len(batch.prompts))]
        outputs = iter(self._llm.generate(prompts, params, use_tqdm=False) if prompts else ())
        return [[list(next(outputs).outputs[0].token_ids) for _ in batch.prompts] for batch in batches]

    def _params(self, batch: Batch, place: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.temperature,
            max_tokens=batch.most,
            seed=(batch.seed + place) % 2**31,
            stop_token_ids=self._ends,
            allowed_token_ids=self._allowed,
            detokenize=False,
        )

    def close(self) -> None:
        """See `Writer`."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None


def writer_of(phase: OnPolicyPhase, pad_id: int, vocabulary: int, context: int) -> Writer:
    """The writer that a phase asks for."""
    if phase.writer == "vllm":
        return VllmWriter(phase.sampling_temperature, phase.vllm, context, vocabulary)
    return TransformersWriter(phase.sampling_temperature, pad_id, vocabulary)


def require_writer(phase: OnPolicyPhase) -> None:
    """Refuse, before any work, a vLLM that is not installed, or one in each of several processes.

    Raises MissingExtraError or TrainingError.
    """
    if phase.writer != "vllm":
        return
    if launched().size > 1:
        raise TrainingError(
            f"writer is vllm, but {launched().size} processes train: when it closes, vLLM ends the group that they talk"
            " in; start one process, or set writer: transformers"
        )
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")


def checkpoint_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a student as a plain checkpoint with a head of its own would hold them."""
    adapted = hasattr(model, "get_base_model")
    for name, weight in merged_weights(model) if adapted else model.named_parameters():
        yield name, weight.detach()
    if model.config.tie_word_embeddings:  # vLLM's reloading passes a tied head over and leaves it as it was
        yield "lm_head.weight", model.get_output_embeddings().weight.detach()


def start_beside(model: Any, options: WriterOptions, context: int) -> Any:
    """A vLLM in this process for models of this shape, without weights. Raises EngineError."""
    from distill.engines.vllm import ENVIRONMENT, arguments_of

    dtype = str(model.dtype).removeprefix("torch.") if options.dtype == "auto" else options.dtype
    with surroundings(ENVIRONMENT | IN_PROCESS), tempfile.TemporaryDirectory(prefix="writer-") as folder:
        config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": False})
        config.architectures = [type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__]
        config.save_pretrained(folder)
        from vllm import LLM

        require_same_device(model.device)
        arguments = arguments_of(options) | {"dtype": dtype, "max_model_len": context}
        try:
            return LLM(model=folder, load_format="dummy", generation_config="vllm", **arguments)
        except Exception as error:  # every way in which a device or memory can fail; the log has the details
            first = (str(error).strip().splitlines() or [""])[0]
            raise EngineError(
                f"vLLM cannot start beside the student: {type(error).__name__}: {first}; its log above says why, and"
                " the phase's vllm has its options (gpu_memory_utilization, kv_cache_gb, max_num_seqs, …)"
            ) from error


def require_same_device(device: Any) -> None:
    """Refuse a vLLM that was built for other devices than the student's, or would take another one of them.

    Raises EngineError.
    """
    from vllm.platforms import current_platform

    if device.type != current_platform.device_type or device.index:
        raise EngineError(
            f"the student is on {device}, vLLM would run on the first {current_platform.device_type!r} device; choose"
            " by CUDA_VISIBLE_DEVICES instead of --device, or set writer: transformers"
        )


IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over as tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the training's threads are not vLLM's to pin
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at every reload that rotary tables are not in a checkpoint
}


@contextmanager
def surroundings(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment for the block, and torch's threads as they were after it.

    A user's own setting wins, but for what keeps vLLM in this process.
    """
    import torch

    before = dict(os.environ)
    set_threads = torch.set_num_threads  # vLLM puts one that does nothing into its place
    os.environ.update({**variables, **before, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in variables if name in before})
