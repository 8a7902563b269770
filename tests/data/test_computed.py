"""Computed rows: the logistic map against the paper's numbers, and dates."""

import re
from datetime import date

from cera_train.data.computed import (
    WAYS,
    date_row,
    date_rows,
    logistic_map_row,
    logistic_map_rows,
)
from cera_train.settings.data import LogisticMapConfig


def starts_of(rows: list[dict[str, str]]) -> list[str]:
    return [re.search(r"Starting from x = (\S+),", row["prompt"])[1] for row in rows]


def test_the_trajectory_is_the_papers_and_only_what_is_shown_is_rounded():
    # shared/PAPER.md, "State collapse": growth 3.5 from x0 = 0.4.
    row = logistic_map_row(0.4, 3.5, LogisticMapConfig(decimals=4))
    assert row["completion"].startswith(" 0.8400, 0.4704, 0.8719, 0.3908, 0.8333, ")
    rounded = logistic_map_row(0.4, 3.5, LogisticMapConfig(decimals=1))
    # Computed from the rounded 0.8, the next would be 0.6.
    assert rounded["completion"].startswith(" 0.8, 0.5, 0.9, 0.4, 0.8, ")


def test_every_growth_gets_a_row_from_every_start_and_holds_out_the_same_starts():
    train, evaluation = logistic_map_rows(LogisticMapConfig(growth=[3.5, 3.7, 3.9]), 20)
    # 7 starting points are held out, one of them at two growths
    assert (len(train), len(evaluation)) == (3 * 92, 20)
    starts = [*{*starts_of(train)}, *{*starts_of(evaluation)}]
    assert sorted(starts) == [f"0.{number:02}" for number in range(1, 100)]
    assert [row["prompt"][13:23] for row in train[:4]] == [
        "= 3.5 x (1",
        "= 3.7 x (1",
        "= 3.9 x (1",
        "= 3.5 x (1",
    ]


def test_dates_are_asked_in_every_format():
    day = date(1988, 3, 1)
    texts = [
        "the first of March 1988",
        "1 March 1988",
        "March 1, 1988",
        "1.3.88",
        "February 29, 1988",
    ]
    for way, text in zip(WAYS, texts, strict=True):
        row = date_row(day, way)
        assert text in row["prompt"]
        assert row["completion"] == f" {day}"


def test_every_day_of_the_century_is_one_answer_and_held_out_rows_stay_the_same():
    train, evaluation = date_rows(None, 50)
    days = sorted(row["completion"].strip() for row in (*train, *evaluation))
    assert (days[0], days[-1], len(days), len(set(days))) == (
        "1900-01-01",
        "1999-12-31",
        36_524,
        36_524,
    )
    assert date_rows(640, 50) == (train[:640], evaluation)
    assert train[:9] != sorted(train[:9], key=lambda row: row["completion"])
