"""`distill bench`: how fast an artifact is on this machine, measured in a process of its own.

Time to the first token behind 128 and 1,024 prompt tokens, tokens a second of one text, throughput of batches, time to
load, peak memory; medians over rounds. The answers go on behind the model's end token, so that every round writes
exactly the tokens it counts.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import EngineError
from distill.progress import progress
from distill.runs import RunOptions, available_cores, library_versions

from .runtime import Request, Runtime

PROMPTS = (128, 1024)
BATCHES = (1, 8, 16, 32)
NEW_TOKENS = 64
ROUNDS = 3
LIBRARIES = ("onnxruntime", "onnxruntime-genai", "tokenizers", "numpy", "distill")


def bench(
    folder: Path, variant: str | None = None, threads: int = 0, rounds: int = ROUNDS, quiet: bool = False
) -> dict[str, Any]:
    """Every figure as a JSON object. Raises EngineError, with the reason, if the artifact cannot be run."""
    order = json.dumps({"folder": str(folder), "variant": variant, "threads": threads, "rounds": rounds})
    command = [sys.executable, "-m", "distill.export.bench", order]
    steps = rounds * (len(PROMPTS) + len(BATCHES))
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process,
        progress("bench", steps, RunOptions(quiet=quiet), unit="measurements") as bar,
    ):
        assert process.stdout
        try:
            found: dict[str, Any] = {}
            for line in process.stdout:
                found = json.loads(line)
                if "step" in found:
                    bar.advance(1)
        except BaseException:
            process.kill()
            raise
    if "result" not in found:
        raise EngineError(found.get("error") or f"the measuring process ended with exit code {process.returncode}")
    result: dict[str, Any] = found["result"]
    return result


def as_rows(result: dict[str, Any]) -> list[list[str]]:
    """The figures for a table: name, value, spread over the rounds."""
    rows = [["load", f"{result['load_s']:.2f} s", ""]]
    for length, times in result["ttft_s"].items():
        rows.append([f"first token, {int(length):,} prompt tokens", f"{times['median']:.3f} s", _spread(times, "s", 3)])
    for size, rates in result["tokens_per_s"].items():
        name = "decode, one text" if size == "1" else f"throughput, batch of {size}"
        rows.append([name, f"{rates['median']:.1f} tokens/s", _spread(rates, "tokens/s", 1)])
    rows.append(["peak memory", f"{result['peak_memory_bytes'] / 1e6:,.0f} MB", ""])
    return rows


def _spread(values: dict[str, float], unit: str, digits: int) -> str:
    return f"{values['low']:.{digits}f} to {values['high']:.{digits}f} {unit}"


# --- in the process that measures -------------------------------------------------------------------------------------


def measure(
    folder: Path, variant: str | None, threads: int, rounds: int, on_step: Callable[[], None]
) -> dict[str, Any]:
    """All figures of one artifact."""
    started = time.perf_counter()
    with Runtime(folder, variant, threads, max_rows=max(BATCHES)) as runtime:
        load_s = time.perf_counter() - started
        runtime.generate([_request(runtime, 16, 2, seed=0)])  # what only the first call pays is not measured
        longest = [length for length in PROMPTS if length < runtime.max_tokens]
        ttft = {str(length): list(_ttft(runtime, length, rounds, on_step)) for length in longest}
        rates = {str(size): list(_rates(runtime, size, rounds, on_step)) for size in BATCHES}
        return {
            "artifact": runtime.name,
            "variant": runtime.graph.variant,
            "threads": runtime.threads,
            "rounds": rounds,
            "new_tokens": NEW_TOKENS,
            "load_s": load_s,
            "ttft_s": {length: _summary(values) for length, values in ttft.items()},
            "tokens_per_s": {size: _summary(values) for size, values in rates.items()},
            "peak_memory_bytes": peak_memory(),
            "machine": {"processor": processor(), "cores": available_cores(), "system": platform.platform()},
            "versions": {"python": platform.python_version(), **library_versions(LIBRARIES)},
        }


def _request(runtime: Runtime, length: int, new_tokens: int, seed: int) -> Request:
    """Random prompts, so that none shares a start with another."""
    ids = np.random.default_rng([seed, length]).integers(0, runtime.decoder.shape.vocabulary, length)
    return Request([int(one) for one in ids], new_tokens, ignore_end=True)


def _ttft(runtime: Runtime, length: int, rounds: int, on_step: Callable[[], None]) -> Iterator[float]:
    for number in range(rounds):
        request = _request(runtime, length, 1, seed=1 + number)
        started = time.perf_counter()
        runtime.generate([request])
        yield time.perf_counter() - started
        on_step()


def _rates(runtime: Runtime, size: int, rounds: int, on_step: Callable[[], None]) -> Iterator[float]:
    """New tokens a second of `size` short prompts together, prefill included for batches and left out for one text."""
    for number in range(rounds):
        requests = [_request(runtime, 32, NEW_TOKENS, seed=1000 * size + 100 * number + place) for place in range(size)]
        started = time.perf_counter()
        if size == 1:
            runtime.generate([_request(runtime, 32, 1, seed=5000 + number)])
            prefill, started = time.perf_counter() - started, time.perf_counter()
            runtime.generate(requests)
            yield (NEW_TOKENS - 1) / (time.perf_counter() - started - prefill)
        else:
            runtime.generate(requests)
            yield size * NEW_TOKENS / (time.perf_counter() - started)
        on_step()


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def peak_memory() -> int:
    """Most bytes this process has held; the kernel's own count where it has one, since the other is inherited."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """The model name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _tell(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _main(order: str) -> None:
    from distill.errors import DistillError

    given = json.loads(order)
    try:
        result = measure(
            Path(given["folder"]), given["variant"], given["threads"], given["rounds"], lambda: _tell(step=True)
        )
        _tell(result=result)
    except DistillError as error:
        _tell(error=str(error))


if __name__ == "__main__":
    _main(sys.argv[1])
