"""The problems of a task's files: which rows they are, their ids, and the line that a file gets that has none."""

from __future__ import annotations

import pytest

from cera_train.common.errors import UserError
from cera_train.evaluation.tasks.task import load_problems
from cera_train.settings.tasks import TaskConfig

GSM8K = {"question": "1 + 1", "answer": "It is 2.\n#### 2"}
MATH = {"problem": "1 + 1", "solution": r"\boxed{2}"}


@pytest.fixture
def problems(write_jsonl):
    """problems(rows, kind="gsm8k", ...) -> the problems of a file with these rows."""

    def problems(rows, kind="gsm8k", **settings):
        path = str(write_jsonl("rows.jsonl", rows))
        prompt = {"gsm8k": "Question: {question}", "math": "Problem: {problem}"}[kind]
        return load_problems(
            TaskConfig(**{"kind": kind, "name": kind, "prompt": prompt} | settings, files=[path]), None
        )

    return problems


def test_the_same_question_twice_is_two_problems(problems):
    first, second, third = (problem.id for problem in problems([GSM8K] * 3))
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_problems_of_one_level(problems):
    rows = [MATH | {"problem": f"p{n}", "level": level} for n, level in enumerate(["Level 5", "Level 1", 5, "Level ?"])]
    assert [problem.question for problem in problems(rows, "math", level=5)] == ["p0", "p2"]
    assert [problem.question for problem in problems(rows, "math", level=5, limit=1)] == ["p0"]


def test_a_limit_takes_the_first_rows_and_reads_no_further(problems):
    assert [problem.gold for problem in problems([GSM8K, GSM8K, {"question": "broken"}], limit=2)] == ["2", "2"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [GSM8K, MATH],
            {},
            r"rows.jsonl(:|, row )2: column 'question' of task.prompt is missing among problem, solution\. "
            r"Rename the one with the question to question, or choose another task\.$",
        ),
        (
            [GSM8K],
            {"prompt": "{hint} {question}"},
            r"(:|, row )1: column 'hint' of task.prompt is missing among question, answer. Name one of these\.$",
        ),
        ([GSM8K | {"question": ["a"]}], {}, r"rows.jsonl(:|, row )1: column 'question' holds a list: expected text"),
        ([GSM8K, {"question": "?", "answer": "18"}], {}, r"rows.jsonl(:|, row )2: column 'answer' should end in ####"),
        ([{"question": "?"}], {}, r"rows.jsonl(:|, row )1: column 'answer' is missing"),
        (
            [{"messages": []}],
            {},
            r"rows.jsonl(:|, row )1: column 'question' of task.prompt is missing among messages",
        ),
        ([], {}, r"task.files=\[\S+/rows.jsonl\] has no rows: name a file with a problem on each row\.$"),
        ([MATH | {"level": 1}], {"kind": "math", "level": 5}, r"task.level=5: task.files=.* no problems of that level"),
        ([MATH], {"kind": "math", "level": 5}, r"rows.jsonl(:|, row )1: column 'level' is missing"),
        ([MATH | {"solution": "2"}], {"kind": "math"}, r"rows.jsonl(:|, row )1: column 'solution' has no \\boxed"),
    ],
)
def test_a_file_without_what_the_task_needs_gets_one_line_with_its_place(problems, rows, settings, message):
    with pytest.raises(UserError, match=message) as error:
        problems(rows, **settings)
    assert "\n" not in str(error.value)
