"""Answers to the logistic map: the numbers of a text, compared step by step."""

import pytest

from cera_train.evaluation.tasks.logistic_map import TASK, is_collapsed, read_values
from cera_train.runs.evaluation_folder import Generation, Problem


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x1 = 0.5600, x2 = 0.8600, then 0.42, 0.85, 0.46", [0.56, 0.86, 0.42]),
        ("x1 = 3.5 * 0.16 * (1 - 0.16) = 0.56, x2 = 0.86", [0.56, 0.86]),
        (" 1, 0, 0.5", [1.0, 0.0, 0.5]),
        (f" 0.56, {'9' * 400}.5, 0.42", [0.56, 0.42]),
    ],
)
def test_an_answer_is_the_decimal_numbers_of_its_first_line(text, values):
    assert read_values(text, steps=3) == values


def test_steps_are_compared_one_by_one():
    problem = Problem("a", "?", "?", "0.56, 0.86, 0.42, 0.85", growth=3.5, decimals=2)
    grades = [
        TASK.grade(problem, Generation("a", 0, text, 9, False))
        for text in ("0.56, 0.8649, 0.5", problem.gold)
    ]
    assert [grade.details["matches"] for grade in grades] == [
        [True, True, False, False],
        [True] * 4,
    ]
    assert [(grade.answer, grade.exact, grade.score) for grade in grades] == [
        ("0.56, 0.86, 0.50", False, 0.5),
        (problem.gold, True, 1.0),
    ]
    scores = TASK.scores([problem], grades)
    assert (scores["step_accuracy"], scores["step_accuracy/mean"]) == ([1, 1, 0.5, 0.5], 0.75)


@pytest.mark.parametrize(
    ("given", "truth", "collapsed"),
    [
        # The paper's example.
        (["0.84", "0.87", "0.87", "0.87", "0.87"], ["0.84", "0.47", "0.87", "0.39", "0.83"], True),
        (["0.84", "0.47", "0.87", "0.39", "0.83"], ["0.84", "0.47", "0.87", "0.39", "0.83"], False),
        # Later values move on.
        (["0.87", "0.87", "0.84", "0.39", "0.83"], ["0.84", "0.47", "0.87", "0.39", "0.83"], False),
        (["0.60", "0.60", "0.60"], ["0.60", "0.60", "0.60"], False),  # the truth stands still too
        ([], ["0.60", "0.63"], False),
    ],
)
def test_state_collapse_is_one_value_to_the_end_where_the_truth_moves(given, truth, collapsed):
    assert is_collapsed(given, truth) == collapsed
