"""How many rows and tokens a run trains on, and how many problems its tasks have: of files and
computed rows by the run's own reader, whose tokens the run then finds in the cache; of data sets on
the Hub, which a plan does not download, by data.facts or plan.tokens_per_row."""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import pstdev

from datasets import ReadInstruction

from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import config_dir, read_yaml
from cera_train.common.settings import require
from cera_train.data.sources import open_sources, rows_of_parts
from cera_train.evaluation.task_evaluation import evaluations_of
from cera_train.evaluation.tasks.task import load_problems, training_task
from cera_train.model.folder import load_tokenizer
from cera_train.settings.data import DataConfig, DataFacts, LossOn
from cera_train.settings.run import Config, PlanRun
from cera_train.training.build import look_at_data

BY_FACTS = "data.facts"
BY_READER = "by the model's tokenizer"
BY_SETTING = "plan.tokens_per_row"

ROW_SPREAD = 0.4
"""Spread of rows that nobody has read: 0.36 on GSM8K, 0.43 on OpenOrca."""


@dataclass(frozen=True)
class DataSize:
    """How much there is to train and to evaluate on."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float  # in the mean; of a preference, of each of its answers
    supervised: float  # share of the tokens whose prediction counts in the loss
    source: str  # where the number of tokens comes from, in words
    spread: float = ROW_SPREAD  # standard deviation of the tokens in a row over their mean

    @property
    def prompt_tokens(self) -> float:
        """Tokens of a row outside its completions; the whole row where no prompt is known."""
        return self.tokens_per_row * (1 - round(self.supervised, 6)) or self.tokens_per_row


def data_size(config: PlanRun) -> DataSize:
    """The rows and tokens of a run's data set. Raises UserError where they are not known, or the
    run would refuse its rows."""
    tokens_per_row = config.plan.tokens_per_row
    parts = [*config.data.parts()]
    if tokens_per_row is None and all(is_here(part) for _, part in parts):
        return _read_size(config)
    sizes: list[DataSize] = []
    for place, part in parts:
        with errors_at(place):
            if tokens_per_row is None and is_here(part):
                sizes.append(_read_size(replace(config, data=part)))
            else:
                sizes.append(_known_size(part, tokens_per_row))
    return sizes[0] if config.data.mix is None else _size_of_mix(config.data, sizes)


def is_here(config: DataConfig) -> bool:
    """Whether the rows are files of this machine or computed."""
    return config.is_computed or bool(config.train_files)


def trained_size(config: Config, data: DataSize) -> DataSize:
    """The size of what updates train on: the rows, or prompts with sampled answers, each as long
    as allowed.

    Args:
        data: the size of the rows.
    """
    if not config.work.answers:
        return data
    tokens = data.prompt_tokens + config.work.answer_tokens
    share = config.work.answer_tokens / tokens
    return replace(data, tokens_per_row=tokens, supervised=share, spread=ROW_SPREAD)


def _read_size(config: Config) -> DataSize:
    try:
        load_tokenizer(config.model)
    except UserError as error:
        raise UserError(f"{error} Or set plan.tokens_per_row.") from error
    config, data = look_at_data(config)
    train = data.rows.train
    tokens = sum(train.lengths)
    return DataSize(
        train_rows=data.order.rows,
        eval_rows=len(data.rows.evaluation) // config.data.sequences,
        tokens_per_row=tokens / len(train),
        supervised=sum(train.supervised) / tokens,
        source=BY_READER,
        spread=pstdev(train.lengths) * len(train) / tokens,
    )


def _known_size(config: DataConfig, tokens_per_row: float | None) -> DataSize:
    """The size without a tokenizer. Rows of this machine are counted, also those without an
    answer."""
    facts = None if is_here(config) else facts_of(config.path, config.facts)
    train_rows = config.train_rows
    eval_rows = config.eval_rows
    supervised = 1.0
    source = BY_SETTING
    if is_here(config):
        train_rows, eval_rows = (sum(1 for _ in rows.located()) for rows in open_sources(config))
    elif facts is not None:
        is_one_split = _name_of(config.train_split) == _name_of(config.eval_split)
        evaluated = facts.train_rows if is_one_split else facts.eval_rows
        train_rows = _sliced(config.train_split, facts.train_rows, train_rows)
        eval_rows = _sliced(config.eval_split, evaluated, eval_rows)
        supervised = facts.supervised
        if tokens_per_row is None:
            tokens_per_row = facts.tokens_per_row
            source = BY_FACTS
    require(
        None not in (train_rows, eval_rows, tokens_per_row),
        f"data.path={config.path}: its size is unknown. Set data.train_rows, data.eval_rows "
        "and plan.tokens_per_row, or write data.facts for it in a file of conf/data.",
    )
    tokens_per_row = min(tokens_per_row, config.max_length)
    supervised = 1.0 if config.loss_on == LossOn.all else supervised
    return DataSize(train_rows, eval_rows, tokens_per_row, supervised, source)


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


def _name_of(split: str) -> str:
    """`train` of train[:1000]."""
    return re.match(r"\w*", split)[0]


def _sliced(split: str, rows: int, limit: int | None) -> int:
    """Rows of a slice such as train[:100000] or test[:10%], up to a limit. Raises UserError for any
    other form."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({_name_of(split): rows})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"data split {split!r}: cera-plan reads splits such as train or train[:1000]. Use one "
            "of that form."
        ) from error
    count = sum(part.to - part.from_ for part in parts)
    return count if limit is None else min(count, limit)


def _size_of_mix(config: DataConfig, sizes: Sequence[DataSize]) -> DataSize:
    counts = rows_of_parts([size.train_rows for size in sizes], config.weights, config.train_rows)
    tokens = [count * size.tokens_per_row for count, size in zip(counts, sizes, strict=True)]
    shares = [size.supervised for size in sizes]
    return DataSize(
        train_rows=sum(counts),
        eval_rows=sum(size.eval_rows for size in sizes),
        tokens_per_row=sum(tokens) / sum(counts),
        supervised=sum(map(operator.mul, tokens, shares)) / sum(tokens),
        source="; ".join(dict.fromkeys(size.source for size in sizes)),
    )


def count_problems(name: str, config: Config, data: DataSize) -> int:
    """The number of problems of one of `train.tasks`. Local files are read and computed problems
    made; a task of the Hub counts up to its limit. Raises UserError without any."""
    task = training_task(name, config.train.changes_of_task(name))
    settings = task.config
    place = f"train.tasks=[{name}]"
    if settings.kind == "held_out":
        known = data.eval_rows
    elif settings.files or settings.path is None:
        with errors_at(place):
            return len(load_problems(task, config.data))
    else:
        known = settings.limit
    require(
        known is not None,
        f"{place}: the number of its problems is unknown: set train.task_settings.{name}.limit, or "
        "task files.",
    )
    return known if settings.limit is None else min(known, settings.limit)


def check_exams(config: PlanRun, positions: int | None) -> None:
    """Raises UserError where the run would refuse its tasks or samples, as far as their rows and
    problems are of this machine.

    Args:
        positions: of the model; None: without a limit.
    """
    train = config.train
    tasks = {name: training_task(name, train.changes_of_task(name)).config for name in train.tasks}
    here = [name for name, task in tasks.items() if task.files or task.path is None]
    samples = train.samples if len(here) == len(tasks) else 0
    are_rows_here = all(is_here(part) for _, part in config.data.parts())
    if (here or samples) and are_rows_here and config.plan.tokens_per_row is None:
        config, data = look_at_data(config)
        train = replace(train, tasks=here, samples=samples)
        evaluations_of(replace(config, train=train), data.tokenizer, positions)
