"""The evaluation rows of a run: their prompts are the questions, their answers the gold ones,
graded as in jsonl.py."""

from dataclasses import replace

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Source
from cera_train.data.sources import answered_rows
from cera_train.evaluation.tasks import jsonl
from cera_train.settings.data import DataConfig, Layout
from cera_train.settings.evaluation import TaskConfig


class HeldOut(jsonl.JsonlTask):
    def source(self, config: TaskConfig, data: DataConfig | None) -> Source:
        fix = "write the questions into a file, for task=jsonl"
        require(
            data is not None,
            f"task={config.name}: the rows that this model was trained on are unknown: {fix}.",
        )
        rows = []
        for part, prompt, answer in answered_rows(data, tokenizer=None):
            if part.layout == Layout.messages or len(prompt) > 1:
                reason = "knows neither chat templates nor answers before the asked one"
                raise UserError(f"task={config.name} {reason}, and these rows have them: {fix}.")
            rows.append({"question": prompt[0].text, "answer": answer.text})
        require(
            bool(rows), f"task={config.name}: no evaluation row has a prompt and an answer: {fix}."
        )
        return Source.numbered("", rows, f"task={config.name}")


TASK = replace(HeldOut(**vars(jsonl.TASK)), settings=("prompt", "grader"))
