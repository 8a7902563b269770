"""Rows and tokens: read by the run, or from facts."""

from statistics import fmean, pstdev

import pytest

from cera_train.data.prepare import prepare_data
from cera_train.planning.data_size import DataSize, data_size, read_rows


@pytest.fixture
def size(compose, tiny_folder):
    """size("data=gsm8k", ...) -> DataSize, by the tiny model's tokenizer"""
    tiny = (f"model.path={tiny_folder}", "data.max_length=256")

    def size(*overrides: str) -> DataSize:
        config = compose(*tiny, *overrides, command="plan")
        return data_size(config, read_rows(config))

    return size


def test_a_split_is_sliced_as_datasets_does(size):
    for split, rows in {
        "train": 7473,
        "train[100:300]": 200,
        "train[7000:]": 473,
        "train[:10%]": 747,
        "test": 1319,
    }.items():
        both = size("data=gsm8k", f"data.train_split='{split}'", f"data.eval_split='{split}'")
        assert both.train_rows == both.eval_rows == rows


@pytest.mark.parametrize("words", [[], ["data.chat=template"], ["train.objective=grpo"]])
def test_local_rows_are_those_that_the_run_reads(compose, size, write_jsonl, tokenizer, words):
    rows = [{"question": f"{row} is", "answer": f" {row}" * (row % 9)} for row in range(60)]
    file = f"data.train_files=[{write_jsonl('rows.jsonl', rows)}]"
    settings = ["data=jsonl", file, "data.eval_rows=10", "data.max_length=24", *words]
    counted = size(*settings)
    config = compose(*settings)
    data = prepare_data(config.data, tokenizer)
    lengths = data.train.lengths
    assert (counted.train_rows, counted.eval_rows) == (len(data.train), len(data.evaluation))
    assert counted.tokens_per_row == pytest.approx(fmean(lengths))
    assert counted.spread == pytest.approx(pstdev(lengths) / fmean(lengths))
    assert counted.supervised == sum(data.train.supervised) / sum(lengths)
    given = size(*settings, "plan.tokens_per_row=20")
    assert (given.train_rows, given.eval_rows, given.tokens_per_row) == (50, 10, 20)
    assert given.supervised == 1.0


def test_settings_bound_what_is_known_of_the_hub_and_give_what_is_not(size):
    bounded = size("data=gsm8k", "data.train_rows=10", "data.max_length=16", "data.loss_on=all")
    assert (bounded.train_rows, bounded.tokens_per_row, bounded.supervised) == (10, 16, 1.0)
    counts = ["data.train_rows=20000", "data.eval_rows=100", "plan.tokens_per_row=200"]
    mix = size("data=gsm8k_slimorca", *counts)
    assert (mix.train_rows, mix.eval_rows, mix.tokens_per_row) == (20_000, 200, 200)
