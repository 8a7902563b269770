"""Every generator of the list: its gold answers are right, others are not, and the same again from
a file."""

import json

import pytest

from cera_train.common.errors import UserError
from cera_train.evaluation.grading import grade_all
from cera_train.evaluation.tasks.task import all_tasks, build_task, load_problems
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.settings.data import (
    GENERATORS,
    DataConfig,
    MixPart,
    ReasoningGymConfig,
    TrainedRows,
)
from cera_train.settings.evaluation import TaskConfig

pytest.importorskip("reasoning_gym")

TASK = all_tasks()["reasoning_gym"]
EVERY = [(name, level) for name in GENERATORS for level in (0, None)]


def problems(limit: int = 4, data: DataConfig | None = None, **settings) -> list[Problem]:
    config = TaskConfig(kind="reasoning_gym", name="gym", limit=limit, **settings)
    return load_problems(build_task(config), TrainedRows(data))


def credits(problems: list[Problem], answers: list[str]) -> list[tuple[float, bool, str | None]]:
    generations = [
        Generation(problem.id, 0, text, 1, False)
        for problem, text in zip(problems, answers, strict=True)
    ]
    grades = grade_all(TASK, problems, generations)
    return [(grade.details["credit"], grade.exact, grade.failure) for grade in grades]


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_gold_answers_are_right_and_others_are_not(name, level):
    drawn = problems(generator=name, level=level)
    assert {problem.details["generator"] for problem in drawn} == {name}
    again = [
        Problem.from_json(json.loads(json.dumps(problem.to_json())), "problems.jsonl:1")
        for problem in drawn
    ]
    assert (
        credits(again, [f" {problem.gold}\nQuestion: and so on" for problem in drawn])
        == [(1.0, True, None)] * 4
    )
    for answers in (["I cannot tell."] * 4, [""] * 4):
        assert all(credit < 1 and not exact for credit, exact, _ in credits(drawn, answers))


def test_partial_credit_is_not_a_right_answer():
    [problem] = problems(1, generator="word_sorting")
    words = problem.gold.split(", ")
    [(credit, exact, _)] = credits([problem], [", ".join([*words[:-2], words[-1], words[-2]])])
    assert 0 < credit < 1
    assert not exact
    right, wrong = (
        TASK.grade(problem, Generation(problem.id, 0, text, 1, False))
        for text in (problem.gold, "x")
    )
    assert TASK.scores([problem], [right, wrong])["credit"] == (1 + wrong.details["credit"]) / 2


def test_problems_are_of_the_generators_and_the_level_that_the_run_was_trained_on():
    settings = ReasoningGymConfig(generator=["gcd", "lcm"], level=1)
    data = DataConfig(layout="reasoning_gym", train_rows=9, eval_rows=3, reasoning_gym=settings)
    assert [
        (problem.details["generator"], problem.details["level"]) for problem in problems(2, data)
    ] == [("gcd", 1), ("lcm", 1)]
    [harder] = problems(1, data, generator="chain_sum", level=3)
    assert (harder.details["generator"], harder.details["level"]) == ("chain_sum", 3)
    parts = [MixPart(path="a/b"), MixPart(layout="reasoning_gym", train_rows=5, eval_rows=2)]
    mixed = DataConfig(prompt="{a}", completion="{b}", reasoning_gym=settings, mix=parts)
    assert problems(2, mixed) == problems(2, data)
    with pytest.raises(
        UserError, match=r"task.generator is missing, .* such as task.generator=chain_sum"
    ):
        problems()
