"""How many rows and tokens a run trains on, and how many problems its tasks have: by data.facts, by
computing them, or by counting local files."""

import math
import re
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import config_dir, read_yaml
from cera_train.data.chats import may_use_template, uses_template
from cera_train.data.prepare import check_overlap, encode
from cera_train.data.rows import Source
from cera_train.data.segments import Segment, prompt_of, segmenter, segmenters, sequences_of
from cera_train.data.sources import open_sources, rows_of_parts
from cera_train.evaluation.tasks.task import load_problems, training_task
from cera_train.settings.data import DataConfig, DataFacts, Layout, LogisticMapConfig, LossOn
from cera_train.settings.run import Config

PIECES = re.compile(r"\d|[^\W\d_]{1,8}|[^\w\s]|\n")
"""Digits, up to eight letters of a word, and signs: an estimate of tokens, for rows that are not
tokenised here. Pieces per token of SmolLM2: 0.99 on GSM8K, 0.95 to 1.12 in prose and code."""

SAMPLE_ROWS = 1000
"""Rows whose tokens are estimated."""

PROBLEMS_OF_LEVEL = {1: 437, 2: 894, 3: 1131, 4: 1214, 5: 1324}
"""MATH's test problems: no other task of the Hub has levels."""

COUNTED = "by SmolLM2's tokenizer"
ESTIMATED = "an estimate"
BY_TEMPLATE = "by the model's chat template"
WITHOUT_TEMPLATE = (
    "an estimate without the model's chat template, which adds tokens: set plan.tokens_per_row"
)


@dataclass(frozen=True)
class DataSize:
    """How much there is to train and to evaluate on."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float
    supervised: float  # share of the tokens whose prediction counts in the loss
    source: str  # where the number of tokens comes from, in words
    is_even: bool = False  # whether all rows have the same length
    prompt_tokens: float = 0.0  # of a row, whatever the loss counts
    sequences_per_row: float = 1.0  # `train_rows` and `eval_rows` count sequences


def data_size(
    config: DataConfig,
    tokens_per_row: float | None = None,
    tokenizer: Any = None,
    asks: bool = False,
) -> DataSize:
    """The rows and tokens of a data set.

    Args:
        tokens_per_row: overrides what is known.
        tokenizer: the model's, if it is at hand, for the rows that its chat template writes.
        asks: as of `chats.chat_exchanges`.

    Raises:
        UserError: nothing is known about `data.path`, or local files cannot be read.
    """
    if config.mix is not None:
        return _size_of_mix(config, tokens_per_row, tokenizer, asks)
    if config.is_computed or config.train_files:
        size = _size_of_rows(config, tokenizer, asks)
    elif (facts := facts_of(config.path, config.facts)) is not None:
        size = _size_by_facts(config, facts)
    elif None not in (config.train_rows, config.eval_rows, tokens_per_row):
        size = DataSize(config.train_rows, config.eval_rows, tokens_per_row, 1.0, "")
    else:
        raise UserError(
            f"data.path={config.path}: its size is unknown. Set data.train_rows, data.eval_rows "
            "and plan.tokens_per_row, or write data.facts for it in a file of conf/data."
        )
    if tokens_per_row is not None:
        size = replace(size, tokens_per_row=tokens_per_row, source="plan.tokens_per_row")
    size = replace(size, tokens_per_row=min(size.tokens_per_row, config.max_length))
    supervised = 1.0 if config.loss_on == LossOn.all else size.supervised
    return replace(size, supervised=supervised, prompt_tokens=_prompt_tokens(size))


def facts_of(path: str, facts: DataFacts | None = None) -> DataFacts | None:
    """The facts about a data set of the Hub: the given ones if they describe it, else those in a
    file of conf/data."""
    if facts is not None and facts.of == path:
        return facts
    for file in sorted((config_dir("conf") / "data").glob("*.yaml")):
        known = read_yaml(file).get("facts", {})
        if known.get("of") == path:
            return DataFacts(**known)
    return None


def trained_size(config: Config, data: DataSize) -> DataSize:
    """The size of what updates train on: the rows, or prompts with sampled answers, each as long
    as allowed.

    Args:
        data: the size of the rows.
    """
    if not config.work.answers:
        return data
    tokens = data.prompt_tokens + config.work.answer_tokens
    return replace(
        data, tokens_per_row=tokens, supervised=config.work.answer_tokens / tokens, is_even=False
    )


def check_prompts(config: DataConfig) -> None:
    """Raises UserError where a run would refuse held-out prompts that it trains on. Only plain rows
    of local files are checked: others take a tokenizer or a download."""
    if config.mix is not None or not config.train_files or may_use_template(config):
        return
    if config.holds_out_by_prompt or config.allow_overlap:
        return
    to_sequences = segmenter(config, None)

    def prompts(source: Source) -> list[str]:
        rows = sequences_of(source.located(), to_sequences)
        return [prompt_of(sequences[0]) for sequences in rows if sequences]

    train, held_out = map(prompts, open_sources(config))
    check_overlap(config, set(train), held_out)


def _prompt_tokens(rows: DataSize) -> float:
    """Tokens of a row outside its completions; of the whole row where no prompt is known."""
    return rows.tokens_per_row * (1 - round(rows.supervised, 6)) or rows.tokens_per_row


def _size_of_mix(
    config: DataConfig, tokens_per_row: float | None, tokenizer: Any, asks: bool
) -> DataSize:
    sizes: list[DataSize] = []
    for place, part in config.parts():
        with errors_at(place):
            sizes.append(data_size(part, tokens_per_row, tokenizer, asks))
    available = [round(size.train_rows / size.sequences_per_row) for size in sizes]
    counts = rows_of_parts(available, config.weights, config.train_rows)
    rows = [
        round(count * size.sequences_per_row) for count, size in zip(counts, sizes, strict=True)
    ]
    tokens = 0.0
    supervised = 0.0
    prompt_tokens = 0.0
    for count, size in zip(rows, sizes, strict=True):
        tokens += count * size.tokens_per_row
        supervised += count * size.tokens_per_row * size.supervised
        prompt_tokens += count * size.prompt_tokens
    return DataSize(
        train_rows=sum(rows),
        eval_rows=sum(size.eval_rows for size in sizes),
        tokens_per_row=tokens / sum(rows),
        supervised=supervised / tokens,
        source="; ".join(dict.fromkeys(size.source for size in sizes)),
        prompt_tokens=prompt_tokens / sum(rows),
    )


def _size_by_facts(config: DataConfig, facts: DataFacts) -> DataSize:
    train_rows = _sliced(config.train_split, facts.train_rows)
    evaluated = facts.train_rows if _evaluates_on_training_split(config) else facts.eval_rows
    eval_rows = _sliced(config.eval_split, evaluated)
    return DataSize(
        train_rows if config.train_rows is None else min(train_rows, config.train_rows),
        eval_rows if config.eval_rows is None else min(eval_rows, config.eval_rows),
        facts.tokens_per_row,
        facts.supervised,
        ESTIMATED if facts.estimated else COUNTED,
    )


def _evaluates_on_training_split(config: DataConfig) -> bool:
    return _name_of(config.train_split) == _name_of(config.eval_split)


def _name_of(split: str) -> str:
    """`train` of train[:1000]."""
    return re.match(r"\w*", split)[0]


def _sliced(split: str, rows: int) -> int:
    """Rows of a slice such as train[:100000] or test[:10%]. Raises UserError for any other form."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({_name_of(split): rows})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"data split {split!r}: cera-plan reads splits such as train or train[:1000]. Use one "
            "of that form."
        ) from error
    return sum(part.to - part.from_ for part in parts)


def _size_of_rows(config: DataConfig, tokenizer: Any, asks: bool) -> DataSize:
    """Counts computed rows or those of local files, and estimates the tokens of the first ones;
    those of chats are counted, if the tokenizer is at hand."""
    train, evaluation = open_sources(config)
    sampled = 0
    answered = 0
    kept_rows = 0
    kept_sequences = 0
    lengths: list[float] = []  # of sequences, or of the windows of a document
    supervised = 0.0
    by_template = uses_template(config, tokenizer)
    to_sequences = segmenters(config, tokenizer if by_template else None, asks)
    for sequences in sequences_of(train.first(SAMPLE_ROWS).located(), *to_sequences):
        sampled += 1
        answered += bool(sequences)
        if by_template:
            measured = _tokens(sequences, config, tokenizer, asks)
        else:
            measured = [_estimated_tokens(sequence, config) for sequence in sequences]
        kept_rows += bool(measured)  # training drops rows without an answer
        kept_sequences += len(measured)
        for sequence_lengths, sequence_supervised in measured:
            lengths += sequence_lengths
            supervised += sequence_supervised
    if not sum(lengths):
        raise UserError(
            f"{train.name}: no row to train on has an answer. Check columns, templates, "
            "data.max_length, data.eval_rows."
        )

    train_rows = round(len(lengths) / sampled * sum(1 for _ in train.located()))
    eval_rows = round(len(lengths) / answered * sum(1 for _ in evaluation.located()))
    if by_template:
        source = BY_TEMPLATE
    elif tokenizer is None and may_use_template(config):
        source = WITHOUT_TEMPLATE
    else:
        source = ESTIMATED
    size = DataSize(
        train_rows,
        eval_rows,
        fmean(lengths),
        supervised / sum(lengths),
        source,
        is_even=len(set(lengths)) == 1,
        sequences_per_row=kept_sequences / kept_rows,
    )
    is_default = config.layout == Layout.logistic_map and config.logistic_map == LogisticMapConfig()
    if config.facts is not None and is_default and not by_template:
        tokens = config.facts.tokens_per_row
        supervised = config.facts.supervised
        return replace(size, tokens_per_row=tokens, supervised=supervised, source=COUNTED)
    return size


def _tokens(
    sequences: list[list[Segment]], config: DataConfig, tokenizer: Any, asks: bool
) -> list[tuple[list[float], float]]:
    """The length of each sequence of a row that training keeps, and its supervised tokens."""
    examples = encode([sequences], config, tokenizer) if sequences else []
    return [
        ([len(example.input_ids)], sum(example.loss_mask))
        for example in examples
        if example.has_answer and not (asks and example.truncated)
    ]


def _estimated_tokens(segments: list[Segment], config: DataConfig) -> tuple[list[float], float]:
    """An estimate of a sequence's length, or of those of a document's windows, and of its
    supervised tokens."""
    tokens = 0
    prompt = 0
    for segment in segments:
        count = len(PIECES.findall(segment.text))
        tokens += count
        if not segment.supervised:
            prompt += count
    windows = 1
    if config.layout == Layout.documents:
        windows = math.ceil(tokens / config.max_length)
    length = min(tokens, windows * config.max_length)
    return [length / windows] * windows, max(0.0, length - prompt)


def count_problems(name: str, config: Config, data: DataSize) -> int:
    """The number of problems of one of `train.tasks`. Local files are read and computed problems
    made; for a task of the Hub the facts about its rows count.

    Raises:
        UserError: the number is neither known nor limited.
    """
    task = training_task(name, config.train.changes_of_task(name))
    settings = task.config
    place = f"train.tasks=[{name}]"
    loads_rows = any(part.path and not part.train_files for _, part in config.data.parts())
    if settings.kind == "held_out" and loads_rows:  # held-out rows, which a plan does not load
        return min(data.eval_rows, settings.limit or data.eval_rows)
    if settings.files or settings.path is None:
        with errors_at(place):
            return len(load_problems(task, config.trained_rows))

    counts = []
    if settings.limit is not None:
        counts.append(settings.limit)
    facts = facts_of(settings.path)
    if facts is not None:
        is_train = settings.split.startswith("train")
        rows = facts.train_rows if is_train else facts.eval_rows
        counts.append(PROBLEMS_OF_LEVEL.get(settings.level, rows))
    if not counts:
        raise UserError(
            f"{place}: the number of its problems is unknown: set "
            f"train.task_settings.{name}.limit, or task files."
        )
    return min(counts)
