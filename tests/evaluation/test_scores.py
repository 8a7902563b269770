"""Answers by hand, graded and scored by hand."""

from __future__ import annotations

import pytest

from cera_train.evaluation.scores import grade_exactly, score, verify
from cera_train.tasks.config import TaskKind
from cera_train.tasks.logistic_map import compare, extract, is_collapsed
from cera_train.tasks.records import Generation, Problem


def answer(problem: str, text: str, sample: int = 0, truncated: bool = False) -> Generation:
    return Generation(problem, sample, text, len(text), truncated)


def test_both_graders_count_side_by_side():
    problems = {name: Problem(name, "?", "?", r"\frac{1}{2}") for name in "abcde"}
    answers = [
        answer("a", r"so \boxed{\frac12}"),  # written alike
        answer("b", r"so \boxed{0.5}"),  # equal, written otherwise
        answer("c", r"so \boxed{2}"),
        answer("d", r"so the answer is $\frac{1}{2}$."),  # no box: math-verify looks at the text
        answer("e", r"so \boxed{\frac{1", truncated=True),
    ]
    grades = [grade_exactly(TaskKind.math, problems[given.problem], given) for given in answers]
    grades = verify(problems, answers, grades, seconds=10)
    assert [grade.exact for grade in grades] == [True, False, False, False, False]
    assert [grade.verified for grade in grades] == [True, True, False, True, False]
    assert [grade.answer for grade in grades] == [r"\frac12", "0.5", "2", None, None]
    scores = score(TaskKind.math, list(problems.values()), answers, grades)
    assert (scores["exact/pass@1"], scores["verified/pass@1"]) == (1 / 5, 3 / 5)
    assert (scores["truncated"], scores["no_answer"], scores["grader_failures"]) == (1, 2, 0)
    assert scores["tokens"] == sum(given.tokens for given in answers)
    lower, upper = scores["verified/pass@1/interval"]
    assert lower < 3 / 5 < upper


def test_a_hostile_answer_is_wrong_and_the_others_go_on():
    problems = {name: Problem(name, "?", "?", "12") for name in "ab"}
    answers = [answer("a", r"\boxed{9^{9^{9^{9}}}}"), answer("b", r"\boxed{12.0}")]
    grades = [grade_exactly(TaskKind.math, problems[given.problem], given) for given in answers]
    hostile, good = verify(problems, answers, grades, seconds=2)
    assert (hostile.verified, hostile.failure) == (False, "timeout")
    assert (good.verified, good.failure) == (True, None)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (" 0.56, 0.86, 0.42", [0.56, 0.86, 0.42]),
        ("x1 = 0.5600, x2 = 0.8600, then 0.42, 0.85, 0.46", [0.56, 0.86, 0.42]),
        (" 0.56, 0.86\nQuestion: 0.11", [0.56, 0.86]),
        ("The next 3 values are .56 0.86 -0.42", [0.56, 0.86, -0.42]),
        ("x1 = 3.5 * 0.16 * (1 - 0.16) = 0.56, x2 = 0.86", [0.56, 0.86]),
        (" 1, 0, 0.5", [1.0, 0.0, 0.5]),
        (f" 0.56, {'9' * 400}.5, 0.42", [0.56, 0.42]),
        ("", []),
        ("\n\n", []),
        ("none of 3", []),
    ],
)
def test_an_answer_is_the_decimal_numbers_of_its_first_line(text, values):
    assert extract(text, steps=3) == values


def test_steps_are_compared_one_by_one():
    steps = compare([0.56, 0.8649, 0.5], "0.56, 0.86, 0.42, 0.85", decimals=2)
    assert steps.matches == [True, True, False, False]
    assert steps.errors == [0.0, pytest.approx(0.0049), pytest.approx(0.08), None]


@pytest.mark.parametrize(
    ("given", "truth", "collapsed"),
    [
        (["0.84", "0.87", "0.87", "0.87", "0.87"], ["0.84", "0.47", "0.87", "0.39", "0.83"], True),  # the paper's
        (["0.84", "0.47", "0.87", "0.39", "0.39"], ["0.84", "0.47", "0.87", "0.39", "0.83"], True),
        (["0.84", "0.47", "0.87", "0.39", "0.83"], ["0.84", "0.47", "0.87", "0.39", "0.83"], False),
        (["0.87", "0.87", "0.84", "0.39", "0.83"], ["0.84", "0.47", "0.87", "0.39", "0.83"], False),  # moves on
        (["0.60", "0.60", "0.60"], ["0.60", "0.60", "0.60"], False),  # the truth stands still too
        (["0.60", "0.64", "0.64", "0.64"], ["0.60", "0.63", "0.64", "0.64"], True),
        (["0.60"], ["0.60", "0.63"], False),
        ([], ["0.60", "0.63"], False),
    ],
)
def test_state_collapse_is_one_value_to_the_end_where_the_truth_moves(given, truth, collapsed):
    assert is_collapsed(given, truth) == collapsed
