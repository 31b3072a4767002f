"""Our side of the decoding benchmark, and torch's, which shares our environment.

prepare       Load a GGUF model, save it as a checkpoint, and export variants of it as artifacts' folders.
ceilings      How fast the processors read memory.
genai         A variant in onnxruntime-genai, as a user of the artifact runs it.
onnxruntime   The same graph in our own decoder.
torch         The checkpoint in transformers, in bf16.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from steps import DECODE, say
from turns import PROMPT, Turn, answer, prompt, step_by_step

READ = 1 << 26
"""Numbers of 4 bytes that are read to measure memory: far more than any cache holds."""


def prepare(given: argparse.Namespace) -> None:
    """Fill `given.folder`; says the bytes of every variant."""
    from distill.artifact import graph_bytes
    from distill.export.graph import build_variant
    from distill.export.schemes import VARIANTS
    from distill.models import find_model, load_model, load_tokenizer

    source = find_model(given.model)
    assert source.folder and source.gguf, f"{given.model} is no GGUF file"
    checkpoint = given.folder / "checkpoint"
    load_model(source).save_pretrained(checkpoint)
    load_tokenizer(source).save_pretrained(checkpoint)
    sizes = {}
    for name in given.variants:
        scheme = VARIANTS[name]
        build_variant(checkpoint, name, given.folder / name, scheme)
        sizes[name] = {"scheme": str(scheme), "bytes": graph_bytes(given.folder / name, name)}
    say(variants=sizes, gguf=str(source.folder / source.gguf))


def ceilings(given: argparse.Namespace) -> None:
    """Say the best GB/s of reading with all threads."""
    import torch

    torch.set_num_threads(given.threads)
    numbers = torch.zeros(READ)
    best = 0.0
    for _ in range(9):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began) / 1e9)
    say(read_gb_s=best)


def genai(given: argparse.Namespace) -> Turn:
    """Turns of onnxruntime-genai; texts do not end, since the shortest is as long as the longest."""
    import json

    import onnxruntime_genai

    from distill.artifact import locate

    graph = locate(given.folder / given.variant, given.variant)
    config = onnxruntime_genai.Config(str(graph.root))
    options = {"intra_op_num_threads": given.threads}
    config.overlay(json.dumps({"model": {"decoder": {"filename": graph.file, "session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    running: list[Any] = []

    def start(ids: list[int]) -> int:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, min_length=given.tokens, max_length=given.tokens)
        running[:] = [onnxruntime_genai.Generator(model, params)]
        running[0].append_tokens(np.array(ids, np.int32))
        return step(0)

    def step(_: int) -> int:
        running[0].generate_next_token()
        return int(running[0].get_next_tokens()[0])

    return step_by_step(start, step)


def onnxruntime(given: argparse.Namespace) -> Turn:
    """Turns of our decoder: decoding takes what a text of so many tokens takes more than one of a single token."""
    from distill.onnx_decoding import OnnxDecoder

    decoder = OnnxDecoder(given.folder / given.variant, given.threads, variant=given.variant)

    def seconds(ids: list[int], new: int) -> float:
        began = time.perf_counter()
        decoder.generate([ids], new, eos_ids=())
        return time.perf_counter() - began

    def turn(what: str, tokens: int) -> float:
        if what == DECODE:
            return seconds(prompt(PROMPT), tokens + 1) - seconds(prompt(PROMPT), 1)
        return seconds(prompt(tokens), 1)

    return turn


def torch_bf16(given: argparse.Namespace) -> Turn:
    """Turns of transformers' forward pass with a growing cache, the least work around it."""
    import torch

    from distill.models import find_model, load_model

    torch.set_num_threads(given.threads)
    model = load_model(find_model(str(given.folder / "checkpoint")), "bfloat16")
    cache: list[Any] = []

    @torch.inference_mode()
    def step(ids: list[int]) -> int:
        found = model(torch.tensor([ids]), past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        cache[0] = found.past_key_values
        return int(found.logits[0, -1].argmax())

    def start(ids: list[int]) -> int:
        cache[:] = [None]
        return step(ids)

    return step_by_step(start, lambda token: step([token]))


def main() -> None:
    """Do one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"prepare": prepare, "ceilings": ceilings}
    sides = {"genai": genai, "onnxruntime": onnxruntime, "torch": torch_bf16}
    parser.add_argument("task", choices=[*tasks, *sides])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", help="of `prepare`")
    parser.add_argument("--variants", nargs="+", help="of `prepare`")
    parser.add_argument("--variant")
    parser.add_argument("--tokens", type=int, default=2048, help="longest text")
    given = parser.parse_args()
    if given.task in tasks:
        tasks[given.task](given)
    else:
        answer(sides[given.task](given))


if __name__ == "__main__":
    main()
