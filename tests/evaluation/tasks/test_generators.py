"""Every generator of the list: its gold answers are right, others are not, and the same again from a file."""

from __future__ import annotations

import json

import pytest

from cera_train.common.errors import UserError
from cera_train.evaluation.grading import grade_all, score
from cera_train.evaluation.tasks.task import find_task, load_problems
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.settings.data import GENERATORS, DataConfig, MixPart, ReasoningGymConfig
from cera_train.settings.tasks import TaskConfig

pytest.importorskip("reasoning_gym")

TASK = find_task("reasoning_gym")
EVERY = [(subject, name, level) for subject, names in GENERATORS.items() for name in names for level in (0, None)]


def problems(limit: int = 4, data: DataConfig | None = None, **settings) -> list[Problem]:
    return load_problems(TaskConfig(kind="reasoning_gym", name="gym", limit=limit, **settings), data)


def credits(problems: list[Problem], answers: list[str]) -> list[tuple[float, bool, str | None]]:
    generations = [Generation(problem.id, 0, text, 1, False) for problem, text in zip(problems, answers, strict=True)]
    grades = grade_all(TASK, {problem.id: problem for problem in problems}, generations, 5.0)
    return [(grade.details["credit"], grade.exact, grade.failure) for grade in grades]


def trained(**settings) -> DataConfig:
    return DataConfig(layout="reasoning_gym", train_rows=9, eval_rows=3, reasoning_gym=ReasoningGymConfig(**settings))


def test_at_least_twelve_generators_of_five_subjects():
    assert {*GENERATORS} >= {"algebra", "arithmetic", "number theory", "algorithms", "logic"}
    assert len(EVERY) >= 2 * 12


@pytest.mark.parametrize(("subject", "name", "level"), EVERY)
def test_gold_answers_are_right_and_others_are_not(subject, name, level):
    made = problems(generator=name, level=level)
    assert {problem.details["generator"] for problem in made} == {name}
    again = [Problem.from_json(json.loads(json.dumps(problem.to_json())), "problems.jsonl:1") for problem in made]
    assert credits(again, [f" {problem.gold}\nQuestion: and so on" for problem in made]) == [(1.0, True, None)] * 4
    for answers in (["I cannot tell."] * 4, [""] * 4):
        assert all(credit < 1 and not exact for credit, exact, _ in credits(made, answers))


def test_a_part_of_the_credit_is_no_right_answer():
    [problem] = problems(1, generator="word_sorting")
    words = problem.gold.split(", ")
    [(credit, exact, _)] = credits([problem], [", ".join([*words[:-2], words[-1], words[-2]])])
    assert 0 < credit < 1
    assert not exact


def test_scores_are_those_of_each_generator_too():
    made = problems(generator=["gcd", "spell_backward"])
    answers = [Generation(made[0].id, 0, made[0].gold, 1, False), Generation(made[1].id, 0, "x", 1, False)]
    grades = grade_all(TASK, {problem.id: problem for problem in made}, answers, 5.0)
    result = score(TASK, made, answers, grades)
    assert (result.accuracy("exact").value, result.details["credit"]) == (0.5, 0.5)
    assert result.details["by_generator"]["gcd"] == {"exact": 1.0, "credit": 1.0, "answers": 1}
    assert TASK.lines(result.details)["spell_backward"] == "exact 0.0%, credit 0.0%, 1 answers"
    assert TASK.figures == {"exact": True, "credit": True}


def test_problems_are_of_the_generators_and_the_level_that_the_run_was_trained_on():
    data = trained(generator=["gcd", "lcm"], level=1)
    assert [(problem.details["generator"], problem.details["level"]) for problem in problems(2, data)] == [
        *(("gcd", 1), ("lcm", 1)),
    ]
    harder = problems(1, data, generator="chain_sum", level=3)
    assert [(problem.details["generator"], problem.details["level"]) for problem in harder] == [("chain_sum", 3)]
    mixed = DataConfig(
        prompt="{a}",
        completion="{b}",
        reasoning_gym=data.reasoning_gym,
        mix=[MixPart(path="a/b"), MixPart(layout="reasoning_gym", train_rows=5, eval_rows=2)],
    )
    assert problems(2, mixed) == problems(2, data)


def test_a_model_that_no_generator_trained_needs_one():
    with pytest.raises(UserError, match=r"task.generator is missing, .* such as task.generator=chain_sum"):
        problems()


def test_a_problem_of_another_version_or_of_a_grader_that_runs_answers_is_refused():
    [problem] = problems(1, generator="gcd")
    other = Problem(problem.id, "Find 2 + 2.", problem.prompt, problem.gold, **problem.details)
    with pytest.raises(UserError, match="gcd now has another question"):
        credits([other], ["2"])
    hostile = Problem(problem.id, "x", "x", "x", **problem.details | {"generator": "spiral_matrix"})
    with pytest.raises(UserError, match="generator=spiral_matrix: expected generators"):
        credits([hostile], ["__import__('os').getcwd()"])
