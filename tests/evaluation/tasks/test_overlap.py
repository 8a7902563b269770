"""Problems whose question stands in the training rows."""

from __future__ import annotations

import pytest

from cera_train.evaluation.tasks.overlap import trained_on
from cera_train.settings.data import DataConfig, LogisticMapConfig, MixPart

PROBLEMS = [{"question": f"How many apples has {name}?", "answer": "#### 3"} for name in ("Ann", "Bob", "Cem")]


@pytest.fixture
def found(write_jsonl):
    """found(rows) -> questions of PROBLEMS that stand in these training rows"""

    def found(rows: list[dict], **settings) -> list[str]:
        task = {"files": [str(write_jsonl("problems.jsonl", PROBLEMS))]}
        layout = {"prompt": "{question}", "completion": "{answer}", "eval_rows": 1}
        data = DataConfig(**layout | {"train_files": [str(write_jsonl("rows.jsonl", rows))]} | settings)
        return trained_on("gsm8k", task, data)

    return found


def test_a_question_is_found_whatever_its_case_spaces_and_place(found):
    held_out = {"question": "How many apples has Ann?", "answer": "3"}
    rows = [
        {"question": "HOW many\n apples  has bob? ", "answer": "3"},
        {"question": "x", "messages": [{"role": "user", "content": "Tell me. How many apples has Cem? Quick."}]},
    ]
    assert found([*rows, held_out]) == ["How many apples has Bob?", "How many apples has Cem?"]


def test_a_part_of_a_question_is_not_one(found):
    rows = [
        {"question": "How many apples has Ann?s sister", "answer": "How many apples"},
        {"question": "", "answer": None},
    ]
    assert found([*rows, {"question": "How many apples", "answer": "has Ann?"}, rows[0]]) == []


def test_every_part_of_a_mix_is_searched(found, write_jsonl):
    other = str(write_jsonl("other.jsonl", [PROBLEMS[2]] * 3))
    parts = [
        MixPart(train_files=[str(write_jsonl("first.jsonl", [{"question": "x", "answer": "y"}] * 3))]),
        MixPart(train_files=[other]),
    ]
    assert found([], train_files=[], mix=parts) == ["How many apples has Cem?"]


def test_computed_rows_hold_none_of_their_problems():
    data = DataConfig(layout="logistic_map", eval_rows=20, logistic_map=LogisticMapConfig(growth=[3.5, 3.8]))
    assert trained_on("logistic_map", {}, data) == []
    pytest.importorskip("reasoning_gym")
    data = DataConfig(layout="reasoning_gym", train_rows=500, eval_rows=5)
    assert trained_on("reasoning_gym", {"limit": 20}, data) == []
    data.reasoning_gym.level = 0
    assert trained_on("reasoning_gym", {"limit": 15}, data) == []
