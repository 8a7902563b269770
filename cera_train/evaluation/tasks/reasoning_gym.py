"""Questions of reasoning-gym's generators that no training row holds, graded by the generators
themselves; data/computed.py draws them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.computed import Draw, Split, draws, open_generator
from cera_train.data.rows import computed_row
from cera_train.evaluation.tasks.task import (
    ComputedTask,
    Metric,
    Task,
    mean,
    question_id,
)
from cera_train.runs.evaluation_folder import Generation, Grade, Problem
from cera_train.settings.data import (
    DataConfig,
    Layout,
    ReasoningGymConfig,
    TrainedRows,
    check_generators,
)
from cera_train.settings.evaluation import TaskConfig

DRAWN = ("generator", "level", "seed", "index")
"""What a problem holds of its `Draw` beside question and answer."""


class Graded(NamedTuple):
    answer: str
    credit: float
    failure: str | None

    @property
    def is_right(self) -> bool:
        return self.credit > 1 - 1e-9


def score_text(text: str, draw: Draw) -> Graded:
    """What the generator of a question gives for as many lines of a text as the gold answer has."""
    answer = "\n".join(text.strip().split("\n")[: draw.answer.count("\n") + 1]).strip()
    generator = open_generator(draw.generator, draw.level, draw.seed)
    try:
        return Graded(
            answer, float(generator.score_answer(answer, entry=generator[draw.index])), None
        )
    except Exception as error:  # whatever a model may write must not end a run of hours
        return Graded(answer, 0.0, f"crash: {type(error).__name__}: {error}")


class ReasoningGym(ComputedTask):
    def configured(self, config: TaskConfig) -> Task:
        if config.generator is not None:
            check_generators("task.generator", config.generator)
        require(
            config.limit is not None,
            "task.limit=null: a generator has no last problem. Set a number, such as 200.",
        )
        return super().configured(config)

    def problems(self, trained: TrainedRows, tokenizer: Any = None) -> Iterable[Problem]:
        generators = self._generators(self.part(trained))
        for draw in draws(generators, Split.test, self.config.limit, "task.limit"):
            row = computed_row(draw.question, draw.answer)
            details = {name: getattr(draw, name) for name in DRAWN}
            details |= self.prompt(row, trained, tokenizer)
            question = draw.question
            yield Problem(id=question_id(question), question=question, gold=draw.answer, **details)

    def _generators(self, part: DataConfig | None) -> ReasoningGymConfig:
        """The generators that the run was trained on, with the settings that the task changes."""
        if part is None and not self.config.generator:
            reason = "the model was trained on no generator of reasoning-gym"
            raise UserError(
                f"task.generator is missing, and {reason}. Name one, such as "
                f"task.generator=chain_sum."
            )
        settings = part.reasoning_gym if part else ReasoningGymConfig()
        if self.config.generator is not None:
            settings = replace(settings, generator=self.config.generator)
        if self.config.level is not None:
            settings = replace(settings, level=self.config.level)
        return settings

    def grade(self, problem: Problem, generation: Generation) -> Grade:
        drawn = {name: problem.details[name] for name in DRAWN}
        draw = Draw(**drawn, question=problem.question, answer=problem.gold)
        graded = score_text(generation.text, draw)
        answer = graded.answer or None
        is_right = graded.is_right
        return Grade(
            generation.problem,
            generation.sample,
            answer,
            is_right,
            failure=graded.failure,
            credit=graded.credit,
        )

    def scores(self, problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
        return {"credit": mean([grade.details["credit"] for grade in grades])}


TASK = ReasoningGym(
    layout=Layout.reasoning_gym,
    settings=("generator", "level"),
    # Graders give a part of the credit to an answer that merely holds the right digits, so runs are
    # compared by exact.
    shown=(Metric("credit", "credit"),),
    is_verified=False,
)
