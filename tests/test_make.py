"""What make decides before it installs anything."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def torch_build(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_build", root / ".ci" / "torch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        (["filelock", "sympy>=1.13.3", "jinja2"], False),
        (["filelock", 'nvidia-cublas-cu12==12.8.4.1; platform_system == "Linux"'], True),
        (["sympy", 'triton==3.5.0; platform_system == "Linux"'], True),
        ([], False),
    ],
)
def test_a_cuda_build_is_known_by_what_it_requires(
    torch_build: ModuleType, requires: list[str], expected: bool
) -> None:
    assert torch_build.needs_gpu({"requires_dist": requires}) is expected


def test_make_without_a_target_says_what_there_is(root: Path) -> None:
    said = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in said for target in ("quickstart", "test", "test-full", "lint", "docs", "bench"))


def test_ci_runs_what_developers_run(root: Path) -> None:
    lines = (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines and lines[-2:] == ["make lint", "make test"]
