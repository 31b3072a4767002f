"""Running verifiers: light ones here, all others in processes that can be killed.

A verifier may loop for ever, crash or be hostile to time limits inside its own process, so the limit is kept from
outside: a verdict that takes too long becomes `timeout`, a worker that dies becomes `error`, and the next verdict gets
a new worker. Workers are started afresh (never forked: this process may hold threads and locks of torch), one small
pool for each verifier, which it loads before the clock of its first verdict starts. `number`, `exact` and `choice` take
time linear in the answer and run in this process. The parts of a combination run each in their own way, beside one
another; a judge, which costs money, is asked last and only where the other parts leave the verdict open.
"""

import asyncio
import faulthandler
import importlib
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any, Self

from distill.errors import EngineError, RecipeError
from distill.records import Prompt, Trace, Verdict
from distill.runs import available_cores
from distill.verifiers import JUDGE, VerifierSpec, Verify, judge, resolve, verdict_of
from distill.verifiers.combination import combine, decided
from distill.verifiers.judging import unasked
from distill.verifiers.program import check_sandbox
from distill.verifiers.structured import load_schema

MOST_WORKERS = 8
"""Workers of a pool that was not told how many; verifying is seldom what a run waits for."""
AHEAD = 32
"""Verdicts in flight beyond the one that is waited for."""
SLOW_IMPORTS = {"math": "math_verify", "reasoning_gym": "reasoning_gym", "json_schema": "jsonschema"}
"""What a worker imports before its first verdict, so that importing does not count as verifying."""
ORPHAN_GRACE_S = 10.0
"""How long after its limit a worker ends itself, should nobody be left to end it."""


Judging = Callable[[VerifierSpec, Prompt, Trace], Awaitable[Verdict]]
"""Asks a judge about a trace; `spec.section` is its `JudgeVerifier`."""
Begun = Verdict | Future[Verdict] | list["Begun"] | None
"""A verdict, one that a worker is at, those of a combination's parts, or None for a judge that is not asked yet."""


class VerifierPool:
    """Judges traces with whatever verifier their prompts name; close it, or use it as a context manager.

        with VerifierPool() as pool:
            for verdict in pool.verify_many(pairs):
                ...

    `workers` limits the processes of each verifier (0: one a core this process may use, at most 8). `timeout_s`
    overrides the limits of the verifiers themselves. `by_source` gives the verifiers of prompt sources by name, as the
    recipe has them now; a prompt of another source is judged by the verifier that its own record names. `judging` asks
    judges; a pool without it refuses them, and only `verify` can ask.
    """

    def __init__(
        self,
        workers: int = 0,
        timeout_s: float | None = None,
        by_source: Mapping[str, VerifierSpec] | None = None,
        judging: Judging | None = None,
    ) -> None:
        cores = available_cores()
        self.workers = min(workers, cores) if workers > 0 else min(cores, MOST_WORKERS)
        self.timeout_s = timeout_s
        self.by_source = dict(by_source or {})
        self.judging = judging
        self._specs: dict[str, VerifierSpec] = {}
        self._light: dict[VerifierSpec, Verify] = {}
        self._pools: dict[VerifierSpec, Any] = {}
        self._delivered: set[VerifierSpec] = set()

    def verify_many(self, pairs: Iterable[tuple[Prompt, Trace]]) -> Iterator[Verdict]:
        """Verdicts in the order of the pairs, which are read only a little ahead.

        Raises EngineError if worker processes cannot be started at all, RecipeError for an unknown verifier and for a
        judge, which only `verify` can ask.
        """
        waiting: deque[tuple[VerifierSpec, Prompt, Trace, Begun]] = deque()
        try:
            for prompt, trace in pairs:
                spec = self._spec(prompt)
                if any(leaf.name == JUDGE for leaf in spec.leaves()):
                    raise RecipeError(_needs_judging(spec))
                waiting.append((spec, prompt, trace, self._begin(spec, prompt, trace)))
                if len(waiting) > AHEAD:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            for _, _, _, begun in waiting:
                for future in _futures(begun):
                    future.cancel()

    async def verify(self, prompt: Prompt, trace: Trace) -> Verdict:
        """One verdict, without holding up the event loop.

        Raises RecipeError for a judge in a pool that cannot ask any.
        """
        spec = self._spec(prompt)
        if self.judging is None and any(leaf.name == JUDGE for leaf in spec.leaves()):
            raise RecipeError(_needs_judging(spec))
        begun = self._begin(spec, prompt, trace)
        # only waited for: the results, whatever they are, are read in one place; cancelling this frees the workers
        futures = [asyncio.wrap_future(future) for future in _futures(begun)]
        await asyncio.gather(*futures, return_exceptions=True)
        return await self._settle(spec, prompt, trace, begun)

    def close(self) -> None:
        """End every worker, at work or not, and wait until they are gone."""
        while self._pools:
            _, pool = self._pools.popitem()
            pool.stop()
            pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, prompt: Prompt) -> VerifierSpec:
        if prompt.source in self.by_source:
            return self.by_source[prompt.source]
        if prompt.verifier not in self._specs:
            self._specs[prompt.verifier] = resolve(prompt.verifier)
        return self._specs[prompt.verifier]

    def _begin(self, spec: VerifierSpec, prompt: Prompt, trace: Trace) -> Begun:
        """The verdict where it is quickly had, else what will become of it."""
        if spec.parts:
            return [self._begin(part, prompt, trace) for part in spec.parts]
        if spec.name == JUDGE:
            return unasked(spec.label, spec.section, prompt, trace)
        if not spec.light:
            return self._submit(spec, prompt, trace)
        if spec not in self._light:
            self._light[spec] = spec.load()
        return judge(spec, self._light[spec], prompt, trace)

    async def _settle(self, spec: VerifierSpec, prompt: Prompt, trace: Trace, begun: Begun) -> Verdict:
        """The verdict of a pair whose workers are done; asks the judges that it takes."""
        if begun is None:
            assert self.judging is not None  # `verify` has seen to it
            return await self.judging(spec, prompt, trace)
        if not isinstance(begun, list):
            return self._finish(spec, prompt, trace, begun)
        # parts that cost nothing more first; the verdicts stay in the order of the recipe
        order = sorted(range(len(begun)), key=lambda at: _asks(begun[at]))
        said: list[Verdict | str] = [part.label for part in spec.parts]
        for at in order:
            outcomes = [verdict.outcome for verdict in said if isinstance(verdict, Verdict)]
            if not _asks(begun[at]) or decided(spec.name, outcomes, len(said)) is None:
                said[at] = await self._settle(spec.parts[at], prompt, trace, begun[at])
        return combine(spec.label, spec.name, prompt, trace, said)

    def _submit(self, spec: VerifierSpec, prompt: Prompt, trace: Trace) -> Future[Verdict]:
        limit_s = self.timeout_s or spec.timeout_s
        for _ in range(2):
            try:
                future: Future[Verdict] = self._pool(spec).schedule(
                    _judge_here, args=(spec, prompt, trace, limit_s), timeout=limit_s
                )
                return future
            except RuntimeError:  # the pool broke since it was last used
                self._drop(spec)
        raise EngineError(_cannot_start(spec))

    def _finish(self, spec: VerifierSpec, prompt: Prompt, trace: Trace, begun: Begun, again: bool = True) -> Verdict:
        """The verdict of a pair, whatever became of the workers that had it."""
        from pebble import ProcessExpired

        assert begun is not None  # judges are asked by `_settle`
        if isinstance(begun, Verdict):
            return begun
        if isinstance(begun, list):
            verdicts = [self._finish(part, prompt, trace, one) for part, one in zip(spec.parts, begun)]
            return combine(spec.label, spec.name, prompt, trace, verdicts)
        try:
            verdict = begun.result()
        except TimeoutError:
            limit_s = self.timeout_s or spec.timeout_s
            return verdict_of(prompt, trace, "timeout", f"no verdict in {limit_s:g} s", spec.label)
        except ProcessExpired as error:
            return verdict_of(prompt, trace, "error", f"the worker died (exit code {error.exitcode})", spec.label)
        except BrokenProcessPool as error:
            self._drop(spec)
            if again:
                return self._finish(spec, prompt, trace, self._submit(spec, prompt, trace), again=False)
            if spec not in self._delivered:
                raise EngineError(_cannot_start(spec)) from error
            return verdict_of(prompt, trace, "error", "the worker died", spec.label)
        except Exception as error:  # the verdict could not be sent: not ours to crash on
            return verdict_of(prompt, trace, "error", f"{type(error).__name__}: {error}"[:500], spec.label)
        self._delivered.add(spec)
        return verdict

    def _pool(self, spec: VerifierSpec) -> Any:
        from pebble import ProcessPool

        if spec not in self._pools:
            self._pools[spec] = ProcessPool(
                max_workers=self.workers,
                initializer=_start_worker,
                initargs=(spec,),
                context=_Context(),
            )
        return self._pools[spec]

    def _drop(self, spec: VerifierSpec) -> None:
        """Forget a broken pool; the next verdict starts another."""
        pool = self._pools.pop(spec, None)
        if pool is not None:
            pool.stop()
            pool.join()


def _futures(begun: Begun) -> Iterator[Future[Verdict]]:
    if isinstance(begun, Future):
        yield begun
    for part in begun if isinstance(begun, list) else ():
        yield from _futures(part)


def _asks(begun: Begun) -> bool:
    """Whether a judge would have to be asked."""
    return any(map(_asks, begun)) if isinstance(begun, list) else begun is None


def _needs_judging(spec: VerifierSpec) -> str:
    return (
        f"verifier {spec.label} asks a judge, and nothing here can ask one; judges need the stages of a recipe"
        " (`distill run`), or a VerifierPool with `judging` and its `verify`"
    )


def check_verifier(spec: VerifierSpec, prompt: Prompt) -> None:
    """Try a verifier before a run: whether there is a sandbox for `code`, whether a schema can be used, whether one of
    the user's own judges a trial answer to a prompt, in a process of its own.

    Raises RecipeError if it cannot be loaded, takes too long, ends its process or returns no Verdict. That it raises
    on this answer is accepted: that would be one `error` verdict, not a broken verifier.
    """
    for leaf in spec.leaves():
        if leaf.name == "code":
            check_sandbox(leaf.section)
        elif leaf.name == "json_schema":
            load_schema(leaf.section.file)
        elif leaf.custom:
            _check_custom(leaf, prompt)


def _check_custom(spec: VerifierSpec, prompt: Prompt) -> None:
    from pebble import ProcessExpired

    with VerifierPool(workers=1) as pool:
        try:
            problem = pool._pool(spec).schedule(_trial, args=(spec, prompt), timeout=spec.timeout_s).result()
        except TimeoutError:
            problem = f"no verdict on a trial answer in {spec.timeout_s:g} s; make it faster or raise timeout_s"
        except ProcessExpired as error:
            problem = f"it ended its process on a trial answer (exit code {error.exitcode})"
        except BrokenProcessPool:
            problem = "its worker process ended while it was being loaded"
    if problem:
        raise RecipeError(f"verifier {spec.where.removeprefix('file:')}: {problem}")


def _cannot_start(spec: VerifierSpec) -> str:
    return (
        f"worker processes of verifier {spec.name} end before they judge anything; see their message above, and whether"
        " there is memory left"
    )


# --- starting workers -----------------------------------------------------------------------------------------------

_hiding_main = threading.Lock()


class _WorkerProcess(SpawnProcess):
    """A fresh process that does not run the caller's script again.

    `multiprocessing` imports the main script into every new process, which would run a script without
    `if __name__ == "__main__":` a second time. A worker needs nothing of it, so it is out of sight while one starts.
    """

    def start(self) -> None:
        """Start the process."""
        with _hiding_main:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                super().start()
            finally:
                sys.modules["__main__"] = main


class _Context(SpawnContext):
    """What pebble makes its pipes, locks and processes with."""

    Process = _WorkerProcess


# --- in the worker --------------------------------------------------------------------------------------------------

_loaded: dict[VerifierSpec, Verify | RecipeError] = {}
_nowhere: IO[str] | None = None


def _start_worker(spec: VerifierSpec) -> None:
    """Load the verifier before any time is counted, and keep its prints out of the results on stdout."""
    global _nowhere
    os.dup2(sys.stderr.fileno() if _has_descriptor(sys.stderr) else 2, 1)
    _nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # kept open for the watchdog
    try:
        _loaded[spec] = spec.load()
        if spec.name in SLOW_IMPORTS:
            importlib.import_module(SLOW_IMPORTS[spec.name])
    except RecipeError as error:
        _loaded[spec] = error


def _has_descriptor(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (AttributeError, OSError, ValueError):
        return False


def _judge_here(spec: VerifierSpec, prompt: Prompt, trace: Trace, limit_s: float) -> Verdict:
    verify = _loaded[spec]
    if isinstance(verify, RecipeError):
        return verdict_of(prompt, trace, "error", str(verify)[:500], spec.label)
    # the parent keeps the limit; should it be killed, this ends the worker even inside a loop in C
    assert _nowhere is not None  # opened when the worker started
    faulthandler.dump_traceback_later(limit_s + ORPHAN_GRACE_S, exit=True, file=_nowhere)
    try:
        return judge(spec, verify, prompt, trace)
    except BaseException as error:  # sent back, a SystemExit would end the parent
        return verdict_of(prompt, trace, "error", f"{type(error).__name__}: {error}"[:500], spec.label)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _trial(spec: VerifierSpec, prompt: Prompt) -> str | None:
    """What is wrong with a verifier, as far as one call shows."""
    from distill.records import Teacher

    verify = _loaded[spec]
    if isinstance(verify, RecipeError):
        return str(verify).partition(": ")[2] or str(verify)
    trace = Trace(
        trace_id="trial", prompt_id=prompt.prompt_id, cfg="trial", sample=0, teacher=Teacher(engine="trial"),
        reasoning="", think="empty", answer=prompt.gold or "0", raw=prompt.gold or "0",
    )  # fmt: skip
    try:
        returned: Any = verify(prompt, trace)
    except BaseException:  # as above
        return None
    if not isinstance(returned, Verdict):
        return f"verify(prompt, trace) returned {type(returned).__name__}; it must return a distill.records.Verdict"
    return None
