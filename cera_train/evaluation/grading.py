"""Mathematical equality of answers by math-verify, in processes that can be stopped.

What a model writes is hostile input: 9^{9^{9^9}} would take all time and all memory. So each answer has a time limit,
and the processes that look at it a memory limit. An answer that exceeds one is wrong; the others go on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pebble

from cera_train.tasks import math

MEMORY_LIMIT = 2**30
"""Bytes; what math-verify needs for honest answers is about a tenth."""

PERCENT = re.compile(r"%[\s$.]*$")


@dataclass(frozen=True)
class Candidate:
    """What is compared."""

    gold: str
    r"""A bare LaTeX answer, such as \frac{1}{2}."""
    answer: str | None
    """Likewise, as found in the text. None: math-verify looks for an answer in the whole text."""
    text: str


@dataclass(frozen=True)
class Verdict:
    correct: bool
    failure: str | None = None
    """`timeout`, or `crash:` and the error in one line."""


class Verifier:
    """A pool of processes that verify answers. They start with the first answer and end with the context.

    Args:
        time_limit: seconds for one answer, from when a process takes it up.
        workers: number of processes; by default one for each core.
        memory_limit: bytes that a process may take.
    """

    def __init__(self, time_limit: float = 5.0, workers: int | None = None, memory_limit: int = MEMORY_LIMIT) -> None:
        self.time_limit = time_limit
        self.workers = workers or len(os.sched_getaffinity(0))
        self.memory_limit = memory_limit

    def __enter__(self) -> Verifier:
        self._pool = pebble.ProcessPool(
            self.workers,
            # Spawned, not forked: a fork of a process with torch's threads can hang.
            context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.memory_limit,),
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()

    def verify(self, candidates: Sequence[Candidate]) -> Iterator[Verdict]:
        """A verdict for each candidate, in their order, as they come.

        Raises:
            BrokenProcessPool: the processes cannot start.
        """
        # Not pool.map, whose results count the wait for a free process, and its start, as time of the answer.
        verdicts = [self._pool.schedule(_verdict, [candidate], timeout=self.time_limit) for candidate in candidates]
        for verdict in verdicts:
            try:
                yield verdict.result()
            except TimeoutError:
                yield Verdict(False, "timeout")
            except pebble.ProcessExpired as error:
                yield Verdict(False, f"crash: ProcessExpired: exit code {error.exitcode}")


# --- in the processes ------------------------------------------------------------------------------------------------


def _start_worker(memory_limit: int) -> None:
    # pebble hears SIGTERM in Python, which a long multiplication keeps from running.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    # Imports, grammars and regular expressions take up to seconds the first time: no answer's time limit pays for that.
    _is_equal(Candidate(gold=r"\frac{1}{2}", answer="x^2", text=""))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_limit
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _verdict(candidate: Candidate) -> Verdict:
    # Errors do not travel: some cannot be unpickled, which would end the pool.
    try:
        return Verdict(_is_equal(candidate))
    except Exception as error:
        message = " ".join(str(error).split())
        return Verdict(False, ": ".join(filter(None, ("crash", type(error).__name__, message)))[:200])


def _is_equal(candidate: Candidate) -> bool:
    gold, answer = candidate.gold, candidate.answer
    if answer is None:
        return _is_any_equal(_parse_box(gold), _parse(candidate.text))
    if math.is_exact(answer, gold):  # also where math-verify cannot read the gold answer
        return True
    golds, answers = _parse_box(gold), _parse_box(answer)
    # Of two percentages the numbers count; one alone, 20\%, may stand for 20 or for 1/5.
    if PERCENT.search(gold) and not PERCENT.search(answer):
        golds += _parse_box(rf"\frac{{{math.normalize(gold)}}}{{100}}")
    if PERCENT.search(answer) and not PERCENT.search(gold):
        answers += _parse_box(rf"\frac{{{math.normalize(answer)}}}{{100}}")
    return _is_any_equal(golds, answers)


def _parse_box(answer: str) -> list:
    return _parse(rf"\boxed{{{math.normalize(answer)}}}")


def _parse(text: str) -> list:
    """The ways of reading a text: an expression of sympy's, and a string."""
    from math_verify import parse

    # Its own limits work by signals, which do not interrupt a long multiplication.
    return parse(text, parsing_timeout=None, raise_on_error=True)


def _is_any_equal(golds: list, answers: list) -> bool:
    """Whether a reading of the gold answer equals one of the answer.

    Raises:
        Exception: none does, and a comparison failed.
    """
    from math_verify import verify

    failure = None
    for gold in golds:
        for answer in answers:
            try:
                if verify(gold, answer, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as error:
                failure = failure or error
    if failure:
        raise failure
    return False
