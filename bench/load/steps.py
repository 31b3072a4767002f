"""What the sides of the benchmarks share: taking turns, memory, the allocator, where a step's time goes.

Imported by scripts that run in several virtual environments, so it needs nothing but the standard library (and torch
where it profiles). Linux only.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

RESULT = "RESULT "
"""Begins the lines of a side's stdout that hold its results, among whatever else it prints."""
STEP, PROFILE = "step", "profile"
"""What the benchmark asks for: a step, or a step under the profiler."""
DECODE, PREFILL = "decode", "prefill"
"""What the decoding benchmark asks for, each followed by how many tokens."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


def say(**values: Any) -> None:
    """One line of result for the benchmark that started this process."""
    print(RESULT + json.dumps(values), flush=True)


def asked() -> str:
    """Wait until the benchmark wants something: STEP, PROFILE, or nothing more (empty)."""
    return sys.stdin.readline().strip()


# --- memory ---------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let glibc re-use large freed blocks instead of returning them to the kernel.

    As `distill.models.keep_freed_memory`, for the peer too: without it every step faults its memory in anew.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def memory_mb(field: str) -> float:
    """A field of this process's status in MB of 2^20 bytes: `VmRSS` is its size now, `VmHWM` the highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def loaded_mb(model: Any) -> float:
    """The size with a model loaded, less what loading has freed; the highest is counted from here on.

    Weights that are only mapped from their file are copied first: they count once they are touched.
    """
    for weight in model.parameters():
        weight.data = weight.data.clone()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


# --- where the time goes --------------------------------------------------------------------------------------------

HEAD = "head, loss, embedding"
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "softmax", "bmm"),
    "optimizer, clipping": ("adam", "foreach", "vector_norm"),
    "matrix products of the layers": ("mm", "linear", "matmul"),
    "copies, casts, gathers": ("copy", "clone", "cat", "index", "zero", "fill", "stack", "gather"),
}
"""Kinds of operators by parts of their names, the first that fits; what is left is the fifth kind."""
OTHERS = "norms, activations, other elementwise"
TILE = 32768
"""Columns of the vocabulary that TRL's fused head takes at a time."""


class Clock:
    """Times a step, and under the profiler says what it was spent on."""

    def __init__(self, vocabulary: int) -> None:
        self.head = {vocabulary, TILE, vocabulary % TILE} - {0}

    def start(self, what: str) -> None:
        """The step begins."""
        self.profiler = None
        if what == PROFILE:
            import torch

            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            self.profiler.start()
        self.began = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """Seconds since it began; with the profiler also the seconds of each kind of operator."""
        found: dict[str, Any] = {"seconds": time.perf_counter() - self.began}
        if self.profiler is not None:
            self.profiler.stop()
            found["spent"] = self._spent()
        return found

    def _spent(self) -> dict[str, float]:
        spent: dict[str, float] = {}
        for event in self.profiler.key_averages(group_by_input_shape=True):
            kind = self._kind(event.key.lower(), event.input_shapes)
            spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        return spent

    def _kind(self, name: str, shapes: list[Any]) -> str:
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHERS)
        sizes = {size for shape in shapes if isinstance(shape, list) for size in shape if isinstance(size, int)}
        return HEAD if sizes & self.head and not kind.startswith("optimizer") else kind
