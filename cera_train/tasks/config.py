"""Settings of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cera_train.common.settings import MISSING, require, require_positive, setting


class TaskKind(StrEnum):
    math = "math"
    gsm8k = "gsm8k"
    logistic_map = "logistic_map"
    perplexity = "perplexity"
    text = "text"


@dataclass
class TaskConfig:
    kind: TaskKind = setting(MISSING, "answers")
    """math, gsm8k, logistic_map: problems with answers to generate; perplexity: rows as in training; text: perplexity
    of running text."""
    name: str = setting(MISSING, "answers")
    """The results lie in RUN/eval/name."""
    path: str | None = setting(None, "answers")
    """A data set's id on the Hub. Not needed with files."""
    subset: str | None = setting(None, "answers")
    revision: str | None = setting(None, "answers")
    split: str = setting("test", "answers")
    files: list[str] = setting(list, "answers")
    """Local json, jsonl or parquet files with the same columns; for kind text also .txt."""
    limit: int | None = setting(None, "answers")
    """Take only so many problems (of kind text: windows) from the start. null: all."""
    prompt: str | None = setting(None, "answers")
    """Template with {column} for a row's columns."""
    level: int | None = setting(None, "answers")
    """Take only MATH problems of this level. null: all."""
    growths: list[float] = setting(list, "answers")
    """Values of r in x' = r x (1 - x), for logistic_map."""
    max_new_tokens: int = setting(1024, "answers")
    window: int = setting(1024, "answers")
    """Tokens in a window, for kind text. Every token but a window's first is predicted."""
    stop: list[str] = setting(list, "answers")
    """Texts that end an answer besides the end token, for models that do not stop by themselves."""

    def __post_init__(self) -> None:
        require_positive("task", self, "limit", "max_new_tokens", "window")
        if self.kind in (TaskKind.math, TaskKind.gsm8k):
            require(
                bool(self.prompt),
                "task.prompt is empty: set a template, such as $'task.prompt=\"Question: {question}\\nAnswer:\"'.",
            )
        if self.kind in (TaskKind.math, TaskKind.gsm8k, TaskKind.text):
            require(bool(self.path or self.files), "set task.files to local files, or task.path to a Hub data set.")
        if self.kind == TaskKind.logistic_map:
            require(
                bool(self.growths) and all(0 < growth <= 4 for growth in self.growths),
                f"task.growths={self.growths} must be numbers above 0 and up to 4.",
            )
            require(
                all(float(f"{growth:g}") == growth for growth in self.growths),
                f"task.growths={self.growths} has more than the six digits that a prompt shows: round it.",
            )
            require(
                not (self.prompt or self.files),
                "task=logistic_map makes its problems in the words of its training: it takes neither task.prompt nor "
                "task.files.",
            )
        require(
            self.level is None or self.kind == TaskKind.math,
            f"task.level={self.level} is for MATH's tasks: leave it out.",
        )
        require(self.window > 1, "task.window=1 must be at least 2: a window's first token is not predicted.")
