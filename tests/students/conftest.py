"""Live students in any precision, documents for them, and phases to train on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.attention import PER_DOCUMENT
from distill.config import SftPhase
from distill.documents import Documents
from distill.format import Document
from distill.models import find_model, load_model, load_tokenizer

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices: threads only cost time, and sums must not depend on how many there are."""
    import torch

    torch.set_num_threads(1)


def enliven(model: Any, seed: int) -> Any:
    """Weights so large that attention is far from uniform and every parameter, biases and norms too, matters."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model


@pytest.fixture(scope="session")
def live(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    """A function that loads a fresh student of a family: `live("qwen3", "float64", attention="sdpa")`."""

    def load(
        family: str = "llama", dtype: str = "float32", attention: str = PER_DOCUMENT, seed: int = 7, **changes: Any
    ) -> Any:
        import torch

        model = load_model(find_model(str(tiny_model(family))), dtype, "cpu", attention)
        if changes:
            model = type(model)(type(model.config)(**(model.config.to_dict() | changes)))
            model.set_attn_implementation(attention)
        return enliven(model.to(getattr(torch, dtype)).eval(), seed)

    return load


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


def random_documents(lengths: list[int], prompts: list[int], vocabulary: int = 512, seed: int = 0) -> Documents:
    """Documents of random ids (special ones too) with the given lengths and prompt lengths."""
    rng = np.random.default_rng(seed)
    return Documents.of(
        Document(rng.integers(0, vocabulary, size=length).tolist(), segments_of(length, prompt), False)
        for length, prompt in zip(lengths, prompts, strict=True)
    )


def segments_of(length: int, prompt: int) -> bytes:
    """A prompt, then reasoning up to the middle of the rest, an answer, and an end."""
    rest = length - prompt - 1
    return bytes([0] * prompt + [1] * (rest // 2) + [2] * (rest - rest // 2) + [3])


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., Documents]:
    return random_documents


@pytest.fixture(scope="session")
def phase() -> Callable[..., SftPhase]:
    """A function from what differs to a phase that trains small and fast."""

    def make(**changes: Any) -> SftPhase:
        return SftPhase(**({"kind": "sft", "lr": 1e-3, "step_tokens": 64, "micro_batch_tokens": 32} | changes))

    return make
