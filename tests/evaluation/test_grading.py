"""Grades, scores and statistics by hand, enumeration and scipy; and verification of what a model
may write, such as answers that would take all time and memory."""

import multiprocessing

import pytest
from hostile_answers import Deadly, Hungry

from cera_train.evaluation import grading
from cera_train.evaluation.evaluate import score
from cera_train.evaluation.grading import (
    AnswerPair,
    Verdict,
    ending_of,
    grade_all,
    verify_answers,
)
from cera_train.evaluation.tasks import gsm8k, logistic_map
from cera_train.evaluation.tasks import math as math_task
from cera_train.runs.evaluation_folder import (
    ENDINGS,
    Generation,
    Problem,
)

pytest_plugins = ("evaluated_runs",)


RIGHT = AnswerPair("12", r"\frac{24}{2}", "")


def answer(problem: str, text: str, truncated: bool = False) -> Generation:
    return Generation(problem, 0, text, len(text), truncated)


def test_both_graders_count_side_by_side(one_verifier):
    problems = [Problem(name, "?", "?", r"\frac{1}{2}") for name in "abcde"]
    answers = [
        answer("a", r"so \boxed{\frac12}"),  # written alike
        answer("b", r"so \boxed{0.5}"),  # equal, written otherwise
        answer("c", r"so \boxed{2}"),
        answer("d", r"so the answer is $\frac{1}{2}$."),  # no box: math-verify looks at the text
        answer("e", r"so \boxed{\frac{1", truncated=True),
    ]
    grades = grade_all(math_task.TASK, problems, answers)
    assert [grade.exact for grade in grades] == [True, False, False, False, False]
    assert [grade.verified for grade in grades] == [True, True, False, True, False]
    assert [grade.answer for grade in grades] == [r"\frac12", "0.5", "2", None, None]
    assert [grade.ending for grade in grades] == ["right", "right", "wrong", "right", "truncated"]
    scores = score(math_task.TASK, problems, answers, grades)
    assert list(scores.accuracies) == ["exact/pass@1", "verified/pass@1"]
    assert [scores.details[key] for key in scores.accuracies] == [1 / 5, 3 / 5]
    assert [scores.endings[name] for name in ENDINGS] == [3 / 5, 1 / 5, 1 / 5, 0]
    assert (scores.truncated, scores.no_answer, scores.grader_failures) == (1, 2, 0)
    lower, upper = scores.accuracies["verified/pass@1"]
    assert lower < 3 / 5 < upper


TRUTH = "0.84, 0.47, 0.87, 0.40, 0.84, 0.47"


@pytest.mark.parametrize(
    ("task", "gold", "text", "truncated", "expected"),
    [
        (gsm8k, "18", "She has 3 apples left. " * 9, True, "truncated"),
        (gsm8k, "18", "She has 3 apples left.", False, "wrong"),
        (gsm8k, "18", "#### 18\n" + "Question: " * 9, True, "right"),
        (logistic_map, TRUTH, TRUTH, False, "right"),
        (logistic_map, TRUTH, "0.84, 0.60" + ", 0.60" * 20, True, "collapsed"),
        (logistic_map, TRUTH, "0.84, 0.61" + ", 0.61, 0.84" * 10, True, "truncated"),
    ],
)
def test_how_an_answer_ends(task, gold, text, truncated, expected):
    problem = Problem("a", "?", "?", gold, decimals=2)
    given = answer("a", text, truncated=truncated)
    assert ending_of(given, task.TASK.grade(problem, given)) == expected


def test_an_extracted_answer_decides_else_the_text_and_a_crash_stops_no_other():
    cases = [
        (RIGHT, Verdict(True)),
        (Deadly("12", "12", ""), Verdict(False, "crash: ProcessExpired: exit code 3")),
        (AnswerPair("12", "13", "the answer is 12"), Verdict(False)),
        (Hungry("12", "12", ""), Verdict(False, "crash: MemoryError")),
        (
            AnswerPair("12", None, "The final answer is $x = 12$. I hope it is correct."),
            Verdict(True),
        ),
        (
            AnswerPair(r"\frac{0}{0}", "1", ""),
            Verdict(False, "crash: ValueError: Can't evaluate nan or zoo"),
        ),
        (AnswerPair("12", None, r"we get \[ 24/2 \]"), Verdict(True)),
        (AnswerPair("12", None, "So the answer is 13, not 12. The answer is 13."), Verdict(False)),
        (AnswerPair("12", None, ""), Verdict(False)),
        (AnswerPair("12", None, "the value is x^2 = 5 " * 50_000), Verdict(False)),
    ]
    before = set(multiprocessing.active_children())
    assert verify_answers([pair for pair, _ in cases], seconds=60) == [
        verdict for _, verdict in cases
    ]
    assert verify_answers([], seconds=60) == []
    assert set(multiprocessing.active_children()) <= before


def test_hostile_answers_are_wrong_and_the_others_go_on(monkeypatch):
    """To replace the only process takes longer than the time limit, which that must not count
    against the next answer."""
    monkeypatch.setattr(grading, "processors", lambda: 1)
    hostile = ["9^{9^{9^{9}}}", "9" * 1_000_000]
    pairs = []
    for answer in hostile:
        pairs += [AnswerPair("12", answer, ""), RIGHT]
    verdicts = verify_answers(pairs, seconds=1)
    assert [verdict.correct for verdict in verdicts] == [False, True] * len(hostile)
    assert verdicts[0] == Verdict(False, "timeout")
