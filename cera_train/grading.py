"""Mathematical equality of answers by math-verify, in processes that can be stopped.

What a model writes is hostile input: 9^{9^{9^9}} would take all time and all memory. So each answer has a time limit,
and the processes that look at it a memory limit. An answer that exceeds one is wrong; the others go on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from types import TracebackType

import pebble

MEMORY_LIMIT = 4 * 2**30
"""Bytes of address space of a process."""


@dataclass(frozen=True)
class Candidate:
    """What is compared."""

    gold: str
    """A bare LaTeX answer."""
    answer: str | None
    """What was found in the text; None: math-verify looks for an answer in the whole text."""
    text: str


@dataclass(frozen=True)
class Verdict:
    correct: bool
    failure: str | None = None
    """timeout, or crash: and what it was."""


class Verifier:
    """A pool of processes that verify answers.

    Args:
        time_limit: seconds for one answer.
        workers: processes; by default one for each core.
    """

    def __init__(self, time_limit: float, workers: int | None = None) -> None:
        self.time_limit = time_limit
        self.workers = workers or len(os.sched_getaffinity(0))

    def __enter__(self) -> Verifier:
        # Spawned, not forked: a fork of a process with torch's threads can hang. They start with the first answer.
        context = multiprocessing.get_context("spawn")
        self._pool = pebble.ProcessPool(self.workers, context=context, initializer=_start_worker)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()

    def verify(self, candidates: Sequence[Candidate]) -> Iterator[Verdict]:
        """A verdict for each candidate, in their order, as they come."""
        if not candidates:
            return
        correct = self._pool.map(_is_equal, candidates, timeout=self.time_limit).result()
        for _ in candidates:
            try:
                yield Verdict(next(correct))
            except TimeoutError:
                yield Verdict(False, "timeout")
            except Exception as error:
                yield Verdict(False, f"crash: {type(error).__name__}: {' '.join(str(error).split())}"[:200])


def _start_worker() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    import math_verify  # noqa: F401  # a second or two that no answer's time limit should pay for

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off


def _is_equal(candidate: Candidate) -> bool:
    from math_verify import parse, verify

    # Its own limits work by signals, which do not interrupt a long multiplication.
    gold = parse(f"\\boxed{{{candidate.gold}}}", parsing_timeout=None)
    text = candidate.text if candidate.answer is None else f"\\boxed{{{candidate.answer}}}"
    return verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)
