"""Running Python code that nobody vouches for: bubblewrap, or nothing.

`run_sandboxed` starts a bare interpreter (standard library only) in user, pid, network, ipc, uts and mount namespaces
of its own: read-only system folders, a small private folder in memory, no environment, no capabilities, no way to more
namespaces, and no system calls with which to trace others or to hold memory that no limit counts. Nothing of the home,
of the working folder or of the machine's `/tmp` is there. When the interpreter ends, when time is up, or when this
process dies, the whole pid namespace is killed. Limits on what runs are its own to set (`harness`).

A sandbox of a root process is started in two steps: process limits do not bind root, and an unprivileged process might
not reach the interpreter. So a first bubblewrap, as root, lays out the folders to be seen, and a second one, started
there from a uid that nobody else has, makes the namespaces. What runs is always unprivileged, on the inside and on the
outside.
"""

import os
import platform
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
"""The interpreter outside any virtual environment."""
FLAGS = ("-s", "-S", "-P", "-B", "-X", "utf8")
"""No site packages, no working folder on the path, no byte code."""
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All that is set: the order of sets is the same on every run."""
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
FOLDER = "/tmp"  # noqa: S108  # a private one, in memory
LONGEST_ERROR = 4096
"""Bytes of stderr that are read."""
LAST_UID = 2**31 - 2
UIDS = 100_000
"""How many uids, from the last one down, are used for sandboxes of root."""
PROBE_S = 30.0
"""How long the trial of the sandbox may take."""
GRACE_S = 5.0
"""How long a process that has closed its output may take to end by itself."""
REMEDY = "install bubblewrap 0.8 or newer (package `bubblewrap`) and allow user namespaces"


class Ended(NamedTuple):
    """What became of a run."""

    output: bytes
    """What it wrote to stdout, up to the limit."""
    errors: str
    exit_code: int
    """Negative where a signal ended it."""
    timed_out: bool = False
    overflowed: bool = False
    """Whether it wrote more than the limit; it was killed for that."""


def run_sandboxed(source: str, given: bytes, timeout_s: float, output_bytes: int, folder_mb: int) -> Ended:
    """Run Python source (as `python -c`) in a sandbox, with `given` on stdin; returns when nothing of it is left.

    Raises RuntimeError where bubblewrap is not installed. A sandbox that fails to start ends with an exit code and
    says why in `errors`.
    """
    with _call_filter() as descriptor:
        command = [*_command(folder_mb, descriptor), str(PYTHON), *FLAGS, "-c", source]
        return _run(command, given, timeout_s, output_bytes, "/", descriptor)


def run_unsandboxed(source: str, given: bytes, timeout_s: float, output_bytes: int, folder_mb: int) -> Ended:
    """The same with the rights of this process, in a temporary folder; nothing keeps the code there."""
    with tempfile.TemporaryDirectory(prefix="distill-unsandboxed-", ignore_cleanup_errors=True) as folder:
        return _run([str(PYTHON), *FLAGS, "-c", source], given, timeout_s, output_bytes, folder)


@cache
def sandbox_problem() -> str | None:
    """Why no sandbox can be started here, None where one works; tried once a process."""
    word = secrets.token_hex(8)
    try:
        ended = run_sandboxed(f"print({word!r})", b"", PROBE_S, 1000, 1)
    except RuntimeError as error:
        return str(error)
    if ended.output.decode("utf-8", "replace").strip() == word:
        return None
    if ended.timed_out:
        return f"bubblewrap did not start within {PROBE_S:g} s"
    return f"bubblewrap cannot start: {' '.join(ended.errors.split()) or f'exit code {ended.exit_code}'}"


# --- the command ----------------------------------------------------------------------------------------------------


def _command(folder_mb: int, descriptor: int) -> list[str]:
    """The start of the command line that runs what follows it in a sandbox."""
    bubblewrap = _tool("bwrap")
    folders = _folders()
    inner = [
        bubblewrap, *folders,
        "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--disable-userns", "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1",
        "--proc", "/proc", "--dev", "/dev", "--size", str(folder_mb << 20), "--tmpfs", FOLDER,
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", FOLDER,
        "--seccomp", str(descriptor),
        "--clearenv", *(word for item in ENVIRONMENT.items() for word in ("--setenv", *item)),
        "--",
    ]  # fmt: skip
    if os.geteuid() != 0:
        return inner
    uid = str(_free_uid())
    outer = [
        bubblewrap, *folders,
        # the second step mounts a /proc of its own, which the kernel allows only where it sees a whole one
        "--bind", "/proc", "/proc", "--dev", "/dev", "--tmpfs", FOLDER, "--chdir", "/",
        # a change of uid undoes --die-with-parent below it; a pid namespace dies with its first process all the same
        "--unshare-pid", "--die-with-parent", "--",
        _tool("setpriv"), "--reuid", uid, "--regid", uid, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
        "--",
    ]  # fmt: skip
    return outer + inner


def _tool(name: str) -> str:
    if platform.system() != "Linux":
        raise RuntimeError(f"the sandbox needs Linux and bubblewrap; this is {platform.system()}")
    if not (found := shutil.which(name)):
        raise RuntimeError(f"{name} is not installed")
    return found


def _folders() -> list[str]:
    """Options that show the system's folders and the interpreter's own, read-only, and nothing else."""
    options: list[str] = []
    for folder in map(Path, SYSTEM_FOLDERS):
        if folder.is_symlink():
            options += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            options += ["--ro-bind", str(folder), str(folder)]
    prefix = Path(sys.base_prefix).resolve()
    own = [prefix] if PYTHON.is_relative_to(prefix) else [prefix, PYTHON.parent]
    for folder in own:
        if any(folder.is_relative_to(system) for system in SYSTEM_FOLDERS):
            continue
        for parent in reversed(folder.parents[:-1]):  # else they would be closed to all but root
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(folder), str(folder)]
    return options


def _free_uid() -> int:
    """A uid for this process's sandboxes alone: no user has it, and limits count all processes of a uid."""
    last = min(LAST_UID, _last_mapped_uid())
    return last - os.getpid() % min(UIDS, last // 2)


def _last_mapped_uid() -> int:
    """The largest uid of this user namespace."""
    rows = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return max(first + count - 1 for first, _, count in rows) - 1


# --- system calls ---------------------------------------------------------------------------------------------------

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Names of machines in the order of the numbers below, and what the kernel calls them."""
REFUSED_CALLS = {
    # memory that belongs to no process and so to no limit
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
    # reading and writing other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    # parts of the kernel that no answer needs
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
}  # fmt: skip
"""System calls that fail with EPERM, and their numbers."""


def call_filter(machine: str) -> bytes:
    """A seccomp program (classic BPF) that refuses these calls; one that refuses none for a machine we do not know."""
    load, jump_equal, jump_from, leave = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    if machine not in MACHINES:
        return struct.pack("<HBBI", leave, 0, 0, allow)
    numbers = [numbers[list(MACHINES).index(machine)] for numbers in REFUSED_CALLS.values()]
    left = len(numbers) + 1  # instructions from the first comparison to the last one
    program = [
        (load, 0, 0, 4), (jump_equal, 1, 0, MACHINES[machine]), (leave, 0, 0, kill),  # another machine's numbers
        (load, 0, 0, 0), (jump_from, left, 0, 1 << 30),  # x32, which has numbers of its own
        *((jump_equal, left - 1 - at, 0, number) for at, number in enumerate(numbers)),
        (leave, 0, 0, allow), (leave, 0, 0, refuse),
    ]  # fmt: skip
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


@contextmanager
def _call_filter() -> Iterator[int]:
    """A descriptor from which bubblewrap can read the program."""
    source, sink = os.pipe()
    try:
        os.write(sink, call_filter(platform.machine()))
        os.close(sink)
        yield source
    finally:
        os.close(source)


# --- running it -----------------------------------------------------------------------------------------------------


def _run(command: list[str], given: bytes, timeout_s: float, output_bytes: int, folder: str, *keep: int) -> Ended:
    """Run a command with a deadline, reading no more of its output than asked for; at the end nothing of it runs."""
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as stdin:  # a file: a pipe would have to be fed while the output is read
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=ENVIRONMENT,
            start_new_session=True, pass_fds=keep,
        )  # fmt: skip
    try:
        output, errors, timed_out = _read(process, deadline, output_bytes)
        overflowed = len(output) > output_bytes
        if not (timed_out or overflowed):
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    finally:
        _end(process)
    text = errors[:LONGEST_ERROR].decode("utf-8", "replace")
    return Ended(output[:output_bytes], text, process.returncode, timed_out, overflowed)


def _read(process: "subprocess.Popen[bytes]", deadline: float, output_bytes: int) -> tuple[bytes, bytes, bool]:
    """stdout and stderr, until both end, one is too long or time is up, and whether it was."""
    assert process.stdout is not None and process.stderr is not None
    kept = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    most = {process.stdout.fileno(): output_bytes, process.stderr.fileno(): LONGEST_ERROR}
    timed_out = False
    with selectors.DefaultSelector() as selector:
        for descriptor in kept:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and all(len(kept[one]) <= most[one] for one in kept):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                timed_out = True
                break
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                kept[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
    output, errors = kept.values()
    return bytes(output), bytes(errors), timed_out


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left and wait until nobody holds the pipes: then every process of the sandbox is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        for pipe in (process.stdout, process.stderr):
            while os.read(pipe.fileno(), 1 << 16):
                pass
