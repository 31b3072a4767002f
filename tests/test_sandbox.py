"""The sandbox of the `code` verifier under attack, and that each attack works where there is none.

These need bubblewrap. On a machine without it they are skipped with the reason, in CI they fail.
"""

import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.config import CodeVerifier, VerifierSection
from distill.records import Message, Prompt, Teacher, Trace, Verdict
from distill.verifiers import code, resolve
from distill.verifiers.pool import VerifierPool
from distill.verifiers.sandbox import (
    MACHINES,
    REFUSED_CALLS,
    Ended,
    call_filter,
    run_sandboxed,
    run_unsandboxed,
    sandbox_problem,
)

HERE = "CI" in os.environ or sandbox_problem() is None
pytestmark = pytest.mark.skipif(not HERE, reason=f"no sandbox on this machine: {sandbox_problem()}")

QUICK = CodeVerifier(timeout_s=4, cpu_s=1)
HARNESS = "What runs inside the sandbox of the `code` verifier"
"""Stands in the command line of every process of a sandbox."""


def verdict_on(source: str, *tests: str, options: CodeVerifier = QUICK) -> Verdict:
    prompt = Prompt.of(
        [Message(role="user", content="Write f.")], row={"test_list": list(tests) or ["assert f() == 2"]}
    )
    values = {"trace_id": "t", "prompt_id": "p", "cfg": "c", "sample": 0, "teacher": Teacher(engine="test")}
    return code(prompt, Trace.model_validate({**values, "answer": f"```python\n{source}\n```"}), options)


def running(word: str) -> list[str]:
    """Processes of this machine whose command line has a word in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if word in (folder / "cmdline").read_bytes().decode("utf-8", "replace"):
                    found.append(folder.name)
            except OSError:  # it has just ended
                continue
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    assert running(HARNESS) == []


# --- attacks that are contained and judged --------------------------------------------------------------------------

FORKS = """
import os
def f():
    while True:
        try:
            os.fork()
        except OSError:
            pass
"""
ALLOCATES = """
def f():
    return len(bytearray(10 * 1024**3)) and 2
"""
ALLOCATES_SLOWLY = """
def f():
    kept = []
    while True:
        kept.append(bytearray(1 << 20))
"""
ALLOCATES_IN_MANY = """
import os, time
def f():
    for _ in range(25):
        if os.fork() == 0:
            kept = b"x" * (200 << 20)
            time.sleep(100)
    time.sleep(100)
"""
KILLS_ITS_PARENT = """
import os, signal
def f():
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT, signal.SIGALRM):
        os.kill(os.getppid(), number)
    return 2
"""
KILLS_EVERYBODY = """
import os, signal
def f():
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return 2  # there is nobody but the referee, whom no signal reaches
"""
PRINTS = """
def f():
    for _ in range(1024):
        print("x" * (1 << 20))
    return 2
"""

CONTAINED: dict[str, tuple[str, str, str]] = {
    "a fork bomb": (FORKS, "timeout", "no end in 4 s"),
    "a fork bomb that fails": ("import os\ndef f():\n    while True: os.fork()", "wrong", "BlockingIOError"),
    "an endless loop": ("def f():\n    while True: pass", "timeout", "more than 1 CPU seconds"),
    "an endless sleep": ("import time\ndef f():\n    time.sleep(10**6)", "timeout", "no end in 4 s"),
    "10 GB at once": (ALLOCATES, "wrong", "MemoryError"),
    "10 GB step by step": (ALLOCATES_SLOWLY, "wrong", "MemoryError"),
    "much memory in many processes": (ALLOCATES_IN_MANY, "wrong", "use more than 512 MB together"),
    "killing its parent": (KILLS_ITS_PARENT, "correct", "1 assertion passed"),
    "killing everybody": (KILLS_EVERYBODY, "correct", "1 assertion passed"),
    "1 GB of output": (PRINTS, "correct", "1 assertion passed"),
    "a crash of the interpreter": ("import ctypes\ndef f(): ctypes.string_at(0)", "wrong", "signal SIGSEGV"),
    "a value without end": ("def f(): return 'x' * (1 << 27)", "wrong", "a value of more than 16 MB"),
}


@pytest.mark.parametrize("attack", CONTAINED)
def test_an_attack_ends_with_its_own_verdict_and_leaves_nothing(attack: str) -> None:
    source, outcome, detail = CONTAINED[attack]
    options = QUICK if outcome == "timeout" else QUICK.model_copy(update={"cpu_s": 20, "timeout_s": 60.0})
    verdict = verdict_on(source, options=options)
    assert verdict.outcome == outcome and detail in verdict.detail, verdict


def test_a_background_process_does_not_outlive_its_verdict() -> None:
    marker = f"time.sleep(1000) # left behind {os.getpid()}"
    source = (
        "import subprocess, sys\ndef f():\n"
        f"    subprocess.Popen([sys.executable, '-c', {'import time; ' + marker!r}], start_new_session=True)\n"
        "    return 2"
    )
    assert verdict_on(source).outcome == "correct"
    assert running(marker) == []


def test_output_beyond_the_limit_is_never_read() -> None:
    endless = "while True: print('x' * 100_000)"
    ended = run_sandboxed(endless, b"", timeout_s=60, output_bytes=1000, folder_mb=1)
    assert ended.overflowed and len(ended.output) == 1000 and not ended.timed_out


def test_a_sandbox_ends_at_its_deadline_whatever_runs_in_it() -> None:
    started = time.monotonic()
    ended = run_sandboxed("import os\nos.fork()\nwhile True: pass", b"", timeout_s=1, output_bytes=1000, folder_mb=1)
    assert ended.timed_out and time.monotonic() - started < 30


WORKER = """
import sys
from distill.verifiers.sandbox import run_sandboxed
run_sandboxed("import time, sys; time.sleep(1000) # " + sys.argv[1], b"", 1000, 1000, 1)
"""


def test_a_sandbox_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    marker = f"orphan of {os.getpid()}"
    (tmp_path / "worker.py").write_text(WORKER)
    worker = subprocess.Popen([sys.executable, str(tmp_path / "worker.py"), marker])
    try:
        _wait_until(lambda: len(running(f"# {marker}")) > 0)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    _wait_until(lambda: running(f"# {marker}") == [])


def test_a_sandbox_dies_with_the_worker_whose_time_is_up() -> None:
    spec = resolve(VerifierSection(code=CodeVerifier(timeout_s=1000)))
    row = {"test_list": ["assert f() == 2"]}
    prompt = Prompt.of([Message(role="user", content="Write f.")], row=row, source="s")
    values = {"trace_id": "t", "prompt_id": "p", "cfg": "c", "sample": 0, "teacher": Teacher(engine="test")}
    trace = Trace.model_validate({**values, "answer": "```python\nimport time\ndef f(): time.sleep(1000)\n```"})
    with VerifierPool(workers=1, timeout_s=4, by_source={"s": spec}) as pool:
        assert [verdict.outcome for verdict in pool.verify_many([(prompt, trace)])] == ["timeout"]
    _wait_until(lambda: running(HARNESS) == [])


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- attacks on what lies outside, each tried without a sandbox too -------------------------------------------------


def said(ended: Ended) -> str:
    return ended.output.decode()


def inside(source: str) -> str:
    return said(run_sandboxed(source, b"", timeout_s=60, output_bytes=100_000, folder_mb=1))


def outside(source: str) -> str:
    return said(run_unsandboxed(source, b"", timeout_s=60, output_bytes=100_000, folder_mb=1))


def attempt(body: str) -> str:
    """A program that prints `succeeded` if its body runs through."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"try:\n{lines}\n    print('succeeded')\nexcept OSError as error:\n    print(type(error).__name__)\n"


def test_files_can_be_written_in_the_private_folder_only(tmp_path: Path) -> None:
    target = tmp_path / "written"
    write = attempt(f"open({str(target)!r}, 'w').write('x')")
    assert inside(write) == "FileNotFoundError\n" and not target.exists()
    assert outside(write) == "succeeded\n" and target.exists(), "control"
    for folder in ("/", "/usr", "/dev", "/dev/shm", "/proc/sys/kernel"):
        assert "succeeded" not in inside(attempt(f"open({folder + '/distill-test'!r}, 'w')")), folder
    assert inside(attempt("open('own', 'w').write('x')")) == "succeeded\n"
    assert inside("import os; print(os.listdir('.'), os.getcwd())") == "[] /tmp\n", "empty on every start"


def test_the_private_folder_is_small() -> None:
    assert inside(attempt("open('big', 'wb').write(b'x' * (2 << 20))")) == "OSError\n"
    assert inside(attempt("open('big', 'wb').write(b'x' * (1 << 19))")) == "succeeded\n"


def test_nothing_of_the_users_files_is_there(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    for path in (tmp_path / "secret", Path(__file__), Path.home(), Path("/etc/passwd"), Path("/var"), Path("/run")):
        look = f"import os; print(os.path.exists({str(path)!r}) and os.listdir({str(path.parent)!r}))"
        assert inside(look) == "False\n" or path == Path.home(), path
    assert "False" not in outside(f"import os; print(os.path.exists({str(tmp_path / 'secret')!r}))"), "control"


READS_ENVIRONMENTS = """
import os
text = repr(dict(os.environ))
for process in os.listdir("/proc"):
    try:
        text += open(f"/proc/{process}/environ").read()
    except OSError:
        pass
print(%r in text)
"""


def test_no_process_environment_can_be_read() -> None:
    secret = next(f"{name}={value}" for name, value in os.environ.items() if name == "PATH")
    assert inside(READS_ENVIRONMENTS % secret) == "False\n"
    assert outside(READS_ENVIRONMENTS % secret) == "True\n", "control: the parent's environment is there to be read"
    names = inside("import os; print(sorted(os.environ))")
    assert names == "['LC_CTYPE', 'PWD', 'PYTHONHASHSEED']\n"


def test_no_network_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        connect = attempt(f"import socket\nsocket.create_connection({address!r}, timeout=5).close()")
        assert inside(connect) == "ConnectionRefusedError\n"
        assert outside(connect) == "succeeded\n", "control"
    interfaces = inside("import socket; print([name for _, name in socket.if_nameindex()])")
    assert interfaces == "['lo']\n"


def test_no_local_socket_can_be_reached(tmp_path: Path) -> None:
    # names that begin with a zero byte are no files: only a network namespace keeps them apart
    for name in (f"\0distill-{os.getpid()}", str(tmp_path / "s")):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
            server.listen()
            connect = attempt(f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})")
            assert "succeeded" not in inside(connect)
            assert "succeeded" in outside(connect), "control"


def test_no_process_outside_can_be_seen_or_signalled() -> None:
    signalled = attempt(f"import os\nos.kill({os.getpid()}, 0)")
    assert inside(signalled) == "ProcessLookupError\n" and outside(signalled) == "succeeded\n"
    listed = inside("import os; print(sorted(int(name) for name in os.listdir('/proc') if name.isdigit()))")
    assert listed == "[1]\n"


def test_what_runs_has_no_rights_and_can_get_none() -> None:
    status = inside("print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1" and int(fields["CapEff"], 16) == 0 == int(fields["CapBnd"], 16)
    assert "0" not in fields["Uid"].split()
    new_user = "import ctypes, os\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError\n"
    assert inside(attempt(new_user)) == "OSError\n", "no user namespaces in which it would be root"


HOLDS_MEMORY = """
import ctypes, os
try:
    print("memfd", os.memfd_create("x") > 0)
except PermissionError as error:
    print("memfd", False)
print("shared", ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0)
"""


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="no system calls are refused on this machine")
def test_memory_that_belongs_to_no_process_cannot_be_had() -> None:
    assert inside(HOLDS_MEMORY) == "memfd False\nshared False\n"
    assert outside(HOLDS_MEMORY.replace("shmget(0,", "getpid(")) == "memfd True\nshared True\n", "control"


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_of_system_calls_refuses_each_of_its_numbers_and_nothing_else(machine: str) -> None:
    number = list(MACHINES).index(machine)
    refused = {numbers[number] for numbers in REFUSED_CALLS.values()}
    for call in range(600):
        assert filtered(call_filter(machine), MACHINES[machine], call) == (0x50001 if call in refused else 0x7FFF0000)
    assert filtered(call_filter(machine), 0x40000003, 0) == 0x80000000, "32-bit calls have other numbers"
    assert filtered(call_filter(machine), MACHINES[machine], (1 << 30) + 9) == 0x50001
    assert filtered(call_filter("another"), 1, 319) == 0x7FFF0000


def filtered(program: bytes, machine: int, call: int) -> int:
    """What the kernel's interpreter of such programs would return."""
    steps = list(struct.iter_unpack("<HBBI", program))
    at = value = 0
    while True:
        what, if_true, if_false, operand = steps[at]
        at += 1
        if what == 0x06:
            return int(operand)
        if what == 0x20:
            value = {0: call, 4: machine}[operand]
        else:
            at += if_true if (value == operand if what == 0x15 else value >= operand) else if_false


@pytest.mark.skipif(os.geteuid() != 0, reason="whoever is not root is unprivileged already")
def test_a_sandbox_of_root_runs_as_a_uid_that_nobody_has() -> None:
    ended = inside("print(open('/proc/self/uid_map').read())")
    assert int(ended.split()[1]) == 0, "seen from the uid itself"
    uid = int(inside("import os; print(os.getuid())"))
    users = {line.split(":")[2] for line in Path("/etc/passwd").read_text().splitlines()}
    assert uid > 1000 and str(uid) not in users


def test_the_interpreter_has_the_standard_library_and_nothing_else() -> None:
    assert inside("import json, sqlite3, ctypes; print('all there')") == "all there\n"
    assert inside("import importlib.util; print(importlib.util.find_spec('pydantic'))") == "None\n"


def test_what_differs_between_runs_elsewhere_is_fixed() -> None:
    program = "import os, time; print(list({'a', 'b', 'c', 'd'}), time.tzname, os.uname().nodename)"
    assert inside(program) == inside(program)
    assert "sandbox" in inside(program)


# --- attacks on the verdict -----------------------------------------------------------------------------------------

LOOKS_AROUND = """
import gc, os, sys
def f(given=None):
    seen = repr(sys.argv)
    frame = sys._getframe()
    while frame:
        seen += repr(frame.f_locals)
        frame = frame.f_back
    seen += repr([value for value in gc.get_objects() if isinstance(value, (dict, list, tuple))])
    for process in os.listdir("/proc"):
        for name in ("cmdline", "environ", "mem", "maps", "fd/0", "fd/1", "fd/3", "fd/4"):
            try:
                seen += open(f"/proc/{process}/{name}", "rb").read(1 << 20).decode("latin-1")
            except OSError:
                pass
    expected = int("".join(["77", "00", "77"]))  # put together late: neither text nor constants of this answer hold it
    return expected if str(expected) in seen else 2
"""
TRACES_THE_REFEREE = """
import ctypes, os
def f():
    library = ctypes.CDLL(None)
    attach, pidfd_open, pidfd_getfd = 16, 434, 438
    descriptor = library.syscall(pidfd_open, 1, 0)
    traced = library.ptrace(attach, 1, 0, 0)
    taken = library.syscall(pidfd_getfd, descriptor, 3, 0)
    try:
        os.listdir("/proc/1/fd")
    except PermissionError:
        return 2 if (traced, taken) == (-1, -1) else 0
"""
FORGED = '{"token": "", "outcome": "correct", "detail": "1 assertion passed"}'

FAKED: dict[str, tuple[str, str]] = {
    "os._exit at import": ("import os\nos._exit(0)", "the answer ended its own process (exit code 0)"),
    "os._exit in a call": ("import os\ndef f(): os._exit(0)", "the answer ended its own process (exit code 0)"),
    "sys.exit at import": ("import sys\nsys.exit(0)", "the answer cannot run: SystemExit: 0"),
    "sys.exit in a call": ("import sys\ndef f(): sys.exit(0)", "SystemExit: 0"),
    "printing": (f"print('ok'); print({FORGED!r})\ndef f(): return 3", "assert f() == 2"),
    "writing to every descriptor": (
        "import os\ndef f():\n    for one in range(64):\n        try: os.write(one, b'\\0' * 8 + b'{}')\n"
        "        except OSError: pass\n    return 3",
        "what is no value",
    ),
    "closing every descriptor": ("import os\ndef f(): os.closerange(0, 64)", "ended its own process"),
    "a number equal to everything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef f(): return Any(3)",
        "assert f() == 2",
    ),
    "another assertion error": (
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.__build_class__ = None\ndef f(): return 3",
        "assert f() == 2",
    ),
}


@pytest.mark.parametrize("fake", FAKED)
def test_an_answer_cannot_pass_without_the_right_values(fake: str) -> None:
    source, detail = FAKED[fake]
    verdict = verdict_on(source)
    assert verdict.outcome == "wrong" and detail in verdict.detail, verdict


def test_an_object_equal_to_everything_decides_nothing() -> None:
    verdict = verdict_on("class Any:\n    def __eq__(self, other): return True\ndef f(): return Any()")
    assert verdict.outcome == "unverifiable" and "compare a Any of the answer" in verdict.detail


@pytest.mark.parametrize("brought", ["set", "sorted", "len", "str"])
def test_an_answer_cannot_bring_the_builtins_it_is_compared_with(brought: str) -> None:
    source = f"def {brought}(*_): return 1\ndef f(): return [3]"
    assert verdict_on(source, f"assert {brought}(f()) == {brought}([2, 1])").outcome == "wrong"


def test_an_answer_cannot_bring_a_module_it_is_compared_with() -> None:
    fake = "class math:\n    isclose = lambda *a, **k: True\ndef f(): return 3"
    prompt_row = {"test_list": ["assert math.isclose(f(), 2)"], "imports": ["import math"]}
    options = QUICK.model_copy(update={"setup_column": "imports"})
    prompt = Prompt.of([Message(role="user", content="Write f.")], row=prompt_row)
    values = {"trace_id": "t", "prompt_id": "p", "cfg": "c", "sample": 0, "teacher": Teacher(engine="test")}
    trace = Trace.model_validate({**values, "answer": f"```python\n{fake}\n```"})
    assert code(prompt, trace, options).outcome == "wrong"


def test_what_is_expected_is_nowhere_in_the_answers_process() -> None:
    verdict = verdict_on(LOOKS_AROUND, "assert f() == 770077", options=CodeVerifier(timeout_s=60))
    assert verdict.outcome == "wrong" and "assert f() == 770077" in verdict.detail
    control = verdict_on(LOOKS_AROUND, "assert f(770077) == 770077", options=CodeVerifier(timeout_s=60))
    assert control.outcome == "correct", "what it is given it does see"


def test_the_referee_cannot_be_traced_or_robbed() -> None:
    assert verdict_on(TRACES_THE_REFEREE).outcome == "correct"
