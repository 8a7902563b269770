"""How many rows and tokens a run trains on: of files and computed rows by the run's own reader,
whose tokens the run then finds in the cache; of data sets on the Hub, which a plan does not
download, by data.facts or plan.tokens_per_row."""

from dataclasses import dataclass, replace
from statistics import pstdev

from datasets import ReadInstruction

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.sources import open_sources
from cera_train.evaluation.task_evaluation import evaluations_of
from cera_train.evaluation.tasks.task import training_task
from cera_train.model.folder import load_tokenizer
from cera_train.settings.data import DataConfig, LossOn
from cera_train.settings.run import Config, PlanRun
from cera_train.training.build import Data, look_at_data

ROW_SPREAD = 0.4
"""Spread of rows that nobody has read: 0.36 on GSM8K, 0.43 on OpenOrca."""


@dataclass(frozen=True)
class DataSize:
    """How much there is to train and to evaluate on."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float  # in the mean; of a preference, of each of its answers
    supervised: float  # share of the tokens whose prediction counts in the loss
    spread: float = ROW_SPREAD  # standard deviation of the tokens in a row over their mean


def read_rows(config: PlanRun) -> tuple[PlanRun, Data] | None:
    """The rows as the run reads them, after the config in which it decides how; None where they are
    on the Hub, or `plan.tokens_per_row` describes them. Raises UserError where the run would refuse
    them."""
    are_here = all(is_here(part) for _, part in config.data.parts())
    if not are_here or config.plan.tokens_per_row is not None:
        return None
    try:
        load_tokenizer(config.model)
    except UserError as error:
        fix = "set plan.tokens_per_row, which needs no tokenizer"
        raise UserError(f"the rows cannot be counted: {fix}, or: {error}") from error
    return look_at_data(config)


def data_size(config: PlanRun, read: tuple[PlanRun, Data] | None) -> DataSize:
    """The rows and tokens of a run's data set: without a tokenizer, rows of this machine are
    counted, also those without an answer. Raises UserError where they are not known.

    Args:
        read: by `read_rows`.
    """
    if read is not None:
        return _read_size(*read)
    data = config.data
    tokens_per_row = config.plan.tokens_per_row
    train_rows = data.train_rows
    eval_rows = data.eval_rows
    supervised = 1.0
    facts = data.facts
    if is_here(data):
        train_rows, eval_rows = (sum(1 for _ in rows) for rows in open_sources(data))
    elif data.mix is not None and eval_rows is not None:
        eval_rows *= len(data.mix)
    elif facts is not None and facts.of == data.path:
        train_rows = _sliced(data.train_split, facts.splits, train_rows)
        eval_rows = _sliced(data.eval_split, facts.splits, eval_rows)
        supervised = facts.supervised
        tokens_per_row = tokens_per_row or facts.tokens_per_row
    place = f"data.path={data.path}" if data.mix is None else "data.mix"
    require(
        None not in (train_rows, eval_rows, tokens_per_row),
        f"{place}: its size is unknown. Set data.train_rows, data.eval_rows and "
        "plan.tokens_per_row, or write data.facts for it in a file of conf/data.",
    )
    tokens_per_row = min(tokens_per_row, data.max_length)
    supervised = 1.0 if data.loss_on == LossOn.all else supervised
    return DataSize(train_rows, eval_rows, tokens_per_row, supervised)


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
    # the whole row is a prompt where none is known
    prompt = data.tokens_per_row * (1 - round(data.supervised, 6)) or data.tokens_per_row
    tokens = prompt + config.work.answer_tokens
    share = config.work.answer_tokens / tokens
    return replace(data, tokens_per_row=tokens, supervised=share, spread=ROW_SPREAD)


def _read_size(config: Config, data: Data) -> DataSize:
    train = data.rows.train
    tokens = sum(train.lengths)
    return DataSize(
        train_rows=data.order.rows,
        eval_rows=len(data.rows.evaluation) // config.data.sequences,
        tokens_per_row=tokens / len(train),
        supervised=sum(train.supervised) / tokens,
        spread=pstdev(train.lengths) * len(train) / tokens,
    )


def _sliced(split: str, splits: dict[str, int], limit: int | None) -> int:
    """Rows of a split, or of a slice such as train[:100000] or test[:10%], up to a limit. Raises
    UserError for any other.

    Args:
        splits: rows of every split.
    """
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"data split {split!r}: data.facts has {', '.join(splits)}. Use one of these, or a "
            "slice such as train[:1000]."
        ) from error
    count = sum(part.to - part.from_ for part in parts)
    return count if limit is None else min(count, limit)


def check_tasks(config: PlanRun, read: tuple[PlanRun, Data] | None, positions: int | None) -> None:
    """Raises UserError where the run would refuse its tasks; of rows or problems on the Hub, only
    for the settings of a task.

    Args:
        read: by `read_rows`.
        positions: of the model; None: without a limit.
    """
    tasks = [training_task(name, config.train.changes_of_task(name)) for name in config.train.tasks]
    are_here = all(task.config.files or task.config.path is None for task in tasks)
    if read is not None and are_here:
        decided, rows = read
        evaluations_of(decided, rows.tokenizer, positions)
