"""How an answer ended, on answers by hand."""

from __future__ import annotations

import pytest

from cera_train.evaluation.grading import LONGEST_SEGMENT, ending_of, is_loop
from cera_train.evaluation.tasks import gsm8k, logistic_map
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.runs.results import AccuracyResult, ending_shares

SENTENCE = "She has 3 apples left. "
LONG = "".join(f"{n} and then " for n in range(80))
"""Over 900 characters, no part of which repeats."""


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE * 3,
        f"{SENTENCE * 5}She has 3 ap",  # cut in the middle of the segment
        "0" * 50,
        LONG * 3,
    ],
)
def test_a_tail_of_one_segment_is_a_loop(text):
    assert is_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "18",
        LONG,
        f"{SENTENCE * 5}So the answer is 18.",  # it got out of it
        "0.84, 0.84, 0.84, 0.84, 0.84, 0.84",  # too short
        "".join(f"Step {n}: add one. " for n in range(40)),
        "x" * (LONGEST_SEGMENT + 1) + "y",
    ],
)
def test_other_texts_are_none(text):
    assert not is_loop(text)


def test_a_megabyte_is_searched_for_loops():
    assert not is_loop("ab" * 500_000 + "c")
    assert is_loop("ab" * 500_000)


def ending(task, gold: str, text: str, truncated: bool = False, **details) -> str:
    problem, answer = Problem("a", "?", "?", gold, **details), Generation("a", 0, text, 9, truncated)
    return ending_of(task, problem, answer, task.grade(problem, answer))


@pytest.mark.parametrize(
    ("text", "truncated", "expected"),
    [
        ("#### 18", False, "right"),
        ("I do not know.", False, "wrong"),
        (LONG, True, "truncated"),
        (SENTENCE * 9, True, "loop"),
        ("#### 18\n" + "Question: " * 9, True, "right"),
    ],
)
def test_failures_apart(text, truncated, expected):
    assert ending(gsm8k.TASK, "18", text, truncated) == expected


TRUTH = "0.84, 0.47, 0.87, 0.40, 0.84, 0.47"


@pytest.mark.parametrize(
    ("text", "truncated", "expected"),
    [
        (TRUTH, False, "right"),
        ("0.84, 0.47, 0.87, 0.41, 0.84, 0.47", False, "wrong"),
        ("0.84, 0.60, 0.60, 0.60, 0.60, 0.60", False, "collapsed"),
        ("0.84, 0.60" + ", 0.60" * 20, True, "collapsed"),  # also a loop, of which it is the cause
        ("0.84, 0.61" + ", 0.61, 0.84" * 10, True, "loop"),
        ("0.84, 0.47, 0.8", True, "truncated"),
    ],
)
def test_a_state_that_stands_still_has_collapsed(text, truncated, expected):
    assert ending(logistic_map.TASK, TRUTH, text, truncated, decimals=2) == expected


def test_an_answer_that_repeats_itself_as_the_truth_does_is_no_loop():
    cycle = ", ".join(["0.51", "0.80"] * 8)
    assert ending(logistic_map.TASK, cycle, "0.52, 0.80, " + cycle[12:], decimals=2) == "wrong"


def test_shares_are_of_all_answers_and_unknown_where_one_is():
    shares = ending_shares(["right", "loop", "loop", "wrong"])
    assert shares == {
        **{"ending/right": 0.25, "ending/wrong": 0.25, "ending/loop": 0.5},
        **{"ending/truncated": 0.0, "ending/collapsed": 0.0},
    }
    assert sum(AccuracyResult(**shares).endings.values()) == 1
    assert ending_shares([]) == AccuracyResult(**{"ending/right": 1.0}).endings == {}
