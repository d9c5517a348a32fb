"""Ctrl-C and SIGTERM end a run between two steps, so that what was done can be kept."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger("devinterp")

SECONDS_TO_STOP = 30.0
"""What workers have, to end their step and commit"""


@dataclass
class Stop:
    """Asked for by a signal; looked at between steps."""

    signal: int | None = None

    def raise_if_asked(self, kept: str) -> None:
        """As the signal would have ended the process, after a word on what is kept."""
        if self.signal is None:
            return
        logger.warning("stopped by %s. %s", signal.Signals(self.signal).name, kept)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(kept)
        raise SystemExit(128 + self.signal)


_OF_MAIN_THREAD: ContextVar[Stop | None] = ContextVar("stop of the main thread", default=None)


@contextmanager
def heard_by_threads(stop: Stop) -> Iterator[None]:
    """Runs in threads that are started in a copy of this context (`contextvars.copy_context().run`) stop with the main one."""
    token = _OF_MAIN_THREAD.set(stop)
    try:
        yield
    finally:
        _OF_MAIN_THREAD.reset(token)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Catches SIGINT and SIGTERM for the length of the block; a second SIGINT is not waited for.

    One that the process ignores stays ignored: so a shell script spares its jobs in the background when it is stopped itself.
    Outside of the main thread nothing is caught, since signals do not arrive there: see `heard_by_threads`.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield _OF_MAIN_THREAD.get() or stop
        return

    def asked(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, asked) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def no_signals() -> Iterator[None]:
    """In a worker: its parent tells it when to stop, and a signal to the whole group is not for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
