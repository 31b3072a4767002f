"""Signals: the first SIGINT or SIGTERM stops cleanly, the second at once.

Outside a `graceful` section a signal raises `Interrupted` where the program stands; inside one it only sets a flag,
so that a loop can finish its step and save before it stops. Nothing here saves anything: what a stage has on the disk
is already enough to go on from, whatever the signal.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distill.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether someone asked to stop; look at `requested` between two steps."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signum is not None

    def raise_if_requested(self) -> None:
        """Raise Interrupted if a signal came; call it once everything is saved."""
        if self.signum is not None:
            raise Interrupted(self.signum)


_sections: list[Stop] = []
"""The open graceful sections, innermost last."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted` (exit codes 130 and 143) while the block runs.

    Signals reach the main thread only; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _handler(os.getpid())) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextmanager
def graceful() -> Iterator[Stop]:
    """A section that stops between steps: the first signal sets the flag, the second raises `Interrupted` at once.

        with graceful() as stop:
            for batch in batches:
                step(batch)
                if stop.requested:
                    save()
                    stop.raise_if_requested()

    A request that nobody acted on raises `Interrupted` at the end of the section.
    """
    with interruptible():
        stop = Stop()
        _sections.append(stop)
        try:
            yield stop
        finally:
            _sections.remove(stop)
        stop.raise_if_requested()


def _handler(owner: int) -> "signal._HANDLER":
    """The handler of both signals for the process `owner`."""

    def handle(signum: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            _die_of(signum)
        if _sections and not _sections[-1].requested:
            _sections[-1].signum = signum
            return
        raise Interrupted(signum)

    return handle


def _die_of(signum: int) -> None:
    """End a forked worker the default way: it inherited the handler, not the run."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
