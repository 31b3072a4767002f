"""Memory of `distill generate`: 500,000 prompts from a file against a server that answers at once.

    python bench/generate_memory.py --check
    python bench/generate_memory.py --prompts 50000

The command line runs as a user runs it, in a process of its own: prompts stage, generate stage with the verifier
`number`, ledger and view on the disk. This script samples that process's resident size (Linux only). Growth is the
highest size that the kernel saw, less the highest of the same command with 100 prompts. Numbers are in MB of 2^20
bytes. About 6 KB of disk a prompt are needed in build/bench while it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MOST_GROWTH_MB = 200
OUT = Path("build/bench/generate_memory.json")
SERVER = Path(__file__).parent / "load" / "server.py"
SAMPLE_EVERY_S = 0.25
KEPT_SAMPLES = 200
FEW = 100
"""Prompts of the run that growth is counted from."""
STAGES = ("prompts", "generate")


class Sample(NamedTuple):
    """Where the process stood at one moment."""

    elapsed_s: float
    stage: str
    """The stage that was being written."""
    rss_mb: float


def write_prompts(path: Path, count: int) -> None:
    """Problems of about 300 characters, no two alike; the server's one answer is right."""
    story = "A shop sells pears and plums by the crate, and every crate is weighed twice before it leaves the yard. "
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            question = f"{story}{story}On day {number} it sold {number % 97} crates. How many are 40 and 2?"
            out.write(json.dumps({"question": question, "answer": "42"}) + "\n")


def write_recipe(path: Path, prompts: Path, port: int, concurrency: int) -> None:
    """A recipe with these prompts and the server as its teacher."""
    endpoint = {"base_url": f"http://127.0.0.1:{port}/v1", "concurrency": concurrency}
    teacher = {"engine": "openai", "model": "bench", "endpoint": endpoint}
    recipe = {"name": "memory", "prompts": [{"name": "made", "file": str(prompts)}], "teacher": teacher}
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


@contextmanager
def answering() -> Iterator[int]:
    """A server on loopback in a process of its own; yields its port."""
    with subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.stdin.close()


def status_mb(process: int, field: str) -> float:
    """A field of /proc/PID/status in MB; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def stage_of(runs: Path) -> str:
    """The last stage whose folder exists; empty before the first."""
    begun = [stage for stage in STAGES if any((runs / stage).glob("*"))]
    return begun[-1] if begun else ""


class Run(NamedTuple):
    """One run of the command."""

    samples: list[Sample]
    highest_mb: float
    """The highest size that the kernel saw."""
    sealed: dict[str, Any]
    """What each stage wrote of itself."""


def run_generate(folder: Path, count: int, port: int, concurrency: int) -> Run:
    """Run the command on so many prompts, to its end.

    Raises RuntimeError with the end of the command's log if it fails.
    """
    folder.mkdir()
    recipe, runs, log = folder / "recipe.yaml", folder / "runs", folder / "log.txt"
    write_prompts(folder / "prompts.jsonl", count)
    write_recipe(recipe, folder / "prompts.jsonl", port, concurrency)
    command = [sys.executable, "-m", "distill.cli", "generate", str(recipe), "--runs", str(runs)]
    samples: list[Sample] = []
    highest = 0.0
    started = time.monotonic()
    with log.open("w") as err, subprocess.Popen(command, stdout=err, stderr=err) as process:
        while process.poll() is None:
            rss, highest = status_mb(process.pid, "VmRSS"), max(highest, status_mb(process.pid, "VmHWM"))
            samples.append(Sample(round(time.monotonic() - started, 2), stage_of(runs), round(rss, 1)))
            time.sleep(SAMPLE_EVERY_S)
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: ...{log.read_text()[-2000:]}")
    sealed = {stage: json.loads(next((runs / stage).glob("*/stage.json")).read_text()) for stage in STAGES}
    return Run(samples, round(highest, 1), sealed)


def summary(few: Run, many: Run) -> dict[str, Any]:
    """What both runs say together."""
    stages = {}
    for stage in STAGES:
        sizes = [sample.rss_mb for sample in many.samples if sample.stage == stage and sample.rss_mb]
        stages[stage] = {"highest_mb": max(sizes), "last_mb": sizes[-1], "seconds": many.sealed[stage]["seconds"]}
    answered = many.sealed["generate"]["counts"]["answered"]
    return {
        "prompts": answered,
        "few_mb": few.highest_mb,
        "highest_mb": many.highest_mb,
        "growth_mb": round(many.highest_mb - few.highest_mb, 1),
        "prompts_per_s": round(answered / many.sealed["generate"]["seconds"], 1),
        "stages": stages,
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'stage':<10} {'highest MB':>11} {'last MB':>9} {'seconds':>9}")
    for stage, of_stage in found["stages"].items():
        print(f"{stage:<10} {of_stage['highest_mb']:>11.1f} {of_stage['last_mb']:>9.1f} {of_stage['seconds']:>9.1f}")
    print(
        f"{found['prompts']:,} prompts, {found['prompts_per_s']:,.0f} a second in the generate stage; resident size at"
        f" most {found['highest_mb']:.0f} MB, with {FEW} prompts {found['few_mb']:.0f} MB: growth"
        f" {found['growth_mb']:.0f} MB (bar: {MOST_GROWTH_MB})"
    )


def main() -> int:
    """Print the table, write JSON, and with --check judge the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500_000)
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight")
    parser.add_argument("--check", action="store_true", help="exit 1 where the bar is missed")
    given = parser.parse_args()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT.parent) as name, answering() as port:
        few = run_generate(Path(name).resolve() / "few", FEW, port, given.concurrency)
        many = run_generate(Path(name).resolve() / "many", given.prompts, port, given.concurrency)
    found = summary(few, many)
    show(found)
    every = -(-len(many.samples) // KEPT_SAMPLES)
    cores = len(os.sched_getaffinity(0))
    document = {**found, "concurrency": given.concurrency, "cores": cores, "samples": many.samples[::every]}
    OUT.write_text(json.dumps(document, indent=2) + "\n")
    missed = found["prompts"] < given.prompts or found["growth_mb"] >= MOST_GROWTH_MB
    if missed:
        print(f"missed: {found['prompts']:,} of {given.prompts:,} prompts answered, {found['growth_mb']:.0f} MB")
    return int(missed and given.check)


if __name__ == "__main__":
    sys.exit(main())
