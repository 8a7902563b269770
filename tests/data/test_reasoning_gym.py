"""Rows of reasoning-gym's generators: three splits that share no question, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cera_train.common.errors import UserError
from cera_train.data.reasoning_gym import DRAWS, Split, draws, opened, rows, split_of
from cera_train.data.rows import normalized
from cera_train.data.sources import check_data, open_sources
from cera_train.settings.data import GENERATORS, DataConfig, MixPart, ReasoningGymConfig

pytest.importorskip("reasoning_gym")

NAMES = [name for names in GENERATORS.values() for name in names]
SMALL = ReasoningGymConfig(generator="chain_sum", level=0)
"""Sums and differences of two digits: 200 questions."""

ELSEWHERE = """
import json, sys
names, sys.argv[0] = sys.argv[1:], "cera-train"
from cera_train.settings.data import ReasoningGymConfig
from cera_train.data.reasoning_gym import rows
print(json.dumps([rows(ReasoningGymConfig(generator=name, level=0), 3, 1) for name in names]))
"""


def data_config(**settings) -> DataConfig:
    return DataConfig(**{"layout": "reasoning_gym", "train_rows": 6, "eval_rows": 3} | settings)


def questions(split: Split, count: int, **settings) -> list[str]:
    return [draw.question for draw in draws(ReasoningGymConfig(**settings), split, count, "count")]


def test_a_question_is_in_one_split_and_comes_up_once_in_evaluation():
    train, held_out, test = (
        questions(split, count, generator="chain_sum", level=0)
        for split, count in (*((Split.train, 600), (Split.held_out, 15), (Split.test, 15)),)
    )
    assert len(set(train)) < 200  # training repeats
    assert len(set(held_out)) == len(set(test)) == 15
    assert not set(train) & set(held_out)
    assert not set(train) & set(test)
    assert not set(held_out) & set(test)
    assert {split_of(question.upper() + " ") for question in test} == {Split.test}


def test_evaluation_questions_do_not_depend_on_the_number_of_training_rows():
    few, many = (rows(ReasoningGymConfig(), train_rows, 20)[1] for train_rows in (10, 200))
    assert few == many


def test_seeds_and_splits_share_no_draw():
    """A generator seeds its draw i with seed + i."""
    seeds = {draws(ReasoningGymConfig(seed=seed), split, 1, "count")[0].seed for seed in (0, 1, 999) for split in Split}
    assert len(seeds) == 9
    assert all(abs(one - other) >= DRAWS for one in seeds for other in seeds - {one})
    assert max(seeds) + DRAWS < 2**32  # what numpy takes
    first, second = (set(questions(Split.train, 50, seed=seed)) for seed in (0, 1))
    assert not first & second


def test_generators_take_turns():
    made = draws(ReasoningGymConfig(generator=["gcd", "lcm", "chain_sum"]), Split.train, 7, "count")
    assert [draw.generator for draw in made] == ["gcd", "lcm", "chain_sum", "gcd", "lcm", "chain_sum", "gcd"]


def test_rows_are_the_same_in_every_process():
    command, environment = [sys.executable, "-c", ELSEWHERE, *NAMES], os.environ | {"PYTHONHASHSEED": "1"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    here = [rows(ReasoningGymConfig(generator=name, level=0), 3, 1) for name in NAMES]
    assert json.loads(printed) == [list(both) for both in here]


def test_a_level_sets_the_difficulty():
    terms = [
        max(question.count(" + ") + question.count(" - ") for question in questions(Split.train, 60, level=level))
        for level in (0, 3)
    ]
    assert terms == [1, 4]
    assert questions(Split.train, 3, level=0) != questions(Split.train, 3)


def test_sources_are_prompts_and_completions_of_this_size():
    train, evaluation = (list(source.read()) for source in open_sources(data_config()))
    assert (len(train), len(evaluation)) == (6, 3)
    assert all(row["prompt"].startswith("Question: ") and row["prompt"].endswith("\nAnswer:") for row in train)
    assert all(row["completion"].startswith(" ") for row in train)
    prints = [
        source.fingerprint
        for settings in ({}, {"reasoning_gym": SMALL})
        for source in open_sources(data_config(**settings))
    ]
    assert len(set(prints)) == 4


def test_generators_may_be_a_part_of_a_mix(write_jsonl):
    path = str(write_jsonl("rows.jsonl", [{"question": str(row), "answer": "a"} for row in range(9)]))
    settings = {"prompt": "{question}", "completion": " {answer}"}
    made = MixPart(layout="reasoning_gym", rows=4, eval_rows=2)
    config = DataConfig(mix=[MixPart(files=[path], eval_rows=2), made], **settings)
    assert [len(list(open_sources(part)[0].read())) for _, part in config.parts()] == [7, 4]
    with pytest.raises(UserError, match=r"data.mix.0.layout=reasoning_gym needs data.mix.0.rows, such as 1000"):
        check_data(DataConfig(mix=[MixPart(layout="reasoning_gym", eval_rows=2)], **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": "chain_sums"}, r"generator=chain_sums is no generator .* Did you mean chain_sum or d"),
        (
            {"generator": "spiral_matrix"},
            "generator=spiral_matrix is no generator of reasoning-gym that is tested here",
        ),
        ({"generator": "qqq"}, "Choose from simple_equations, "),
        ({"generator": []}, r"generator=\[\] names none"),
        ({"generator": None}, "generator=None is no generator"),
        ({"generator": ["gcd", "gcd"]}, "names gcd twice"),
        ({"level": -1}, "level=-1 must not be negative"),
        ({"seed": 1000}, "seed=1000 must be between 0 and 999"),
    ],
)
def test_a_setting_is_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        ReasoningGymConfig(**settings)


def test_a_level_that_a_generator_lacks_is_refused_before_any_row_is_drawn():
    with pytest.raises(UserError, match=r"level=11 of chain_sum: it has levels 0 to 10"):
        check_data(data_config(reasoning_gym=ReasoningGymConfig(level=11)))


def test_more_rows_than_there_are_questions_are_refused():
    with pytest.raises(
        UserError, match=r"data.eval_rows=400: chain_sum at level 0 has only \d+ different held-out questio"
    ):
        open_sources(data_config(eval_rows=400, reasoning_gym=SMALL))


def test_rows_must_have_a_number():
    with pytest.raises(UserError, match="data.layout=reasoning_gym needs data.train_rows, such as 1000"):
        data_config(train_rows=None)


def test_a_missing_package_is_one_line(monkeypatch):
    opened.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"^data.layout=reasoning_gym needs .*: pip install -e '\.\[tasks\]' in "):
        check_data(data_config())


def test_normalized_texts_are_without_case_and_line_breaks():
    assert normalized("  What is\n 2 + 2? ") == normalized("what IS 2 + 2?") == "what is 2 + 2?"
