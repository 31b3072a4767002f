"""A sweep on a real Ray cluster: the stages of the local executor, whichever node runs them, whichever is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.runs import RunOptions
from distill.sweep.record import read_events
from distill.sweep.run import run_sweep
from distill.sweep.schedule import Scheduler

RAY = Path(sys.executable).parent / "ray"
PORT = 6398

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not RAY.exists(), reason="ray is not installed (extra: ray)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A cluster of two nodes on this machine; yields the process of the second."""
    environment = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    common = ["--num-cpus=2", "--disable-usage-stats", "--block", "--object-store-memory=100000000"]
    head_command = [RAY, "start", "--head", f"--port={PORT}", "--node-ip-address=127.0.0.1",
                    "--include-dashboard=false", f"--temp-dir={tmp_path.parent / 'ray'}", *common]  # fmt: skip
    second_command = [RAY, "start", f"--address=127.0.0.1:{PORT}", "--node-ip-address=127.0.0.1", *common]
    head = subprocess.Popen(head_command, env=environment, start_new_session=True, stdout=-3, stderr=-3)
    time.sleep(8)
    second = subprocess.Popen(second_command, env=environment, start_new_session=True, stdout=-3, stderr=-3)
    time.sleep(6)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{PORT}")
    try:
        yield second
    finally:
        for node in (second, head):
            kill_session(node)


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill a node: every process of its session."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader.pid:
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue
    leader.wait()


def digests(runs: Path) -> dict[str, str]:
    """Result digests of all finished stages."""
    documents = [json.loads(file.read_text()) for file in runs.glob("*/*/stage.json")]
    return {document["identity"]: document["digest"] for document in documents}


@pytest.mark.timeout(600)
def test_a_sweep_that_loses_a_node_midway_ends_as_the_local_one(
    lab: Any, tmp_path: Path, two_nodes: subprocess.Popen[bytes]
) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"select.limit": [2, 4, 6, 8, 10, 12], "prompts.0.split_seed": [0, 1]})
    run_sweep(path, RunOptions(tmp_path / "one", "cpu", quiet=True), lab.Inline())
    lost = False

    def lose_a_node(scheduler: Scheduler) -> None:
        nonlocal lost
        if not lost and len(scheduler.summary.executed) >= 5:
            lost = True
            kill_session(two_nodes)

    outcome = run_sweep(path, RunOptions(tmp_path / "runs", "cpu", quiet=True), "ray", lose_a_node)
    assert lost and two_nodes.returncode is not None
    assert outcome.done == outcome.trials == 12 and not outcome.failed_trials
    assert digests(tmp_path / "runs") == digests(tmp_path / "one")
    done = [event.identity for event in read_events(outcome.folder) if event.outcome == "done"]
    assert len(done) == len(set(done)) == outcome.stages
    assert run_sweep(path, RunOptions(tmp_path / "runs", "cpu", quiet=True), lab.Inline()).summary.executed == []
