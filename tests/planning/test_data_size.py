"""Rows and tokens: from facts, by computing the rows, or by counting local files."""

from __future__ import annotations

import pytest
from conftest import needs_shared_data, needs_smollm2

from cera_train.planning.data_size import data_size


@pytest.fixture(scope="module")
def size(compose):
    """size("data=gsm8k", ...) -> DataSize"""
    return lambda *overrides: data_size(compose(*overrides).data)


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train", 7473), ("train[:100]", 100), ("train[100:300]", 200), ("train[7000:]", 473), ("train[:10%]", 747)],
)
def test_a_split_is_sliced_as_datasets_does(size, split, rows):
    assert size("data=gsm8k", f"data.train_split='{split}'").train_rows == rows


def test_a_split_of_several_is_refused(size):
    with pytest.raises(ValueError, match="split 'train.test': cera-plan reads splits such as train or train"):
        size("data=gsm8k", "data.train_split='train+test'")


def test_an_estimate_is_called_one(size):
    assert size("+recipe=math_r64").source == "an estimate"
    assert size("+recipe=gsm8k_r64").source == "by SmolLM2's tokenizer"


def test_the_rows_of_the_logistic_map_are_those_it_has(size):
    quickstart = size("+recipe=quickstart")
    assert (quickstart.train_rows, quickstart.eval_rows, quickstart.tokens_per_row) == (79, 20, 72)
    assert quickstart.is_even
    longer = size("+recipe=quickstart", "data.logistic_map.steps=12")
    assert longer.tokens_per_row > 72
    assert longer.source == "an estimate: a token for each word, digit and sign"


def test_rows_and_tokens_are_bounded_by_the_settings(size):
    assert size("data=gsm8k", "data.train_rows=10", "data.max_length=16").train_rows == 10
    assert size("data=gsm8k", "data.max_length=16").tokens_per_row == 16
    assert size("data=gsm8k", "data.loss_on=all").supervised == 1.0


def test_local_rows_are_counted_and_their_characters_too(size, write_jsonl):
    rows = write_jsonl("rows.jsonl", [{"prompt": "p" * 35, "completion": "c" * 105}] * 50)
    counted = size("data=jsonl", f"data.train_files=[{rows}]", "data.eval_rows=10")
    assert (counted.train_rows, counted.eval_rows, counted.tokens_per_row) == (40, 10, 40)
    assert counted.supervised == pytest.approx(0.75)
    assert "estimate" in counted.source
    with pytest.raises(ValueError, match="no row to train on has an answer. Check .* data.eval_rows"):
        size("data=jsonl", f"data.train_files=[{rows}]", "data.eval_rows=50")
    empty = write_jsonl("empty.jsonl", [{"prompt": "p", "completion": ""}])
    with pytest.raises(ValueError, match=r"data.train_files=.*empty.jsonl.: no row to train on has"):
        size("data=jsonl", f"data.train_files=[{empty}]", f"data.eval_files=[{rows}]")


def test_local_chats_are_counted(size, write_jsonl):
    chat = [{"role": "user", "content": "u" * 35}, {"role": "assistant", "content": "a" * 35}]
    rows = write_jsonl("rows.jsonl", [{"messages": chat}] * 4)
    chats = ["data=jsonl", "data.layout=messages", f"data.train_files=[{rows}]", f"data.eval_files=[{rows}]"]
    counted = size(*chats)
    assert (counted.train_rows, counted.eval_rows, counted.tokens_per_row) == (4, 4, 20)
    assert counted.supervised == pytest.approx(0.5)


def test_a_mix_is_the_sum_of_its_parts_by_their_weights(size):
    mixed, gsm8k, orca = size("data=gsm8k_slimorca"), size("data=gsm8k"), size("data=slimorca")
    assert [(part.rows, part.available, part.eval_rows) for part in mixed.parts] == [
        (7473, 7473, 1319),
        (2491, 100_000, 2000),
    ]
    assert (mixed.train_rows, mixed.eval_rows) == (9964, 3319)
    assert mixed.tokens_per_row * 9964 == pytest.approx(7473 * gsm8k.tokens_per_row + 2491 * orca.tokens_per_row)
    assert mixed.eval_tokens == pytest.approx(1319 * gsm8k.tokens_per_row + 2000 * orca.tokens_per_row)
    assert size("data=gsm8k_slimorca", "data.train_rows=20000", "data.mix.0.weight=4").parts[0].rows == 16_000


@pytest.mark.slow
def test_a_part_of_unknown_size_is_named(plan):
    unknown = ["+recipe=math_r64", "data=gsm8k_slimorca", "data.mix.1.path=org/rows", "data.mix.1.train_split=train"]
    with pytest.raises(
        ValueError, match="data.mix.1: data.path=org/rows: its size is unknown. Set data.train_rows, data."
    ):
        plan(*unknown)
    known = ["data.mix.1.train_rows=640", "data.mix.1.eval_rows=10", "plan.tokens_per_row=100"]
    assert plan(*unknown, *known).data.train_rows == 640 * 4


def test_a_data_set_of_conf_is_known_by_its_path(size):
    settings = ["data=jsonl", "data.path=openai/gsm8k", "data.prompt='{question}'", "data.completion=' {answer}'"]
    assert size(*settings).train_rows == 7473


def test_rows_of_unknown_number_are_asked_for(plan):
    with pytest.raises(ValueError, match="data.path=org/rows: its size is unknown. Set data.train_rows"):
        plan("+recipe=math_r64", "data.path=org/rows")
    known = ["data.path=org/rows", "data.train_rows=640", "data.eval_rows=10", "plan.tokens_per_row=100"]
    assert plan("+recipe=math_r64", *known).totals.tokens == 3 * 640 * 100


@needs_shared_data
@needs_smollm2
def test_the_facts_of_gsm8k_are_its_rows(compose):
    from conftest import SHARED_DATA

    from cera_train.data.prepare import prepare_evaluation
    from cera_train.model.weights import load_tokenizer

    config = compose("data=gsm8k", f"data.train_files=[{SHARED_DATA}/gsm8k_test.jsonl]", "data.eval_rows=1000")
    rows = prepare_evaluation(config.data, load_tokenizer(config.model))
    assert config.data.facts.tokens_per_row == pytest.approx(sum(rows.lengths) / len(rows), rel=0.06)
    assert config.data.facts.supervised == pytest.approx(sum(rows.supervised) / sum(rows.lengths), abs=0.02)


def test_generated_rows_are_as_many_as_the_settings_say(size):
    pytest.importorskip("reasoning_gym")
    rows = ["data=reasoning_gym", "data.reasoning_gym.generator=[chain_sum,gcd]"]
    counted = size(*rows, "data.train_rows=700", "data.eval_rows=30")
    assert (counted.train_rows, counted.eval_rows) == (700, 30)
    assert 25 < counted.tokens_per_row < 50
    assert 0 < counted.supervised < 0.2
    assert "estimate" in counted.source
    assert size("data=reasoning_gym", "data.max_length=9").tokens_per_row == 9


def test_rows_of_several_growths_are_counted(size):
    counted = size("data=logistic_map", "data.logistic_map.growth=[3.5,3.75,3.9]")
    assert (counted.train_rows, counted.eval_rows) == (3 * 92, 20)
    assert not counted.is_even
