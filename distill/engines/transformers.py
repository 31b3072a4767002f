"""Local generation with transformers: a model loaded from anywhere, or one that is already in memory.

Requests are answered in whole batches with left padding; a batch's text depends on its members, so the caller cuts
batches from the full list (see `Engine.batch_size`). Greedy text is reproducible at equal device, threads and library
versions; sampled text too, since every batch is seeded from its requests.
"""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import islice
from typing import Any

from distill.config import FormatConfig, TeacherConfig
from distill.engines import Completion, Request
from distill.format import (
    encode_prompt,
    opens_reasoning,
    parse_completion,
    render_prompt,
    set_template,
    with_own_system,
)
from distill.models import choose_device, find_model, load_model, load_tokenizer, model_digest, set_threads
from distill.records import Usage, digest_json
from distill.runs import DigestCache, RunOptions


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """The content of the model."""
    return {"model": model_digest(find_model(teacher.model, teacher.revision or "main"), cache)}


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
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "TransformersEngine":
        """Load the recipe's teacher with its own template (bf16 on every device)."""
        return cls.load(teacher.model, teacher.revision or "main", format, teacher.batch_size, "bfloat16", options)

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

    async def generate(self, requests: Iterable[Request]) -> AsyncIterator[Completion]:
        """Answer requests batch by batch, in order."""
        pulled = iter(requests)
        while batch := list(islice(pulled, self.batch_size)):
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
        sampling = requests[0].sampling
        generated = generate_ids(
            self.model,
            ids,
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            seed=batch_seed(requests),
            pad_id=self.tokenizer.pad_token_id,
        )
        latency = (time.perf_counter() - started) / len(requests)
        return [
            completion_of(self.tokenizer, self.format, request, text, len(prompt), new, latency)
            for request, text, prompt, new in zip(requests, texts, ids, generated)
        ]


def completion_of(
    tokenizer: Any,
    format: FormatConfig,
    request: Request,
    prompt_text: str,
    prompt_tokens: int,
    new_ids: Sequence[int],
    latency_s: float,
) -> Completion:
    """The parsed completion of generated ids; `length` where the last of them is no end token."""
    stopped = len(new_ids) < request.sampling.max_new_tokens or is_end(tokenizer, new_ids[-1])
    text_ids = list(new_ids[:-1]) if new_ids and is_end(tokenizer, new_ids[-1]) else list(new_ids)
    raw = tokenizer.decode(text_ids, skip_special_tokens=False)
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


def is_end(tokenizer: Any, token: int) -> bool:
    """Whether a generated id is the end token (or another id that the tokenizer marks as special)."""
    return token == tokenizer.eos_token_id or token in getattr(tokenizer, "all_special_ids", ())


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
) -> list[list[int]]:
    """New ids of each prompt, the end token included where one came; greedy at temperature 0.

    Prompts are padded on the left; ids after the first end token are cut off.
    """
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends = model.generation_config.eos_token_id
    draw = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad_id, **({"do_sample": False} | draw)
    )
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [cut_after_end(row[longest:].tolist(), ends) for row in output]


def cut_after_end(ids: list[int], ends: int | list[int] | None) -> list[int]:
    """Ids up to and with the first end token."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return ids
