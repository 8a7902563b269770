"""A task of one's own: its gold answers, what counts as an answer under each grader, and the rows that are refused."""

from __future__ import annotations

import re

import pytest

from cera_train.common.errors import UserError
from cera_train.evaluation.grading import score, verify
from cera_train.evaluation.tasks.jsonl import chosen
from cera_train.evaluation.tasks.task import load_problems, task_of
from cera_train.runs.evaluation_folder import Generation
from cera_train.runs.results import AccuracyResult
from cera_train.settings.tasks import TaskConfig

CITY = {"question": "The capital of France?", "choices": ["Rome", "Paris", "Oslo"], "answer": "B"}
ASKED = "Question: {question}\n{choices}\nAnswer:"


@pytest.fixture
def config_of(write_jsonl):
    """config_of(rows, grader, ...) -> TaskConfig on a file of these rows"""

    def config_of(rows: list[dict], grader: str | None, **settings) -> TaskConfig:
        fixed = {"kind": "jsonl", "name": "mine", "files": [str(write_jsonl("mine.jsonl", rows))], "grader": grader}
        return TaskConfig(**fixed | {"prompt": "Question: {question}\nAnswer:"} | settings)

    return config_of


@pytest.mark.parametrize(
    ("grader", "gold", "answer", "is_exact"),
    [
        ("text", "New  York", " New York\n", True),
        ("text", "New York", "new york", False),
        ("text", "New York", "New York\nQuestion:", False),
        ("number", "The answer is 1,234", "so 1234.0 in all", True),
        ("number", "step 3\n#### 18", "It is 3", False),
        ("number", 0.5, "1/2", False),
        ("math", r"\frac{1}{2}", r"so \boxed{\dfrac12}", True),
        ("math", "7", "It is 7", False),
        ("choice", "B", "The answer is (B).", True),
        ("choice", "B", " B. Paris", True),
    ],
)
def test_each_grader_reads_gold_and_answer_by_its_rule(config_of, grader, gold, answer, is_exact):
    config = config_of([{"question": "?", "answer": gold}], grader)
    [problem] = load_problems(config, None)
    grade = task_of(config).grade(problem, Generation(problem.id, 0, answer, 1, False))
    assert (grade.exact, grade.failure) == (is_exact, None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B) Paris", "B"),
        (" B\n\nQuestion: the next?\nAnswer: A", "B"),
        ("Paris, so the answer is B.\n\nQuestion: the next?\nAnswer: A", "B"),
        ("B) since A is wrong", "B"),
        ("The correct answer is: C", "C"),
        ("Answer: [A]", "A"),
        ("A dog, so none", None),
        ("The answer is Paris", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert chosen(text) == letter


@pytest.mark.parametrize("answer", ["B", "Paris", 1, "1"])
def test_a_choice_is_named_by_letter_text_or_number_and_shown_by_letters(config_of, answer):
    [problem] = load_problems(config_of([CITY | {"answer": answer}], "choice", prompt=ASKED), None)
    assert problem.prompt == "Question: The capital of France?\nA. Rome\nB. Paris\nC. Oslo\nAnswer:"
    assert problem.gold == "B"


def test_columns_of_other_names(config_of):
    rows = [{"query": "1 + 1", "response": "2"}]
    config = config_of(rows, "number", question="query", answer="response", prompt="{query} =")
    [problem] = load_problems(config, None)
    assert (problem.question, problem.prompt, problem.gold) == ("1 + 1", "1 + 1 =", "2")


def test_mathematical_equality_is_verified_and_text_is_not(config_of):
    def scores(grader: str) -> AccuracyResult:
        config = config_of([{"question": "half", "answer": "0.5"}], grader)
        task, [problem] = task_of(config), load_problems(config, None)
        answer = Generation(problem.id, 0, r"\boxed{\frac{1}{2}}", 1, False)
        grades = [task.grade(problem, answer)]
        if task.is_verified:
            grades = verify({problem.id: problem}, [answer], grades, seconds=30)
        return score(task, [problem], [answer], grades)

    assert [scores("math").accuracy(grader).value for grader in ("exact", "verified")] == [0, 1]
    assert scores("text").accuracy("verified") is None


FINE = {"question": "?", "answer": "7"}
LETTER = {"question": "?", "answer": "A"}


@pytest.mark.parametrize(
    ("first", "second", "grader", "line"),
    [
        (
            FINE,
            {"question": "?"},
            "text",
            "2: column 'answer' is missing; its columns are question",
        ),
        (FINE, FINE | {"answer": None}, "math", "2: column 'answer' holds '', and task.grader=math needs an answer in"),
        (
            LETTER,
            FINE | {"answer": "no"},
            "choice",
            "2: column 'answer' holds 'no', and task.grader=choice needs a lett",
        ),
        (LETTER, CITY, "choice", "2: task.prompt does not show column 'choices': write {choices} where they belong."),
        (CITY, CITY | {"answer": "D"}, "choice", "2: column 'answer' holds 'D', and task.grader=choice needs a letter"),
        (CITY, CITY | {"choices": ["a"]}, "choice", "2: column 'choices' holds 1 texts: expected a list of 2 to 26 te"),
    ],
)
def test_a_row_without_an_answer_of_its_kind_is_refused_by_file_and_line(config_of, first, second, grader, line):
    prompt = ASKED if "choices" in first else "Question: {question}"
    with pytest.raises(UserError, match=re.escape(f"mine.jsonl:{line}")):
        load_problems(config_of([first, second], grader, prompt=prompt), None)
