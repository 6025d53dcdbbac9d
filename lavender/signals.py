"""Ending a long run when a scheduler asks for it (Kubernetes by SIGTERM, Slurm by SIGUSR1 too), at a point of the run's choice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
EXIT_CODE = 128 + signal.SIGTERM
"""Of a run that was asked to end, and did, whichever signal said so: schedulers know it."""
SAME_S = 1.0
"""Seconds in which a signal that comes again is the same one: launchers hand on what the scheduler sent to all processes."""

OUTLAST_S = 60
"""Seconds that a worker goes on after a scheduler's SIGTERM."""


class Stopped(SystemExit):
    """Ends a process that was asked to end, with `EXIT_CODE`; `str` says what became of its work, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stop:
    """Whether a run was asked to end.

    Attributes:
        requested: the number of the signal that did; None if none came.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._since = 0.0

    def named(self) -> str:
        """The signal's name; empty if none came."""
        return "" if self.requested is None else signal.Signals(self.requested).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Notes `SIGNALS` while the block runs, which looks at `requested` where its work is whole, and raises `Stopped`.

    A second signal ends the process at once. The handlers that were there before come back at the end. Python hands signals to a
    process's main thread alone: in another one nothing changes, and nothing is ever requested.
    """
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        # A handler that was set from outside of Python could not be put back.
        before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, stop._note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlast() -> None:
    """Makes a worker process go on for `OUTLAST_S` seconds when a scheduler sends its signals to all processes, the worker too: the
    main process, which ends the worker, finishes what it has in hand by its help."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLAST_S))
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
