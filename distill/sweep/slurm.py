"""A sweep as array jobs of a Slurm cluster: a script that submits them, and the stages as lines of a file.

Stages that wait for nothing are the first wave, those that wait only for them the second, and so on; each wave is one
array job for each kind of resources, which begins when the waves before have ended, well or not. A task runs the same
process as the other executors; what it needs and does not find it refuses. Afterwards `distill sweep FILE` finds
everything done, and runs what is missing.

Tried on one node with Slurm 22.05 as Debian has it; on a cluster of several nodes it is untried.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.errors import RecipeError, storage_errors

from .config import Resources
from .graph import Graph, Node
from .record import write_record
from .resources import needed
from .run import Planned
from .schedule import job_of

MOST_TASKS = 1000
"""Tasks of one array; Slurm takes 1,001 unless its administrator allowed more."""


class Array(NamedTuple):
    """Lines of the job file that run as one array job."""

    wave: int
    cpus: int
    memory_gb: float
    gpus: int
    first: int
    """Line of the first task, from 0."""
    tasks: int


class Scripts(NamedTuple):
    """What was written."""

    submit: Path
    jobs: Path
    arrays: list[Array]


def write_scripts(planned: Planned) -> Scripts:
    """Write `slurm/submit.sh` and `slurm/jobs.jsonl` into the sweep's folder; submits nothing.

    Raises RecipeError for a search, whose trials are not known beforehand, StorageError if the disk refuses.
    """
    if planned.file.sweep.search is not None:
        raise RecipeError(
            f"{planned.file.place('search')}: a search chooses its trials as results come in, so it cannot be"
            " written as array jobs; run it with --executor local or ray"
        )
    folder = planned.folder / "slurm"
    with storage_errors(f"cannot write {folder}"):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_record(planned.folder, planned.file, planned.graph, planned.file.sweep.resources)
        groups = _groups(planned.graph, planned.chosen_numbers, planned.file.sweep.resources)
        lines, arrays = _lines(planned.graph, groups, planned.file.sweep.resources)
        scripts = Scripts(folder / "submit.sh", folder / "jobs.jsonl", arrays)
        scripts.jobs.write_text("".join(lines), encoding="utf-8")
        scripts.submit.write_text(script(scripts, planned.file.sweep.name), encoding="utf-8")
        scripts.submit.chmod(0o755)
    return scripts


Kind = tuple[int, int, float, int]
"""Wave, CPUs, memory, GPUs."""


def _groups(graph: Graph, numbers: Iterable[int], resources: Resources) -> dict[Kind, list[Node]]:
    """Stages that are owed, by wave and resources."""
    chosen = set(numbers)
    waves: dict[str, int] = {}
    groups: dict[Kind, list[Node]] = {}
    for identity, node in graph.nodes.items():  # upstream stages come first
        if identity in graph.store.sealed or not chosen.intersection(node.trials):
            continue
        waves[identity] = 1 + max((waves.get(other, -1) for other in node.needs), default=-1)
        grant, gpus = needed(node.step, node.recipe, resources)
        groups.setdefault((waves[identity], grant.cpus, grant.memory_gb, gpus), []).append(node)
    return dict(sorted(groups.items()))


def _lines(graph: Graph, groups: dict[Kind, list[Node]], resources: Resources) -> tuple[list[str], list[Array]]:
    lines: list[str] = []
    arrays = []
    for (wave, cpus, memory_gb, gpus), nodes in groups.items():
        for start in range(0, len(nodes), MOST_TASKS):
            part = nodes[start : start + MOST_TASKS]
            arrays.append(Array(wave, cpus, memory_gb, gpus, len(lines), len(part)))
            for node in part:
                grant, _ = needed(node.step, node.recipe, resources)
                job = job_of(node, node.recipe, graph.options, grant)  # which GPUs it sees is Slurm's to say
                lines.append(json.dumps(job.to_json()) + "\n")
    return lines, arrays


def script(scripts: Scripts, name: str) -> str:
    """The script that submits every array, each after the waves before it."""
    folder = shlex.quote(str(scripts.submit.parent.resolve()))
    waves: dict[int, list[Array]] = {}
    for array in scripts.arrays:
        waves.setdefault(array.wave, []).append(array)
    body = [
        "#!/usr/bin/env bash",
        f"# Submits sweep {name}: {sum(one.tasks for one in scripts.arrays)} stages in {len(waves)} waves.",
        "# Written by distill; untried on more than one node. The run store must lie where all nodes see it.",
        "# SBATCH_ARGS adds options to every job, such as --partition or --account.",
        "set -euo pipefail",
        f"cd {folder}",
        'before=""',
    ]
    for wave, arrays in waves.items():
        body.append(f"# wave {wave}")
        body += [f"job{index}=$({_sbatch(array, name)})" for index, array in enumerate(arrays)]
        body.append('before="' + ":".join(f"$job{index}" for index in range(len(arrays))) + '"')
    body.append('echo "submitted; when the last of $before has ended: distill sweep status ' + name + '"')
    return "\n".join(body) + "\n"


def _sbatch(array: Array, name: str) -> str:
    task = (
        f"exec {shlex.quote(sys.executable)} -m distill.sweep.work jobs.jsonl $(({array.first} + SLURM_ARRAY_TASK_ID))"
    )
    options = [
        "--parsable", f"--job-name={shlex.quote(name)}", f"--array=0-{array.tasks - 1}",
        f"--cpus-per-task={array.cpus}", "--signal=B:TERM@60", "--output=logs/%x-%A-%a.log",
    ]  # fmt: skip
    options += [f"--mem={round(array.memory_gb * 1024)}M"] if array.memory_gb else []
    options += [f"--gres=gpu:{array.gpus}"] if array.gpus else []
    return " ".join([
        "sbatch", *options, "${before:+--dependency=afterany:$before}", "${SBATCH_ARGS:-}", "--wrap", shlex.quote(task),
    ])  # fmt: skip


def summary(scripts: Scripts) -> Sequence[str]:
    """What was written, in lines."""
    waves = len({one.wave for one in scripts.arrays})
    stages = sum(one.tasks for one in scripts.arrays)
    return [
        f"{stages} stages in {waves} waves, {len(scripts.arrays)} array jobs; untried on more than one node",
        f"submit them with: bash {scripts.submit}",
    ]
