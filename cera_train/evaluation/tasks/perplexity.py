"""Perplexity on rows as in training, with the adapter's spectra."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.evaluation.tasks.task import RowTask
from cera_train.settings.data import COMPUTED, DataConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.tasks import TaskConfig

if TYPE_CHECKING:
    from cera_train.data.prepare import TokenizedRows


class Perplexity(RowTask):
    def rows(self, config: TaskConfig, data: DataConfig | None, model: ModelConfig, tokenizer: Any) -> TokenizedRows:
        from cera_train.data.prepare import prepare_evaluation

        if data is None:
            raise UserError("data=... is missing: the training data of this adapter is not on record. Choose the rows.")
        if config.files:
            mend = "this run computed its rows and has no layout for files. Add one, such as data=jsonl."
            require(data.layout not in COMPUTED, f"task.files: {mend}")
            data = replace(data, mix=None, train_files=config.files, eval_files=config.files, eval_rows=None)
        return prepare_evaluation(data, tokenizer, config.limit)


TASK = Perplexity(name="perplexity", has_spectra=True)
