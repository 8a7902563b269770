"""Signals that ask a run to stop, heard between updates: Ctrl-C, SIGTERM, and SIGUSR1 and SIGUSR2, by which a scheduler
tells of a time limit or a preemption."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from cera_train.common.errors import UserError

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""Those of a scheduler first: one that comes beside another decides, since it asks to be started again."""


class Interrupted(SystemExit):
    """The run was saved and stops, with a shell's status for the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number

    def hand_over(self) -> None:
        """Tells whoever listened to the signal before the run did, such as submitit, which requeues the job.

        Raises:
            SystemExit: with status 0, where a scheduler's signal was taken: it asks process 0, and ends all when one
                ends in failure.
            ValueError: the listener refuses.
        """
        handler = signal.getsignal(self.signal)
        if not callable(handler) or handler is signal.default_int_handler:
            return
        try:
            handler(self.signal, None)
        except Exception as error:
            raise UserError(f"it was saved, but is not started again: {error} The same command goes on.") from error
        if self.signal in (signal.SIGUSR1, signal.SIGUSR2):
            raise SystemExit(0)


REPEAT_SECONDS = 1.0
"""A signal that comes again sooner is the same: who sent it may have sent it to every process, and so do we."""


class Interruption:
    """While it is open, signals are only remembered; a second SIGINT or SIGTERM acts at once. One that nobody acted on
    is delivered when it closes.

    Args:
        tell: called with each signal that is remembered, such as to pass it on to other processes.
    """

    def __init__(self, tell: Callable[[int], None] = lambda number: None) -> None:
        self.signal: int | None = None
        self._tell = tell

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        is_repeated = self.signal is not None and time.monotonic() - self._heard > REPEAT_SECONDS
        self._heard = time.monotonic()
        if self.signal is None or SIGNALS.index(number) < SIGNALS.index(self.signal):
            self.signal = number
        if is_repeated and number in (signal.SIGINT, signal.SIGTERM):
            self._restore()
            os.kill(os.getpid(), number)
        else:
            self._tell(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()
        if kind is None and self.signal is not None:
            os.kill(os.getpid(), self.signal)

    def heard(self) -> list[float]:
        """For each of SIGNALS 1 where it is the one that was heard, else 0: a row that processes can add up."""
        return [float(number == self.signal) for number in SIGNALS]


def first_heard(rows: Sequence[float]) -> int | None:
    """The signal that some process heard, by the sum or the mean of their rows."""
    return next((number for number, heard in zip(SIGNALS, rows, strict=True) if heard), None)
