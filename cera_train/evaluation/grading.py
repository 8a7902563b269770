"""Answers -> grades -> scores. Two graders, both reported: `exact` is the task's published rule;
`verified` is mathematical equality by math-verify, or exact. An answer that a grader cannot read is
wrong and counted.

A model's answer is hostile input: 9^{9^{9^9}} would take all time and memory. So math-verify runs
in processes with a memory limit and a time limit for each answer. An answer that exceeds one is
wrong; the others go on.
"""

import itertools
import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from pathlib import Path

import pebble

from cera_train.evaluation.statistics import accuracy_interval, pass_at_k
from cera_train.evaluation.tasks import math
from cera_train.evaluation.tasks.task import AnswerTask, mean
from cera_train.runs.evaluation_folder import (
    LOOP,
    RIGHT,
    TRUNCATED,
    WRONG,
    AccuracyResult,
    Generation,
    Grade,
    Key,
    Problem,
    ending_shares,
)

SECONDS = 5.0  # an answer's time limit
MEMORY_LIMIT = (
    2**30
)  # bytes beyond a process's imports, ten times what math-verify needs for honest answers
LOOP_TIMES = 3
LOOP_CHARACTERS = 50
LONGEST_SEGMENT = 1_000
PERCENT = re.compile(r"%[\s$.]*$")
BASE = re.compile(r"-?[\dA-Z]+_\{?(\d+)\}?$")  # 11_8, which math-verify takes for 11


def grade_all(
    task: AnswerTask,
    problems: Sequence[Problem],
    answers: Sequence[Generation],
    exact: Mapping[Key, Grade] | None = None,
) -> list[Grade]:
    """The grade of each answer by every grader that the task has, and how the answer ended.

    Args:
        exact: the answers that `task.grade` has graded already.
    """
    exact = exact or {}
    by_id = {problem.id: problem for problem in problems}
    grades = []
    for answer in answers:
        grade = exact.get(answer.key)
        grades.append(grade or task.grade(by_id[answer.problem], answer))
    if task.is_verified:
        grades = verify(by_id, answers, grades)
    return [
        grade.replace(ending=ending_of(by_id[answer.problem], answer, grade))
        for answer, grade in zip(answers, grades, strict=True)
    ]


def verify(
    problems: Mapping[str, Problem], answers: Sequence[Generation], grades: Sequence[Grade]
) -> list[Grade]:
    """The grades with the verdict of math-verify. An exact answer is equal without its help."""
    comparisons = [
        Comparison(problems[answer.problem].gold, grade.answer, answer.text)
        for answer, grade in zip(answers, grades, strict=True)
        if not grade.exact
    ]
    verdicts = iter(judge(comparisons))
    verified = []
    for grade in grades:
        verdict = Verdict(True) if grade.exact else next(verdicts)
        failure = grade.failure or verdict.failure
        verified.append(grade.replace(verified=verdict.correct, failure=failure))
    return verified


def ending_of(problem: Problem, answer: Generation, grade: Grade) -> str:
    """The first that applies of right, the task's (collapsed: a state stands still where the truth
    moves), loop (the text repeats itself, and the gold answer does not), truncated (by
    max_new_tokens) and wrong."""
    if grade.is_right:
        return RIGHT
    if grade.ending is not None:
        return grade.ending
    if is_loop(answer.text) and not is_loop(problem.gold):
        return LOOP
    return TRUNCATED if answer.truncated else WRONG


def is_loop(text: str) -> bool:
    """Whether a text ends in a segment that comes at least 3 times in a row, the last or first time
    perhaps in part, over at least 50 characters: repetition at the end, as Holtzman et al. 2020
    (arXiv 1904.09751) count it in tokens.
    """
    for length in range(1, min(len(text) // LOOP_TIMES, LONGEST_SEGMENT) + 1):
        start = len(text) - max(LOOP_TIMES * length, LOOP_CHARACTERS)
        # The tail repeats with this period where it equals itself moved by one segment.
        if start >= 0 and text.startswith(text[start + length :], start):
            return True
    return False


def score(
    task: AnswerTask,
    problems: Sequence[Problem],
    answers: Sequence[Generation],
    grades: Sequence[Grade],
) -> AccuracyResult:
    """The scores of an evaluation: pass@k for every k up to the number of samples, with its 95 %
    interval, and what the task adds."""
    figures = task.scores(problems, grades)
    for grader in task.graders:
        by_problem: dict[str, list[bool]] = {}
        for grade in grades:
            by_problem.setdefault(grade.problem, []).append(getattr(grade, grader))
        for k in range(1, min(map(len, by_problem.values())) + 1):
            values = [pass_at_k(len(correct), sum(correct), k) for correct in by_problem.values()]
            key = f"{grader}/pass@{k}"
            figures |= {key: mean(values), f"{key}/interval": [*accuracy_interval(values)]}
    return AccuracyResult(
        truncated=sum(answer.truncated for answer in answers),
        no_answer=sum(grade.answer is None for grade in grades),
        grader_failures=sum(grade.failure is not None for grade in grades),
        tokens=sum(answer.tokens for answer in answers),
        **ending_shares([grade.ending for grade in grades]) | figures,
    )


# --- math-verify ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """An answer to compare with the gold answer."""

    gold: str  # bare LaTeX, such as \frac{1}{2}
    answer: str | None  # extracted from the text; None: math-verify looks for one in the whole text
    text: str


@dataclass(frozen=True)
class Verdict:
    correct: bool
    failure: str | None = None  # `timeout`, or `crash:` and the error on one line


def judge(comparisons: Sequence[Comparison], seconds: float = SECONDS) -> list[Verdict]:
    """Verifies answers in processes that can be stopped, each within `seconds` of when a process
    begins it."""
    workers = min(len(os.sched_getaffinity(0)), len(comparisons)) or 1
    # Spawned: a fork of a process with torch's threads can hang.
    pool = pebble.ProcessPool(
        workers, context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        # pool.map would count the wait for a free process, and its start, as the answer's time.
        verdicts = [
            pool.schedule(_verdict, [comparison], timeout=seconds) for comparison in comparisons
        ]
        return [_outcome(verdict) for verdict in verdicts]
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
    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that its time limits are off
    # The first call imports and compiles for seconds, which must not count against an answer's time
    # limit.
    _is_equal(Comparison(gold=r"\frac{1}{2}", answer="x^2", text=""))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _verdict(comparison: Comparison) -> Verdict:
    # Some errors cannot be unpickled, which would end the pool: only their text leaves the process.
    try:
        return Verdict(_is_equal(comparison))
    except Exception as error:
        message = " ".join(str(error).split())
        return Verdict(
            False, ": ".join(filter(None, ("crash", type(error).__name__, message)))[:200]
        )


def _is_equal(comparison: Comparison) -> bool:
    gold = comparison.gold
    answer = comparison.answer
    if answer is None:
        return _is_any_equal(_parse_box(gold), _parse(comparison.text))
    if math.is_exact(answer, gold):  # also where math-verify cannot read the gold answer
        return True
    bases = [BASE.match(math.normalize(text)) for text in (gold, answer)]
    if all(bases) and bases[0][1] != bases[1][1]:
        return False
    golds = _parse_box(gold)
    answers = _parse_box(answer)
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
