"""Make the environment in which an artifact is loaded by Optimum: transformers 4, beside everything it needs.

    python optimum_environment.py FOLDER

`optimum-onnx` pins transformers 4, which cannot live beside distill's transformers 5. Nothing of distill is installed
there: what is tested is that somebody who has never heard of it can load the folder.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("optimum-onnx[onnxruntime]==0.1.*", "transformers==4.57.*")


def main(folder: Path) -> int:
    """Make it, with the torch of the Python that runs this; returns the exit code."""
    torch = f"torch=={version('torch').partition('+')[0]}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", *PACKAGES, torch], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
