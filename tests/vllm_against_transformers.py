"""Run by tests/test_real_engines.py with the Python that has vLLM: both libraries on one model, in float32, greedy.

    python vllm_against_transformers.py MODEL_FOLDER

Prints as JSON how many of eight texts are equal, how far apart logprobs of a text are, in nats, and how many of 32
sampled texts came whose prompts do not fit one step.
"""

import asyncio
import json
import sys
from typing import Any

from distill.config import FormatConfig, Sampling, TeacherConfig, VllmOptions
from distill.engines import Request, stream
from distill.engines.transformers import generate_ids
from distill.engines.vllm import Scores, VllmEngine
from distill.format import encode_prompt, render_prompt
from distill.models import find_model, load_model
from distill.records import Message, Prompt
from distill.runs import RunOptions

NEW_TOKENS = 24


def main(folder: str) -> dict[str, float]:
    """Compare."""
    options = VllmOptions(dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_gb=0.5)
    teacher = TeacherConfig(engine="vllm", model=folder, vllm=options)
    engine = VllmEngine.from_teacher(teacher, FormatConfig(), RunOptions())
    prompts = [Prompt.of([Message(role="user", content=f"What is {n} + {3 * n}?")]) for n in range(11, 19)]
    requests = [Request(prompt, 0, Sampling(max_new_tokens=NEW_TOKENS), 1) for prompt in prompts]
    long = Prompt.of([Message(role="user", content="Add one and one and one. " * 40)])
    drawn = [Request(long, sample, Sampling(max_new_tokens=2, temperature=1.0), sample) for sample in range(1, 33)]
    ids = [
        encode_prompt(engine.tokenizer, render_prompt(engine.tokenizer, p.messages, FormatConfig())) for p in prompts
    ]
    written, scores = asyncio.run(write_and_score(engine, [*requests, *drawn], ids[0]))
    model = load_model(find_model(folder))
    expected = [generate_ids(model, [prompt], NEW_TOKENS)[0] for prompt in ids]
    equal = sum(written[request.key] == text for request, text in zip(requests, expected))
    sampled = sum(key[1] > 0 for key in written)
    return {"texts": len(expected), "equal_texts": equal, "sampled": sampled, **differences(model, ids[0], scores)}


async def write_and_score(
    engine: VllmEngine, requests: list[Request], ids: list[int]
) -> tuple[dict[tuple[str, int], list[int]], Scores]:
    """vLLM's texts by request, and its scores of a prompt."""
    written = {}
    async for completion in engine.generate(stream(requests)):
        assert completion.error is None, completion.error
        written[completion.key] = list(completion.token_ids or ())
    scores = await engine.score(ids, range(1, len(ids)), top_k=4)
    await engine.close()
    return written, scores


def differences(model: Any, ids: list[int], scores: Scores) -> dict[str, float]:
    """vLLM's scores beside a log-softmax of transformers' logits."""
    import torch

    with torch.inference_mode():
        logprobs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)
    own = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    top = logprobs_TV.topk(4)
    apart = (
        (own - torch.tensor(scores.token_logprobs_P)).abs().max(),
        (top.values - torch.tensor(scores.top_logprobs_PK)).abs().max(),
    )
    agree = (top.indices == torch.tensor(scores.top_ids_PK)).double().mean()
    return {"largest_difference_nats": float(max(apart)), "equal_top_ids": float(agree)}


if __name__ == "__main__":  # vLLM starts processes that import this file
    print(json.dumps(main(sys.argv[1])))
