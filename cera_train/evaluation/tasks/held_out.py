"""The held-out rows of a run: their prompts are the questions, their answers the gold ones,
graded as in jsonl.py."""

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Source
from cera_train.data.sources import answered_rows
from cera_train.evaluation.tasks import jsonl
from cera_train.settings.data import DataConfig, Layout


class EvaluationRows(jsonl.JsonlTask):
    def source(self, data: DataConfig | None) -> Source:
        name = f"task={self.config.name}"
        fix = "write the questions into a file, for task=jsonl"
        require(
            data is not None,
            f"{name}: the rows that this model was trained on are unknown: {fix}.",
        )
        rows = []
        for part, prompt, answer in answered_rows(data, tokenizer=None):
            if part.layout == Layout.messages or len(prompt) > 1:
                reason = "knows neither chat templates nor answers before the asked one"
                raise UserError(f"{name} {reason}, and these rows have them: {fix}.")
            rows.append({"question": prompt[0].text, "answer": answer.text})
        require(bool(rows), f"{name}: no held-out row has a prompt and an answer: {fix}.")
        return Source.numbered("", rows, name)


TASK = EvaluationRows(**vars(jsonl.TASK) | {"settings": ("prompt", "grader")})
