"""Answers to the logistic map: the numbers of a text, compared step by step."""

from __future__ import annotations

import pytest

from cera_train.evaluation.tasks.logistic_map import compare, extract, is_collapsed


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
    assert steps["matches"] == [True, True, False, False]
    assert steps["errors"] == [0.0, pytest.approx(0.0049), pytest.approx(0.08), None]


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
