"""How many rows and tokens a run has: from data.facts, by computing the rows, or by counting local files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cera_train.common.errors import UserError
from cera_train.data.config import DataConfig, Layout, LogisticMapConfig, LossOn

CHARACTERS_PER_TOKEN = 3.5
"""Estimate for local rows, which are not tokenised here. With SmolLM2's tokenizer a token has 2.8 characters on GSM8K,
which is full of digits, and 4.2 on OpenOrca."""

SAMPLE_ROWS = 1000
"""Local rows whose characters are counted."""


@dataclass(frozen=True)
class DataSize:
    """How much there is to train and to evaluate on."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float
    supervised: float
    """Share of the tokens whose prediction counts in the loss."""
    source: str
    """Where the number of tokens comes from, for people."""
    is_even: bool = False
    """All rows have the same length."""


def is_known(config: DataConfig) -> bool:
    """Whether the number of rows is known: from data.facts, local files, or because rows are computed."""
    has_facts = config.facts is not None and config.facts.of == config.path
    return has_facts or bool(config.train_files) or config.layout == Layout.logistic_map


def data_size(config: DataConfig, tokens_per_row: float | None = None) -> DataSize:
    """The rows and tokens of a data set, by its facts, or by counting local files.

    Args:
        tokens_per_row: overrides what is found.

    Raises:
        UserError: nothing is known about `data.path`, or local files cannot be read.
    """
    if config.layout == Layout.logistic_map:
        size = _logistic_map_size(config)
    elif config.train_files:
        size = _size_of_files(config)
    elif is_known(config):
        facts = config.facts
        size = DataSize(
            _sliced(config.train_split, facts.train_rows),
            _sliced(config.eval_split, facts.eval_rows),
            facts.tokens_per_row,
            facts.supervised,
            "an estimate" if facts.estimated else "by SmolLM2's tokenizer",
        )
    elif None not in (config.train_rows, config.eval_rows, tokens_per_row):
        size = DataSize(config.train_rows, config.eval_rows, tokens_per_row, 1.0, "")
    else:
        raise UserError(
            f"data.path={config.path}: its size is unknown. Set data.train_rows, data.eval_rows and "
            "plan.tokens_per_row, or write data.facts for it in a file of conf/data."
        )
    if tokens_per_row is not None:
        size = replace(size, tokens_per_row=tokens_per_row, source="plan.tokens_per_row")
    return replace(
        size,
        train_rows=min(size.train_rows, config.train_rows or size.train_rows),
        eval_rows=min(size.eval_rows, config.eval_rows or size.eval_rows),
        tokens_per_row=min(size.tokens_per_row, config.max_length),
        supervised=1.0 if config.loss_on == LossOn.all else size.supervised,
    )


def _sliced(split: str, rows: int) -> int:
    """Rows of a split in the notation of `datasets`, such as train[:100000] or test[:10%].

    Raises:
        UserError: it is more than one slice of one split.
    """
    match = re.fullmatch(r"\w+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if match is None:
        raise UserError(
            f"data split {split!r}: cera-plan reads splits such as train or train[:1000]. Use one of that form."
        )
    start, end = (
        None if bound is None else round(rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
        for bound in match.groups()
    )
    return len(range(rows)[start:end])


def _logistic_map_size(config: DataConfig) -> DataSize:
    from cera_train.data import logistic_map

    train, evaluation = logistic_map.problems(config.logistic_map, config.eval_rows)
    characters = sum(map(len, train[0].values()))
    if config.facts is None:
        tokens, supervised, source = characters / CHARACTERS_PER_TOKEN, 0.5, "by their characters"
    else:
        usual = sum(map(len, logistic_map.problem(0.5, LogisticMapConfig()).values()))
        is_usual = characters == usual
        tokens, supervised = config.facts.tokens_per_row * characters / usual, config.facts.supervised
        source = "by SmolLM2's tokenizer" if is_usual else "by their characters"
    return DataSize(len(train), len(evaluation), tokens, supervised, source, is_even=True)


def _size_of_files(config: DataConfig) -> DataSize:
    """Counts all rows, and the characters of the first ones."""
    from cera_train.data.files import from_files
    from cera_train.data.segments import segmenter, segments_of

    tokens = supervised = used = 0.0
    rows = from_files(config.train_files, "data.train_files").head(SAMPLE_ROWS).located()
    for segments in segments_of(rows, segmenter(config, tokenizer=None)):
        if segments:
            length = sum(len(segment.text) for segment in segments) / CHARACTERS_PER_TOKEN
            answers = sum(len(segment.text) for segment in segments if segment.supervised) / CHARACTERS_PER_TOKEN
            kept = min(length, config.max_length)
            tokens, used = tokens + kept, used + 1
            supervised += max(0.0, kept - (length - answers))
    if not used:
        raise UserError(
            f"data.train_files={', '.join(config.train_files)}: no row has an answer. Check the columns and templates."
        )
    train_rows, eval_rows = _count_rows(config.train_files), _count_rows(config.eval_files)
    if not config.eval_files:
        eval_rows = config.eval_rows
        if eval_rows >= train_rows:
            raise UserError(
                f"data.eval_rows={eval_rows} leaves nothing to train on: data.train_files has {train_rows} rows."
            )
        train_rows -= eval_rows
    source = f"an estimate: {CHARACTERS_PER_TOKEN} characters a token"
    return DataSize(train_rows, eval_rows, tokens / used, supervised / tokens, source)


def _count_rows(names: list[str]) -> int:
    from cera_train.data.files import from_files

    rows = 0
    for name in names:
        if name.endswith(".jsonl"):
            with open(name, "rb") as file:
                rows += sum(bool(line.strip()) for line in file)
        else:
            rows += sum(1 for _ in from_files([name]).read())
    return rows
