"""A task of one's own: its gold answers, and what counts as an answer under each grader."""

import pytest

from cera_train.evaluation.tasks.jsonl import chosen
from cera_train.evaluation.tasks.task import load_problems
from cera_train.runs.evaluation_folder import Generation


@pytest.mark.parametrize(
    ("grader", "gold", "answer", "is_exact"),
    [
        ("text", "New  York", " New York\n", True),
        ("text", "New York", "new york", False),
        ("number", "The answer is 1,234", "so 1234.0 in all", True),
        ("number", "step 3\n#### 18", "It is 3", False),
        ("math", r"\frac{1}{2}", r"so \boxed{\dfrac12}", True),
        ("choice", " B\n", "The answer is (B).", True),
        ("choice", "B", " B. Paris", True),
    ],
)
def test_each_grader_reads_gold_and_answer_by_its_rule(task_of, grader, gold, answer, is_exact):
    task = task_of([{"question": "?", "answer": gold}], "jsonl", grader=grader)
    [problem] = load_problems(task)
    grade = task.grade(problem, Generation(problem.id, 0, answer, 1, False))
    assert (grade.exact, grade.failure) == (is_exact, None)
    assert task.is_verified == (grader in ("number", "math"))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B\n\nQuestion: the next?\nAnswer: A", "B"),
        ("Paris, so the answer is B.\n\nQuestion: the next?\nAnswer: A", "B"),
        ("Answer: [A]", "A"),
        ("B is correct, so the answer A is wrong", "B"),
        ("X-rays, so the answer is C", "C"),
        ("A dog, so none", None),
        ("A is correct, B is not", "A"),
        ("Answer: I think none", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert chosen(text) == letter


def test_columns_of_other_names(task_of):
    rows = [{"query": "1 + 1", "response": "2"}]
    columns = {"question": "query", "answer": "response", "prompt": "{query} ="}
    [problem] = load_problems(task_of(rows, "jsonl", grader="number", **columns))
    assert (problem.question, problem.prompt, problem.gold) == ("1 + 1", "1 + 1 =", "2")
