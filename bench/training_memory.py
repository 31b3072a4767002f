"""Memory of training data at scale: a million tokenized traces, planned, and packed for a thousand steps.

    python bench/training_memory.py [--check] [--traces 1000000] [--tokens 500]

Writes a token store's arrays of so many documents to a temporary folder, opens them as training does, plans an epoch,
and lays out the packs of some steps. Prints the process's own memory and what each part took; `--check` exits 1 above
the bar. Linux only.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from distill.config import SftPhase
from distill.documents import Arrays, Documents
from distill.students.loop import cut, plan_of

MOST_MB = 2000.0
"""Bar: far below 24 GB, which a student of some billions of parameters needs for itself."""
STEPS = 1000
BLOCK = 10_000
"""Documents written at a time."""


def write(folder: Path, traces: int, tokens: int) -> None:
    """The arrays of a token store: documents around so many tokens long, a fifth of each its prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(tokens // 2, tokens * 3 // 2, size=traces)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    np.save(folder / "bounds.npy", bounds)
    ids = np.lib.format.open_memmap(folder / "ids_T.npy", "w+", np.int32, (int(bounds[-1]),))
    segments = np.lib.format.open_memmap(folder / "segments_T.npy", "w+", np.uint8, (int(bounds[-1]),))
    for start in range(0, traces, BLOCK):
        first, last = int(bounds[start]), int(bounds[min(start + BLOCK, traces)])
        ids[first:last] = rng.integers(0, 49_152, size=last - first, dtype=np.int32)
        segments[first:last] = 1
        for number in range(start, min(start + BLOCK, traces)):
            begin, end = int(bounds[number]), int(bounds[number + 1])
            segments[begin : begin + (end - begin) // 5] = 0
            segments[end - 1] = 3
    ids.flush()
    segments.flush()


def main() -> int:
    """Write, open, plan, lay out; say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 above the bar")
    parser.add_argument("--traces", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, given.traces, given.tokens)
        began = time.perf_counter()
        arrays = Arrays(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in Arrays._fields))
        documents = Documents.over([arrays], "bench", {"documents": given.traces})
        phase = SftPhase(kind="sft", step_tokens=65_536, micro_batch_tokens=16_384)
        plan = plan_of(documents, phase)
        planned_s = time.perf_counter() - began
        packs = sum(len(cut(chosen, documents, phase)) for chosen in plan[:STEPS])
        seconds = time.perf_counter() - began - planned_s
        status = Path("/proc/self/status").read_text().splitlines()
        own = next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1e3
    size = f"{len(documents):,} documents, {len(arrays.ids_T):,} tokens"
    planned = f"{size}, {len(plan):,} steps planned in {planned_s:.1f} s"
    print(f"{planned}; {packs:,} packs of {STEPS:,} steps in {seconds:.1f} s")
    print(f"memory of its own {own:,.0f} MB (bar {MOST_MB:,.0f})")
    return 1 if given.check and own > MOST_MB else 0


if __name__ == "__main__":
    sys.exit(main())
