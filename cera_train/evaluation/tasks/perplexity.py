"""Perplexity on rows as in training, or on running text, window by window: what fine-tuning made a
model forget."""

from typing import Any

from cera_train.common.errors import errors_at
from cera_train.common.settings import require
from cera_train.data.prepare import TokenizedRows, prepare_evaluation, prepare_windows
from cera_train.data.rows import text_of
from cera_train.evaluation.tasks.task import Task, open_rows, require_rows
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import TaskConfig
from cera_train.settings.model import ModelConfig


class Perplexity(Task):
    def configured(self, config: TaskConfig) -> Task:
        require(
            not config.files or config.window is not None,
            "task.files holds running text: choose task=forgetting, or name rows by data=....",
        )
        if config.window is not None:
            require_rows(config)
            require(
                config.window > 1,
                "task.window=1 must be at least 2: a window's first token is not predicted.",
            )
        return super().configured(config)

    def rows(self, data: DataConfig | None, model: ModelConfig, tokenizer: Any) -> TokenizedRows:
        """The rows to predict; of the run, or of `data=`, those held out."""
        config = self.config
        if config.window is not None:
            from cera_train.model.folder import check_length  # imports torch

            check_length(model, config.window, "task.window")
            source = open_rows(config)
            texts = []
            for place, row in source:
                with errors_at(place):
                    texts.append(text_of(row, "text"))
            with errors_at(source.name):
                return prepare_windows("\n\n".join(texts), tokenizer, config.window, config.limit)
        require(
            data is not None,
            "data=... is missing: this adapter's training data is unknown. Choose the rows.",
        )
        return prepare_evaluation(data, tokenizer, config.limit)


TASK = Perplexity()
