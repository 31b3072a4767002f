"""Trainings in one or several processes (see train_in_ranks.py), and how far apart what they made is."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

SCRIPT = Path(__file__).with_name("train_in_ranks.py")


class Ended(NamedTuple):
    """What a training left."""

    code: int
    made: dict[str, Any] | None
    err: str


def launch(
    ranks: int, model: Path, work: Path, strategy: str, precision: str = "fp64", stop_after: int | None = None
) -> Ended:
    """Train in `ranks` processes; one is started without torchrun."""
    work.mkdir(exist_ok=True)
    out = work.with_suffix(".pt")
    python = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    given = [str(x) for x in (model, work, out, strategy, precision)] + ([str(stop_after)] if stop_after else [])
    said = subprocess.run([*python, str(SCRIPT), *given], capture_output=True, text=True, timeout=240)
    made = torch.load(out, weights_only=True) if out.exists() and not stop_after else None
    return Ended(said.returncode, made, said.stderr[-3000:])


def trained(*given: Any, **more: Any) -> dict[str, Any]:
    ended = launch(*given, **more)
    assert ended.code == 0 and ended.made is not None, ended.err
    return ended.made


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of weights, moments, losses and gradient norms, relative where they are above 1."""
    assert one["weights"].keys() == other["weights"].keys()
    pairs = [(one["weights"][name], other["weights"][name]) for name in one["weights"]]
    pairs += [(state[k], other["optimizer"][n][k]) for n, state in one["optimizer"].items() for k in state]
    numbers = [[*made["heldout"].values(), *(x for row in made["losses"] for x in row)] for made in (one, other)]
    pairs.append(tuple(torch.tensor(row, dtype=torch.float64) for row in numbers))
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)
