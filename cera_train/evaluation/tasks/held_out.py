"""The held-out rows of a run: their prompts are the questions, their answers the gold ones,
graded as in jsonl.py."""

import itertools
from collections.abc import Iterator
from typing import Any

from cera_train.common.errors import errors_at
from cera_train.common.settings import require
from cera_train.data.prepare import held_out_questions
from cera_train.evaluation.tasks import jsonl
from cera_train.evaluation.tasks.task import fields_of_prompt, question_id
from cera_train.runs.evaluation_folder import Problem
from cera_train.settings.data import DataConfig


class EvaluationRows(jsonl.JsonlTask):
    def problems(self, data: DataConfig | None, tokenizer: Any) -> Iterator[Problem]:
        name = f"task={self.config.name}"
        fix = "write the questions into a file, for task=jsonl"
        require(
            data is not None,
            f"{name}: the rows that this model was trained on are unknown: {fix}.",
        )
        require(
            self.config.prompt == "{question}",
            f"{name} asks as the run's rows do: leave out task.prompt, or {fix}.",
        )
        questions = held_out_questions(data, tokenizer)
        for question in itertools.islice(questions, self.config.limit):
            with errors_at(question.place):
                gold = self.gold({"answer": question.gold})
            asked = question.text
            yield Problem(question_id(asked), asked, gold=gold, **fields_of_prompt(question))


TASK = EvaluationRows(**vars(jsonl.TASK) | {"has_files": False})
