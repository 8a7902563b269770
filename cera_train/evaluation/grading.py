"""Mathematical equality of answers by math-verify, in processes that can be stopped.

A model's answer is hostile input: 9^{9^{9^9}} would take all time and memory. So each answer has a time limit, and the
processes that read it have a memory limit. An answer that exceeds one is wrong; the others go on.
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
"""Bytes, ten times what math-verify needs for honest answers."""

PERCENT = re.compile(r"%[\s$.]*$")


@dataclass(frozen=True)
class Candidate:
    """An answer to compare with the gold answer."""

    gold: str
    r"""A bare LaTeX answer, such as \frac{1}{2}."""
    answer: str | None
    """The answer extracted from the text. None: math-verify looks for one in the whole text."""
    text: str


@dataclass(frozen=True)
class Verdict:
    correct: bool
    failure: str | None = None
    """`timeout`, or `crash:` and the error on one line."""


class Verifier:
    """A pool of processes that verify answers. They start at the first answer and end with the context.

    Args:
        time_limit: seconds for one answer, counted from when a process begins it.
        workers: number of processes; by default one for each core.
        memory_limit: bytes that a process may allocate beyond those of its imports.
    """

    def __init__(self, time_limit: float = 5.0, workers: int | None = None, memory_limit: int = MEMORY_LIMIT) -> None:
        self.time_limit = time_limit
        self.workers = workers or len(os.sched_getaffinity(0))
        self.memory_limit = memory_limit

    def __enter__(self) -> Verifier:
        self._pool = pebble.ProcessPool(
            self.workers,
            # Spawned: a fork of a process with torch's threads can hang.
            context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.memory_limit,),
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()

    def verify(self, candidates: Sequence[Candidate]) -> Iterator[Verdict]:
        """Yields a verdict for each candidate, in order, as soon as it is there.

        Raises:
            BrokenProcessPool: the processes cannot start.
        """
        # pool.map would count the wait for a free process, and its start, as the answer's time.
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
    # pebble handles SIGTERM in Python, which cannot run during a long multiplication.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    # The first call imports and compiles for seconds, which must not count against an answer's time limit.
    _is_equal(Candidate(gold=r"\frac{1}{2}", answer="x^2", text=""))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_limit
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _verdict(candidate: Candidate) -> Verdict:
    # Some errors cannot be unpickled, which would end the pool: only their text leaves the process.
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
    # Two percentages are compared as numbers; one alone, 20\%, may stand for 20 or for 1/5.
    if PERCENT.search(gold) and not PERCENT.search(answer):
        golds += _parse_box(rf"\frac{{{math.normalize(gold)}}}{{100}}")
    if PERCENT.search(answer) and not PERCENT.search(gold):
        answers += _parse_box(rf"\frac{{{math.normalize(answer)}}}{{100}}")
    return _is_any_equal(golds, answers)


def _parse_box(answer: str) -> list:
    return _parse(rf"\boxed{{{math.normalize(answer)}}}")


def _parse(text: str) -> list:
    """Readings of a text: a sympy expression, and a string."""
    from math_verify import parse

    # math-verify's time limits use signals, which do not interrupt a long multiplication.
    return parse(text, parsing_timeout=None, raise_on_error=True)


def _is_any_equal(golds: list, answers: list) -> bool:
    """Whether any reading of the gold answer equals one of the answer.

    Raises:
        Exception: none is equal, and a comparison failed.
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
