"""Tiny students whose every parameter matters, and their exported variants; each is made once a session."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Student = Callable[..., Path]
Variant = Callable[..., Path]

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "qwen2", "qwen3")


def save_student(template: Path, folder: Path, tied: bool = True, dtype: str = "float32", **changes: Any) -> Path:
    """A random model like the one in `template`, with large weights, so that its texts vary and no bias is zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(template, tie_word_embeddings=tied, **changes)
    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A function from a family and the changes wanted to a saved checkpoint; never change what it returns."""
    made: dict[tuple[Any, ...], Path] = {}

    def find(family: str = "llama", **changes: Any) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = save_student(tiny_model(family), tmp_path_factory.mktemp(f"student-{family}"), **changes)
        return made[key]

    return find


@pytest.fixture(scope="session")
def exported(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """A function from family, variant and changes to the folder of an exported variant; never change it either."""
    from distill.export.graph import build_variant

    made: dict[tuple[Any, ...], Path] = {}

    def find(family: str = "llama", variant: str = "fp32", **changes: Any) -> Path:
        key = (family, variant, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-artifact") / variant
            build_variant(student(family, **changes), variant, made[key])
        return made[key]

    return find


@pytest.fixture(scope="session")
def artifact(exported: Variant, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from family, variants and changes to a folder that every runtime loads; never change it."""
    from distill.export.package import write_loader_files

    made: dict[tuple[Any, ...], Path] = {}

    def find(family: str = "llama", variants: tuple[str, ...] = ("fp32", "int8", "int4"), **changes: Any) -> Path:
        key = (family, variants, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-artifact") / "all"
            for variant in variants:
                shutil.copytree(exported(family, variant, **changes), made[key], dirs_exist_ok=True)
            write_loader_files(made[key])
        return made[key]

    return find


@pytest.fixture
def node_home(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers.js is; skips the test where `make js-env` has not put it."""
    home = Path(os.environ.get("DISTILL_NODE") or ROOT / "build" / "node")
    if not (shutil.which("node") and (home / "node_modules" / "@huggingface").is_dir()):
        pytest.skip("transformers.js is not here: make js-env")
    monkeypatch.setenv("DISTILL_NODE", str(home))
    return home


@pytest.fixture
def optimum_home(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment with Optimum; skips the test where `make optimum-env` has not made it."""
    home = Path(os.environ.get("DISTILL_OPTIMUM") or ROOT / "build" / "venvs" / "optimum")
    if not (home / "bin" / "python").is_file():
        pytest.skip("Optimum is not here: make optimum-env")
    monkeypatch.setenv("DISTILL_OPTIMUM", str(home))
    return home


@pytest.fixture(scope="session")
def altered(exported: Variant, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a template and end tokens to an artifact that has these; its context is longer than others'."""

    def alter(template: str | None = None, end_ids: list[int] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("altered") / "artifact"
        shutil.copytree(exported(max_position_embeddings=8192), folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if end_ids is not None:
            config = json.loads((folder / "genai_config.json").read_text())
            config["model"]["eos_token_id"] = end_ids
            (folder / "genai_config.json").write_text(json.dumps(config))
        return folder

    return alter


@pytest.fixture(scope="session")
def torch_student(student: Student) -> Callable[..., Any]:
    """A function from a family to its student as torch runs it, in fp32: the reference."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(family: str = "llama", **changes: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(student(family, **changes), dtype=torch.float32).eval()

    return load
