"""Signals that stop a run between two updates: Ctrl-C, SIGTERM, and SIGUSR1 and SIGUSR2, which
schedulers send before a time limit or a preemption. Before and after, they end the command at
once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import NoReturn

from cera_train.common.errors import errors_as

OF_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)
# In order of precedence: a scheduler's signal wins, since it restarts the job.
SIGNALS = (*OF_SCHEDULERS, signal.SIGTERM, signal.SIGINT)
# A repeat within this time counts as the same signal: a sender may signal every process, and we
# pass signals on too.
REPEAT_SECONDS = 1.0


class Interrupted(SystemExit):
    """A signal stops the command, between two updates or at once; the exit status is 128 plus the
    signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number

    def hand_over(self) -> None:
        """Calls the handler that the run replaced, such as submitit's, which requeues the job.

        Raises:
            SystemExit: with status 0 after a scheduler's signal: the scheduler watches process 0,
                and would end all processes if one failed.
            UserError: the handler failed.
        """
        handler = signal.getsignal(self.signal)
        if not callable(handler) or handler in (signal.default_int_handler, stop_at_once):
            return
        problem = "saved, but the scheduler could not requeue it"
        with errors_as(problem, "The same command resumes it."):
            handler(self.signal, None)
        if self.signal in OF_SCHEDULERS:
            raise SystemExit(0)


STOPPED: list[int] = []
"""Signals by which `stop_at_once` ended this command."""


def stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """The handler that ends a command at once. Code in C, as in an import, may turn the exception
    into another, so the signal is also recorded."""
    STOPPED.append(number)
    raise Interrupted(number)


def signal_children(number: int) -> None:
    """Passes a signal on. Ctrl-C becomes SIGTERM: Python would print a traceback in every
    process."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else number)


class Interruption:
    """Records signals while the context is open, and passes each on; a second SIGINT or SIGTERM
    acts at once. A signal that nobody handled is delivered when the context closes."""

    def __init__(self, pass_on: Callable[[int], None] = lambda number: None) -> None:
        self.signal: int | None = None
        self._pass_on = pass_on

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        is_repeated = self.signal is not None and time.monotonic() - self._heard > REPEAT_SECONDS
        self._heard = time.monotonic()
        self.signal = min(number, self.signal or number, key=SIGNALS.index)
        if is_repeated and number in (signal.SIGINT, signal.SIGTERM):
            self._restore()
            os.kill(os.getpid(), number)
        else:
            self._pass_on(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self.signal is not None:
            os.kill(os.getpid(), self.signal)

    def heard(self) -> list[float]:
        """One-hot over SIGNALS, so that processes can add their rows."""
        return [float(number == self.signal) for number in SIGNALS]


def first_heard(rows: Sequence[float]) -> int | None:
    """The signal that some process received, from the sum or the mean of all rows."""
    return next((number for number, heard in zip(SIGNALS, rows, strict=True) if heard), None)
