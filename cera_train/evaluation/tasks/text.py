"""Perplexity of running text, window by window: a measure of what fine-tuning made a model forget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.common.errors import errors_at
from cera_train.common.settings import require
from cera_train.data.rows import text_of
from cera_train.evaluation.tasks.task import RowTask, open_rows, require_rows
from cera_train.settings.data import DataConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.tasks import TaskConfig

if TYPE_CHECKING:
    from cera_train.data.prepare import TokenizedRows


class RunningText(RowTask):
    def check(self, config: TaskConfig) -> None:
        require_rows(config)
        require(config.window > 1, "task.window=1 must be at least 2: a window's first token is not predicted.")

    def rows(self, config: TaskConfig, data: DataConfig | None, model: ModelConfig, tokenizer: Any) -> TokenizedRows:
        from cera_train.data.prepare import prepare_windows
        from cera_train.model.weights import check_length

        check_length(model, config.window, "task.window")
        source, texts = open_rows(config), []
        for place, row in source.located():
            with errors_at(place):
                texts.append(text_of(row, "text"))
        with errors_at(source.name):
            return prepare_windows("\n\n".join(texts), tokenizer, config.window, config.limit)


TASK = RunningText(name="running text")
