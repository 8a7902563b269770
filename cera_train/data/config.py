"""Settings of the rows, and how they become tokens."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import MISSING, Changes, leaves, require, require_positive, section, setting

Layout = StrEnum("Layout", ["text", "conversations", "messages", "logistic_map"])
Turns = StrEnum("Turns", ["first", "all"])
LossOn = StrEnum("LossOn", ["completion", "all"])
BatchLayout = StrEnum("BatchLayout", ["auto", "flat", "padded"])


@dataclass
class LogisticMapConfig:
    """Rows of the logistic map x' = growth x (1 - x), for `data.layout=logistic_map`."""

    growth: float = setting(3.5, "result")
    steps: int = setting(6, "result")
    decimals: int = setting(2, "result")
    """Starting points are all numbers between 0 and 1 with this many decimals."""
    seed: int = setting(0, "result")
    """Decides which starting points train and which validate."""

    def __post_init__(self) -> None:
        require_positive("data.logistic_map", self, "growth", "steps", "decimals")
        growth = f"data.logistic_map.growth={self.growth}"
        require(self.growth <= 4, f"{growth} must be at most 4, else x leaves [0, 1].")
        if float(f"{self.growth:g}") != self.growth:
            raise UserError(f"{growth} has more than the six digits that a prompt shows: round it.")
        require(self.decimals <= 4, f"data.logistic_map.decimals={self.decimals} must be at most 4.")


@dataclass
class DataFacts:
    """Size of a data set: with it cera-plan needs neither the rows nor a tokenizer."""

    of: str | None = setting(None, "nothing")
    """The `data.path` that these facts describe."""
    train_rows: int = setting(MISSING, "nothing")
    """Rows of the split that data.train_split names, before it is sliced."""
    eval_rows: int = setting(MISSING, "nothing")
    tokens_per_row: float = setting(MISSING, "nothing")
    """Mean, truncated at the file's max_length."""
    supervised: float = setting(MISSING, "nothing")
    """Share of the tokens that belong to completions, end token included."""
    estimated: bool = setting(False, "nothing")
    """Whether tokens_per_row and supervised are estimates; a comment in the file gives their basis."""

    def __post_init__(self) -> None:
        require_positive("data.facts", self, "train_rows", "eval_rows", "tokens_per_row", "supervised")
        require(self.supervised <= 1, f"data.facts.supervised={self.supervised} is a share: it must be at most 1.")


@dataclass
class DataConfig:
    layout: Layout = setting(Layout.text, "tokens")
    """How a row reads. text: columns by template; conversations: ShareGPT's from/value; messages: chat template."""
    path: str | None = setting(None, "result")
    """A data set's id on the Hub. Not needed with train_files."""
    subset: str | None = setting(None, "result")
    revision: str | None = setting(None, "result")
    train_split: str = setting("train", "result", splits="training")
    eval_split: str = setting("test", "result")
    """Splits in the notation of `datasets`: `train[:100000]`."""
    train_files: list[str] = setting(list, "result")
    eval_files: list[str] = setting(list, "result")
    """Local json, jsonl or parquet files in the same layout. Without eval_files, the last eval_rows rows of
    train_files are held out."""
    prompt: str | None = setting(None, "tokens")
    completion: str | None = setting(None, "tokens")
    """Templates of layout text, with {column} for a row's columns. The completion starts where the prompt ends."""
    turns: Turns = setting(Turns.first, "tokens")
    """Turns of layout conversations. first: the first question and answer, as published; all: every turn and the system
    prompt."""
    loss_on: LossOn = setting(LossOn.completion, "tokens")
    max_length: int = setting(512, "tokens")
    """Tokens; longer rows are truncated."""
    train_rows: int | None = setting(None, "result", splits="training")
    eval_rows: int | None = setting(None, "result")
    """Take only this many rows, from the start. null: all."""
    allow_overlap: bool = setting(False, "result", splits="training")
    """Accept evaluation rows whose prompt is also a training row's."""
    logistic_map: LogisticMapConfig = section(LogisticMapConfig)
    facts: DataFacts | None = section(None)
    """For cera-plan only."""

    def __post_init__(self) -> None:
        require_positive("data", self, "max_length", "train_rows", "eval_rows")
        if self.layout == Layout.text and not (self.prompt and self.completion):
            example = "$'data.prompt=\"Question: {question}\\nAnswer:\"' $'data.completion=\" {answer}\"'"
            raise UserError(f"data.layout=text needs data.prompt and data.completion, such as {example}.")
        if self.layout == Layout.logistic_map:
            require(self.eval_rows is not None, "data.layout=logistic_map needs data.eval_rows, such as 20.")
        elif not (self.path or self.train_files):
            mend = "set data.train_files to local files or data.path to a Hub data set"
            raise UserError(f"there is no training data: {mend}.")
        if self.train_files and not self.eval_files and self.eval_rows is None:
            mend = "name evaluation files, or set data.eval_rows to hold out the last rows of the training files"
            raise UserError(f"data.train_files without data.eval_files: {mend}.")
        if self.eval_files and not self.train_files:
            raise UserError("data.eval_files without data.train_files: name the training files too.")


def evaluation_rows(settings: dict[str, Any], prefix: str = "data.") -> tuple:
    """The settings that choose the evaluation tokens of a perplexity. Runs are comparable where these are equal.

    Args:
        settings: flat settings of a run or an evaluation, in which data's start with `prefix`. A null counts like a
            missing key, since another version may not have it.
    """
    marked = [(leaf.key, leaf.field.metadata["splits"], leaf.changes) for leaf in leaves(DataConfig)]
    skipped = [key for key, splits, changes in marked if splits == "training" or changes == Changes.nothing]
    if settings.get(f"{prefix}train_files"):  # nothing comes from the Hub
        skipped += ["path", "subset", "revision", "eval_split"]
    if settings.get(f"{prefix}eval_files"):
        skipped += ["train_files"]
    keys = {key for key, value in settings.items() if value is not None} - {prefix + name for name in skipped}
    return tuple(sorted((key, repr(settings[key])) for key in keys))
