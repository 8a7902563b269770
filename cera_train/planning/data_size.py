"""How many rows and tokens a run trains on, and how many problems its tasks have: by data.facts, by
plan.tokens_per_row, or by the run's own reader for rows that are on this machine."""

import re
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import config_dir, read_yaml
from cera_train.data.chats import may_use_template
from cera_train.data.prepare import check_overlap, encode
from cera_train.data.rows import Source
from cera_train.data.segments import prompt_of, segmenter, segmenters, sequences_of
from cera_train.data.sources import open_sources, rows_of_parts
from cera_train.evaluation.tasks.task import load_problems, training_task
from cera_train.settings.data import DataConfig, DataFacts, Layout, LogisticMapConfig, LossOn
from cera_train.settings.run import Config

SAMPLE_ROWS = 1000
"""Rows whose tokens are counted."""

PROBLEMS_OF_LEVEL = {1: 437, 2: 894, 3: 1131, 4: 1214, 5: 1324}
"""MATH's test problems: no other task of the Hub has levels."""

COUNTED = "by SmolLM2's tokenizer"
ESTIMATED = "an estimate"
BY_READER = "by the model's tokenizer"
BY_SETTING = "plan.tokens_per_row"


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
        tokenizer: the model's; needed where `takes_tokenizer`.
        asks: as of `chats.chat_exchanges`.

    Raises:
        UserError: nothing is known about `data.path`, or local files cannot be read.
    """
    if config.mix is not None:
        return _size_of_mix(config, tokens_per_row, tokenizer, asks)
    if tokens_per_row is None and takes_tokenizer(config):
        size = _size_by_reader(config, tokenizer, asks)
    else:
        size = _size_by_facts(config, tokens_per_row)
    size = replace(size, tokens_per_row=min(size.tokens_per_row, config.max_length))
    supervised = 1.0 if config.loss_on == LossOn.all else size.supervised
    return replace(size, supervised=supervised, prompt_tokens=_prompt_tokens(size))


def takes_tokenizer(config: DataConfig) -> bool:
    """Whether rows of this machine are read for their size, since no facts describe them."""
    if config.mix is not None:
        return any(takes_tokenizer(part) for _, part in config.parts())
    return _is_here(config) and _facts_about(config) is None


def _is_here(config: DataConfig) -> bool:
    return config.is_computed or bool(config.train_files)


def _facts_about(config: DataConfig) -> DataFacts | None:
    """The facts that describe the rows of a config. Those of computed rows are of the default ones,
    without a chat template."""
    if config.train_files:
        return None
    if not config.is_computed:
        return facts_of(config.path, config.facts)
    is_described = config.logistic_map == LogisticMapConfig() and not may_use_template(config)
    return facts_of(config.layout, config.facts) if is_described else None


def facts_of(path: str, facts: DataFacts | None = None) -> DataFacts | None:
    """The facts about a data set: the given ones if they describe it, else those in a file of
    conf/data.

    Args:
        path: a `data.path`, or the layout of computed rows.
    """
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


def _size_by_facts(config: DataConfig, tokens_per_row: float | None) -> DataSize:
    """The size without a tokenizer. Rows of this machine are counted, also those without an
    answer."""
    facts = _facts_about(config)
    train_rows = config.train_rows
    eval_rows = config.eval_rows
    supervised = 1.0
    source = BY_SETTING
    if _is_here(config):
        train_rows, eval_rows = (sum(1 for _ in rows.located()) for rows in open_sources(config))
    elif facts is not None:
        evaluated = facts.train_rows if _evaluates_on_training_split(config) else facts.eval_rows
        known = _sliced(config.train_split, facts.train_rows)
        train_rows = known if train_rows is None else min(known, train_rows)
        known = _sliced(config.eval_split, evaluated)
        eval_rows = known if eval_rows is None else min(known, eval_rows)
    if facts is not None:
        supervised = facts.supervised
        if tokens_per_row is None:
            tokens_per_row = facts.tokens_per_row
            source = ESTIMATED if facts.estimated else COUNTED
    if None in (train_rows, eval_rows, tokens_per_row):
        raise UserError(
            f"data.path={config.path}: its size is unknown. Set data.train_rows, data.eval_rows "
            "and plan.tokens_per_row, or write data.facts for it in a file of conf/data."
        )
    is_even = facts is not None and config.layout == Layout.logistic_map
    return DataSize(train_rows, eval_rows, tokens_per_row, supervised, source, is_even)


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


def _size_by_reader(config: DataConfig, tokenizer: Any, asks: bool) -> DataSize:
    """Counts the rows, and the tokens of the first ones as training reads them."""
    train, evaluation = open_sources(config)
    sampled = 0
    answered = 0
    kept_rows = 0
    lengths: list[int] = []  # of sequences, or of the windows of a document
    supervised = 0
    to_sequences = segmenters(config, tokenizer, asks)
    for sequences in sequences_of(train.first(SAMPLE_ROWS).located(), *to_sequences):
        sampled += 1
        answered += bool(sequences)
        kept = [
            example
            for example in encode([sequences], config, tokenizer)
            if example.has_answer and not (asks and example.truncated)
        ]
        if kept:  # a window of a document is a row
            kept_rows += max(1, sum(not example.continues for example in kept))
        lengths += [len(example.input_ids) for example in kept]
        supervised += sum(sum(example.loss_mask) for example in kept)
    if not lengths:
        raise UserError(
            f"{train.name}: no row to train on has an answer. Check columns, templates, "
            "data.max_length, data.eval_rows."
        )
    return DataSize(
        train_rows=round(len(lengths) / sampled * sum(1 for _ in train.located())),
        eval_rows=round(len(lengths) / answered * sum(1 for _ in evaluation.located())),
        tokens_per_row=fmean(lengths),
        supervised=supervised / sum(lengths),
        source=BY_READER,
        is_even=len(set(lengths)) == 1,
        sequences_per_row=len(lengths) / kept_rows,
    )


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
