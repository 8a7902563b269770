"""The logistic map's rows against the paper's numbers, and their split."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from cera_train.data.logistic_map import problem, problems, trajectory
from cera_train.data.sources import open_sources
from cera_train.settings.data import DataConfig, LogisticMapConfig


def starts_of(rows: list[dict[str, str]]) -> list[str]:
    return [re.search(r"Starting from x = (\S+),", row["prompt"])[1] for row in rows]


def test_trajectory_is_the_papers():
    # shared/PAPER.md, "State collapse": growth 3.5 from x0 = 0.4.
    assert [f"{x:.4f}" for x in trajectory(0.4, 3.5, 5)] == ["0.8400", "0.4704", "0.8719", "0.3908", "0.8333"]


@pytest.mark.parametrize("x0", ["0.01", "0.37", "0.5", "0.99"])
def test_trajectory_equals_exact_arithmetic(x0):
    exact, iterates = Decimal(x0), []
    for _ in range(6):
        exact = Decimal("3.5") * exact * (1 - exact)
        iterates.append(float(exact))
    assert trajectory(float(x0), 3.5, 6) == pytest.approx(iterates, abs=1e-13)


def test_only_what_is_shown_is_rounded():
    row = problem(0.4, 3.5, LogisticMapConfig(decimals=4, steps=5))
    assert row["completion"] == " 0.8400, 0.4704, 0.8719, 0.3908, 0.8333"
    rounded = problem(0.4, 3.5, LogisticMapConfig(decimals=1, steps=5))
    assert rounded["completion"] == " 0.8, 0.5, 0.9, 0.4, 0.8"  # from the rounded 0.8 the next would be 0.6


def test_train_and_evaluation_starts_are_disjoint_and_together_all_99():
    train, evaluation = problems(LogisticMapConfig(), 20)
    assert (len(train), len(evaluation)) == (79, 20)
    assert sorted(starts_of(train) + starts_of(evaluation)) == [f"0.{number:02}" for number in range(1, 100)]


def test_split_follows_from_the_seed():
    assert problems(LogisticMapConfig(seed=3), 20) == problems(LogisticMapConfig(seed=3), 20)
    first, second = (set(starts_of(problems(LogisticMapConfig(seed=seed), 20)[1])) for seed in (3, 4))
    assert first != second


def test_four_decimals_have_a_row_for_every_start():
    train, evaluation = problems(LogisticMapConfig(decimals=4), 100)
    assert len(set(starts_of(train) + starts_of(evaluation))) == 9999


@pytest.mark.parametrize("eval_rows", [99, 100])
def test_a_split_without_training_rows_is_refused(eval_rows):
    with pytest.raises(ValueError, match=rf"data\.eval_rows={eval_rows} leaves nothing to train on: there are 99"):
        problems(LogisticMapConfig(), eval_rows)


def test_several_growths_have_a_row_each_from_every_start_and_hold_out_the_same_starts():
    train, evaluation = problems(LogisticMapConfig(growth=[3.5, 3.7, 3.9]), 20)
    assert (len(train), len(evaluation)) == (3 * 92, 20)  # 7 starting points are held out, one of them at two growths
    assert not set(starts_of(train)) & set(starts_of(evaluation))
    assert [row["prompt"][13:23] for row in train[:4]] == [*("= 3.5 x (1", "= 3.7 x (1", "= 3.9 x (1", "= 3.5 x (1")]
    one, _ = problems(LogisticMapConfig(growth=[3.7]), 20)
    assert one == problems(LogisticMapConfig(growth=3.7), 20)[0]


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        (4.1, r"growth=4\.1 must be numbers above 0 and up to 4"),
        ([], r"growth=\[\] must be numbers"),
        ("3.5", "growth=3.5 must be numbers"),
        (True, "growth=True must be numbers"),
        (None, "growth=None must be numbers"),
        ([3.5, float("nan")], "must be numbers"),
        (3.5699456, "more than the six digits that a prompt shows"),
        ([3.7, 3.7], r"growth=\[3.7, 3.7\] names one twice"),
    ],
)
def test_a_growth_that_is_none_is_refused(growth, message):
    with pytest.raises(ValueError, match=message):
        LogisticMapConfig(growth=growth)


def test_the_config_cuts_training_rows_only():
    config = DataConfig(layout="logistic_map", eval_rows=10, train_rows=5)
    train, evaluation = (list(source.read()) for source in open_sources(config))
    assert (len(train), len(evaluation)) == (5, 10)
    assert train == problems(LogisticMapConfig(), 10)[0][:5]
