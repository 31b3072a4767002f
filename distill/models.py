"""Loading models and tokenizers.

A model comes from a hub id, a local folder, a GGUF file or a GGUF that a Python package ships; whatever the source,
the result is a plain transformers model that can be saved. Attention that stays inside packed documents
(`distill.attention`) is made known to transformers on the way.
"""

import contextlib
import copy
import ctypes
import importlib.util
import io
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import MissingExtraError, ModelError
from distill.records import digest_json
from distill.runs import DigestCache, RunOptions

FAMILIES = ("llama", "qwen2", "qwen3")
GGUF_READER = "one-table"
"""Changed where the same GGUF file becomes another model."""
ROWS_APART = 64
"""Rows of a GGUF file's embedding between two that are compared with its head."""
SCALED_TOGETHER = 32
"""Values of a quantized row whose range is taken together: as many as share a scale, or twice as many."""
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
"""torch's name of each precision of a recipe."""


class ModelSource(NamedTuple):
    """Where a model lies: a folder (perhaps with one GGUF file chosen), or a hub id with its revision."""

    name: str
    folder: Path | None = None
    gguf: str | None = None
    revision: str = "main"

    @property
    def where(self) -> str:
        """What transformers' `from_pretrained` takes first."""
        return str(self.folder) if self.folder else self.name


def find_model(name: str, revision: str = "main") -> ModelSource:
    """Resolve a model name without loading anything.

    `package:NAME/FILE.gguf` is a file of an installed Python package; a path that exists is local; anything else is a
    hub id. Raises ModelError for files that are missing, truncated or not what they claim to be.
    """
    if name.startswith("package:"):
        path = _package_file(name)
    else:
        path = Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") != 1
        if not path.exists():
            if looks_local and not _is_bare_hub_id(name):
                raise ModelError(f"{name}: no such model file or folder; give a folder, a .gguf file or a hub id")
            return ModelSource(name, revision=revision)
    if path.is_file():
        _check_gguf(path)
        return ModelSource(name, path.parent, path.name)
    _check_folder(path)
    return ModelSource(name, path)


def _is_bare_hub_id(name: str) -> bool:
    return "/" not in name and not name.endswith(".gguf") and name not in (".", "..", "~")


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{name}: the Python package {package!r} is not installed; install it with pip --no-deps")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise ModelError(f"{name}: the package {package!r} has no file {file!r}")
    return path


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file (starts with {magic!r}); give a .gguf file, a folder or a hub id")


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a configuration or with damaged weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in it; give the folder of a transformers checkpoint")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not list(folder.glob("*.bin")):
        raise ModelError(f"{folder}: no weights (*.safetensors) in it")
    for path in weights:
        check_safetensors(path)
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index)


def _check_index(index: Path) -> None:
    """Refuse a checkpoint of several files of which one is missing."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read; download it again") from error
    if missing := sorted(name for name in shards if not (index.parent / name).is_file()):
        raise ModelError(f"{index.parent}: {missing[0]} is missing, though {index.name} lists it; download it again")


def check_safetensors(path: Path) -> None:
    """Compare a safetensors file's size with what its header says.

    Raises ModelError if it is truncated or not safetensors at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, 100 << 20):
            raise ModelError(f"{path}: not a safetensors file, or cut off in its header; download it again")
        try:
            header = json.loads(file.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{path}: its safetensors header cannot be read; download it again") from error
    if size != 8 + length + end:
        raise ModelError(
            f"{path}: truncated: {size:,} bytes, its header says {8 + length + end:,}; download or copy it again"
        )


def model_digest(source: ModelSource, cache: DigestCache) -> str:
    """What identifies a model's content: a digest for local files, the resolved commit for a hub id.

    A hub that cannot be reached leaves the revision as given, marked `unresolved`. That of a GGUF file names what we
    make of it, so that no run goes on with another model than it began with.
    """
    if source.folder and source.gguf:
        return f"{cache.of(source.folder / source.gguf)}:{GGUF_READER}"
    if source.folder:
        return cache.of(source.folder)
    return f"{source.name}@{hub_commit(source.name, source.revision)}"


def tokenizer_root(source: ModelSource, cache: DigestCache) -> str:
    """What identifies a model's tokenizer and template: their files in a folder, else the model itself."""
    if source.folder is None or source.gguf:
        return model_digest(source, cache)
    files = sorted(path for pattern in TOKENIZER_FILES for path in source.folder.glob(pattern))
    return digest_json({path.relative_to(source.folder).as_posix(): cache.of(path) for path in files})


TOKENIZER_FILES = ("tokenizer*", "*token*.json", "vocab.*", "merges.txt", "chat_template*", "*.model")
"""Where a checkpoint keeps its tokenizer and chat template."""


def hub_commit(repo: str, revision: str, kind: str = "model") -> str:
    """Commit of a hub id, from the local cache or the hub; `unresolved:REVISION` where neither answers."""
    if len(revision) == 40 and all(c in "0123456789abcdef" for c in revision):
        return revision
    from huggingface_hub import HfApi, constants

    folder = f"{kind}s--{repo.replace('/', '--')}"
    ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    if constants.HF_HUB_OFFLINE:
        return ref.read_text().strip() if ref.is_file() else f"unresolved:{revision}"
    try:
        return str(HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=10).sha)
    except Exception:  # every way a network can fail; the caller says what it means
        return ref.read_text().strip() if ref.is_file() else f"unresolved:{revision}"


# --- loading --------------------------------------------------------------------------------------------------------


def require_torch() -> None:
    """Raise MissingExtraError unless torch and transformers are installed."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "train")


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a pad token (the end token where it has none: masks go by position, never by id)."""
    require_torch()
    return _parsed_once("tokenizer", source, _load_tokenizer)


_parsed: dict[tuple[Any, ...], Any] = {}
"""What this process has read of GGUF files, by file, size and modification time."""


def _parsed_once(what: str, source: ModelSource, load: Callable[[ModelSource], Any]) -> Any:
    """Load, but of a GGUF file only once a process and a copy for each caller: its header takes seconds to parse."""
    if source.folder is None or source.gguf is None:
        return load(source)
    status = (source.folder / source.gguf).stat()
    key = (what, source, status.st_size, status.st_mtime_ns)
    if key not in _parsed:
        _parsed[key] = load(source)
    return copy.deepcopy(_parsed[key])


def _load_tokenizer(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    with _explained(source), quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(source.where, **_from_pretrained(source))
    if source.gguf:
        _restore_pre_tokenizer(tokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _restore_pre_tokenizer(tokenizer: Any, source: ModelSource) -> None:
    """Split digits one by one where the GGUF file says so; transformers' conversion drops that rule.

    SmolLM's tokenizer would otherwise split a run of newlines before a number, which the model never saw.
    """
    from tokenizers import pre_tokenizers

    if _parsed_once("gguf", source, _read_gguf).pre_tokenizer == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def load_config(source: ModelSource) -> Any:
    """The model's configuration; refuses architectures that were not tested."""
    require_torch()
    return _parsed_once("config", source, _load_config)


def _load_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    with _explained(source), quiet_loading():
        config = AutoConfig.from_pretrained(source.where, **_from_pretrained(source))
        if config.model_type not in FAMILIES:
            raise ModelError(f"{source.name}: a {config.model_type!r} model; students are {', '.join(FAMILIES)}")
        if source.gguf and not config.tie_word_embeddings:
            config.tie_word_embeddings = _parsed_once("gguf", source, _read_gguf).one_table
    return config


class _Gguf(NamedTuple):
    """What transformers does not read of a GGUF file."""

    pre_tokenizer: str | None
    one_table: bool
    """Whether embedding and head, though stored apart, are one matrix."""


def _read_gguf(source: ModelSource) -> _Gguf:
    import gguf

    assert source.folder is not None and source.gguf is not None
    reader = gguf.GGUFReader(source.folder / source.gguf)  # takes seconds and half a gigabyte of a large vocabulary
    kind = reader.fields.get("tokenizer.ggml.pre")
    tables = {tensor.name: tensor for tensor in reader.tensors}
    embedding, head = tables.get("token_embd.weight"), tables.get("output.weight")
    one_table = embedding is not None and head is not None and _rounded_alike(embedding, head)
    return _Gguf(None if kind is None else str(kind.contents()), one_table)


def _rounded_alike(embedding: Any, head: Any) -> bool:
    """Whether two tensors of a GGUF file are one matrix, the head in as many bits or more, as quantizers store it.

    Each value of the embedding must be within a step of its grid from the head's: rounding, or being clipped at an end
    of a block's range, moves none further. A head that was trained apart is further off. In fewer than four bits
    the two could not be told apart, and embedding and head stay as they are. Every `ROWS_APART`-th row is read.
    """
    import gguf
    import numpy as np

    bits = _bits(embedding)
    if list(embedding.shape) != list(head.shape) or not 4 <= bits <= _bits(head):
        return False
    coarse, fine = (gguf.dequantize(one.data[::ROWS_APART], one.tensor_type) for one in (embedding, head))
    if bits >= 16:
        return bool(np.array_equal(coarse, fine))
    blocks, others = (values.reshape(-1, SCALED_TOGETHER) for values in (coarse, fine))
    steps = np.ptp(blocks, axis=-1, keepdims=True) / (2**bits - 1)
    return bool((np.abs(others - blocks) > 1.01 * steps).mean() < 1e-3)


def _bits(tensor: Any) -> int:
    """Bits of a GGUF tensor's values, as its type is named: Q5_0, IQ4_NL, BF16."""
    return int(re.findall(r"\d+", tensor.tensor_type.name)[0])


def require_context(where: str, config: Any, tokens: int) -> None:
    """Refuse a teacher that cannot read documents of up to so many tokens. Raises ModelError."""
    context = int(config.max_position_embeddings)
    if tokens > context:
        raise ModelError(
            f"{where}: its context is {context:,} tokens, but documents have up to format.max_tokens={tokens:,};"
            " set that lower"
        )


def load_model(source: ModelSource, dtype: str = "float32", device: str = "cpu", attention: str = "sdpa") -> Any:
    """A plain causal language model in `dtype` (`float32` or `bfloat16`) on a device, in evaluation mode.

    A GGUF file is dequantised and copied into a plain model of its architecture, which can be saved; embedding and
    head that the file rounded from one matrix share the one in more bits again. Raises
    ModelError naming what is missing and what to do; weights that the file lacks are never made up.
    """
    require_torch()
    import torch
    from transformers import AutoModelForCausalLM

    from distill.attention import register_attention

    config = load_config(source)
    register_attention()
    with _explained(source), quiet_loading():
        model, found = AutoModelForCausalLM.from_pretrained(
            source.where,
            dtype=getattr(torch, dtype),
            attn_implementation=None if source.gguf else attention,
            output_loading_info=True,
            **_from_pretrained(source),
        )
    _check_filled(source, found["missing_keys"], found["unexpected_keys"])
    if source.gguf:
        model = _plain_copy(model, config.tie_word_embeddings, attention, getattr(torch, dtype))
    return model.to(device).eval()


def _check_filled(source: ModelSource, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Refuse weights that do not fit the configuration: transformers would draw at random or ignore them, quietly.

    What is not part of a layer (the head of a reward model, say) may be ignored.
    """
    surplus = [key for key in unexpected if ".layers." in key and "rotary_emb" not in key]
    for keys, what in ((missing, "are missing"), (surplus, "have no place in it")):
        if keys:
            raise ModelError(
                f"{source.name}: {len(keys)} weights {what} by its config.json ({min(keys)} and so on);"
                " give a config.json and weights that belong together"
            )


def _plain_copy(model: Any, tied: bool, attention: str, dtype: Any) -> Any:
    """The same weights in a model that carries no trace of GGUF and so can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    values = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        values.pop(key, None)
    config = type(model.config)(**values | {"tie_word_embeddings": tied})
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if tied and not model.config.tie_word_embeddings:
        state["model.embed_tokens.weight"] = state.pop("lm_head.weight")  # the one in more bits
    plain = plain.to_empty(device="cpu").to(dtype)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    plain.tie_weights()
    if set(missing) - ({"lm_head.weight"} if tied else set()) or unexpected:
        raise ModelError(f"the GGUF file does not fill its architecture: missing {missing}, unexpected {unexpected}")
    _recompute_buffers(plain)
    plain.generation_config = GenerationConfig.from_model_config(config)
    return plain


def _recompute_buffers(model: Any) -> None:
    """Make the rotary tables anew: they are not in the state dict, and `to_empty` left them undefined."""
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "config"):
            fresh = type(module)(config=module.config)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.original_inv_freq


def _from_pretrained(source: ModelSource) -> dict[str, Any]:
    """Where-from arguments for `from_pretrained`."""
    if source.gguf:
        return {"gguf_file": source.gguf}
    return {} if source.folder else {"revision": source.revision}


@contextlib.contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """Turn the many ways loading fails into one line that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if source.folder:
            whole = "is it whole? copy or download it again"
            raise ModelError(f"{source.name}: cannot be loaded; {whole} ({first})") from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise ModelError(
            f"{source.name}@{source.revision}: not in the local hub cache and the hub cannot be reached{offline}, or no"
            f" such model; check the id, the network and HF_TOKEN, or give a local folder ({first[:160]})"
        ) from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal while loading."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def choose_device(options: RunOptions) -> str:
    """The torch device to use: as asked, else CUDA, else CPU (Apple's MPS only on request)."""
    device = _device(options)
    if device == "cpu":  # DeepSpeed, which accelerate imports where it is installed, would say on stdout that it looked
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return device


def _device(options: RunOptions) -> str:
    require_torch()
    import torch

    if options.device != "auto":
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise ModelError(f"--device {options.device}: not usable here ({first}); try --device cpu") from error
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_threads(options: RunOptions) -> None:
    """Let torch use the threads the run was given, and keep the memory it frees."""
    import torch

    torch.set_num_threads(options.cpu_threads)
    keep_freed_memory()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let glibc re-use large freed blocks instead of returning them to the kernel (elsewhere it does nothing).

    A training step frees and takes gigabytes of activations; faulting their pages in again each time costs about a
    quarter of a step on a virtual machine.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Let glibc return to the kernel what `keep_freed_memory` has it keep: milliseconds, and more to get it back."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Let torch draw from `seed` inside the block; the random state of the CPU and of a CUDA `device` comes back."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        yield
