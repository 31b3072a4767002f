"""Logit distillation on this machine's processors: our trainer against TRL's GKDTrainer without generation.

    python bench/kd_vs_trl.py [--check] [--data TRACES]

SmolLM2-135M teaches a student of every second of its layers, on real R1-Distill-32B traces of at most 1,024 tokens, in
bf16 (fp32 weights and moments, bf16 matrix products, clipping at 1.0; teachers in bf16). Forward KL at temperature 1.
TRL takes batches of four documents, in the order that is fastest for it. Ours runs twice: from a cache of 50 tokens
drawn from the teacher at each position, and with the teacher in memory. Each takes turns with TRL, step by step; tokens
a second are medians. Linux only; writes build/bench/kd_vs_trl.json; `--check` exits 1 when a bar is missed.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from train_vs_trl import OUT, ROOT, SIDES, Memory, Row, Side, Step, answer, said_of, table, trl_python

TIMES = {"cache": 4.0, "memory": 2.5}
"""Bar: our tokens a second, as a multiple of TRL's, by where the teacher's distribution comes from."""
MEMORY_SHARE = 0.5
"""Bar: our peak memory above the loaded models, as a share of TRL's."""
BYTES_A_ROW = 40.0
"""Bar: bytes of the cache for each supervised token."""
ORDERS = ("sequential", "group_by_length")


def rate(steps: Sequence[Step]) -> float:
    """Median of tokens a second."""
    return statistics.median(step.tokens / step.seconds for step in steps)


Turns = tuple[dict[str, list[Step]], dict[str, Memory]]


def turns(commands: dict[str, list[str]], given: argparse.Namespace, rounds: int) -> Turns:
    """Some steps of every side, in turns after a warm-up, and the memory that each took."""
    sides = {name: Side(command, given.patience_s, given.tries) for name, command in commands.items()}
    steps: dict[str, list[Step]] = {name: [] for name in commands}
    try:
        for side in sides.values():
            side.step()
        for name in [*commands] * rounds:
            steps[name].append(sides[name].quiet_step())
            print(f"{name} {steps[name][-1]}", file=sys.stderr, flush=True)
        return steps, {name: side.end() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.kill()


def main() -> int:
    """Measure, print, write, and say whether all bars were met."""
    given = arguments()
    python = str(trl_python())
    with tempfile.TemporaryDirectory(dir=OUT.parent) as name:
        common = ["--folder", name, "--threads", str(given.threads)]
        ours = [sys.executable, str(SIDES / "kd_side.py")]
        prepared = answer([*ours, "prepare", *common, "--data", str(given.data)])
        trl = [python, str(SIDES / "gkd_side.py"), *common, "--precision", "bf16", "--lr", "5e-5",
               "--documents", str(given.documents)]  # fmt: skip
        swept = {}
        for order in ORDERS:
            steps, _ = turns({order: [*trl, "--order", order]}, given, 2)
            swept[order] = rate(steps[order])
        fastest = max(swept, key=lambda order: swept[order])
        found: dict[str, Turns] = {}
        for tutor in TIMES:  # two at a time: three do not fit into 24 GB
            commands = {"trl": [*trl, "--order", fastest], tutor: [*ours, "train", *common, "--tutor", tutor]}
            found[tutor] = turns(commands, given, given.rounds)
    rows = [Row(f"TRL, {order}, tokens/s", f"{value:.1f}") for order, value in swept.items()]
    for tutor, bar in TIMES.items():
        steps, memory = found[tutor]
        rows.append(Row(f"TRL ({fastest}), tokens/s", f"{rate(steps['trl']):.1f}" + said_of(steps["trl"])))
        times = rate(steps[tutor]) / rate(steps["trl"])
        share = memory[tutor].above_mb / memory["trl"].above_mb
        measured = f"{rate(steps[tutor]):.1f}, {times:.2f} times as many" + said_of(steps[tutor])
        rows.append(Row(f"ours, teacher in {tutor}, tokens/s", measured, f"{bar:g} times", times >= bar))
        size = f"{memory[tutor].above_mb:,.0f} MB, {share:.2f} of TRL's {memory['trl'].above_mb:,.0f} MB"
        rows.append(Row(f"ours, teacher in {tutor}, memory", size, f"{MEMORY_SHARE:g}", share <= MEMORY_SHARE))
    size = prepared["cache_bytes_per_row"]
    rows.append(Row("cache, bytes a supervised token", f"{size:.1f}", f"{BYTES_A_ROW:g}", size <= BYTES_A_ROW))
    print(table(rows))
    document = {
        "prepared": prepared, "swept": swept, "rows": [asdict(row) for row in rows],
        "memory": {tutor: {name: one._asdict() for name, one in of[1].items()} for tutor, of in found.items()},
        "steps": {tutor: {name: [step._asdict() for step in steps] for name, steps in of[0].items()}
                  for tutor, of in found.items()},
    }  # fmt: skip
    OUT.with_name("kd_vs_trl.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if given.check and any(row.met is False for row in rows) else 0


def arguments() -> argparse.Namespace:
    """What to measure and for how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    traces = ROOT.parent / "shared/data/traces/gsm8k_r1_distill_qwen_32b.jsonl"
    parser.add_argument("--data", type=Path, default=traces, help="the traces")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each side")
    parser.add_argument("--documents", type=int, default=16, help="of a step of TRL; ours takes 8,192 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long a step waits for a quiet machine")
    parser.add_argument("--tries", type=int, default=3, help="how often a disturbed step is taken")
    given = parser.parse_args()
    if not given.data.exists():
        parser.error(f"{given.data} is not there")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    return given


if __name__ == "__main__":
    sys.exit(main())
