"""llama.cpp's side of the decoding benchmark, through llama-cpp-python's own bindings; its environment needs no other.

quantize   Write a GGUF file in another type, layers, head and embedding alike.
run        Load a GGUF file and decode or prefill when asked to.
"""

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from steps import say
from turns import answer, step_by_step

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
"""Of llama.h's `llama_ftype`: what most matrices are stored in."""
TENSOR_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "F16": 1}
"""Of ggml.h's `ggml_type`."""


def quantize(given: argparse.Namespace) -> None:
    """Write `given.out`; tensors that are quantized already are dequantized first."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = given.threads
    params.ftype = FILE_TYPES[given.type]
    params.output_tensor_type = params.token_embedding_type = TENSOR_TYPES[given.type]
    params.allow_requantize = True
    if code := llama_cpp.llama_model_quantize(str(given.model).encode(), str(given.out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize failed with {code}")
    say(bytes=given.out.stat().st_size)


class Llama:
    """A GGUF file in llama.cpp with a context of `tokens`."""

    def __init__(self, path: Path, threads: int, tokens: int, setting: dict[str, Any]) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = setting["repack"]
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if setting["mmap"] else llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        of_context = llama_cpp.llama_context_default_params()
        of_context.n_ctx = tokens
        of_context.n_batch = tokens
        of_context.n_ubatch = setting["ubatch"]
        of_context.n_threads = of_context.n_threads_batch = threads
        of_context.flash_attn_type = int(setting["flash"])
        of_context.type_k = of_context.type_v = TENSOR_TYPES[setting["cache"]]
        self._context = llama_cpp.llama_init_from_model(self._model, of_context)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp does not load it with {setting}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self, ids: list[int]) -> int:
        """Forget everything, read a prompt and choose the token after it."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self.step(ids)

    def step(self, ids: list[int]) -> int:
        """Read tokens behind those read so far and choose the next one, greedily."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # held until the call is over
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {code}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def run(given: argparse.Namespace) -> None:
    """Take turns until nothing more is asked."""
    llama = Llama(given.model, given.threads, given.tokens, json.loads(given.setting))
    answer(step_by_step(llama.start, lambda token: llama.step([token])))


def main() -> None:
    """Do one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"quantize": quantize, "run": run}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, help="of `quantize`")
    parser.add_argument("--type", choices=FILE_TYPES, help="of `quantize`")
    parser.add_argument("--tokens", type=int, default=2048, help="longest text")
    parser.add_argument("--setting", help="of `run`: flash, repack, mmap, ubatch, cache as JSON")
    given = parser.parse_args()
    tasks[given.task](given)


if __name__ == "__main__":
    main()
