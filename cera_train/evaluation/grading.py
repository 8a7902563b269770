"""Grades of answers. Two graders, both reported: `exact` is the task's published rule; `verified`
is mathematical equality by math-verify, or exact. An answer that a grader cannot read is wrong, and
counted.

A model's answer is hostile input: 9^{9^{9^9}} would take all time and memory. So math-verify runs
in processes with a memory limit and a time limit for each answer. An answer that exceeds one is
wrong; the others go on.
"""

import itertools
import logging
import multiprocessing
import re
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass

import pebble
import psutil

from cera_train.distributed.processes import processors
from cera_train.evaluation.tasks import math as math_task
from cera_train.evaluation.tasks.task import AnswerTask
from cera_train.runs.evaluation_folder import (
    RIGHT,
    TRUNCATED,
    WRONG,
    Generation,
    Grade,
    Problem,
)

SECONDS = 5.0  # an answer's time limit
MEMORY_LIMIT = 2**30
"""Bytes beyond a process's imports, ten times what math-verify needs for honest answers."""
PERCENT = re.compile(r"%[\s$.]*$")
BASE = re.compile(r"-?[\dA-Z]+_\{?(\d+)\}?$")  # 11_8, which math-verify takes for 11


def grade_all(
    task: AnswerTask,
    problems: Sequence[Problem],
    answers: Sequence[Generation],
) -> list[Grade]:
    """The grade of each answer by every grader that the task has, and how the answer ended."""
    by_id = {problem.id: problem for problem in problems}
    grades = [task.grade(by_id[answer.problem], answer) for answer in answers]
    if task.is_verified:
        grades = verify_grades(by_id, answers, grades)
    return [
        grade.replace(ending=ending_of(answer, grade))
        for answer, grade in zip(answers, grades, strict=True)
    ]


def verify_grades(
    problems: Mapping[str, Problem], answers: Sequence[Generation], grades: Sequence[Grade]
) -> list[Grade]:
    """The grades with the verdict of math-verify. An exact answer is equal without its help."""
    pairs = [
        AnswerPair(problems[answer.problem].gold, grade.answer, answer.text)
        for answer, grade in zip(answers, grades, strict=True)
        if not grade.exact
    ]
    verdicts = iter(verify_answers(pairs))
    verified = []
    for grade in grades:
        verdict = Verdict(True) if grade.exact else next(verdicts)
        failure = grade.failure or verdict.failure
        verified.append(grade.replace(verified=verdict.correct, failure=failure))
    return verified


def ending_of(answer: Generation, grade: Grade) -> str:
    """The first that applies: right; the task's (collapsed: a state stands still where the truth
    moves); truncated (by max_new_tokens); wrong."""
    if grade.is_right:
        return RIGHT
    if grade.ending is not None:
        return grade.ending
    return TRUNCATED if answer.truncated else WRONG


# --- math-verify ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerPair:
    """An answer to compare with the gold answer."""

    gold: str  # bare LaTeX, such as \frac{1}{2}
    answer: str | None  # extracted from the text; None: math-verify looks for one in the whole text
    text: str


@dataclass(frozen=True)
class Verdict:
    correct: bool
    failure: str | None = None  # `timeout`, or `crash:` and the error on one line


def verify_answers(pairs: Sequence[AnswerPair], seconds: float = SECONDS) -> list[Verdict]:
    """Verifies answers in processes that can be stopped, each within `seconds` of when a process
    begins it."""
    workers = min(processors(), len(pairs)) or 1
    # Spawned: a fork of a process with torch's threads can hang.
    pool = pebble.ProcessPool(
        workers, context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        # pool.map would count the wait for a free process, and its start, as the answer's time.
        verdicts = [pool.schedule(_verdict, [pair], timeout=seconds) for pair in pairs]
        return list(map(_outcome, verdicts))
    finally:
        pool.stop()
        pool.join()


def _outcome(verdict: pebble.ProcessFuture) -> Verdict:
    try:
        return verdict.result()
    except TimeoutError:
        return Verdict(False, "timeout")
    except pebble.ProcessExpired as error:
        return Verdict(False, f"crash: ProcessExpired: exit code {error.exitcode}")


def _start_worker() -> None:
    # pebble handles SIGTERM in Python, which cannot run during a long multiplication.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # It warns that its time limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # The first call imports and compiles for seconds, which must not count against an answer's time
    # limit.
    _is_equal(AnswerPair(gold=r"\frac{1}{2}", answer="x^2", text=""))
    process = psutil.Process()
    if hasattr(process, "rlimit"):  # Linux
        limit = process.memory_info().vms + MEMORY_LIMIT
        process.rlimit(psutil.RLIMIT_AS, (limit, limit))


def _verdict(pair: AnswerPair) -> Verdict:
    # Some errors cannot be unpickled, which would end the pool: only their text leaves the process.
    try:
        return Verdict(_is_equal(pair))
    except Exception as error:
        failure = f"crash: {type(error).__name__}"
        if message := " ".join(str(error).split()):
            failure += f": {message}"
        return Verdict(False, failure[:200])


def _is_equal(pair: AnswerPair) -> bool:
    gold = pair.gold
    answer = pair.answer
    if answer is None:
        return _is_any_equal(_box_readings(gold), _readings(pair.text))
    if math_task.same_latex(answer, gold):  # also where math-verify cannot read the gold answer
        return True
    bases = [BASE.match(math_task.plain_latex(text)) for text in (gold, answer)]
    if all(bases) and bases[0][1] != bases[1][1]:
        return False
    golds = _box_readings(gold)
    answers = _box_readings(answer)
    # Two percentages are compared as numbers; one alone, 20\%, may stand for 20 or for 1/5.
    if PERCENT.search(gold) and not PERCENT.search(answer):
        golds += _box_readings(rf"\frac{{{math_task.plain_latex(gold)}}}{{100}}")
    if PERCENT.search(answer) and not PERCENT.search(gold):
        answers += _box_readings(rf"\frac{{{math_task.plain_latex(answer)}}}{{100}}")
    return _is_any_equal(golds, answers)


def _box_readings(answer: str) -> list:
    return _readings(rf"\boxed{{{math_task.plain_latex(answer)}}}")


def _readings(text: str) -> list:
    """Readings of a text: a sympy expression, and a string."""
    from math_verify import parse

    # math-verify's time limits use signals, which do not interrupt a long multiplication.
    return parse(text, parsing_timeout=None, raise_on_error=True)


def _is_any_equal(golds: list, answers: list) -> bool:
    """Whether any reading of the gold answer equals one of the answer; raises an error where none
    does and a comparison failed."""
    from math_verify import verify

    failure = None
    for gold, answer in itertools.product(golds, answers):
        try:
            if verify(gold, answer, timeout_seconds=None, raise_on_error=True):
                return True
        except Exception as error:
            failure = failure or error
    if failure:
        raise failure
    return False
