"""Array jobs for Slurm: waves that wait for one another, tasks that are the same stages; no real cluster is asked."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RecipeError
from distill.runs import RunOptions
from distill.sweep.run import plan_sweep, run_sweep
from distill.sweep.slurm import write_scripts

SBATCH = """#!/usr/bin/env bash
# stands in for Slurm: runs each task of the array at once, in order, and prints a job number
for argument in "$@"; do
  case "$argument" in
    --array=0-*) last="${argument#--array=0-}" ;;
    --dependency=*) echo "$argument" >> "$FAKE_LOG" ;;
  esac
  task="$argument"
done
echo "cpus $*" | grep -o 'cpus-per-task=[0-9]*' >> "$FAKE_LOG"
for index in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$index bash -c "$task" >> "$FAKE_LOG" 2>&1 || true; done
echo $RANDOM
"""


def test_stages_are_written_as_waves_with_their_resources(lab: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(
        tmp_path, grid={"select.limit": [5, 10]}, resources={"stages": {"select": {"memory_gb": 1.5}}}
    )
    said = cli("sweep", "slurm", path, "--runs", tmp_path / "runs", "--json")
    assert said.code == 0, said.err
    arrays = [(one["wave"], one["memory_gb"], one["first"], one["tasks"]) for one in said.json["arrays"]]
    assert arrays == [(0, 0.0, 0, 1), (1, 0.0, 1, 2), (2, 1.5, 3, 2)]
    jobs = [json.loads(line) for line in Path(said.json["jobs"]).read_text().splitlines()]
    assert [job["label"] for job in jobs] == ["prompts", "generate", "eval:teacher:heldout", "select", "select"]
    text = Path(said.json["submit"]).read_text()
    assert "untried on more than one node" in text and "--mem=1536M" in text and "afterany:$before" in text
    assert subprocess.run(["bash", "-n", said.json["submit"]], check=False).returncode == 0
    assert "2 trials (2 waiting)" in cli("sweep", "status", path, "--runs", tmp_path / "runs").out


def test_a_search_cannot_be_written_beforehand(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, search={"space": {"select.limit": {"int": [1, 5]}}})
    with pytest.raises(RecipeError, match=r"sweep.yaml:\d+: a search chooses its trials as results come in"):
        write_scripts(plan_sweep(path, RunOptions(tmp_path / "runs")))


@pytest.mark.full
def test_the_submitted_tasks_make_what_the_local_executor_makes(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"select.limit": [5, 10]})
    options = RunOptions(tmp_path / "runs", "cpu", quiet=True)
    scripts = write_scripts(plan_sweep(path, options))
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(SBATCH)
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "log")}
    done = subprocess.run(["bash", scripts.submit], env=environment, capture_output=True, text=True, check=False)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert log.count(": done") == 5 and log.count("afterany:") == 2, log
    outcome = run_sweep(path, options, lab.Inline())
    assert outcome.done == 2 and outcome.summary.executed == []
