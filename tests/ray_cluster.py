"""A Ray cluster of two nodes on this machine, of which one can be lost, be set up otherwise, or see another disk."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

RAY = Path(sys.executable).parent / "ray"
PORT = 6399
ADDRESS = f"127.0.0.1:{PORT}"
STARTS_WITHIN_S = 90

Node = subprocess.Popen[bytes]


@contextmanager
def two_nodes(second: Sequence[str] = (), **environment: str) -> Iterator[Node]:
    """Run the cluster that RAY_ADDRESS then names; yields the second node's process.

    `second` stands before the second node's command, `environment` is added to what its processes see. One cluster at
    a time, whatever other tests run beside: their ports are the same. Ray's own files lie in a folder with a short
    name, since the path of a socket has room for 107 bytes.
    """
    scratch = Path(tempfile.gettempdir())
    with (scratch / "distill-ray.lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="ray-") as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _nodes(Path(folder), second, environment) as node:
            yield node


@contextmanager
def _nodes(folder: Path, second: Sequence[str], environment: Mapping[str, str]) -> Iterator[Node]:
    outside = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    common = ["--num-cpus=2", "--disable-usage-stats", "--block", "--object-store-memory=100000000",
              "--node-ip-address=127.0.0.1"]  # fmt: skip
    head = [RAY, "start", "--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes = [subprocess.Popen([*head, *common], env=outside, start_new_session=True, stdout=-3, stderr=-3)]
    try:
        _wait_for(1)
        command = [*second, RAY, "start", f"--address={ADDRESS}", *common]
        nodes.append(subprocess.Popen(command, env=outside | environment, start_new_session=True, stdout=-3, stderr=-3))
        _wait_for(2)
        yield nodes[1]
    finally:
        for node in reversed(nodes):
            kill(node)


def _wait_for(nodes: int) -> None:
    """Until so many nodes are there; asked in a process of its own, whose connection ends with it."""
    ask = f"import ray; ray.init('{ADDRESS}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    patience_s = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < patience_s:
        said = subprocess.run([sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True, check=False)
        if said.stdout.strip().endswith(str(nodes)):
            return
        time.sleep(1)
    raise TimeoutError(f"no cluster of {nodes} nodes within {STARTS_WITHIN_S} s: {said.stderr[-500:]}")


def kill(leader: Node) -> None:
    """Kill a node: every process of its session."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader.pid:
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue
    leader.wait()
