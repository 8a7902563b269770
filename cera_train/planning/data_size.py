"""How many rows and tokens a run has: from data.facts, by computing the rows, or by counting local files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import config_dir, read_yaml
from cera_train.data.order import PartRows, rows_of_parts
from cera_train.settings.data import DataConfig, DataFacts, Layout, LogisticMapConfig, LossOn

CHARACTERS_PER_TOKEN = 3.5
"""Estimate for local rows, which are not tokenised here. With SmolLM2's tokenizer a token has 2.8 characters on GSM8K,
which is full of digits, and 4.2 on OpenOrca."""

PIECES = re.compile(r"\d|[^\W\d_]+|[^\w\s]|\n")
"""Digits, words and signs. The questions of generators have 0.8 to 1.05 of them for each token of SmolLM2's tokenizer,
which splits numbers into digits; only a cipher's words have fewer."""

SAMPLE_ROWS, FEW_ROWS = 1000, 100
"""Rows whose tokens are estimated, and rows of a generator, which may take milliseconds for one."""

COUNTED = "by SmolLM2's tokenizer"


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
    parts: tuple[PartRows, ...] = ()
    """The parts of a mix."""
    eval_tokens: float | None = None
    """Tokens of all evaluation rows. None: they are as long as the training rows."""

    @property
    def tokens_per_eval_row(self) -> float:
        return self.tokens_per_row if self.eval_tokens is None else self.eval_tokens / self.eval_rows


def is_known(config: DataConfig) -> bool:
    """Whether the number of rows is known: from facts, local files, or because rows are computed."""
    return facts_of(config) is not None or bool(config.train_files) or config.is_computed


def facts_of(config: DataConfig) -> DataFacts | None:
    """The facts of a data set of the Hub: its own, or those in a file of conf/data."""
    if config.facts is not None and config.facts.of == config.path:
        return config.facts
    return None if config.path is None else facts_at(config.path)


def facts_at(path: str) -> DataFacts | None:
    """The facts of a data set of the Hub that a file of conf/data has."""
    files = map(read_yaml, sorted((config_dir("conf") / "data").glob("*.yaml")))
    matching = (file["facts"] for file in files if file.get("facts", {}).get("of") == path)
    return next((DataFacts(**facts) for facts in matching), None)


def data_size(config: DataConfig, tokens_per_row: float | None = None) -> DataSize:
    """The rows and tokens of a data set, by its facts, or by counting local files.

    Args:
        tokens_per_row: overrides what is found.

    Raises:
        UserError: nothing is known about `data.path`, or local files cannot be read.
    """
    if config.mix is not None:
        return _size_of_mix(config, tokens_per_row)
    if config.is_computed or config.train_files:
        size = _size_of_rows(config)
    elif (facts := facts_of(config)) is not None:
        size = DataSize(
            _sliced(config.train_split, facts.train_rows),
            _sliced(config.eval_split, facts.eval_rows),
            facts.tokens_per_row,
            facts.supervised,
            "an estimate" if facts.estimated else COUNTED,
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
        eval_rows=size.eval_rows if config.eval_rows is None else min(size.eval_rows, config.eval_rows),
        tokens_per_row=min(size.tokens_per_row, config.max_length),
        supervised=1.0 if config.loss_on == LossOn.all else size.supervised,
    )


def _size_of_mix(config: DataConfig, tokens_per_row: float | None) -> DataSize:
    sizes = []
    for place, part in config.parts():
        with errors_at(place):
            sizes.append((part.title, data_size(part, tokens_per_row)))
    counts = rows_of_parts([size.train_rows for _, size in sizes], config.weights, config.train_rows)
    parts = tuple(
        PartRows(title, size.train_rows, count, count * size.tokens_per_row, size.eval_rows)
        for (title, size), count in zip(sizes, counts, strict=True)
    )
    tokens = sum(part.tokens for part in parts)
    return DataSize(
        sum(counts),
        sum(part.eval_rows for part in parts),
        tokens / sum(counts),
        sum(part.tokens * size.supervised for part, (_, size) in zip(parts, sizes, strict=True)) / tokens,
        "; ".join(dict.fromkeys(size.source for _, size in sizes)),
        parts=parts,
        eval_tokens=sum(size.eval_rows * size.tokens_per_row for _, size in sizes),
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


def _size_of_rows(config: DataConfig) -> DataSize:
    """Counts computed rows or those of local files, and estimates the tokens of the first ones."""
    from cera_train.data.segments import segmenter, segments_of
    from cera_train.data.sources import open_sources

    is_generated = config.layout == Layout.reasoning_gym  # as many as the settings say, and slow to make
    few = replace(config, train_rows=min(FEW_ROWS, config.train_rows), eval_rows=1) if is_generated else config
    train, evaluation = open_sources(few)
    lengths, tokens, supervised = [], 0.0, 0.0
    for segments in segments_of(train.between(0, SAMPLE_ROWS).located(), segmenter(config, tokenizer=None)):
        counts = [(estimate_tokens(segment.text, config.is_computed), segment.supervised) for segment in segments]
        if counts:
            length, answers = sum(count for count, _ in counts), sum(count for count, counted in counts if counted)
            kept = min(length, config.max_length)
            lengths.append(length)
            tokens, supervised = tokens + kept, supervised + max(0.0, kept - (length - answers))
    if not tokens:
        raise UserError(f"{train.name}: no row to train on has an answer. Check columns, templates, data.eval_rows.")
    size = DataSize(
        config.train_rows if is_generated else sum(1 for _ in train.located()),
        config.eval_rows if is_generated else sum(1 for _ in evaluation.located()),
        tokens / len(lengths),
        supervised / tokens,
        "an estimate" + (": a token for each word, digit and sign" if config.is_computed else " by characters"),
        is_even=len(set(lengths)) == 1,
    )
    if config.facts is not None and config.logistic_map == LogisticMapConfig():
        return replace(
            size, tokens_per_row=config.facts.tokens_per_row, supervised=config.facts.supervised, source=COUNTED
        )
    return size


def estimate_tokens(text: str, is_computed: bool) -> float:
    return len(PIECES.findall(text)) if is_computed else len(text) / CHARACTERS_PER_TOKEN
