"""Training on this machine's processors: our trainer against TRL's SFTTrainer at its fastest setting.

    python bench/train_vs_trl.py [--check] [--part sweep speed loss leak time] [--precision bf16 fp32] [--data TRACES]

SmolLM2-135M on real R1-Distill-32B traces of at most 1,024 tokens, tokenized once for both; loss on completions only,
at most 4,096 tokens a micro-batch, clipping at 1.0, AdamW. Both sides keep fp32 weights and moments; bf16 is the dtype
of the matrix products.

sweep   TRL's settings, one after the other: layout, attention, loss, torch.compile. The fastest goes on.
speed   TRL and ours take turns, step by step: supervised tokens a second (medians), memory above the loaded model, and
        model FLOPs over the best matrix product that was measured.
loss    Both train on the same documents in the same order, unpacked at TRL's: held-out loss afterwards.
leak    TRL's layouts: the loss of a document alone, and behind another one in a micro-batch.
time    One step of each side under the profiler.

A step is timed once the machine is quiet; one during which other work took more than a twentieth of the processors is
taken again, a few times. TRL lives in an environment of its own, build/venvs/trl, which is made here. Prints one table,
writes build/bench/train_vs_trl.json; `--check` exits 1 when a bar is missed. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from load.steps import PROFILE, RESULT, STEP

TIMES = {"bf16": 2.5, "fp32": 1.8}
"""Bar: our supervised tokens a second, as a multiple of TRL's."""
MEMORY_SHARE = 0.6
"""Bar: our peak memory above the loaded model, as a share of TRL's."""
LOSS_APART = 0.01
"""Bar: how far our held-out loss may be from TRL's, relatively."""
MFU = {"bf16": 0.75}
"""Bar: model FLOPs of our step over the best matrix product."""

ROOT = Path(__file__).resolve().parent.parent
SIDES = ROOT / "bench" / "load"
OUT = ROOT / "build" / "bench" / "train_vs_trl.json"
VENV = ROOT / "build" / "venvs" / "trl"
PACKAGES = ("trl==1.16.0", "transformers==5.24.0", "accelerate==1.15.0", "datasets==5.2.0")
"""Of TRL's environment, beside our own version of torch."""
MICRO_BATCH = 4096
MEAN_TOKENS = 512
"""About the mean length of a document, for steps of like size whatever the layout."""
MOST_OTHERS = 0.05
"""Share of the processors that other work may take while a step runs."""


# --- TRL's settings -------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One way to run TRL."""

    layout: str
    """`unpacked`, `padding_free` (documents end to end), or TRL's packing `bfd` or `wrapped` (which cuts documents)."""
    batch: int
    """Documents or packs a micro-batch."""
    max_length: int = 1024
    """Tokens of a pack, or at most of a document."""
    attention: str = "sdpa"
    loss: str = "nll"
    """`nll`, TRL's own (`chunked_nll` is its old name), or `full`: transformers' loss on all logits at once."""
    order: str = "sequential"
    """How documents are drawn; packs, which TRL sorts, are drawn at random."""
    compile: bool = False

    @property
    def title(self) -> str:
        """For the table."""
        packs = self.layout in ("bfd", "wrapped")
        size = f"{self.batch} x {self.max_length:,}" if packs else f"{self.batch} documents"
        more = [self.order] * (self.order == "group_by_length") + ["torch.compile"] * self.compile
        return ", ".join([f"{self.layout} {size}", self.attention, f"loss {self.loss}", *more])

    def with_steps_of(self, documents: int) -> dict[str, Any]:
        """As the other side takes it, accumulated to about so many documents a step."""
        packs = self.layout in ("bfd", "wrapped")
        accumulate = documents * MEAN_TOKENS / (self.batch * self.max_length) if packs else documents / self.batch
        return {**self._asdict(), "accumulate": max(1, round(accumulate))}


UNPACKED = Setting("unpacked", 4)
SETTINGS = (
    UNPACKED,
    UNPACKED._replace(attention="eager"),
    UNPACKED._replace(loss="full"),
    UNPACKED._replace(order="group_by_length"),
    UNPACKED._replace(order="group_by_length", loss="full"),
    Setting("unpacked", 1),
    Setting("unpacked", 1, loss="full"),
    Setting("padding_free", 4),
    Setting("padding_free", 4, loss="full"),
    Setting("bfd", 1, 4096, order="random"),
    Setting("bfd", 1, 4096, loss="full", order="random"),
    Setting("bfd", 1, 1024, loss="full", order="random"),
    Setting("bfd", 1, 1024, attention="eager", loss="full", order="random"),
    Setting("wrapped", 1, 4096, loss="full", order="random"),
    Setting("wrapped", 4, 1024, order="random"),
    Setting("wrapped", 4, 1024, loss="full", order="random"),
)
COMPILED = (
    Setting("unpacked", 1, loss="full", compile=True),
    UNPACKED._replace(order="group_by_length", loss="full", compile=True),
    Setting("wrapped", 4, 1024, loss="full", order="random", compile=True),
)
_BY_LENGTH = UNPACKED._replace(order="group_by_length", loss="full")
FASTEST = {"bf16": _BY_LENGTH, "fp32": _BY_LENGTH._replace(compile=True)}
"""What sweeps have found, for runs without one; in bf16 packs of 1,024 tokens with eager attention are as fast."""
LEAKS = (
    Setting("padding_free", 2),
    Setting("bfd", 1, 4096),
    Setting("bfd", 1, 4096, attention="eager"),
    Setting("wrapped", 1, 4096),
)
MOST_ROUNDING = {"bf16": 0.005, "fp32": 0.0005}
"""How far a loss may differ, relatively, by the order of additions alone."""


def trl_python() -> Path:
    """The Python of TRL's environment, made if it is not there. Raises RuntimeError if it cannot be."""
    return peer_python(VENV, [f"torch=={version('torch')}"], PACKAGES)


def peer_python(venv: Path, *installs: Sequence[str], **variables: str) -> Path:
    """The Python of a peer's environment, made if it does not hold just this: what one pip after the other installs.

    `variables` are set while they do. Raises RuntimeError if it cannot be made.
    """
    stamp, python = venv / "installed.json", venv / "bin" / "python"
    wanted = [word for words in installs for word in words]
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        commands = [[sys.executable, "-m", "venv", "--clear", str(venv)], *([*pip, *words] for words in installs)]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
            if done.returncode:
                raise RuntimeError(f"not installed: {done.stderr[-1000:]}")
        stamp.write_text(json.dumps(wanted))
    return python


# --- the machine ----------------------------------------------------------------------------------------------------


def all_processors() -> tuple[int, int]:
    """Clock ticks that all processors were busy, and that have passed on them."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def of_process(process: int) -> int:
    """Clock ticks that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until_quiet(patience_s: float) -> None:
    """Until other work takes less than a tenth of the processors, or patience is over."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        busy, passed = all_processors()
        time.sleep(1)
        busy_later, passed_later = all_processors()
        if busy_later - busy < 0.1 * (passed_later - passed):
            return


# --- the two sides --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one optimizer step took."""

    seconds: float
    loss: float
    tokens: int
    cells: int
    """Of the forward passes, padding included."""
    supervised: int
    squares: int
    """Sum of the squares of the documents' lengths."""
    cpu_s: float
    """Processor time."""
    others: float
    """Share of the processors that other work took meanwhile."""
    spent: dict[str, float] | None = None
    """Seconds of each kind of operator, under the profiler."""

    @property
    def rate(self) -> float:
        """Supervised tokens a second."""
        return self.supervised / self.seconds


class Memory(NamedTuple):
    """Resident size of a side in MB."""

    loaded_mb: float
    peak_mb: float

    @property
    def above_mb(self) -> float:
        """At most, above the loaded model."""
        return self.peak_mb - self.loaded_mb


class Side:
    """A trainer in a process of its own, which makes a step when it is asked to."""

    def __init__(self, command: Sequence[str], patience_s: float, tries: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in `kill`
        self._patience_s, self._tries = patience_s, tries
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._asked = self._heard({"ready"})

    def _heard(self, wanted: set[str]) -> dict[str, Any]:
        """The next result that holds these names. Raises RuntimeError when the process ends instead."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(RESULT) and wanted <= (found := json.loads(line.removeprefix(RESULT))).keys():
                return found
        self._log.seek(0)
        raise RuntimeError(f"{self._process.args[1]} ended: ...{self._log.read()[-1500:]}")  # type: ignore[index]

    def step(self, what: str = STEP) -> Step:
        """One step, whatever else the machine does meanwhile."""
        return Step(**self.ask(what))

    def ask(self, what: str) -> dict[str, Any]:
        """What the side answers, with `cpu_s` and `others` as `Step` has them."""
        assert self._process.stdin
        busy, passed = all_processors()
        own = of_process(self._process.pid)
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        found = self._heard({"seconds"})
        busy_later, passed_later = all_processors()
        own = of_process(self._process.pid) - own
        others = max(0, busy_later - busy - own) / max(1, passed_later - passed)
        return {**found, "cpu_s": own / os.sysconf("SC_CLK_TCK"), "others": round(others, 3)}

    def quiet_step(self) -> Step:
        """A step on a quiet machine."""
        return Step(**self.ask_quietly(STEP))

    def ask_quietly(self, what: str) -> dict[str, Any]:
        """The least disturbed of some answers."""
        tried: list[dict[str, Any]] = []
        while not tried or (tried[-1]["others"] > MOST_OTHERS and len(tried) < self._tries):
            wait_until_quiet(self._patience_s)
            tried.append(self.ask(what))
        return min(tried, key=lambda answered: answered["others"])

    def end(self) -> Memory:
        """No more steps; what memory they took."""
        assert self._process.stdin
        self._process.stdin.close()
        found = self._heard({"peak_mb"})
        self._process.wait()
        return Memory(**found)

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def environment() -> dict[str, str]:
    """Of both sides: nothing is fetched or reported."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}
    return os.environ | quiet | {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


class Bench(NamedTuple):
    """What every part works with."""

    given: argparse.Namespace
    folder: Path
    """With the model and the data of both sides."""
    shape: dict[str, int]
    """Parameters of the model's body and head, and what attention is computed with."""
    python: Path
    """Of TRL's environment."""

    def trl(self, setting: Setting, precision: str, documents: int, *more: str) -> list[str]:
        """The command of TRL's side."""
        chosen = json.dumps(setting.with_steps_of(documents))
        return [str(self.python), str(SIDES / "trl_side.py"), *self.common(), "--setting", chosen,
                "--precision", precision, "--lr", str(self.given.lr), *more]  # fmt: skip

    def ours(self, precision: str, *more: str) -> list[str]:
        """The command of our side."""
        return self.task("train", "--precision", precision, "--lr", str(self.given.lr), *more)

    def task(self, name: str, *more: str) -> list[str]:
        """The command of a task of our side."""
        return [sys.executable, str(SIDES / "distill_side.py"), name, *self.common(), *more]

    def common(self) -> list[str]:
        """What every side is told."""
        return ["--folder", str(self.folder), "--threads", str(self.given.threads)]

    @contextmanager
    def running(self, **commands: list[str]) -> Iterator[dict[str, Side]]:
        """Sides by name, ended at the end of the block."""
        with ExitStack() as stack:
            sides = {}
            for name, command in commands.items():
                sides[name] = Side(command, self.given.patience_s, self.given.tries)
                stack.callback(sides[name].kill)
            yield sides

    def flops(self, step: Step) -> float:
        """Model FLOPs of a step: forward and backward, the head on supervised rows, attention inside documents."""
        body, head = self.shape["body"] * step.tokens, self.shape["head"] * step.supervised
        return 6.0 * (body + head + self.shape["attention"] * step.squares)


def answer(command: Sequence[str]) -> dict[str, Any]:
    """The one result of a process. Raises RuntimeError if it fails."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        raise RuntimeError(f"{command[1]} failed: ...{done.stderr[-1500:]}")
    return dict(json.loads(lines[-1].removeprefix(RESULT)))


# --- the parts ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table; `met` is None where there is no bar."""

    what: str
    measured: str
    bar: str = ""
    met: bool | None = None


Found = tuple[list[Row], dict[str, Any]]
"""Rows of the table, and what goes into the file."""


def rate_of(steps: Sequence[Step]) -> float:
    """Median of supervised tokens a second."""
    return statistics.median(step.rate for step in steps)


def said_of(steps: Sequence[Step]) -> str:
    """A note on steps that were not alone on the machine."""
    others = max(step.others for step in steps)
    return f" (disturbed: other work took {others:.0%})" if others > MOST_OTHERS else ""


def sweep(bench: Bench, precision: str) -> tuple[list[Row], dict[str, Any], Setting]:
    """Every setting of TRL, a warm-up and some steps each; the fastest."""
    rates: dict[Setting, float] = {}
    rows, found = [], {}
    for setting in bench.given.settings:
        what = f"{precision}: TRL, {setting.title}"
        try:
            with bench.running(trl=bench.trl(setting, precision, bench.given.sweep_documents)) as sides:
                for _ in range(2 if setting.compile else 1):
                    sides["trl"].step()
                steps = [sides["trl"].quiet_step() for _ in range(bench.given.sweep_steps)]
                memory = sides["trl"].end()
        except RuntimeError as error:
            rows.append(Row(what, f"does not run: {str(error).strip().splitlines()[-1][:120]}"))
            continue
        rates[setting] = rate_of(steps)
        measured = f"{rates[setting]:.1f} supervised tokens/s, {memory.above_mb:,.0f} MB above the loaded model"
        measured += said_of(steps)
        rows.append(Row(what, measured))
        print(f"| {what} | {measured} |", steps, file=sys.stderr, flush=True)
        found[setting.title] = {**setting._asdict(), **memory._asdict(), "steps": [step._asdict() for step in steps]}
    return rows, found, max(rates, key=lambda setting: rates[setting])


def speed(bench: Bench, precision: str, setting: Setting) -> Found:
    """TRL's fastest setting and ours, step by step in turns."""
    before = answer(bench.task("ceilings"))
    commands = {"trl": bench.trl(setting, precision, bench.given.documents), "ours": bench.ours(precision)}
    steps: dict[str, list[Step]] = {name: [] for name in commands}
    with bench.running(**commands) as sides:
        for side in sides.values():
            side.step()  # a warm-up
        for name in [*commands] * bench.given.rounds:
            steps[name].append(sides[name].quiet_step())
            print(f"{precision} {name} {steps[name][-1]}", file=sys.stderr, flush=True)
        memory = {name: side.end() for name, side in sides.items()}
    after = answer(bench.task("ceilings"))
    gflops = max(before["gflops"][precision], after["gflops"][precision])
    mfu = {name: statistics.median(bench.flops(s) / s.seconds for s in steps[name]) / gflops / 1e9 for name in steps}
    times = rate_of(steps["ours"]) / rate_of(steps["trl"])
    share = memory["ours"].above_mb / memory["trl"].above_mb
    copied = max(before["copy_gb_s"], after["copy_gb_s"])
    rows = [
        Row(f"{precision}: best matrix product; best copy", f"{gflops:.0f} GFLOP/s; {copied:.1f} GB/s"),
        Row(f"{precision}: TRL at its fastest ({setting.title}), supervised tokens/s",
            f"{rate_of(steps['trl']):.1f}, MFU {mfu['trl']:.0%}" + said_of(steps["trl"])),
        Row(f"{precision}: ours, supervised tokens/s",
            f"{rate_of(steps['ours']):.1f}, {times:.2f} times as many" + said_of(steps["ours"]),
            f"{TIMES[precision]:g} times", times >= TIMES[precision]),
        Row(f"{precision}: ours, model FLOPs over the best matrix product", f"{mfu['ours']:.1%}",
            f"{MFU[precision]:.0%}" if precision in MFU else "",
            mfu["ours"] >= MFU[precision] if precision in MFU else None),
        Row(f"{precision}: ours, peak memory above the loaded model",
            f"{memory['ours'].above_mb:,.0f} MB, {share:.2f} of TRL's {memory['trl'].above_mb:,.0f} MB",
            f"{MEMORY_SHARE:g}", share <= MEMORY_SHARE),
    ]  # fmt: skip
    return rows, {
        "setting": setting.title, "times": times, "memory_share": share, "mfu": mfu, "ceilings": [before, after],
        "memory": {name: one._asdict() for name, one in memory.items()},
        "steps": {name: [step._asdict() for step in of] for name, of in steps.items()},
    }  # fmt: skip


def loss(bench: Bench, precision: str, _: Setting) -> Found:
    """Both sides on the same documents in the same order; what their models lose on held-out completions."""
    documents = bench.given.loss_documents
    with tempfile.TemporaryDirectory() as folder:
        saved = {name: Path(folder) / name for name in ("trl", "ours")}
        commands = {
            "trl": bench.trl(UNPACKED, precision, documents, "--save", str(saved["trl"])),
            "ours": bench.ours(precision, "--in-order", str(documents), "--save", str(saved["ours"])),
        }
        steps: dict[str, list[Step]] = {}
        for name, command in commands.items():
            with bench.running(side=command) as sides:
                steps[name] = [sides["side"].step() for _ in range(bench.given.loss_steps)]
                sides["side"].end()
        saved["before"] = bench.folder / "model"
        heldout = {name: answer(bench.task("score", "--save", str(path)))["loss"] for name, path in saved.items()}
    assert [step.supervised for step in steps["trl"]] == [step.supervised for step in steps["ours"]]
    apart = abs(heldout["ours"] / heldout["trl"] - 1)
    training = [ours.loss / trl.loss - 1 for ours, trl in zip(steps["ours"], steps["trl"])]
    tokens = sum(step.tokens for step in steps["trl"])
    measured = f"{heldout['ours']:.4f}, TRL's {heldout['trl']:.4f} ({apart:.2%} apart), before {heldout['before']:.4f}"
    rows = [
        Row(f"{precision}: ours, held-out loss after {tokens:,} tokens", measured, f"{LOSS_APART:.0%}",
            apart <= LOSS_APART),
        Row(f"{precision}: training loss of a step, apart from TRL's at most", f"{max(map(abs, training)):.2%}"),
    ]  # fmt: skip
    of_steps = {name: [step.loss for step in of] for name, of in steps.items()}
    return rows, {"heldout": heldout, "apart": apart, "tokens": tokens, "steps": of_steps}


def leak(bench: Bench, precision: str, _: Setting) -> Found:
    """What a document's loss is behind another one, in every layout of TRL that puts them into one row."""
    rows, found = [], {}
    for setting in LEAKS:
        command = bench.trl(setting, precision, 2, "--leak")
        losses = found[setting.title] = answer(command)
        apart = abs(losses["together"] / losses["alone"] - 1)
        says = "sees the document before it" if apart > MOST_ROUNDING[precision] else "stays apart"
        measured = f"{losses['together']:.4f} behind another, {losses['alone']:.4f} alone: {says}"
        rows.append(Row(f"{precision}: TRL, {setting.title}, loss of a document", measured))
    return rows, found


def spent(bench: Bench, precision: str, setting: Setting) -> Found:
    """One step of each side under the profiler, in seconds per 1,000 supervised tokens."""
    commands = {"ours": bench.ours(precision), "trl": bench.trl(setting, precision, bench.given.documents)}
    shares: dict[str, dict[str, float]] = {}
    for name, command in commands.items():
        with bench.running(side=command) as sides:
            sides["side"].step()  # a warm-up
            wait_until_quiet(bench.given.patience_s)
            step = sides["side"].step(PROFILE)
            sides["side"].end()
        assert step.spent
        outside = max(0.0, step.seconds - sum(step.spent.values()))
        of_kind = {**step.spent, "outside operators": outside}
        shares[name] = {kind: seconds / step.supervised * 1000 for kind, seconds in of_kind.items()}
    whole = {name: sum(of.values()) for name, of in shares.items()}
    rows = []
    for kind in sorted(shares["ours"], key=lambda kind: -shares["ours"][kind]):
        each = [f"{who} {shares[name].get(kind, 0.0):.3f} s ({shares[name].get(kind, 0.0) / whole[name]:.0%})"
                for name, who in (("ours", "ours"), ("trl", "TRL's"))]  # fmt: skip
        rows.append(Row(f"{precision}: {kind}, per 1,000 supervised tokens", "; ".join(each)))
    return rows, shares


# --- the report -----------------------------------------------------------------------------------------------------

PARTS = {"speed": speed, "loss": loss, "leak": leak, "time": spent}


def table(rows: Sequence[Row]) -> str:
    """All rows with their bars."""
    lines = ["| what | measured | bar | met |", "| --- | --- | --- | --- |"]
    for row in rows:
        met = {None: "", True: "yes", False: "NO"}[row.met]
        lines.append(f"| {row.what} | {row.measured} | {row.bar} | {met} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """What to measure and for how long, which can be cut short to try the script out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--part", nargs="+", choices=("sweep", *PARTS), default=["sweep", *PARTS])
    parser.add_argument("--precision", nargs="+", choices=tuple(TIMES), default=list(TIMES))
    traces = ROOT.parent / "shared/data/traces/gsm8k_r1_distill_qwen_32b.jsonl"
    parser.add_argument("--data", type=Path, default=traces, help="the traces")
    parser.add_argument(
        "--settings", nargs="+", default=[""], help="of the sweep: those with such a text in their title"
    )
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each side in `speed`")
    parser.add_argument("--documents", type=int, default=16, help="of a step of TRL; ours takes 8,192 tokens")
    parser.add_argument("--sweep-steps", type=int, default=2)
    parser.add_argument("--sweep-documents", type=int, default=4)
    parser.add_argument("--loss-steps", type=int, default=12)
    parser.add_argument("--loss-documents", type=int, default=8, help="of a step in `loss`")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long a step waits for a quiet machine")
    parser.add_argument("--tries", type=int, default=3, help="how often a disturbed step is taken")
    given = parser.parse_args()
    if not given.data.exists():
        parser.error(f"{given.data} is not there")
    given.settings = [one for one in (*SETTINGS, *COMPILED) if any(text in one.title for text in given.settings)]
    return given


def measured(bench: Bench) -> Found:
    """All parts that are wanted, in every precision."""
    rows: list[Row] = []
    found: dict[str, Any] = {}
    for precision in bench.given.precision:
        fastest = FASTEST[precision]
        of_precision: dict[str, Any] = {}
        if "sweep" in bench.given.part:
            swept, of_precision["sweep"], fastest = sweep(bench, precision)
            rows += swept
        for name, part in PARTS.items():
            if name in bench.given.part:
                more, of_precision[name] = part(bench, precision, fastest)
                rows += more
        found[precision] = of_precision
    return rows, found


def main() -> int:
    """Measure, print, write, and say whether all bars were met."""
    given = arguments()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    python = trl_python()
    with tempfile.TemporaryDirectory(dir=OUT.parent) as name:
        folder = Path(name)
        bench = Bench(given, folder, {}, python)
        data = answer(bench.task("prepare", "--data", str(given.data)))
        rows, found = measured(bench._replace(shape=data["shape"]))
    print(table(rows))
    document = {"data": data, **found, "rows": [asdict(row) for row in rows]}
    OUT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    missed = [row for row in rows if row.met is False]
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
