"""Decide how `make` installs torch: keep one that is there, and never fetch a CUDA build for a machine without a GPU.

    python torch_build.py REQUIREMENT

Exits 0 if torch is already importable at a fitting version or if what pip would take suits this machine; else says in
one line what to do and exits 1. Only the wheel's metadata is looked at: `pip install --dry-run` fetches no more.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

GPU_PARTS = ("nvidia-", "cuda-", "triton")
"""Starts of the requirements that only CUDA builds of torch have on Linux."""


def main(requirement: str) -> int:
    """Check one requirement; returns the exit code."""
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") or sys.platform != "linux":
        return 0
    options = ["--dry-run", "--quiet", "--no-deps", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *options, requirement]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        print(answer.stderr.strip(), file=sys.stderr)
        return 1
    chosen = json.loads(answer.stdout)["install"]
    if not any(needs_gpu(part["metadata"]) for part in chosen):
        return 0
    version = chosen[0]["metadata"]["version"]
    print(
        f"error: pip would take the CUDA build torch {version} (several GB), and this machine has no NVIDIA GPU."
        " Install PyTorch's CPU build into the Python that make uses (make keeps it), or name one:"
        " make TORCH=path/to/torch-cpu.whl; to take the CUDA build all the same: make CUDA=1",
        file=sys.stderr,
    )
    return 1


def needs_gpu(metadata: dict[str, list[str]]) -> bool:
    """Whether a wheel requires CUDA libraries."""
    return any(part.lower().startswith(GPU_PARTS) for part in metadata.get("requires_dist", []))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
