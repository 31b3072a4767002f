"""What this installation can do: versions, devices, attention, missing extras, hub state, disk space.

Nothing is downloaded and no model is loaded. Heavy libraries are imported only to ask them what they see.
"""

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from distill.runs import RunOptions, available_cores, library_versions
from distill.verifiers.sandbox import REMEDY, sandbox_problem

EXTRAS = {
    "train": ("torch", "transformers", "accelerate", "safetensors", "datasets", "pyarrow", "gguf", "jinja2", "peft"),
    "export": ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir", "cyclonedx"),
    "sign": ("model_signing", "OpenSSL"),
    "harness": ("lm_eval",),
    "track": ("tensorboard",),
    "sweep": ("optuna",),
    "vllm": ("vllm",),
    "gpu": ("flash_attn",),
}
"""Modules that each extra brings."""

SHOWN_VERSIONS = (
    "distill", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "datasets", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "onnx", "onnx-ir", "flash-attn", "vllm",
    "reasoning-gym", "math-verify", "pydantic", "numpy",
)  # fmt: skip


def examine(options: RunOptions) -> dict[str, Any]:
    """Everything that `distill doctor` says, as plain values."""
    return {
        "system": _system(),
        "versions": library_versions(SHOWN_VERSIONS),
        "threads": {"available_cores": available_cores(), "used": options.cpu_threads},
        "devices": _devices(),
        "attention": _attention(),
        "code_sandbox": _code_sandbox(),
        "missing_extras": missing_extras(),
        "missing_runtimes": _missing_runtimes(),
        "hub": _hub(),
        "disk": {"runs": _disk(options.runs)},
    }


def missing_extras() -> dict[str, dict[str, Any]]:
    """Extras that are not wholly installed: what is missing and the command that adds it."""
    found = {}
    for extra, modules in EXTRAS.items():
        if missing := [name for name in modules if not _installed(name)]:
            found[extra] = {"missing": missing, "command": f"pip install 'distill[{extra}]'"}
    return found


def _missing_runtimes() -> dict[str, str]:
    """Runtimes that an export is not held against here, and how to get each."""
    from distill.export.runtimes import missing_runtimes

    return missing_runtimes()


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _system() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "memory_gib": _memory_gib(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)
    except (AttributeError, OSError, ValueError):
        return None


def _devices() -> list[str]:
    """Devices that `--device` takes here, the one that `auto` chooses first."""
    if not _installed("torch"):
        return ["cpu"]
    import torch

    cuda = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, "cpu", *mps]


def _attention() -> dict[str, bool]:
    """Attention implementations for packed documents and generation, and whether each is usable here."""
    if not (_installed("torch") and _installed("transformers")):
        return {"per_document": False, "sdpa": False, "flash_attention_2": False}
    from transformers.utils import is_flash_attn_2_available

    return {"per_document": True, "sdpa": True, "flash_attention_2": bool(is_flash_attn_2_available())}


def _code_sandbox() -> dict[str, Any]:
    """Whether the verifier `code` can run answers in a sandbox here; one is started to see."""
    problem = sandbox_problem()
    return {"usable": problem is None, "problem": problem}


def _hub() -> dict[str, Any]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    home = home.expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return {"home": str(home), "offline": offline, "token_set": bool(os.environ.get("HF_TOKEN")), **_disk(home)}


def _disk(folder: Path) -> dict[str, Any]:
    """Free space where a folder lies or would lie, and whether it can be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_gib = round(shutil.disk_usage(there).free / (1 << 30), 1)
    return {"folder": str(folder), "free_gib": free_gib, "writable": os.access(there, os.W_OK)}


def as_text(found: dict[str, Any]) -> str:
    """The same for people."""
    system, hub, runs, sandbox = found["system"], found["hub"], found["disk"]["runs"], found["code_sandbox"]
    memory = f", {system['memory_gib']} GiB" if system["memory_gib"] else ""
    lines = [
        f"system     Python {system['python']}, {system['platform']}{memory}",
        "versions   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"threads    {found['threads']['used']} of {found['threads']['available_cores']} cores",
        "devices    " + ", ".join(found["devices"]),
        "attention  " + ", ".join(f"{name} {'yes' if usable else 'no'}" for name, usable in found["attention"].items()),
        f"sandbox    {'yes' if sandbox['usable'] else 'no'} (verifier code)"
        f"{'' if sandbox['usable'] else ': ' + sandbox['problem'] + '; ' + REMEDY}",
        f"hub        {hub['home']}, {hub['free_gib']} GiB free, {'offline' if hub['offline'] else 'online'},"
        f" HF_TOKEN {'set' if hub['token_set'] else 'not set'}",
        f"runs       {runs['folder']}, {runs['free_gib']} GiB free{'' if runs['writable'] else ', NOT WRITABLE'}",
    ]
    for extra, what in found["missing_extras"].items():
        lines.append(f"missing    {extra}: {', '.join(what['missing'])}; add with: {what['command']}")
    lines += [f"missing    runtime {name}: {remedy}" for name, remedy in found["missing_runtimes"].items()]
    return "\n".join(lines)
