"""Local generation with transformers: a model loaded from anywhere, or one that is already in memory.

Requests are answered in whole batches with left padding; a batch's text depends on its members, so the caller cuts
batches from the full list (see `Engine.batch_size`). Greedy text is reproducible at equal device, threads and library
versions; sampled text too, since every batch is seeded from its requests. With `continuous_batching` the engine is
`distill.engines.continuous`, which is not.
"""

import time
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distill.config import FormatConfig, TeacherConfig
from distill.engines import Completion, Engine, Request, in_batches
from distill.format import (
    encode_prompt,
    opens_reasoning,
    parse_completion,
    render_prompt,
    set_template,
    with_own_system,
)
from distill.models import (
    choose_device,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    model_digest,
    seeded,
    set_threads,
)
from distill.records import Usage, digest_json
from distill.runs import DigestCache, RunOptions


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """The content of the model."""
    return {"model": model_digest(find_model(teacher.model, teacher.revision or "main"), cache)}


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse a model that is not there, is damaged or of an untested family, and a device that is not here."""
    choose_device(options)
    load_config(find_model(teacher.model, teacher.revision or "main"))


class TransformersEngine:
    """Batched generation with a transformers model."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, format: FormatConfig, batch_size: int) -> None:
        import transformers

        self.version = transformers.__version__
        self.model = model
        self.tokenizer = tokenizer
        self.format = format
        self.batch_size: int | None = batch_size

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> Engine:
        """Load the recipe's teacher with its own template (bf16 on every device)."""
        batched = cls.load(teacher.model, teacher.revision or "main", format, teacher.batch_size, "bfloat16", options)
        if not teacher.continuous_batching:
            return batched
        from distill.engines.continuous import ContinuousEngine

        return ContinuousEngine(batched.model, batched.tokenizer, format, teacher.batch_size)

    @classmethod
    def load(
        cls, model: str, revision: str, format: FormatConfig, batch_size: int, dtype: str, options: RunOptions
    ) -> "TransformersEngine":
        """Load a model by name and give its tokenizer the recipe's template."""
        set_threads(options)
        source = find_model(model, revision)
        tokenizer = load_tokenizer(source)
        set_template(tokenizer, format)
        return cls(load_model(source, dtype, choose_device(options)), tokenizer, format, batch_size)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer requests batch by batch, in order."""
        async for batch in in_batches(requests, self.batch_size or 1):
            for completion in self._batch(batch):
                yield completion

    async def close(self) -> None:
        """Free the model."""
        self.model = None

    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        started = time.perf_counter()
        texts = [
            render_prompt(self.tokenizer, with_own_system(request.prompt.messages, request.system), self.format)
            for request in requests
        ]
        ids = [encode_prompt(self.tokenizer, text) for text in texts]
        context = context_of(self.model)
        fitting = [index for index, prompt in enumerate(ids) if 0 < len(prompt) < context]
        sampling = requests[0].sampling
        generated = generate_ids(
            self.model,
            [ids[index] for index in fitting],
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            seed=batch_seed(requests),
            pad_id=self.tokenizer.pad_token_id,
        )
        answers = dict(zip(fitting, generated))
        latency_s = (time.perf_counter() - started) / len(requests)
        ends = end_ids(self.model)
        return [
            completion_of(
                self.tokenizer, self.format, request, texts[index], len(ids[index]), answers[index], latency_s, ends
            )
            if index in answers
            else Completion(request.key, error=no_room(len(ids[index]), context))
            for index, request in enumerate(requests)
        ]


def completion_of(
    tokenizer: Any,
    format: FormatConfig,
    request: Request,
    prompt_text: str,
    prompt_tokens: int,
    new_ids: Sequence[int],
    latency_s: float,
    ends: Collection[int] | None = None,
) -> Completion:
    """The parsed completion of generated ids.

    It stopped if the last of them is one of `ends`, the ids that generation stops at (the tokenizer's end token where
    they are not given); with any other last, a special token too, it was cut at the limit or the end of the context.
    """
    stopped = bool(new_ids) and new_ids[-1] in ([tokenizer.eos_token_id] if ends is None else ends)
    raw = tokenizer.decode(list(new_ids[:-1] if stopped else new_ids), skip_special_tokens=False)
    parsed = parse_completion(raw, format.open_marker, format.close_marker, opens_reasoning(prompt_text, format))
    reasoning_tokens = len(encode_prompt(tokenizer, parsed.reasoning)) if parsed.reasoning else 0
    return Completion(
        key=request.key,
        reasoning=parsed.reasoning,
        answer=parsed.answer,
        raw=raw,
        think=parsed.think,
        finish_reason="stop" if stopped else "length",
        usage=Usage(input=prompt_tokens, output=len(new_ids), reasoning=reasoning_tokens),
        latency_s=latency_s,
        token_ids=tuple(new_ids),
    )


def context_of(model: Any) -> int:
    """Tokens that a model's positions allow, prompt and answer together."""
    return int(model.config.max_position_embeddings)


def no_room(tokens: int, context: int) -> str:
    """Why a prompt is not answered."""
    return f"the prompt has {tokens:,} tokens; between 1 and {context - 1:,} fit the model's context of {context:,}"


def end_ids(model: Any) -> list[int]:
    """Token ids that a model's generation stops at."""
    return end_ids_of(model.generation_config, model.config)


def end_ids_of(generation_config: Any, config: Any) -> list[int]:
    """Token ids that generation stops at: those of the generation_config, or else of the config."""
    found = generation_config.eos_token_id if generation_config else None
    if found is None:
        found = config.eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


def batch_seed(requests: Sequence[Request]) -> int:
    """One seed for a batch, from the seeds of its requests."""
    return int(digest_json([request.seed for request in requests])[:8], 16)


def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    pad_id: int = 0,
    vocabulary: int | None = None,
) -> list[list[int]]:
    """New ids of each prompt, the end token included where one came; greedy at temperature 0.

    Ids from `vocabulary` on (padding of the head, where it is given) are never chosen.
    Prompts are padded on the left; ids after the first end token, or beyond the model's context, are cut off. Only
    the arguments and the model's end ids count: penalties and the like that its generation_config recommends do not.
    Raises ValueError for a prompt that is empty or fills the context, which transformers would run all the same.
    """
    import torch
    from transformers import GenerationConfig

    if not prompts:
        return []
    context = context_of(model)
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise ValueError(no_room(len(prompt), context))
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends, padded = end_ids(model), int(model.config.vocab_size)
    draw = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - min(map(len, prompts))),
        eos_token_id=ends or None,
        pad_token_id=pad_id,
        suppress_tokens=list(range(vocabulary or padded, padded)) or None,
        **({"do_sample": False} | draw),
    )
    with torch.inference_mode(), seeded(seed, str(model.device)), own_config(model, config):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows = (row[longest:][: context - len(prompt)].tolist() for row, prompt in zip(output, prompts))
    return [cut_after_end(row, ends) for row in rows]


@contextmanager
def own_config(model: Any, config: Any) -> Iterator[None]:
    """Put the model's own generation settings aside: transformers would fill whatever `config` leaves open."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def cut_after_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Ids up to and with the first end token."""
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids
