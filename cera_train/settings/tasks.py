"""Settings of a benchmark."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.files import config_dir
from cera_train.common.settings import MISSING, require_positive, setting

Grader = StrEnum("Grader", ["text", "number", "math", "choice"])


def known_tasks() -> list[str]:
    """The names of the files in conf/task."""
    return sorted(path.stem for path in (config_dir("conf") / "task").glob("*.yaml"))


@dataclass
class TaskConfig:
    kind: str = setting(MISSING, "answers")
    """The file of cera_train/evaluation/tasks/ that defines the task. math, gsm8k, logistic_map, reasoning_gym, jsonl:
    problems to answer; perplexity: rows as in training; text: perplexity of running text."""
    name: str = setting(MISSING, "answers")
    """Results go to RUN/eval/name."""
    path: str | None = setting(None, "answers")
    """A data set's id on the Hub. Not needed with files."""
    subset: str | None = setting(None, "answers")
    revision: str | None = setting(None, "answers")
    split: str = setting("test", "answers")
    files: list[str] = setting(list, "answers")
    """jsonl, json, csv or parquet files with the same columns; for text also .txt."""
    limit: int | None = setting(None, "answers")
    """Takes only the first problems, rows or windows of text. null: all."""
    prompt: str | None = setting(None, "answers")
    """Template with {column} for a row's columns."""
    level: int | None = setting(None, "answers")
    """Takes only the problems of this level, for math; the generator's level, for reasoning_gym. null: all; the level
    that the run was trained on."""
    growths: list[float] = setting(list, "answers")
    """Values of r in x' = r x (1 - x), for logistic_map."""
    generator: Any = setting(None, "answers")
    """A generator of reasoning-gym, or a list of them, for reasoning_gym. null: those that the run was trained on."""
    question: str | None = setting(None, "answers")
    """The column with the question, for jsonl."""
    answer: str | None = setting(None, "answers")
    """The column with the gold answer, for jsonl."""
    grader: Grader | None = setting(None, "answers")
    """The rule that compares an answer with the gold answer, for jsonl."""
    max_new_tokens: int = setting(1024, "answers")
    window: int = setting(1024, "answers")
    """Tokens in a window, for text. Every token but a window's first is predicted."""
    stop: list[str] = setting(list, "answers")
    """Texts that end an answer, beside the end token, for models that do not stop."""

    def __post_init__(self) -> None:
        require_positive("task", self, "limit", "max_new_tokens", "window")
