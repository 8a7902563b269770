"""Rows, tokens and problems: read by the run, or from facts."""

from pathlib import Path
from statistics import fmean, pstdev

import pytest
from conftest import needs_smollm2

from cera_train.data.prepare import prepare_data
from cera_train.planning.data_size import count_problems, data_size

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_test.jsonl"


@pytest.fixture
def size(compose, tiny_folder):
    """size("data=gsm8k", ...) -> DataSize, by the tiny model's tokenizer"""
    tiny = (f"model.path={tiny_folder}", "data.max_length=256")
    return lambda *overrides: data_size(compose(*tiny, *overrides, command="plan"))


def test_a_split_is_sliced_as_datasets_does(size):
    for split, rows in (
        ("train", 7473),
        ("train[100:300]", 200),
        ("train[7000:]", 473),
        ("train[:10%]", 747),
    ):
        assert size("data=gsm8k", f"data.train_split='{split}'").train_rows == rows
    assert size("data=gsm8k", "data.eval_split='train[90%:]'").eval_rows == 747


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
    assert (given.supervised, given.source) == (1.0, "plan.tokens_per_row")


def test_rows_and_tokens_of_the_hub_are_bounded_by_the_settings(size):
    bounded = size("data=gsm8k", "data.train_rows=10", "data.max_length=16", "data.loss_on=all")
    assert (bounded.train_rows, bounded.tokens_per_row, bounded.supervised) == (10, 16, 1.0)


def test_rows_of_a_model_without_a_tokenizer_need_a_setting(size, tmp_path, write_jsonl):
    file = write_jsonl("rows.jsonl", [{"question": "1", "answer": "2"}] * 20)
    words = ["data=jsonl", f"data.train_files=[{file}]", "data.eval_rows=5"]
    assert size(*words, "model.path=org/model", "plan.tokens_per_row=9").train_rows == 15


def test_a_mix_is_the_sum_of_its_parts_by_their_weights(size):
    mixed = size("data=gsm8k_slimorca")
    gsm8k = size("data=gsm8k")
    orca = size("data=slimorca")
    assert (mixed.train_rows, mixed.eval_rows) == (7473 + 2491, 1319 + 2000)
    tokens = [7473 * gsm8k.tokens_per_row, 2491 * orca.tokens_per_row]
    assert mixed.tokens_per_row * 9964 == pytest.approx(sum(tokens))
    more = size("data=gsm8k_slimorca", "data.train_rows=20000", "data.mix.0.weight=4")
    assert more.train_rows == 20_000


def test_a_known_data_set_needs_no_settings_beyond_its_templates(size):
    unknown = ["+recipe=math_r64", "data.path=org/rows"]
    counts = ["data.train_rows=640", "data.eval_rows=10", "plan.tokens_per_row=100"]
    known = size(*unknown, *counts)
    assert (known.train_rows, known.tokens_per_row, known.prompt_tokens) == (640, 100, 100)
    templates = ["data.prompt='{question}'", "data.completion=' {answer}'"]
    of_conf = size("data=jsonl", "data.path=openai/gsm8k", *templates)
    assert (of_conf.train_rows, of_conf.source) == (7473, "data.facts")


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"real rows are not at {GSM8K}")
@needs_smollm2
def test_the_facts_of_gsm8k_are_its_rows(compose):
    from cera_train.data.prepare import prepare_evaluation
    from cera_train.model.folder import load_tokenizer

    config = compose("data=gsm8k", f"data.train_files=[{GSM8K}]", "data.eval_rows=1000")
    rows = prepare_evaluation(config.data, load_tokenizer(config.model))
    facts = config.data.facts
    assert facts.tokens_per_row == pytest.approx(sum(rows.lengths) / len(rows), rel=0.06)
    assert facts.supervised == pytest.approx(sum(rows.supervised) / sum(rows.lengths), abs=0.02)


def test_problems_of_a_task_are_counted_or_known(compose, write_jsonl, tiny_folder):
    def problems(name: str, *overrides: str) -> int:
        words = [f"model.path={tiny_folder}", "+recipe=logistic_map", f"train.tasks=[{name}]"]
        config = compose(*words, *overrides, command="plan")
        return count_problems(name, config, data_size(config))

    assert problems("gsm8k", "train.tasks_limit=30") == 30
    assert problems("held_out", "data=gsm8k") == 50  # of rows that are on the Hub
    assert problems("logistic_map", "train.tasks_limit=15") == 15
    path = write_jsonl("test.jsonl", [{"question": "a" * 28, "answer": "#### 1"}] * 7)
    assert problems("gsm8k", f"train.task_settings={{gsm8k: {{files: ['{path}']}}}}") == 7
