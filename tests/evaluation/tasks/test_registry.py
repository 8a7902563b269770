"""A benchmark is one file: the registry finds it, and settings, evaluation and reports take all else from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cera_train.evaluation.tasks
from cera_train.common.errors import UserError
from cera_train.evaluation.grading import score
from cera_train.evaluation.tasks.task import (
    AnswerTask,
    RowTask,
    all_tasks,
    check_task,
    display_name,
    find_task,
    load_problems,
)
from cera_train.runs.evaluation_folder import Generation
from cera_train.settings.tasks import TaskConfig

ARITHMETIC = """
from cera_train.data.rows import text_of
from cera_train.evaluation.tasks.task import QuestionTask

TASK = QuestionTask(
    name="Arithmetic",
    question="sum",
    gold=lambda row: text_of(row, "result"),
    extract=lambda text: next(iter(text.split()), None),
    is_exact=lambda answer, gold: answer == gold,
    is_verified=False,
)
"""


def test_a_new_file_is_a_new_benchmark(tmp_path, monkeypatch, write_jsonl):
    (tmp_path / "arithmetic.py").write_text(ARITHMETIC)
    monkeypatch.setattr(cera_train.evaluation.tasks, "__path__", [*cera_train.evaluation.tasks.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "cera_train.evaluation.tasks.arithmetic", None)
    del sys.modules["cera_train.evaluation.tasks.arithmetic"]  # restored, that is removed, after the test
    rows = write_jsonl("sums.jsonl", [{"sum": "1 + 1", "result": 2}, {"sum": "1 + 2", "result": 3}])
    config = TaskConfig(kind="arithmetic", name="sums", prompt="{sum} =", files=[str(rows)])
    task, problems = find_task("arithmetic"), load_problems(config, None)
    assert [(problem.prompt, problem.gold) for problem in problems] == [("1 + 1 =", "2"), ("1 + 2 =", "3")]
    answers = [Generation(problem.id, 0, " 2", 2, False) for problem in problems]
    grades = [task.grade(*pair) for pair in zip(problems, answers, strict=True)]
    scores = score(task, problems, answers, grades)
    assert scores.accuracy("exact").value == 0.5
    assert scores.accuracy("verified") is None
    assert display_name("arithmetic") == "Arithmetic"


@pytest.mark.parametrize("kind", ["nope", "config", "registry", "task", "..config", ""])
def test_an_unknown_kind_is_refused_and_the_kinds_are_listed(kind):
    with pytest.raises(
        UserError, match=rf"^task.kind={kind} is unknown: choose one of gsm8k, jsonl, logistic_map, math"
    ):
        check_task(TaskConfig(kind=kind, name="x"))


def test_every_task_is_of_one_of_the_two_sorts_and_takes_settings_that_there_are():
    names = set(TaskConfig.__dataclass_fields__)
    assert set(all_tasks()) == {"gsm8k", "jsonl", "logistic_map", "math", "perplexity", "reasoning_gym", "text"}
    for task in all_tasks().values():
        assert isinstance(task, (AnswerTask, RowTask))
        assert names >= set(task.settings)


def test_names_for_people():
    names = ["gsm8k", "math", "math500", "math_hard", "logistic_map", "gsm8k-best"]
    assert [display_name(name) for name in names] == [
        *("GSM8K", "MATH", "MATH-500", "MATH level 5", "logistic map", "gsm8k-best"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gsm8k"}, "task.prompt is empty"),
        (
            {"kind": "gsm8k", "prompt": "{question}"},
            "task.files is empty: name local files, or a Hub data set in task.path",
        ),
        ({"kind": "gsm8k", "prompt": "{question"}, r"task.prompt.*'{question' is malformed"),
        ({"kind": "math", "prompt": "Problem:"}, "task.prompt='Problem:' names no column: write one in braces"),
        (
            {"kind": "gsm8k", "prompt": "{question}", "path": "a/b", "level": 5},
            "task.level=5 is for MATH's and reasoning-gym's tasks",
        ),
        ({"kind": "text", "files": ["x"], "growths": [3.5]}, r"task.growths=\[3.5\] is for logistic map's tasks"),
        ({"kind": "text"}, "task.files is empty"),
        ({"kind": "jsonl", "prompt": "{question}", "files": ["x"]}, "task.grader is missing: choose one of text, num"),
        ({"kind": "gsm8k", "grader": "text"}, "task.grader=text is for jsonl's tasks: leave it out"),
        (
            {"kind": "reasoning_gym", "limit": 9, "generator": "chain_sums"},
            "task.generator=chain_sums: expected generators",
        ),
        ({"kind": "reasoning_gym"}, "task.limit=null: a generator has no last problem"),
        ({"kind": "reasoning_gym", "limit": 9, "files": ["x"]}, "takes neither task.prompt nor task.files"),
        ({"kind": "logistic_map"}, r"task.growths=\[\] must be numbers above 0"),
    ],
)
def test_a_task_checks_its_settings(settings, message):
    with pytest.raises(UserError, match=message):
        check_task(TaskConfig(name="x", **settings))


def test_finding_every_task_imports_neither_torch_nor_pyarrow():
    code = "import sys; sys.argv[0] = 'cera-train'\n"
    code += "from cera_train.evaluation.tasks.task import all_tasks; all_tasks()\n"
    code += "import cera_train.settings.evaluation, cera_train.evaluation.tasks.task\n"
    code += "print({'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'pyarrow', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_the_logistic_map_is_paired_by_steps_and_others_by_their_grader():
    class Line:
        exact, verified, details = False, True, {"matches": [True, True, False, False]}

    assert find_task("logistic_map").score_name == "steps"
    assert find_task("logistic_map").paired_value(Line(), "steps") == 0.5
    assert [find_task("math").paired_value(Line(), grader) for grader in ("exact", "verified")] == [0.0, 1.0]
