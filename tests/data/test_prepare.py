"""Rows of both splits: token ids, counts, what is dropped, prompts in both splits, and the
cache."""

import copy
import random
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from examples import EVALUATION, TRAIN

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data, prepare_evaluation
from cera_train.settings.data import DataConfig

pytest_plugins = ["examples"]
pytestmark = pytest.mark.usefixtures("cache")


def test_rows_are_read_from_disk_when_they_are_used(config_of, tokenizer, cache, capsys):
    rows = [
        {"question": f"what is {number}?", "answer": "it is so " * 20} for number in range(3000)
    ]
    config = config_of(rows)
    prepare_data(config, tokenizer)
    assert capsys.readouterr().err.count(", once: it has more than 1,000 rows\n") == 1
    before = pyarrow.total_allocated_bytes()
    train = prepare_data(config, tokenizer).train
    assert pyarrow.total_allocated_bytes() - before < train.table.nbytes / 100
    [file] = cache.glob(f"{train.digest}/**/*.arrow")
    assert file.stat().st_size > train.table.nbytes


def test_batched_tokens_equal_the_tokenizers_own_and_rows_without_an_answer_are_dropped(
    config_of, tokenizer, monkeypatch
):
    monkeypatch.setattr("cera_train.data.prepare.ROWS_AT_ONCE", 7)
    words = ["what", "is", "the", "next", "value", "0.84", "Ünï", "数"]
    draw = random.Random(0).choices
    rows = [
        {
            "question": " ".join(draw(words, k=1 + number % 9)),
            "answer": " ".join(draw(words, k=1 + number % 5)),
        }
        for number in range(50)
    ]
    silent = [{"question": "a", "answer": answer} for answer in ("", None)]
    config = config_of([*rows[:5], *silent, *rows[5:]], max_length=30, allow_overlap=True)
    train = prepare_data(config, tokenizer).train
    assert (len(train), train.dropped) == (50, (2, 0))
    for number, row in enumerate(rows):
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = [
            *tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        assert train.tokens("input_ids", number).to_pylist() == [*prompt, *answer][:30]
        assert (
            train.tokens("loss_mask", number).to_pylist()
            == [*[False] * len(prompt), *[True] * len(answer)][:30]
        )


def test_truncated_dropped_and_kept_rows_are_counted(config_of, tokenizer):
    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = 1 + length("Question: a\nAnswer:")
    fits = prompt + length(" it is 0.84") + 1
    rows = [
        {"question": "a", "answer": "it is 0.84"},  # fits to the token
        {"question": "a", "answer": "it is 0.841"},  # cut: no end token
        {"question": "a" * (fits - prompt + 1), "answer": "it"},  # its whole answer lies beyond
        {"question": "a", "answer": " \n"},
    ]
    train = prepare_data(config_of(rows, max_length=fits), tokenizer).train
    assert train.describe() == (
        f"2 rows, {2 * fits} tokens, {(fits - prompt) / fits:.0%} supervised; 2 dropped (1 empty, "
        "1 beyond max_length), 1 truncated"
    )
    whole, cut = train.column("input_ids")
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut
    assert train.column("length") == [fits, fits]
    assert train.column("supervised") == [fits - prompt, fits - prompt]
    every = prepare_data(config_of(rows, max_length=fits, loss_on="all"), tokenizer).train
    assert (every.dropped, every.column("supervised")) == ((1, 1), [fits - 1, fits - 1])


def test_a_prompt_in_both_splits_is_an_error_unless_allowed(config_of, tokenizer):
    same_prompts = [{"question": row["question"], "answer": "another"} for row in TRAIN[:2]]
    dropped = {"question": TRAIN[3]["question"], "answer": ""}
    evaluation = [*EVALUATION, *same_prompts, dropped]
    with pytest.raises(
        UserError, match="train.jsonl: 2 of 5 held-out prompts are also training .*overlap=true"
    ):
        prepare_data(config_of(evaluation=evaluation), tokenizer)
    assert (
        prepare_data(config_of(evaluation=evaluation, allow_overlap=True), tokenizer).shared_prompts
        == 2
    )
    nearly = [{"question": row["question"] + " ", "answer": row["answer"]} for row in TRAIN]
    assert prepare_data(config_of(evaluation=nearly), tokenizer).shared_prompts == 0


def test_the_same_rows_come_from_the_cache_even_from_another_path(
    config_of, tokenizer, reads, cache, tmp_path, monkeypatch
):
    # Make its import fail: it takes half a second.
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = config_of(evaluation=[], eval_rows=2)
    first = prepare_data(config, tokenizer)
    assert len(reads) == 3  # to count the rows, and once for each split
    config.train_files = [str(Path(config.train_files[0]).rename(tmp_path / "moved.jsonl"))]
    config.allow_overlap = True
    padding = copy.deepcopy(tokenizer)  # pads and truncates by itself
    padding.backend_tokenizer.enable_padding(length=64)
    padding.backend_tokenizer.enable_truncation(max_length=5)
    for file in cache.glob("*/rows.arrow"):
        table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
        opened = table.append_column("opening", [[""] * len(table)])  # as 0.2.0 wrote it
        file.unlink()  # `first` reads it
        with pyarrow.ipc.new_stream(str(file), opened.schema) as writer:
            writer.write_table(opened)
    again = prepare_data(config, copy.deepcopy(tokenizer))
    assert len(reads) == 3
    for one, other in ((first.train, again.train), (first.evaluation, again.evaluation)):
        assert one.digest == other.digest
        assert one.table.to_pylist() == other.table.to_pylist()
    padded = prepare_data(config, padding)
    assert padded.train.table.to_pylist() == first.train.table.to_pylist()
    assert padded.train.digest == first.train.digest  # its first call would change it


@pytest.mark.parametrize(
    "change",
    [
        {"train": [*TRAIN[:-1], {"question": "what is 5?", "answer": "it is five"}]},
        {"prompt": "Question: {question}\nSolution:"},
        {"max_length": 511},
        {"loss_on": "all"},
    ],
    ids=str,
)
def test_settings_that_change_tokens_get_another_cache_entry(config_of, tokenizer, reads, change):
    before = prepare_data(config_of(), tokenizer).train
    after = prepare_data(config_of(**change), tokenizer).train
    assert before.digest != after.digest
    assert reads.count("train.jsonl") == 2
    assert before.table.to_pylist() != after.table.to_pylist() or change == {"max_length": 511}


def test_chosen_answers_are_no_conversations_of_the_same_file(write_jsonl, tokenizer):
    asked = {"role": "user", "content": "1 + 1?"}
    sides = {
        side: [asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    row = {"messages": [asked, {"role": "assistant", "content": "2"}]} | sides
    file = str(write_jsonl("rows.jsonl", [row] * 3))
    plain = DataConfig(
        train_files=[file], eval_rows=1, layout="messages", chat="plain", turns="last"
    )
    paired = replace(plain, rejected="rejected")
    [said, chosen] = [
        prepare_evaluation(config, tokenizer).table.column("input_ids")[0].as_py()
        for config in (plain, paired)
    ]
    assert tokenizer.decode(said).endswith("2</s>")
    assert tokenizer.decode(chosen).endswith("chosen</s>")


def test_a_broken_file_of_the_cache_is_named(config_of, tokenizer, cache):
    prepare_data(config_of(), tokenizer)
    for file in cache.glob("*/rows.arrow"):
        file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(
        UserError, match=r"rows.arrow is broken: .*\. Remove .*: it is written anew"
    ):
        prepare_data(config_of(), tokenizer)


def test_another_tokenizer_gets_another_cache_entry(config_of, tokenizer):
    from tokenizers.processors import TemplateProcessing

    without_start, with_token, with_template, with_end = (
        copy.deepcopy(tokenizer) for _ in range(4)
    )
    without_start.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", special_tokens=[]
    )
    with_token.add_tokens(["what is"])
    with_template.chat_template += " "
    with_end.eos_token = "<|im_end|>"
    tokenizers = [tokenizer, without_start, with_token, with_template, with_end]
    splits = [prepare_data(config_of(), each).train for each in tokenizers]
    assert len({split.digest for split in splits}) == 5
    rows = [split.column("input_ids") for split in splits]
    assert [each == rows[0] for each in rows] == [True, False, False, True, False]
