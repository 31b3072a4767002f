"""What runs inside the sandbox of the `code` verifier: the tests in one process, the answer in another.

The first process, the referee, has the tests. It starts a second one that runs the answer and knows nothing but the
calls it is asked to make; only plain values come back, and the referee compares them. So an answer cannot end, print,
patch or guess its way to a pass: what it could tamper with is its own process. In the sandbox the referee is process 1,
which no signal from inside reaches, and it cannot be traced or read by the answer.

What this does not prevent: an answer that recognises the arguments of a call and returns what it has learned by heart.
What it costs: tests can use the answer's functions, classes and methods, but an object of its own class can only be
looked at (attributes, items, length), not compared; tests that do are `unverifiable`.

This file is handed to a bare interpreter as text (`python -c`). It imports the standard library only, and nothing else
in this package imports it at run time.
"""

import ast
import builtins
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

POLL_S = 0.05
"""How often deadline and memory are looked at while an answer works."""
LARGEST_MESSAGE = 1 << 24
"""Bytes of the largest value that is taken from an answer."""
LAST_WORDS = 4096
"""Bytes of a program's stderr that are kept."""
SHOWN = 100
"""Characters of a line quoted in a detail."""


BARE_PROGRAM = """import builtins, sys
builtins.exit = builtins.quit = sys.exit
exec(compile(open("answer.py", encoding="utf-8").read(), "answer.py", "exec"))
"""
"""Runs a program as Python would; `exit` and `quit` come from `site`, which is not loaded here."""


class Stop(BaseException):
    """The verdict is known; not an Exception, so that tests do not catch it."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(outcome, detail)
        self.outcome = outcome
        self.detail = detail


def shown(text: str) -> str:
    """A text on one short line."""
    folded = " ".join(text.split())
    return folded if len(folded) <= SHOWN else folded[: SHOWN - 1] + "…"


# --- values between the two processes -------------------------------------------------------------------------------

CONTAINERS: tuple[tuple[Any, str], ...] = ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset"))
BY_TEXT: dict[str, Callable[[Any], str]] = {
    "fractions.Fraction": str,
    "decimal.Decimal": str,
    "datetime.date": lambda value: value.isoformat(),
    "datetime.datetime": lambda value: value.isoformat(),
}
"""Types of the standard library that travel as text, and how."""


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """A plain value as JSON that keeps its type; `other` encodes whatever is not plain.

    Subclasses of plain types (Counter, named tuples, enumerations of numbers) travel as what they are based on, so that
    no method of theirs takes part in a comparison.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if isinstance(value, int):
        return int.__index__(value) if -(2**53) < value < 2**53 else ["int", hex(value)]
    if isinstance(value, dict):
        return ["dict", [[encode(key, other), encode(item, other)] for key, item in dict.items(value)]]
    for base, tag in CONTAINERS:
        if isinstance(value, base):
            return [tag, [encode(item, other) for item in value]]
    return _encode_rare(value, other)


def _encode_rare(value: Any, other: Callable[[Any], Any]) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, bytes(value).hex()]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    name = f"{type(value).__module__}.{type(value).__name__}"
    return ["text", name, BY_TEXT[name](value)] if name in BY_TEXT else other(value)


def decode(value: Any, other: Callable[..., Any]) -> Any:
    """The value again; `other` decodes what is not plain."""
    if not isinstance(value, list):
        return value
    tag, *body = value
    if tag == "dict":
        return {decode(key, other): decode(item, other) for key, item in body[0]}
    if tag in BUILDERS:
        return BUILDERS[tag]([decode(item, other) for item in body[0]])
    if tag == "int":
        return int(body[0], 16)
    if tag == "complex":
        return complex(*body)
    if tag in ("bytes", "bytearray"):
        data = bytes.fromhex(body[0])
        return data if tag == "bytes" else bytearray(data)
    if tag == "range":
        return range(*body)
    return _from_text(*body) if tag == "text" else other(tag, *body)


BUILDERS: Mapping[str, Callable[[Any], Any]] = {tag: kind for kind, tag in CONTAINERS}


def _from_text(name: str, text: str) -> Any:
    if name not in BY_TEXT:
        raise ValueError(name)
    module, _, kind = name.partition(".")
    made = getattr(importlib.import_module(module), kind)
    return made.fromisoformat(text) if module == "datetime" else made(text)


def send(descriptor: int, message: Any) -> None:
    """Write one message."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(descriptor, data) :]


# --- the answer's process -------------------------------------------------------------------------------------------


class Host:
    """Runs the answer and does what the referee asks: names, calls, attributes, next items."""

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.objects: list[Any] = []
        self.module = types.ModuleType("answer")
        sys.modules["answer"] = self.module  # data classes look their module up there
        vars(builtins).update(exit=sys.exit, quit=sys.exit)

    def serve(self) -> None:
        """Answer requests until the referee is gone."""
        actions: dict[str, Callable[..., Any]] = {
            "run": self.run, "name": self.name, "call": self.call, "attribute": self.attribute, "next": self.next,
            "truth": self.truth,
        }  # fmt: skip
        while (request := self._receive()) is not None:
            try:
                reply = actions[request[0]](*request[1:])
            except BaseException as error:  # whatever the answer raises is a reply, SystemExit too
                reply = {"raised": [type(error).__name__, _text_of(error)]}
            send(self.sink, reply)

    def run(self, code: str) -> Any:
        """Run a module's text where all others ran."""
        exec(compile(code, "<answer>", "exec", dont_inherit=True), self.module.__dict__)  # noqa: S102
        return {"value": None}

    def name(self, name: str) -> Any:
        """A global name of the answer."""
        if name not in self.module.__dict__:
            return {"missing": True}
        return {"value": self._encode(self.module.__dict__[name])}

    def call(self, at: int, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """What an object returns, and its arguments as it left them."""
        given = [self._decode(argument) for argument in arguments]
        value = self.objects[at](*given, **{name: self._decode(item) for name, item in keywords.items()})
        after = [self._encode(item) if isinstance(item, list | dict | set | bytearray) else None for item in given]
        return {"value": self._encode(value), "after": after}

    def attribute(self, at: int, name: str) -> Any:
        """An attribute of an object."""
        return {"value": self._encode(getattr(self.objects[at], name))}

    def truth(self, at: int) -> Any:
        """Whether an object counts as true."""
        return {"value": bool(self.objects[at])}

    def next(self, at: int) -> Any:
        """The next item of an iterator."""
        for item in self.objects[at]:
            return {"value": self._encode(item)}
        return {"missing": True}

    def _encode(self, value: Any) -> Any:
        return encode(value, self._keep)

    def _keep(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        self.objects.append(value)
        return ["iterator" if isinstance(value, Iterator) else "object", len(self.objects) - 1, type(value).__name__]

    def _decode(self, value: Any) -> Any:
        return decode(value, self._kept)

    def _kept(self, tag: str, body: Any) -> Any:
        return self.objects[body] if tag == "handle" else iter([self._decode(item) for item in body])

    def _receive(self) -> Any:
        header = self._read(8)
        return json.loads(self._read(int.from_bytes(header, "big"))) if header else None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := os.read(self.source, size - len(data))):
            data += part
        return data


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


# --- the referee's view of the answer -------------------------------------------------------------------------------


class Process(NamedTuple):
    """A process of the answer, and the exit statuses (negative: signals) of all that have ended, by process id."""

    pid: int
    statuses: dict[int, int]

    def status(self) -> int | None:
        """Its exit status, None while it runs; takes in whoever else has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                return self.statuses.get(self.pid)
            self.statuses[pid] = os.waitstatus_to_exitcode(status)


def start(
    arguments: Sequence[str], processes: int, stdin: int, stdout: int, stderr: int, keep: Sequence[int] = ()
) -> Process:
    """Start this interpreter again; it inherits the limits of this process and no open file but these."""
    sandboxed = os.getpid() == 1
    pid = os.fork()
    if pid:
        return Process(pid, {})
    try:
        os.setsid()
        if sandboxed:  # elsewhere it would count every process of the user
            resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        for descriptor, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(descriptor, number)
        for descriptor in keep:
            os.set_inheritable(descriptor, True)
        os.execv(  # noqa: S606  # no shell is wanted
            sys.executable, [*sys.orig_argv[: sys.orig_argv.index("-c")], *arguments]
        )
    finally:
        os._exit(127)


def end_all(process: Process) -> None:
    """Kill every process of the answer."""
    try:
        # process 1 of a sandbox may kill all it sees; without a sandbox only the answer's own session is ours
        os.kill(-1 if os.getpid() == 1 else -process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    while process.status() is None:
        time.sleep(0.001)


class Watch:
    """Deadline and memory of one answer."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.deadline = time.monotonic() + timeout_s
        # tests may loop without ever calling the answer
        signal.signal(signal.SIGALRM, lambda *_: self.check_time())
        signal.setitimer(signal.ITIMER_REAL, timeout_s, 1.0)

    def check_time(self) -> None:
        """Stop at the deadline."""
        if time.monotonic() >= self.deadline:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stop("timeout", f"no end in {self.timeout_s:g} s")

    def check(self) -> None:
        """Stop at the deadline, or where all processes together hold more memory than one may."""
        self.check_time()
        if os.getpid() == 1 and _memory_of_all() > self.memory_mb << 20:
            raise Stop("wrong", f"the answer's processes use more than {self.memory_mb} MB together")


def _memory_of_all() -> int:
    """Resident bytes of every process of the sandbox but this one."""
    pages = 0
    for name in os.listdir("/proc"):  # noqa: PTH208  # pathlib costs every start of a sandbox milliseconds
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as statm:  # noqa: PTH123
                    pages += int(statm.read().split()[1])
            except OSError:  # it has just ended
                continue
    return pages * resource.getpagesize()


def ended(status: int, cpu_s: int) -> Stop:
    """The verdict on an answer whose process ended by itself."""
    if -status == signal.SIGXCPU:
        return Stop("timeout", f"more than {cpu_s} CPU seconds")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return Stop("wrong", f"the answer ended its own process ({how})")


class Link:
    """Asks the answer's process; whatever comes back is a plain value or a `Remote`."""

    def __init__(self, watch: Watch, job: Mapping[str, Any]) -> None:
        self.watch = watch
        self.cpu_s: int = job["cpu_s"]
        self.stopped: Stop | None = None
        self.raised: BaseException | None = None
        """The last exception that came from the answer."""
        theirs, self.sink = os.pipe()
        self.source, answers = os.pipe()
        nowhere = os.open(os.devnull, os.O_RDWR)
        arguments = ["-c", sys.orig_argv[sys.orig_argv.index("-c") + 1], "answer", str(theirs), str(answers)]
        self.process = start(arguments, job["processes"], nowhere, nowhere, nowhere, (theirs, answers))
        for descriptor in (theirs, answers, nowhere):
            os.close(descriptor)

    def ask(self, *request: Any) -> dict[str, Any]:
        """One request and its reply.

        Raises what the answer raised, or Stop.
        """
        try:
            reply = self._exchange(request)
        except Stop as stop:  # remembered: a test may catch whatever it likes
            self.stopped = stop
            raise
        if "raised" in reply:
            self.raised = _exception(*reply["raised"])
            raise self.raised
        return reply

    def value(self, reply: Mapping[str, Any]) -> Any:
        """The value of a reply."""
        try:
            return decode(reply["value"], self._received)
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise self._stop("wrong", "the answer's process sent what is no value") from error

    def encode(self, value: Any) -> Any:
        """An argument for the answer."""
        return encode(value, self._given)

    def call(self, at: int, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Call an object of the answer; lists, sets and dictionaries are changed in place as it changed them."""
        sent = [self.encode(argument) for argument in arguments]
        reply = self.ask("call", at, sent, {name: self.encode(item) for name, item in keywords.items()})
        for argument, before, after in zip(arguments, sent, reply.get("after", [])):
            if after is not None and after != before:
                _replace(argument, self.value({"value": after}))
        return self.value(reply)

    def refuse(self, what: str) -> NoReturn:
        """End: the tests ask for what cannot be had from outside the answer's process."""
        raise self._stop("unverifiable", f"the tests {what}, which only the answer's own process could")

    def _stop(self, outcome: str, detail: str) -> Stop:
        self.stopped = Stop(outcome, detail)
        return self.stopped

    def _received(self, tag: str, *body: Any) -> Any:
        if tag == "module":
            (name,) = body
            return importlib.import_module(name) if name in sys.stdlib_module_names else _no_module(name)
        at, kind = body
        return RemoteIterator(self, at) if tag == "iterator" else Remote(self, int(at), str(kind))

    def _given(self, value: Any) -> Any:
        if isinstance(value, Remote | RemoteIterator):
            return ["handle", value._distill_at]
        if isinstance(value, Iterator):
            return ["items", [self.encode(item) for item in value]]
        return self.refuse(f"hand over a {type(value).__name__}")

    def _exchange(self, request: Any) -> dict[str, Any]:
        try:
            send(self.sink, request)
            size = int.from_bytes(self._read(8), "big")
            if size > LARGEST_MESSAGE:
                raise Stop("wrong", f"a value of more than {LARGEST_MESSAGE >> 20} MB")
            reply = json.loads(self._read(size))
        except BrokenPipeError:
            raise self._end() from None
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise Stop("wrong", "the answer's process sent what is no value")
        return reply

    def _read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            if not select.select([self.source], [], [], POLL_S)[0]:
                self.watch.check()
                continue
            self.watch.check_time()
            parts.append(os.read(self.source, min(size, 1 << 20)))
            size -= len(parts[-1])
            if not parts[-1]:
                raise self._end()
        return b"".join(parts)

    def _end(self) -> Stop:
        """The verdict where the answer's process does not answer any more."""
        patience = min(self.watch.deadline, time.monotonic() + 1)
        while (status := self.process.status()) is None and time.monotonic() < patience:
            time.sleep(0.001)
        return ended(status, self.cpu_s) if status is not None else Stop("wrong", "the answer cut itself off")


def _exception(name: str, text: str) -> BaseException:
    """The exception that the answer raised, as one of ours; one of its own kind becomes an `Exception` so called."""
    own: type[Exception] = type(str(name), (Exception,), {})
    kind = getattr(builtins, str(name), None)
    try:
        return kind(str(text)) if isinstance(kind, type) and issubclass(kind, Exception) else own(str(text))
    except TypeError:  # UnicodeDecodeError and its kin take more
        return own(str(text))


def _no_module(name: str) -> NoReturn:
    raise ValueError(name)


def _replace(old: Any, new: Any) -> None:
    """Give a container the content of another."""
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


class Remote:
    """An object in the answer's process: it can be called and looked at, and decides nothing."""

    __slots__ = ("_distill_at", "_distill_kind", "_distill_link")

    def __init__(self, link: Link, at: int, kind: str) -> None:
        self._distill_link = link
        self._distill_at = at
        self._distill_kind = kind

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: D102
        return self._distill_link.call(self._distill_at, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        return self._distill_link.value(self._distill_link.ask("attribute", self._distill_at, name))

    def __iter__(self) -> Any:
        return self.__getattr__("__iter__")()

    def __len__(self) -> Any:
        return self.__getattr__("__len__")()

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __str__(self) -> Any:
        return self.__getattr__("__str__")()

    def __bool__(self) -> bool:
        # an answer that wants to be true could as well return True
        return self._distill_link.ask("truth", self._distill_at).get("value") is True

    def _refuse(self, *_: Any) -> NoReturn:
        self._distill_link.refuse(f"compare a {self._distill_kind} of the answer")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse


class RemoteIterator:
    """An iterator in the answer's process; equal to nothing but itself, like any other."""

    def __init__(self, link: Link, at: int) -> None:
        self._distill_link = link
        self._distill_at = at

    def __iter__(self) -> "RemoteIterator":
        return self

    def __next__(self) -> Any:
        reply = self._distill_link.ask("next", self._distill_at)
        if "missing" in reply:
            raise StopIteration
        return self._distill_link.value(reply)


# --- tests by assertions --------------------------------------------------------------------------------------------


class CountAssertions(ast.NodeTransformer):
    """Calls `__reached__` before each assertion: tests that assert nothing must not pass."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        """The assertion and, before it, the call."""
        call = ast.Call(ast.Name("__reached__", ast.Load()), [], [])
        return [ast.copy_location(ast.Expr(call), node), node]


class Tests:
    """The tests of one answer and where they run."""

    def __init__(self, link: Link, job: Mapping[str, Any]) -> None:
        self.link = link
        self.sources: list[str] = job["tests"]
        self.entry_point: str = job["entry_point"]
        self.reached = 0
        self.place: dict[str, Any] = {"__name__": "tests", "__reached__": self._count}

    def _count(self) -> None:
        self.reached += 1

    def run(self, setup: str) -> tuple[str, str]:
        """The verdict and its detail."""
        try:
            exec(compile(setup, "<setup>", "exec"), self.place)  # noqa: S102
            trees = [ast.parse(source) for source in self.sources]
        except Exception as error:
            return "unverifiable", f"setup or tests cannot run: {type(error).__name__}: {shown(str(error))}"
        self._take_names(trees)
        for number, tree in enumerate(trees, 1):
            code = compile(ast.fix_missing_locations(CountAssertions().visit(tree)), f"<test {number}>", "exec")
            self._step(number, partial(exec, code, self.place))
        for name, function in [item for item in self.place.items() if item[0].startswith("test_")]:
            if isinstance(function, types.FunctionType) and not function.__code__.co_argcount:
                self._step(name, function)
        if self.entry_point in self.place and isinstance(self.place.get("check"), types.FunctionType):
            self._step("check", partial(self.place["check"], self.place[self.entry_point]))
        if not self.reached:
            return "unverifiable", "no assertion was reached"
        return "correct", f"{self.reached} assertion{'s' * (self.reached > 1)} passed"

    def _take_names(self, trees: Sequence[ast.AST]) -> None:
        """Fetch what the tests use of the answer.

        A name of Python's builtins is the answer's only where the tests use nothing else of it: no answer may bring the
        `set` or `sorted` with which it is compared.
        """
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(self.place)
        used |= {self.entry_point} if self.entry_point else set()
        own = {name for name in used if not hasattr(builtins, name)} or used
        for name in sorted(own):
            reply = self.link.ask("name", name)
            if "missing" not in reply:
                self.place[name] = self.link.value(reply)

    def _step(self, number: int | str, act: Callable[[], object]) -> None:
        """One test; Stop where it does not pass."""
        where = f"test {number} of {len(self.sources)}" if isinstance(number, int) else str(number)
        try:
            act()
        except AssertionError as error:
            ours = error is not self.link.raised
            raise Stop("wrong", f"{where}: {self._line(error) if ours else 'an assertion in the answer'}") from None
        except ImportError as error:
            missing = f"{where}: {type(error).__name__}: {shown(str(error))}"
            raise Stop("wrong" if error is self.link.raised else "unverifiable", missing) from None
        except Exception as error:
            what = f"{type(error).__name__}: {shown(str(error))}"
            raise Stop("wrong", f"{where}: {what} in {self._line(error)}") from None
        if self.link.stopped:
            raise self.link.stopped

    def _line(self, error: BaseException) -> str:
        """The last line of the tests that an exception passed."""
        found, trace = "", error.__traceback__
        while trace:
            name = trace.tb_frame.f_code.co_filename
            if name.startswith("<test "):
                source = self.sources[int(name[6:-1]) - 1]
                found = source.splitlines()[trace.tb_lineno - 1]
            trace = trace.tb_next
        return shown(found)


def by_assertions(job: Mapping[str, Any], watch: Watch) -> tuple[str, str]:
    """The verdict on an answer whose functions the tests call."""
    link = Link(watch, job)
    try:
        if job["setup"]:
            _run(link, job["setup"], "unverifiable", "the setup cannot run")
        _run(link, job["answer"], "wrong", "the answer cannot run")
        return Tests(link, job).run(job["setup"])
    finally:
        end_all(link.process)


def _run(link: Link, code: str, outcome: str, problem: str) -> None:
    try:
        link.ask("run", code)
    except Exception as error:
        raise Stop(outcome, f"{problem}: {type(error).__name__}: {shown(str(error))}") from None


# --- tests by what a program prints ---------------------------------------------------------------------------------


def by_output(job: Mapping[str, Any], watch: Watch) -> tuple[str, str]:
    """The verdict on an answer that is a program, by what it prints for each input; white space does not count."""
    cases = job["tests"]
    for number, case in enumerate(cases, 1):
        try:
            printed = run_program(job, case["input"], watch)
        except Stop as stop:
            raise Stop(stop.outcome, f"test {number} of {len(cases)}: {stop.detail}") from None
        if printed.split() != case["output"].split():
            given, expected = shown(printed), shown(case["output"])
            return "wrong", f"test {number} of {len(cases)}: printed {given!r}, expected {expected!r}"
    return "correct", f"{len(cases)} output{'s' * (len(cases) > 1)} as expected"


def run_program(job: Mapping[str, Any], given: str, watch: Watch) -> str:
    """What the answer prints for an input.

    Raises Stop where it fails.
    """
    with open("answer.py", "w", encoding="utf-8", errors="surrogatepass") as file:  # noqa: PTH123
        file.write(job["setup"] + "\n" + job["answer"])
    stdin = os.open("input", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.unlink("input")  # noqa: PTH108
    os.write(stdin, given.encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    (printed, out), (words, err) = os.pipe(), os.pipe()
    process = start(["-c", BARE_PROGRAM], job["processes"], stdin, out, err)
    for descriptor in (stdin, out, err):
        os.close(descriptor)
    try:
        output, last_words = _drain(process, printed, words, job["output_kb"] << 10, watch)
    finally:
        end_all(process)
        os.close(printed)
        os.close(words)
    status = process.status()
    if status:
        stop = ended(status, job["cpu_s"])
        said = last_words.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise Stop(stop.outcome, f"{shown(said)} (exit code {status})" if said and status > 0 else stop.detail)
    return output.decode("utf-8", "replace")


def _drain(process: Process, printed: int, words: int, limit: int, watch: Watch) -> tuple[bytes, bytes]:
    """Read what a program prints until it ends; Stop where it is too much."""
    output, last_words = bytearray(), b""
    open_pipes = {printed, words}
    over = False
    while open_pipes:
        ready = select.select(list(open_pipes), [], [], 0 if over else POLL_S)[0]
        watch.check_time()
        for descriptor in ready:
            part = os.read(descriptor, 1 << 16)
            if not part:
                open_pipes.remove(descriptor)
            elif descriptor == printed:
                output += part
            else:
                last_words = (last_words + part)[-LAST_WORDS:]
        if len(output) > limit:
            raise Stop("wrong", f"printed more than {limit >> 10} KB")
        if not ready:
            watch.check()
            if over:  # its children may hold the pipe for ever
                break
        over = process.status() is not None
    while process.status() is None:
        watch.check()
        time.sleep(0.001)
    return bytes(output), last_words


# --- the referee ----------------------------------------------------------------------------------------------------


def limit(job: Mapping[str, Any]) -> None:
    """Limits for this process and all it starts."""
    limits = {
        resource.RLIMIT_AS: job["memory_mb"] << 20,
        resource.RLIMIT_FSIZE: job["file_mb"] << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        _set_limit(kind, value, value)
    _set_limit(resource.RLIMIT_CPU, job["cpu_s"], job["cpu_s"] + 1)


def _set_limit(kind: int, soft: int, hard: int) -> None:
    highest = resource.getrlimit(kind)[1]
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError):
        if os.getpid() == 1:  # not every system without a sandbox knows every limit
            raise


def hide() -> None:
    """Make this process one that no other can trace, read or interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        no_dump = 4  # PR_SET_DUMPABLE
        if ctypes.CDLL(None).prctl(no_dump, 0, 0, 0, 0):
            raise OSError("prctl refused")


def referee() -> None:
    """Read the job on stdin, say that the sandbox works, give the verdict."""
    with open(0, encoding="utf-8", closefd=False) as stdin:
        job = json.load(stdin)
    outside, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # tests may print
        os.dup2(nowhere, number)
    send(outside, {"started": True})
    try:
        hide()
        limit(job)
        watch = Watch(job["timeout_s"], job["memory_mb"])
        outcome, detail = by_output(job, watch) if job["entry"] == "stdin" else by_assertions(job, watch)
    except Stop as stop:
        outcome, detail = stop.outcome, stop.detail
    except Exception as error:
        outcome, detail = "error", f"the referee failed: {type(error).__name__}: {shown(str(error))}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(outside, {"token": job["token"], "outcome": outcome, "detail": detail})


if __name__ == "__main__":
    if sys.argv[1:2] == ["answer"]:
        Host(int(sys.argv[2]), int(sys.argv[3])).serve()
    else:
        referee()
    sys.stdout = sys.stderr = None
    os._exit(0)
