"""Climb a variant's ladder: build a scheme, hold it against the gates, and take the next better one if it fails.

Each attempt lives in a folder of its own until one is adopted into the artifact: the first that passes, or the last if
none does. What each of them cost and lost is kept, so that the report can say why the one that ships was chosen.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from distill.artifact import graph_bytes
from distill.config import ExportConfig
from distill.evaluation import SUMMARY, load_summary
from distill.progress import say
from distill.records import write_json
from distill.runs import OpenRun

from .graph import build_variant
from .manifest import GateEntry
from .measure import Measured
from .package import write_loader_files
from .quantize import Rounded
from .schemes import Method, Scheme, ladder


class Tried(BaseModel):
    """One scheme of a variant: what it took and how it was judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: str
    """In words."""
    bytes: int
    """Of the graph and its weights on disk."""
    build_seconds: float
    gates: tuple[GateEntry, ...]
    accuracy: float | None = None
    """Verified, on the task gate's set; None where there is none."""
    tokens_per_s: float | None = None
    """Of that evaluation, batches and all: to compare schemes by, no benchmark."""
    chosen: bool = False
    """Whether it is the one in the artifact."""

    @property
    def missed(self) -> str:
        """Names of the gates that failed."""
        return ", ".join(gate.name for gate in self.gates if gate.status == "failed")


class Climbing(NamedTuple):
    """How an attempt is made and judged; what `climb` is given to do the work."""

    round_weights: Callable[[Scheme], Iterator[Mapping[str, Rounded]]]
    """Matrices of a GPTQ scheme, layer by layer."""
    parity: Callable[[str, Path, bool], Measured]
    """Gates of a variant in a folder against the torch student; whether it may be given up early."""
    task: Callable[[str, Path, Path], list[GateEntry]]
    """Gates of the evaluation of a variant in a folder, whose items are kept in another."""


def climb(checkpoint: Path, config: Any, variant: str, export: ExportConfig, run: OpenRun, how: Climbing) -> None:
    """Put a variant into the run's artifact, with `build-`, `parity-` and `attempts-VARIANT.json` and `eval-VARIANT/`.

    Resumes with the attempts that are finished. Raises ExportError if no scheme fits the variant's size budget.
    """
    note = run.path(f"attempts-{variant}.json")
    if note.exists():
        return
    rungs = rungs_of(variant, config, export)
    attempts: list[Tried] = []
    hopeless: set[Method] = set()
    for place, scheme in enumerate(rungs):
        last = place == len(rungs) - 1
        if scheme.body_bits == 4 and scheme.method in hopeless and not last:
            continue  # a better head does not save a body that loses many times too much
        folder = run.work / f"{variant}-{place}"
        attempts.append(attempt(checkpoint, variant, scheme, folder, how, last))
        if not attempts[-1].missed or last:
            adopt(folder, variant, run)
            break
        if json.loads((folder / "parity.json").read_text())["hopeless"]:
            hopeless.add(scheme.method)
        say(f"export: {variant}: {scheme} misses {attempts[-1].missed}; trying the next better one")
    chosen = [one.model_copy(update={"chosen": one is attempts[-1]}) for one in attempts]
    write_json(note, {"attempts": [one.model_dump(mode="json") for one in chosen]})


def rungs_of(variant: str, config: Any, export: ExportConfig) -> list[Scheme]:
    """The schemes that the recipe lets a variant try; raises ExportError if none fits its size budget."""
    budget = {str(name): megabytes for name, megabytes in export.max_mb.items()}.get(variant)
    four = export.four_bits
    rungs = ladder(variant, config, round(budget * 1e6) if budget else None, four.method, four.head_bits)
    return rungs if export.ladder else rungs[:1]


def attempt(checkpoint: Path, variant: str, scheme: Scheme, folder: Path, how: Climbing, last: bool) -> Tried:
    """Build and judge one scheme in `folder`; what is finished there is not done again.

    Unless it is the `last` one, a scheme that is far off is given up early: it costs neither the whole comparison nor
    an evaluation.
    """
    done = folder / "attempt.json"
    if done.exists():
        return Tried.model_validate_json(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    seconds = _build(checkpoint, variant, scheme, folder, how)
    measured = _kept(folder / "parity.json", lambda: how.parity(variant, folder / "artifact", not last))
    gates = measured.gates
    (folder / "eval").mkdir(exist_ok=True)
    if not measured.hopeless:
        gates += how.task(variant, folder / "artifact", folder / "eval")
    size = graph_bytes(folder / "artifact", variant)
    entry = Tried(
        scheme=str(scheme), bytes=size, build_seconds=seconds, gates=tuple(gates), **_evaluated(folder / "eval")
    )
    write_json(done, entry.model_dump(mode="json"))
    return entry


def _build(checkpoint: Path, variant: str, scheme: Scheme, folder: Path, how: Climbing) -> float:
    """Build the variant's folder unless it is there; seconds it took."""
    note = folder / "build.json"
    if not note.exists():
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        started = time.perf_counter()
        rounded = how.round_weights(scheme) if scheme.method == "gptq" else ()
        build_variant(checkpoint, variant, folder / "artifact", scheme, rounded)
        write_loader_files(folder / "artifact")  # which changes the graph: what is measured is what ships
        write_json(note, {"seconds": time.perf_counter() - started})
        size = graph_bytes(folder / "artifact", variant) / 1e6
        say(f"export: {variant}: {scheme}, {size:,.1f} MB in {time.perf_counter() - started:.0f} s")
    return float(json.loads(note.read_text())["seconds"])


def _evaluated(folder: Path) -> dict[str, float | None]:
    """Accuracy and speed of an evaluation, where there was one."""
    summary = load_summary(folder) if (folder / SUMMARY).exists() else {}
    return {"accuracy": summary.get("accuracy"), "tokens_per_s": summary.get("tokens_per_s")}


def _kept(path: Path, measure: Callable[[], Measured]) -> Measured:
    if not path.exists():
        gates, hopeless = measure()
        write_json(path, {"gates": [gate.model_dump(mode="json") for gate in gates], "hopeless": hopeless})
    document = json.loads(path.read_text())
    return Measured([GateEntry.model_validate(gate) for gate in document["gates"]], document["hopeless"])


def adopt(folder: Path, variant: str, run: OpenRun) -> None:
    """Move an attempt's files to where the run has them; a second call finishes what a kill cut short.

    Its graph becomes the artifact's default one. What the variants share comes out alike from each build and is
    replaced by its equal.
    """
    artifact = run.path("artifact")
    (artifact / "onnx").mkdir(parents=True, exist_ok=True)
    for source in sorted(path for path in (folder / "artifact").rglob("*") if path.is_file()):
        os.replace(source, artifact / source.relative_to(folder / "artifact"))
    for name in ("build.json", "parity.json", "eval"):
        target = run.path(f"{name.removesuffix('.json')}-{variant}{'.json' * name.endswith('.json')}")
        if (folder / name).exists():
            os.replace(folder / name, target)


def read_tried(run: OpenRun, variant: str) -> list[Tried]:
    """Every attempt at a variant, the chosen one last."""
    document = json.loads(run.path(f"attempts-{variant}.json").read_text(encoding="utf-8"))
    return [Tried.model_validate(entry) for entry in document["attempts"]]
