"""Throughput of the teacher stage: against a bare client, and against the clients of distilabel and curator.

    python bench/teacher_throughput.py [--check] [--part latency peers verifier] [--window-s 120 ...]

latency   A server with log-normal latency (median 4 s, sigma 0.5) and answers of a kilobyte, 1,024 in flight: the whole
          generate stage (ledger, journal, verdicts by `number`) against a bare asyncio and aiohttp client, by the
          server's own count of answers; and how soon `concurrency: auto` reaches 90% of the bare client's rate.
peers     A server that answers at once: completed requests per second of processor time. Like is compared with like:
          our engine with distilabel's OpenAILLM, which are clients and nothing else; our whole stage with curator's
          LLM, which both keep files, limits and retries. Each at the best of the settings tried, A B A B, medians.
verifier  Verdicts of math-verify itself per second of processor time, for scale.

Peers live in virtual environments of their own under build/bench/venvs, which are made here. Prints one table, writes
build/bench/teacher_throughput.json; `--check` exits 1 when a bar is missed. Everything stays on this machine.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from load.measure import RESULT

STAGE_OF_BARE = 0.97
"""Bar: answers of the whole stage in the window, as a share of the bare client's."""
AUTO_SHARE, AUTO_WITHIN_S = 0.90, 60.0
"""Bar: `auto` reaches this share of the bare client's rate within so many seconds."""
TIMES_A_PEER = 5.0
"""Bar: completed requests per processor second, as a multiple of each peer's."""

IN_FLIGHT = 1024
MEDIAN_S, SIGMA = 4.0, 0.5
RATE_OVER_S = 10
"""`auto` is said to have a rate when it has kept it so long."""

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ROOT / "bench" / "load"
OUT = ROOT / "build" / "bench"


@dataclass
class Row:
    """One line of the table; `met` is None where there is no bar."""

    what: str
    measured: str
    bar: str = ""
    met: bool | None = None


# --- processes ------------------------------------------------------------------------------------------------------


class Server:
    """The load server in a process of its own."""

    def __init__(self, median_s: float = 0.0) -> None:
        command = [sys.executable, str(CLIENTS / "server.py"), "--median-s", str(median_s), "--sigma", str(SIGMA)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its stdin, which ends it

    @property
    def url(self) -> str:
        """Address up to /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, int]:
        """Its counts so far."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/stats")
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()


class Client(NamedTuple):
    """A way to send requests: a script, the Python that runs it, its own arguments."""

    script: str
    python: Path = Path(sys.executable)
    arguments: tuple[str, ...] = ()

    def command(self, server: Server, requests: int, concurrency: object) -> list[str]:
        """The command that sends so many requests, so many at once."""
        given = ["--url", server.url, "--requests", str(requests), "--concurrency", str(concurrency)]
        return [str(self.python), "-W", "ignore", str(CLIENTS / self.script), *given, *self.arguments]


def stage_in(folder: str) -> Client:
    """The whole generate stage, with its runs in a folder."""
    return Client("stage_client.py", arguments=("--folder", folder))


def environment() -> dict[str, str]:
    """Of all clients: no proxy may stand between them and the server, and nothing is fetched."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


@contextmanager
def running(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """A client that is ended when the block is left; raises RuntimeError if it ended by itself with an error."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=said, text=True)
        try:
            yield process
            if process.poll():
                said.seek(0)
                raise RuntimeError(f"{command[3]} failed:\n{said.read()[-2000:]}")
        finally:
            process.kill()
            process.wait()


# --- a server that takes its time -----------------------------------------------------------------------------------


def counted(client: Client, requests: int, concurrency: object, seconds: int, median_s: float) -> list[int]:
    """Answers the server has given, second by second from the first request on."""
    with Server(median_s) as server, running(client.command(server, requests, concurrency)) as process:
        while server.stats()["started"] == 0:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        began, counts = time.monotonic(), []
        for second in range(1, seconds + 1):
            time.sleep(max(0.0, began + second - time.monotonic()))
            counts.append(server.stats()["completed"])
        if process.poll() is not None:
            raise RuntimeError(f"{client.script} ended before the time was over: {process.returncode}")
        return counts


def rate(counts: Sequence[int], start_s: int, end_s: int) -> float:
    """Answers a second between two moments."""
    before = counts[start_s - 1] if start_s else 0
    return (counts[end_s - 1] - before) / (end_s - start_s)


def reached_s(counts: Sequence[int], wanted: float) -> int | None:
    """The first second by which the wanted rate has been kept for a while; None if it never was."""
    seconds = range(RATE_OVER_S, len(counts) + 1)
    return next((end for end in seconds if rate(counts, end - RATE_OVER_S, end) >= wanted), None)


def latency(given: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The whole stage and `auto` against a bare client, one after the other on equal servers."""
    seconds = given.warmup_s + given.window_s
    requests = int(1.5 * IN_FLIGHT / given.median_s * seconds) + 2 * IN_FLIGHT
    window = {"start_s": given.warmup_s, "end_s": seconds}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        bare_counts = counted(Client("bare_client.py"), requests, IN_FLIGHT, seconds, given.median_s)
        stage_counts = counted(stage_in(folder), requests, IN_FLIGHT, seconds, given.median_s)
        auto_counts = counted(stage_in(other), requests, "auto", given.auto_s, given.median_s)
    bare, stage = rate(bare_counts, **window), rate(stage_counts, **window)
    auto_s = reached_s(auto_counts, AUTO_SHARE * bare)
    how = f"{IN_FLIGHT:,} in flight, median {given.median_s:g} s, {given.window_s} s after {given.warmup_s} s"
    said = f"{auto_s} s" if auto_s is not None else f"not within {given.auto_s} s"
    share = stage / bare
    rows = [
        Row(f"answers/s, bare asyncio + aiohttp client, {how}", f"{bare:.1f}"),
        Row("answers/s, whole stage", f"{stage:.1f}, {share:.3f} of bare", str(STAGE_OF_BARE), share >= STAGE_OF_BARE),
        Row(f"auto: time to {AUTO_SHARE:.0%} of bare, kept {RATE_OVER_S} s", said, f"{AUTO_WITHIN_S:g} s",
            auto_s is not None and auto_s <= AUTO_WITHIN_S),
    ]  # fmt: skip
    counts = {"bare": bare_counts, "stage": stage_counts, "auto": auto_counts}
    return rows, {"bare": bare, "stage": stage, "auto_s": auto_s, "answers_by_second": counts}


# --- a server that answers at once ----------------------------------------------------------------------------------


class Contender(NamedTuple):
    """One client with the settings to try."""

    name: str
    script: str
    concurrencies: tuple[int, ...]
    venv: str = ""
    """A peer's environment; ours where there is none."""
    arguments: tuple[str, ...] = ()


CONTENDERS = [
    Contender("engine", "engine_client.py", (64, 256, 1024)),
    Contender("stage", "stage_client.py", (64, 256, 1024)),
    Contender("distilabel OpenAILLM", "distilabel_client.py", (50, 256, 1024), "distilabel"),
    Contender("curator LLM", "curator_client.py", (64, 256, 1024), "curator", ("--part", "run")),
    Contender("curator's bare call (no limits, retries, files)", "curator_client.py", (64, 1024), "curator",
              ("--part", "client")),
]  # fmt: skip
OPPONENTS = {"distilabel OpenAILLM": "engine", "curator LLM": "stage"}
"""With what of ours each peer is compared."""
PACKAGES = {
    "distilabel": ("distilabel[openai]==1.5.3", "openai<2", "requests"),
    "curator": ("bespokelabs-curator==0.1.31",),
}
"""Of each environment; distilabel's newest release is older than openai 2 and forgets that it needs requests."""


def python_of(venv: str) -> Path:
    """The Python of a peer's environment, made if it is not there. Raises RuntimeError if it cannot be."""
    if not venv:
        return Path(sys.executable)
    folder = OUT / "venvs" / venv
    stamp, python = folder / "installed.json", folder / "bin" / "python"
    if not stamp.exists() or json.loads(stamp.read_text()) != list(PACKAGES[venv]):
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, *PACKAGES[venv]]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"not installed: {done.stderr[-1000:]}")
        stamp.write_text(json.dumps(PACKAGES[venv]))
    return python


def per_cpu_second(contender: Contender, requests: int, concurrency: int) -> float:
    """Completed requests per second of processor time. Raises RuntimeError if the client cannot be run."""
    python = python_of(contender.venv)
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        ours = contender.script == "stage_client.py"
        client = stage_in(folder) if ours else Client(contender.script, python, contender.arguments)
        command = client.command(server, requests, concurrency)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr or done.stdout)[-2000:])
    result = json.loads(lines[-1].removeprefix(RESULT))
    return float(result["requests"] / result["cpu_s"])


Rates = dict[str, dict[int, list[float]]]
"""Requests per processor second: by name and setting, one a round."""


def peers(given: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Requests per processor second of everybody, round by round."""
    rates: Rates = {}
    failures: dict[str, str] = {}
    for contender in CONTENDERS * given.repeats:
        requests = given.peer_requests if contender.venv else given.requests
        try:
            for concurrency in contender.concurrencies:
                found = per_cpu_second(contender, requests, concurrency)
                rates.setdefault(contender.name, {}).setdefault(concurrency, []).append(found)
        except RuntimeError as error:
            failures[contender.name] = str(error).strip().splitlines()[-1]
    best = {name: max(statistics.median(found) for found in tried.values()) for name, tried in rates.items()}
    rows = [peer_row(contender.name, rates, failures, best) for contender in CONTENDERS]
    return rows, {"requests_per_cpu_s": rates, "best": best, "failures": failures}


def peer_row(name: str, rates: Rates, failures: dict[str, str], best: dict[str, float]) -> Row:
    """One contender: its best figure, all that were tried, and how many times as much ours is."""
    what = f"requests per CPU s, {'our ' if name in OPPONENTS.values() else ''}{name}"
    bar = f"{TIMES_A_PEER:g} times" if name in OPPONENTS else ""
    if name not in best:
        return Row(what, f"could not be run here: {failures.get(name, '?')}", bar)
    tried = ", ".join(f"{statistics.median(found):.0f} at {count}" for count, found in rates[name].items())
    if name not in OPPONENTS or OPPONENTS[name] not in best:
        return Row(what, f"{best[name]:.0f} ({tried})", bar)
    times = best[OPPONENTS[name]] / best[name]
    measured = f"{best[name]:.0f} ({tried}); our {OPPONENTS[name]} does {times:.1f} times as many"
    return Row(what, measured, bar, times >= TIMES_A_PEER)


# --- the verifier ---------------------------------------------------------------------------------------------------


def verifier(given: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """math-verify alone, in one process, on answers like those of competition problems."""
    from math_verify import parse, verify

    pairs = [(f"${n}$", f"So it is \\boxed{{{n}}}.") for n in range(50)]
    pairs += [(f"$\\frac{{{n}}}{{7}}$", f"Hence \\boxed{{\\frac{{{2 * n}}}{{14}}}}.") for n in range(1, 51)]
    assert verify(parse(pairs[0][0]), parse(pairs[0][1]))  # and loads what it loads
    began, count = time.process_time(), 0
    while time.process_time() - began < given.verifier_s:
        gold, answer = pairs[count % len(pairs)]
        verify(parse(gold), parse(answer))
        count += 1
    found = count / (time.process_time() - began)
    return [Row("math-verify's own verdicts per CPU s", f"{found:.0f}")], {"verdicts_per_cpu_s": found}


# --- the report -----------------------------------------------------------------------------------------------------

PARTS = {"latency": latency, "peers": peers, "verifier": verifier}


def table(rows: Sequence[Row]) -> str:
    """All rows with their bars."""
    lines = ["| what | measured | bar | met |", "| --- | --- | --- | --- |"]
    for row in rows:
        met = {None: "not run" if row.bar else "", True: "yes", False: "NO"}[row.met]
        lines.append(f"| {row.what} | {row.measured} | {row.bar} | {met} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The durations, which can be cut short to try the script out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--warmup-s", type=int, default=30)
    parser.add_argument("--window-s", type=int, default=120)
    parser.add_argument("--auto-s", type=int, default=90, help="how long `auto` is watched")
    parser.add_argument("--median-s", type=float, default=MEDIAN_S, help="median latency of the slow server")
    parser.add_argument("--requests", type=int, default=30_000, help="of ours, against the fast server")
    parser.add_argument("--peer-requests", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--verifier-s", type=float, default=5.0)
    return parser.parse_args()


def main() -> int:
    """Measure, print, write, and say whether all bars were met."""
    given = arguments()
    rows: list[Row] = []
    found: dict[str, Any] = {"arguments": vars(given)}
    for part in given.part:
        part_rows, found[part] = PARTS[part](given)
        rows += part_rows
    print(table(rows))
    OUT.mkdir(parents=True, exist_ok=True)
    found["rows"] = [asdict(row) for row in rows]
    (OUT / "teacher_throughput.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    missed = [row for row in rows if row.met is False]
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
