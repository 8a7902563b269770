"""Rows in every layout, configs that name them, the example made of a row; and a cache for each
test."""

import copy
import itertools
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cera_train.data import rows as data_rows
from cera_train.data.prepare import TokenizedRows
from cera_train.data.reader import Example, Question, Reader
from cera_train.settings.data import DataConfig

TRAIN = [{"question": f"what is {number}?", "answer": f"it is {number}"} for number in range(6)]
EVALUATION = [
    {"question": f"next to {number}?", "answer": f"it is {number}"} for number in range(3)
]

QUESTION_AND_ANSWER = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}

CONVERSATION = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "hello there", "weight": 1.0},
        {"from": "human", "value": "next?"},
        {"from": "gpt", "value": "0.84"},
    ]
}

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
CHAT = {
    "messages": [
        {"role": ROLES[turn["from"]], "content": turn["value"]}
        for turn in CONVERSATION["conversations"]
    ]
}


def data_config(**settings) -> DataConfig:
    return DataConfig(
        **({"train_files": ["t.jsonl"], "eval_files": ["e.jsonl"]} | QUESTION_AND_ANSWER | settings)
    )


def examples_of(row: dict, tokenizer, **settings) -> list[Example]:
    return Reader(data_config(**settings), tokenizer).examples([("a row", row)])


def example_of(row: dict, tokenizer, **settings) -> Example:
    return examples_of(row, tokenizer, **settings)[0]


def questions_of(row: dict, tokenizer, **settings) -> list[Question]:
    return Reader(data_config(**settings), tokenizer).questions("a row", row)


def with_changes(tokenizer: PreTrainedTokenizerFast, **changes) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def supervised_text(example: Example, tokenizer) -> str:
    """The supervised tokens as text, with a bar between stretches."""
    stretches = itertools.groupby(
        zip(example.input_ids, example.loss_mask, strict=True), key=lambda token: token[1]
    )
    return "|".join(
        tokenizer.decode([id for id, _ in tokens]) for counts, tokens in stretches if counts
    )


def texts_of(rows: TokenizedRows, tokenizer) -> list[str]:
    texts = [
        tokenizer.decode(rows.tokens("input_ids", row).to_pylist()) for row in range(len(rows))
    ]
    return [text.removeprefix("<s>").removesuffix("</s>") for text in texts]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of tokenised rows in an empty cache."""
    monkeypatch.setenv("CERA_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def config_of(write_jsonl):
    """config_of(train rows, held-out rows, **settings) -> DataConfig"""

    def config_of(train: list = TRAIN, evaluation: list = EVALUATION, **settings) -> DataConfig:
        names = {
            "train_files": [str(write_jsonl("train.jsonl", train))],
            "eval_files": [str(write_jsonl("eval.jsonl", evaluation))] if evaluation else [],
        }
        return DataConfig(**(QUESTION_AND_ANSWER | names | settings))

    return config_of


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files whose rows were read, in order."""
    names: list[str] = []
    read = data_rows.READERS[".jsonl"]
    monkeypatch.setitem(
        data_rows.READERS, ".jsonl", lambda path: names.append(Path(path).name) or read(path)
    )
    return names
