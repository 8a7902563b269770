"""Rows, tokens and problems: from facts, or counted by the reader of a run."""

import copy
from pathlib import Path
from statistics import fmean

import pytest
from conftest import needs_smollm2

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data
from cera_train.planning.data_size import count_problems, data_size
from cera_train.planning.make import tokenizer_of

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_test.jsonl"


@pytest.fixture(scope="module")
def size(compose, tokenizer):
    """size("data=gsm8k", ...) -> DataSize"""
    return lambda *overrides: data_size(compose(*overrides).data, tokenizer=tokenizer)


def test_a_split_is_sliced_as_datasets_does_or_refused(size):
    for split, rows in (
        ("train", 7473),
        ("full", 7473),
        ("train[100:300]", 200),
        ("train[7000:]", 473),
        ("train[:10%]", 747),
    ):
        assert size("data=gsm8k", f"data.train_split='{split}'").train_rows == rows
    assert size("data=gsm8k", "data.eval_split='train[90%:]'").eval_rows == 747
    for split in ("train+test", "train[x]"):
        with pytest.raises(
            ValueError, match="data split 'train.*': cera-plan reads splits such as train or train"
        ):
            size("data=gsm8k", f"data.train_split='{split}'")


def test_chats_are_counted_as_their_template_writes_them(compose, write_jsonl, tokenizer):
    """An earlier answer that the template shortens is another sequence."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}"
        "|{% endfor %}"
    )
    roles = ("user", "assistant", "user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": f"number {row}"} for role in roles]}
        for row in range(40)
    ]
    data = compose("data=jsonl", f"data.train_files=[{write_jsonl('rows.jsonl', rows)}]").data
    size = data_size(data, tokenizer=chat)
    tokenized = prepare_data(data, chat).train
    assert size.train_rows == len(tokenized) == 2 * 38
    assert size.tokens_per_row == pytest.approx(fmean(tokenized.lengths), rel=0.01)
    assert size.source == "by the model's tokenizer"
    asked = prepare_data(data, chat, asks=True).train  # every answer is one to sample
    assert data_size(data, tokenizer=chat, asks=True).train_rows == len(asked)


def test_rows_that_training_drops_by_their_length_are_not_counted(compose, write_jsonl, tokenizer):
    """A cut answer is no right one where answers are sampled."""
    lengths = [(1, 1), (1, 90), (90, 1)]
    rows = [
        {"question": f"{row}" * question, "answer": "9" * answer}
        for row, (question, answer) in enumerate(lengths * 6, start=10)
    ]
    file = f"data.train_files=[{write_jsonl('rows.jsonl', rows)}]"
    words = ("data=jsonl", file, "data.chat=template", "data.max_length=64", "data.eval_rows=3")
    data = compose(*words).data
    for asks, count in ((False, 10), (True, 5)):
        size = data_size(data, tokenizer=tokenizer, asks=asks)
        assert size.train_rows == len(prepare_data(data, tokenizer, asks).train) == count


def test_computed_rows_by_a_chat_template_are_counted(compose, tokenizer):
    data = compose("data=logistic_map", "data.chat=template").data
    assert data.facts is not None
    lengths = prepare_data(data, tokenizer).train.lengths
    assert data_size(data, tokenizer=tokenizer).tokens_per_row == fmean(lengths)


def test_only_rows_that_no_facts_describe_take_the_tokenizer(compose, tiny_folder, tmp_path):
    def tokenizer(*overrides: str, path: Path = tmp_path / "nothing"):
        return tokenizer_of(compose(f"model.path={path}", *overrides, command="plan"))

    for known in ("data=gsm8k", "data=logistic_map", "data=dates"):
        assert tokenizer(known) is None
    longer = ["data=logistic_map", "data.logistic_map.steps=12"]
    assert tokenizer(*longer, "plan.tokens_per_row=90") is None
    assert tokenizer(*longer, path=tiny_folder) is not None
    (tmp_path / "config.json").write_text("{}")
    fix = "Copy it there, or set plan.tokens_per_row"
    with pytest.raises(UserError, match=f"no tokenizer, .* tokens of logistic_map. {fix}"):
        tokenizer(*longer, path=tmp_path)
    with pytest.raises(UserError, match="cannot be loaded .* Or set plan.tokens_per_row"):
        tokenizer(*longer, path="org/model")


def test_computed_rows_are_counted(size):
    rows = size("+recipe=logistic_map")
    assert (rows.train_rows, rows.eval_rows, rows.tokens_per_row) == (79, 20, 72)
    assert rows.is_even
    longer = size("+recipe=logistic_map", "data.logistic_map.steps=12")
    assert longer.tokens_per_row > 72
    assert longer.source == "by the model's tokenizer"
    several = size("data=logistic_map", "data.logistic_map.growth=[3.5,3.75,3.9]")
    assert (several.train_rows, several.eval_rows) == (3 * 92, 20)
    assert (
        size("data=dates").train_rows,
        size("data=dates", "data.train_rows=null").train_rows,
    ) == (640, 36_474)


def test_rows_and_tokens_are_bounded_by_the_settings(size):
    bounded = size("data=gsm8k", "data.train_rows=10", "data.max_length=16", "data.loss_on=all")
    assert (bounded.train_rows, bounded.tokens_per_row, bounded.supervised) == (10, 16, 1.0)


def test_local_rows_are_counted_by_the_reader_or_by_the_setting(compose, write_jsonl, tokenizer):
    rows = [{"prompt": f"{row} is", "completion": f" {row}" * (row % 2)} for row in range(60)]
    file = f"data.train_files=[{write_jsonl('rows.jsonl', rows)}]"
    data = compose("data=jsonl", file, "data.eval_rows=10").data
    train = prepare_data(data, tokenizer).train
    counted = data_size(data, tokenizer=tokenizer)
    assert counted.train_rows == len(train) == 25
    assert counted.tokens_per_row == fmean(train.lengths)
    assert counted.supervised == sum(train.supervised) / sum(train.lengths)
    columns = ["data.prompt='{prompt}'", "data.completion='{completion}'", "data.eval_rows=10"]
    other = compose("data=gsm8k", file, *columns).data  # facts about other rows
    assert data_size(other, tokenizer=tokenizer) == counted
    given = data_size(data, tokens_per_row=40)
    assert (given.train_rows, given.eval_rows, given.tokens_per_row) == (50, 10, 40)
    assert (given.supervised, given.source) == (1.0, "plan.tokens_per_row")
    empty = write_jsonl("empty.jsonl", [{"prompt": "p", "completion": ""}] * 2)
    nothing = compose("data=jsonl", f"data.train_files=[{empty}]", "data.eval_rows=1").data
    with pytest.raises(UserError, match=r"empty.jsonl.*: no row to train on has an answer"):
        data_size(nothing, tokenizer=tokenizer)


def test_a_mix_is_the_sum_of_its_parts_by_their_weights(size):
    mixed = size("data=gsm8k_slimorca")
    gsm8k = size("data=gsm8k")
    orca = size("data=slimorca")
    assert (mixed.train_rows, mixed.eval_rows) == (7473 + 2491, 1319 + 2000)
    tokens = [7473 * gsm8k.tokens_per_row, 2491 * orca.tokens_per_row]
    assert mixed.tokens_per_row * 9964 == pytest.approx(sum(tokens))
    assert mixed.prompt_tokens == pytest.approx(mixed.tokens_per_row * (1 - mixed.supervised))
    assert (
        size("data=gsm8k_slimorca", "data.train_rows=20000", "data.mix.0.weight=4").train_rows
        == 20_000
    )


def test_an_unknown_number_of_rows_is_refused(compose):
    unknown = ["+recipe=math_r64", "data.path=org/rows"]
    with pytest.raises(
        ValueError, match="data.path=org/rows: its size is unknown. Set data.train_rows"
    ):
        data_size(compose(*unknown).data)
    known = data_size(
        compose(*unknown, "data.train_rows=640", "data.eval_rows=10").data, tokens_per_row=100
    )
    assert (known.train_rows, known.tokens_per_row, known.prompt_tokens) == (640, 100, 100)
    settings = [
        "data=jsonl",
        "data.path=openai/gsm8k",
        "data.prompt='{question}'",
        "data.completion=' {answer}'",
    ]
    of_conf = data_size(compose(*settings).data)
    assert (of_conf.train_rows, of_conf.source) == (7473, "by SmolLM2's tokenizer")


def test_held_out_prompts_that_a_run_trains_on_are_refused(plan, write_jsonl):
    rows = [{"question": f"What is {number % 6}?", "answer": "A digit."} for number in range(9)]
    settings = [f"data.train_files=[{write_jsonl('rows.jsonl', rows)}]", "data.eval_rows=4"]
    with pytest.raises(UserError, match="3 of 4 held-out prompts are also training prompts"):
        plan(*settings)


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"real rows are not at {GSM8K}")
@needs_smollm2
def test_the_facts_of_gsm8k_are_its_rows(compose):
    from cera_train.data.prepare import prepare_evaluation
    from cera_train.model.folder import load_tokenizer

    config = compose("data=gsm8k", f"data.train_files=[{GSM8K}]", "data.eval_rows=1000")
    rows = prepare_evaluation(config.data, load_tokenizer(config.model))
    assert config.data.facts.tokens_per_row == pytest.approx(
        sum(rows.lengths) / len(rows), rel=0.06
    )
    assert config.data.facts.supervised == pytest.approx(
        sum(rows.supervised) / sum(rows.lengths), abs=0.02
    )


def test_problems_of_a_task_are_counted_or_known_or_need_a_limit(compose, write_jsonl):
    def problems(name: str, *overrides: str) -> int:
        config = compose(
            "+recipe=logistic_map", f"train.tasks=[{name}]", *overrides, command="plan"
        )
        return count_problems(name, config, data_size(config.data))

    assert problems("gsm8k", "train.tasks_limit=30") == 30
    assert problems("gsm8k", "train.tasks_limit=9999") == 1_319
    assert problems("math_hard", "train.tasks_limit=5000") == 1_324
    assert problems("gsm8k", "train.task_settings={gsm8k: {split: train, limit: null}}") == 7_473
    assert problems("held_out", "data=gsm8k") == 50  # of rows that are on the Hub
    assert problems("logistic_map", "train.tasks_limit=15") == 15
    assert problems("math500") == 50
    path = write_jsonl("test.jsonl", [{"question": "a" * 28, "answer": "#### 1"}] * 7)
    assert problems("gsm8k", f"train.task_settings={{gsm8k: {{files: ['{path}']}}}}") == 7
    with pytest.raises(
        ValueError,
        match=r"train.tasks=\[math500\]: the number of its problems is unknown: set train",
    ):
        problems("math500", "train.task_settings={math500: {limit: null}}")
