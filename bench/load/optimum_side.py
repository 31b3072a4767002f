"""Optimum's side of the decoding benchmark: its own export of a checkpoint, as it is or in int8, in its environment.

export   Write the fp32 graph, and one quantized dynamically to int8 with Optimum's settings for AVX512-VNNI.
run      Decode or prefill when asked to.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from steps import say
from turns import answer, step_by_step


def export(given: argparse.Namespace) -> None:
    """Fill `given.folder`/optimum-fp32 and optimum-int8; says their bytes."""
    plain, small = given.folder / "optimum-fp32", given.folder / "optimum-int8"
    ORTModelForCausalLM.from_pretrained(given.folder / "checkpoint", export=True).save_pretrained(plain)
    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(plain).quantize(save_dir=small, quantization_config=settings)
    say(**{path.name: sum(file.stat().st_size for file in path.glob("*.onnx*")) for path in (plain, small)})


def run(given: argparse.Namespace) -> None:
    """Take turns until nothing more is asked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    options.log_severity_level = 3
    folder = given.folder / f"optimum-{given.variant}"
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=given.binding)
    state: list[Any] = []

    @torch.inference_mode()
    def step(ids: list[int]) -> int:
        past, length = state
        mask = torch.ones((1, length + len(ids)), dtype=torch.int64)
        positions = torch.arange(length, length + len(ids))[None]
        found = model(torch.tensor([ids]), attention_mask=mask, position_ids=positions, past_key_values=past)
        state[:] = [found.past_key_values, length + len(ids)]
        return int(found.logits[0, -1].argmax())

    def start(ids: list[int]) -> int:
        state[:] = [None, 0]
        return step(ids)

    answer(step_by_step(start, lambda token: step([token])))


def main() -> None:
    """Do one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"export": export, "run": run}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--variant", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--binding", action="store_true", help="bind inputs and outputs instead of copying them")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tasks[given.task](given)


if __name__ == "__main__":
    main()
