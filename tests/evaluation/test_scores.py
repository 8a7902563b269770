"""Answers by hand, graded and scored by hand."""

from __future__ import annotations

import pytest

from cera_train.evaluation.evaluate import print_result
from cera_train.evaluation.grading import grade_all, score, verify
from cera_train.evaluation.tasks import gsm8k, math
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.runs.results import ENDINGS

pytest_plugins = ("evaluated_runs",)


def answer(problem: str, text: str, sample: int = 0, truncated: bool = False) -> Generation:
    return Generation(problem, sample, text, len(text), truncated)


def test_both_graders_count_side_by_side(one_verifier):
    problems = {name: Problem(name, "?", "?", r"\frac{1}{2}") for name in "abcde"}
    answers = [
        answer("a", r"so \boxed{\frac12}"),  # written alike
        answer("b", r"so \boxed{0.5}"),  # equal, written otherwise
        answer("c", r"so \boxed{2}"),
        answer("d", r"so the answer is $\frac{1}{2}$."),  # no box: math-verify looks at the text
        answer("e", r"so \boxed{\frac{1", truncated=True),
    ]
    grades = grade_all(math.TASK, problems, answers, seconds=10)
    assert [grade.exact for grade in grades] == [True, False, False, False, False]
    assert [grade.verified for grade in grades] == [True, True, False, True, False]
    assert [grade.answer for grade in grades] == [r"\frac12", "0.5", "2", None, None]
    assert [grade.ending for grade in grades] == ["right", "right", "wrong", "right", "truncated"]
    scores = score(math.TASK, list(problems.values()), answers, grades)
    assert (scores.accuracy("exact").value, scores.accuracy("verified").value) == (1 / 5, 3 / 5)
    assert [scores.endings[name] for name in ENDINGS] == [3 / 5, 1 / 5, 0, 1 / 5, 0]
    assert (scores.truncated, scores.no_answer, scores.grader_failures) == (1, 2, 0)
    assert scores.tokens == sum(given.tokens for given in answers)
    lower, upper = scores.accuracy("verified").interval
    assert lower < 3 / 5 < upper


def test_a_result_is_printed_line_by_line(capsys, tmp_path):
    problems = [Problem(name, "?", "?", "12") for name in "ab"]
    answers = [answer(problem.id, r"\boxed{12}") for problem in problems]
    grades = grade_all(math.TASK, {problem.id: problem for problem in problems}, answers, seconds=10)
    scores = score(math.TASK, problems, answers, grades)
    print_result(math.TASK, scores.replace(problems=2, samples=1), tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "problems        2",
        "exact           100.0%  (95 % interval 15.8% to 100.0%)",
        "verified        100.0%  (95 % interval 15.8% to 100.0%)",
        "answers         right 100.0%, wrong 0.0%, loop 0.0%, truncated 0.0%, collapsed 0.0%",
        "no answer       0",
        "grader failed   0",
        f"folder          {tmp_path}",
    ]


def test_a_share_that_is_the_same_for_every_problem_has_no_interval(capsys, tmp_path):
    """Half of the answers to each of two problems: resampling gives a point."""
    problems = [Problem(name, "?", "?", "12") for name in "ab"]
    answers = [answer(problem.id, f"#### {12 + sample}", sample) for problem in problems for sample in range(2)]
    grades = [gsm8k.TASK.grade(problems["ab".index(given.problem)], given) for given in answers]
    grades = [grade.replace(verified=grade.exact) for grade in grades]
    scores = score(gsm8k.TASK, problems, answers, grades)
    print_result(gsm8k.TASK, scores.replace(problems=2, samples=2), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "exact pass@1     50.0%  (no 95 % interval: the same for every problem)" in lines
    assert "exact pass@2     100.0%  (95 % interval 15.8% to 100.0%)" in lines


def test_none_or_all_of_the_problems_right_gets_the_exact_interval(one_verifier):
    """Resampling gives the point 0.0 to 0.0, which is not how sure the accuracy is."""
    problems = [Problem(name, "?", "?", "12") for name in "abcd"]
    answers = [answer(problem.id, "nothing") for problem in problems]
    grades = [math.TASK.grade(problem, given) for problem, given in zip(problems, answers, strict=True)]
    grades = verify({problem.id: problem for problem in problems}, answers, grades, seconds=10)
    scores = score(math.TASK, problems, answers, grades)
    for grader in ("exact", "verified"):
        assert scores.accuracy(grader).value == 0
        assert scores.accuracy(grader).interval == (0.0, pytest.approx(1 - 0.025 ** (1 / 4)))
