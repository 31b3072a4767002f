"""Shared fixtures: a clean environment, tiny random models, and a check that stage folders stay in their namespace."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

# Set before anything is imported: no test talks to a hub, reports usage or forks a threaded tokenizer.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    ORT_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
from hypothesis import settings

# Timing on a shared machine is no property of the code; CI tries the same examples every time.
settings.register_profile("distill", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("distill")

ROOT = Path(__file__).resolve().parent.parent
SECRET_NAMES = ("OPENAI_API_KEY", "DEEPSEEK_API_KEY", "OPENROUTER_API_KEY", "HF_TOKEN")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template of the ChatML kind, as Qwen and SmolLM2 have it, without a default system prompt."""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the developer's keys or caches."""
    for name in SECRET_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _stage_folders_stay_in_the_namespace() -> Iterator[None]:
    """`import teachers` would work from the top of the tree and give a second copy of every class."""
    yield
    stray = {"teachers", "students", "export", "configs"} & sys.modules.keys()
    assert not stray, f"imported as top-level modules: {stray}; import them from distill"


@pytest.fixture(scope="session")
def root() -> Path:
    """Top of the source tree."""
    return ROOT


# --- tiny random models ---------------------------------------------------------------------------------------------


PROSE = (
    "State the final answer to the following arithmetic problem and put it in a box.",
    "Let me think about this step by step before I answer the question that was asked.",
    "A train leaves the station at noon and travels for three hours. How many miles has it gone when it stops?",
    "First write the larger number, then subtract the smaller one, then check the result by adding them again.",
)


def corpus() -> list[str]:
    """Text of our own that small tokenizers are trained on: arithmetic traces and a little prose."""
    sums = [f"{a} + {b} = {a + b}. So the answer is \\boxed{{{a + b}}}." for a in range(0, 100, 7) for b in range(100)]
    return [*sums, *PROSE, "<think>\nAdd the ones first, then the tens.\n</think>\n\nThe answer is \\boxed{42}."]


def make_tokenizer(chat_template: str | None = CHATML, vocabulary: int = 512) -> Any:
    """A byte-level BPE tokenizer with an end token, a pad token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_tiny_model(folder: Path, family: str = "llama", seed: int = 0, tokens: int = 512, **changes: Any) -> Path:
    """Save a random two-layer model of a family (llama, qwen2, qwen3) and its tokenizer in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(vocabulary=tokens)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    if family == "qwen2":
        shape.pop("head_dim")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to the folder of a tiny random model; made once a session, never change it."""
    made: dict[str, Path] = {}

    def tiny(family: str = "llama") -> Path:
        if family not in made:
            made[family] = make_tiny_model(tmp_path_factory.mktemp(f"tiny-{family}"), family)
        return made[family]

    return tiny


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Path]:
    """A function that saves another tiny model: `new_model(folder, "llama", seed=5, num_hidden_layers=3)`."""
    return make_tiny_model


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes sections as a recipe file (JSON is YAML) and gives its path."""

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(sections, indent=1, default=str), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def lab() -> Any:
    """The module `sweep_lab.py`: a recipe whose stages take no model, and executors that run in this process."""
    return _beside("sweep_lab")


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `ray_cluster.py`, whose cluster of two nodes is the one that RAY_ADDRESS names."""
    module = _beside("ray_cluster")
    if not module.RAY.exists():
        pytest.skip("ray is not installed (extra: ray)")
    monkeypatch.setenv("RAY_ADDRESS", module.ADDRESS)
    return module


def _beside(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- command line ---------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)

    @property
    def error_line(self) -> str:
        """The one line on stderr that starts with `error:`; fails if stderr holds anything else."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), f"not one error line: {self.err!r}"
        return lines[0].removeprefix("error: ")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """A function that runs the `distill` command in this process."""
    from distill.cli import app

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        code: Any = 0
        try:
            app([str(argument) for argument in arguments], prog_name="distill")
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        return Said(int(code or 0), said.out, said.err)

    return call


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line in a process of its own, which the client of hubs reads its settings in."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        outside = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "distill.cli", *map(str, arguments)],
            cwd=tmp_path, env={**outside, **home, **environment}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    return run


@pytest.fixture
def open_hub() -> Iterator[Callable[..., Any]]:
    """A function from the names of an earlier push to a hub that runs until the test ends."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent / "hub_server.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ExitStack() as stack:
        yield lambda *earlier: stack.enter_context(module.running(earlier))


# --- artifacts --------------------------------------------------------------------------------------------------------


def reseal(folder: Path, **changes: Any) -> None:
    """Bill of materials, card and manifest of an artifact made anew over what lies in it, as a careful forger would."""
    from distill.ancestry import base_alone
    from distill.config import recipe_from
    from distill.export.bom import write_bom
    from distill.export.card import card
    from distill.export.manifest import BOM_FILE, CARD_FILE, Draft, hash_files, read_manifest, write_manifest

    draft = Draft(**{name: value for name, value in dict(read_manifest(folder)).items() if name != "files"} | changes)
    files = {name: entry for name, entry in hash_files(folder).items() if name not in (BOM_FILE, CARD_FILE)}
    write_bom(folder, draft, files)
    recipe = recipe_from({"name": draft.name, "export": {"model": "student"}})
    ancestry = base_alone(recipe, "student", "main", None, "export.licence", "")
    (folder / CARD_FILE).write_text(card(draft, files, ancestry, [{"role": "user", "content": "1 + 1?"}]))
    write_manifest(folder, draft, files)


def make_artifact(folder: Path, **changes: Any) -> Path:
    """A whole artifact whose graph is a stub: everything that `verify` looks at but weights that write text."""
    from onnx import TensorProto, helper

    from distill.export.manifest import Draft, GateEntry, ModelOrigin, Origins, write_manifest

    (folder / "onnx").mkdir(parents=True)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model_q4.onnx_data"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph([], "g", [], [], initializer=[weight])
    (folder / "onnx/model_q4.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    (folder / "onnx/model_q4.onnx_data").write_bytes(bytes(range(16)))
    settings: dict[str, Any] = {
        "genai_config.json": {"model": {"decoder": {"filename": "onnx/model_q4.onnx"}, "eos_token_id": [2]}},
        "config.json": {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2},
        "generation_config.json": {"eos_token_id": 2},
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "tokenizer.json": {"added_tokens": [{"id": 2, "content": "<|im_end|>"}], "model": {"vocab": {}}},
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content))
    gates = (
        GateEntry(name="mean_kl", variant="int4", status="passed", value=0.25, limit=0.5, detail="small"),
        GateEntry(name="accuracy_drop", variant="int4", status="not_run", detail="no evaluation set"),
    )
    origins = Origins(student=ModelOrigin(id="student"))
    draft = Draft(name="sums", variants=("int4",), default="int4", origins=origins, gates=gates)
    write_manifest(folder, draft)
    reseal(folder, **changes)
    return folder


class Artifacts(NamedTuple):
    """What makes artifacts for tests."""

    make: Callable[..., Path]
    reseal: Callable[..., None]


@pytest.fixture
def artifacts() -> Artifacts:
    """Functions that make a whole artifact without a model, and seal a changed one anew."""
    return Artifacts(make_artifact, reseal)
