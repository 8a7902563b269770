"""The held-out rows of a run: their prompts are the questions, their answers the gold ones,
graded as in jsonl.py."""

from typing import Any

from cera_train.common.settings import require
from cera_train.data.chats import may_use_template
from cera_train.data.rows import Row, Source
from cera_train.data.sources import answered_rows
from cera_train.evaluation.tasks import jsonl
from cera_train.runs.evaluation_folder import CHAT
from cera_train.settings.data import TrainedRows


class EvaluationRows(jsonl.JsonlTask):
    def source(self, trained: TrainedRows, tokenizer: Any) -> Source:
        name = f"task={self.config.name}"
        fix = "write the questions into a file, for task=jsonl"
        require(
            bool(trained.parts),
            f"{name}: the rows that this model was trained on are unknown: {fix}.",
        )
        rows = []
        for row in answered_rows(trained.data, tokenizer, trained.asks):
            is_counted = tokenizer is None and may_use_template(row.part)
            require(
                row.is_chat or is_counted or len(row.prompt) == 1,
                f"{name} does not know answers before the asked one in plain text: {fix}.",
            )
            asked = {"question": row.text, "without_markup": row.question}
            rows.append(asked | {"answer": row.gold, CHAT: row.is_chat})
        require(bool(rows), f"{name}: no held-out row has a prompt and an answer: {fix}.")
        return Source.numbered("", rows, name)

    def details(self, row: Row) -> dict[str, Any]:
        return {CHAT: True} if row[CHAT] else {}


TASK = EvaluationRows(
    **vars(jsonl.TASK) | {"settings": ("prompt", "grader"), "question": "without_markup"}
)
