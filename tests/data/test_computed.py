"""Computed rows: the logistic map against the paper's numbers, dates, and reasoning-gym in three
splits."""

import json
import os
import re
import subprocess
import sys
from datetime import date

import pytest

from cera_train.common.errors import UserError
from cera_train.data.computed import (
    DRAWS,
    WAYS,
    Split,
    date_row,
    date_rows,
    draws,
    logistic_map_row,
    logistic_map_rows,
    reasoning_gym_rows,
    split_of,
)
from cera_train.data.sources import check_data, open_sources
from cera_train.settings.data import GENERATORS, DataConfig, LogisticMapConfig, ReasoningGymConfig


def starts_of(rows: list[dict[str, str]]) -> list[str]:
    return [re.search(r"Starting from x = (\S+),", row["prompt"])[1] for row in rows]


def test_the_trajectory_is_the_papers_and_only_what_is_shown_is_rounded():
    # shared/PAPER.md, "State collapse": growth 3.5 from x0 = 0.4.
    row = logistic_map_row(0.4, 3.5, LogisticMapConfig(decimals=4, steps=5))
    assert row["completion"] == " 0.8400, 0.4704, 0.8719, 0.3908, 0.8333"
    rounded = logistic_map_row(0.4, 3.5, LogisticMapConfig(decimals=1, steps=5))
    # Computed from the rounded 0.8, the next would be 0.6.
    assert rounded["completion"] == " 0.8, 0.5, 0.9, 0.4, 0.8"


def test_starting_points_are_split_by_the_seed_without_losing_any():
    train, evaluation = logistic_map_rows(LogisticMapConfig(), 20)
    assert (len(train), len(evaluation)) == (79, 20)
    assert sorted(starts_of(train) + starts_of(evaluation)) == [
        f"0.{number:02}" for number in range(1, 100)
    ]
    assert {*starts_of(evaluation)} != {
        *starts_of(logistic_map_rows(LogisticMapConfig(seed=1), 20)[1])
    }
    with pytest.raises(
        UserError, match=r"data\.eval_rows=99 leaves nothing to train on: there are 99"
    ):
        logistic_map_rows(LogisticMapConfig(), 99)


def test_every_growth_gets_a_row_from_every_start_and_holds_out_the_same_starts():
    train, evaluation = logistic_map_rows(LogisticMapConfig(growth=[3.5, 3.7, 3.9]), 20)
    # 7 starting points are held out, one of them at two growths
    assert (len(train), len(evaluation)) == (3 * 92, 20)
    assert not set(starts_of(train)) & set(starts_of(evaluation))
    assert [row["prompt"][13:23] for row in train[:4]] == [
        "= 3.5 x (1",
        "= 3.7 x (1",
        "= 3.9 x (1",
        "= 3.5 x (1",
    ]


@pytest.mark.parametrize(
    ("day", "texts"),
    [
        (
            date(1988, 3, 1),
            [
                "the first of March 1988",
                "1 March 1988",
                "March 1, 1988",
                "1.3.88",
                "February 29, 1988",
            ],
        ),
        (
            date(1900, 12, 31),
            [
                "thirty-first of D",
                "31 Dec",
                "December 31, 1900",
                "31.12.00",
                "after December 30, 19",
            ],
        ),
    ],
)
def test_dates_are_asked_in_every_format(day, texts):
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


GYM = {"layout": "reasoning_gym", "train_rows": 6, "eval_rows": 3}

ELSEWHERE = """
import json, sys
names, sys.argv[0] = sys.argv[1:], "cera-train"
from cera_train.settings.data import ReasoningGymConfig
from cera_train.data.computed import reasoning_gym_rows as rows
print(json.dumps([rows(ReasoningGymConfig(generator=name, level=0), 3, 1) for name in names]))
"""


@pytest.fixture(autouse=True)
def needs_package(request) -> None:
    if "gym" in request.node.name:
        pytest.importorskip("reasoning_gym")


def questions(split: Split, count: int, **settings) -> list[str]:
    return [draw.question for draw in draws(ReasoningGymConfig(**settings), split, count, "count")]


def test_a_gym_question_is_in_one_split_and_is_held_out_only_once():
    train, held_out, test = (
        questions(split, count, generator="chain_sum", level=0)
        for split, count in ((Split.train, 600), (Split.held_out, 15), (Split.test, 15))
    )
    assert len(set(train)) < 200  # there are only 200 sums of two digits: training repeats them
    assert len(set(held_out)) == len(set(test)) == 15
    assert not {*train} & {*held_out} | {*train} & {*test} | {*held_out} & {*test}
    assert {split_of(question.upper() + " ") for question in test} == {Split.test}


def test_gym_seeds_and_splits_share_no_draw():
    seeds = {
        draws(ReasoningGymConfig(seed=seed), split, 1, "count")[0].seed
        for seed in (0, 1, 999)
        for split in Split
    }
    assert len(seeds) == 9
    assert all(abs(one - other) >= DRAWS for one in seeds for other in seeds - {one})
    assert max(seeds) + DRAWS < 2**32  # what numpy takes


def test_gym_generators_take_turns_and_a_level_sets_the_difficulty():
    taken = draws(
        ReasoningGymConfig(generator=["gcd", "lcm", "chain_sum"]), Split.train, 4, "count"
    )
    assert [draw.generator for draw in taken] == ["gcd", "lcm", "chain_sum", "gcd"]
    terms = [
        max(map(len, map(str.split, questions(Split.train, 60, level=level)))) for level in (0, 3)
    ]
    assert terms[0] < terms[1]


def test_gym_rows_are_the_same_in_every_process():
    command = [sys.executable, "-c", ELSEWHERE, *GENERATORS]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    here = [
        reasoning_gym_rows(ReasoningGymConfig(generator=name, level=0), 3, 1) for name in GENERATORS
    ]
    assert json.loads(printed) == [list(both) for both in here]


GROWTHS = "growth=.* must be numbers above 0 and up to 4, of at most six digits"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *(
            (LogisticMapConfig, {"growth": growth}, GROWTHS)
            for growth in (4.1, [], True, 3.5699456)
        ),
        (
            ReasoningGymConfig,
            {"generator": "chain_sums"},
            "generator=chain_sums: expected generators that are tested",
        ),
        (ReasoningGymConfig, {"generator": []}, r"generator=\[\]: expected"),
        (ReasoningGymConfig, {"level": -1}, "level=-1 must not be negative"),
        (ReasoningGymConfig, {"seed": 1000}, "seed=1000 must be between 0 and 999"),
    ],
)
def test_a_refused_setting_is_named(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(**settings)


def test_more_gym_rows_than_exist_are_refused():
    with pytest.raises(UserError, match=r"level=11 of chain_sum: it has levels 0 to 10"):
        check_data(DataConfig(**GYM, reasoning_gym=ReasoningGymConfig(level=11)))
    with pytest.raises(
        UserError,
        match=r"data.eval_rows=400: chain_sum at level 0 has only \d+ different held-out qu",
    ):
        open_sources(
            DataConfig(**GYM | {"eval_rows": 400}, reasoning_gym=ReasoningGymConfig(level=0))
        )
    with pytest.raises(
        UserError, match="data.layout=reasoning_gym needs data.train_rows, such as 1000"
    ):
        DataConfig(**GYM | {"train_rows": None})
