"""A benchmark is one file: its settings, its problems and their ids, and the line that a file gets
that has none."""

import sys
from dataclasses import replace

from examples import with_changes

import cera_train.evaluation.tasks
from cera_train.evaluation.requests import requests_for
from cera_train.evaluation.tasks.task import load_problems, trained_on, training_task
from cera_train.runs.evaluation_folder import Generation
from cera_train.settings.data import DataConfig, MixPart

GSM8K = {"question": "1 + 1", "answer": "It is 2.\n#### 2"}
MATH = {"problem": "1 + 1", "solution": r"\boxed{2}"}
ARITHMETIC = """
from cera_train.data.rows import text_of
from cera_train.evaluation.requests import requests_for
from cera_train.evaluation.tasks.task import QuestionTask

TASK = QuestionTask(
    question="sum",
    gold=lambda row: text_of(row, "result"),
    extract=lambda text: next(iter(text.split()), None),
    is_verified=False,
)
"""


def test_a_new_file_is_a_new_benchmark(tmp_path, monkeypatch, task_of):
    (tmp_path / "arithmetic.py").write_text(ARITHMETIC)
    monkeypatch.setattr(
        cera_train.evaluation.tasks,
        "__path__",
        [*cera_train.evaluation.tasks.__path__, str(tmp_path)],
    )
    monkeypatch.setitem(sys.modules, "cera_train.evaluation.tasks.arithmetic", None)
    # After the test, monkeypatch removes the module again.
    del sys.modules["cera_train.evaluation.tasks.arithmetic"]
    rows = [{"sum": "1 + 1", "result": 2}, {"sum": "1 + 2", "result": 3}]
    task = task_of(rows, "arithmetic", prompt="{sum} =")
    problems = load_problems(task)
    assert [(problem.prompt, problem.gold) for problem in problems] == [
        ("1 + 1 =", "2"),
        ("1 + 2 =", "3"),
    ]
    answers = [Generation(problem.id, 0, " 2", 2, False) for problem in problems]
    assert [task.grade(*pair).exact for pair in zip(problems, answers, strict=True)] == [
        True,
        False,
    ]
    assert task.graders == ("exact",)


def test_the_same_question_twice_is_two_problems(task_of):
    problems = load_problems(task_of([GSM8K] * 3, "gsm8k"))
    first, second, third = (problem.id for problem in problems)
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_problems_of_one_level(task_of):
    rows = [
        MATH | {"problem": f"p{n}", "level": level}
        for n, level in enumerate(["Level 5", "Level 1", 5, "Level ?"])
    ]
    for limit, questions in ((None, ["p0", "p2"]), (1, ["p0"])):
        task = task_of(rows, "math", prompt="{problem}", level=5, limit=limit)
        problems = load_problems(task)
        assert [problem.question for problem in problems] == questions


TALK = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is  4."}]


def held_out_problems(data: DataConfig, tokenizer, **changes) -> list[tuple[str, str]]:
    problems = load_problems(training_task("held_out", changes), data, tokenizer)
    return [(problem.prompt, problem.gold) for problem in problems]


def test_held_out_asks_the_evaluation_rows_of_all_parts_in_turn(write_jsonl, tokenizer):
    qa = write_jsonl(
        "qa.jsonl",
        [{"q": f"1 + {n}?", "a": f"It is {n + 1}"} for n in range(4)] + [{"q": "?", "a": ""}],
    )
    talk = write_jsonl("talk.jsonl", [{"conversations": TALK}] * 2)
    parts = [
        MixPart(train_files=[str(qa)], prompt="{q} ", completion="{a}", eval_rows=3),
        MixPart(train_files=[str(talk)], layout="conversations"),
        MixPart(layout="dates", train_rows=1, eval_rows=0),
    ]
    data = DataConfig(prompt="x", completion="{y}", chat="plain", eval_rows=1, mix=parts)
    sums = [("1 + 2? ", "It is 3"), ("1 + 3? ", "It is 4")]
    plain = ("User: 2 + 2?\nAssistant:", "It is 4.")
    assert held_out_problems(data, tokenizer) == [sums[0], plain, sums[1]]
    assert held_out_problems(data, tokenizer, grader="number", limit=2) == [
        (sums[0][0], "3"),
        (plain[0], "4"),
    ]


def test_held_out_asks_chats_by_their_template_with_one_start_token(write_jsonl, tokenizer):
    talk = write_jsonl("talk.jsonl", [{"conversations": TALK}] * 2)
    data = DataConfig(train_files=[str(talk)], layout="conversations", eval_rows=1)
    task = training_task("held_out", {})
    [problem] = load_problems(task, data, tokenizer)
    asked = TALK[0]["value"]
    prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert (problem.prompt, problem.gold) == (prompt, "It is 4.")
    other = with_changes(tokenizer, chat_template=f"[start]{tokenizer.chat_template}")
    [asked_otherwise] = load_problems(task, data, other)
    assert asked_otherwise.prompt != prompt
    assert asked_otherwise.id == problem.id  # so two bases are compared by cera-report
    [request] = requests_for([problem], 1, tokenizer, 8, None)
    assert tokenizer.decode(request.prompt_ids) == prompt


def test_held_out_ends_answers_before_the_asked_one_as_training_does(write_jsonl, tokenizer):
    turns = {"conversations": [*TALK[:1], TALK[1] | {"train": False}, *TALK]}
    file = str(write_jsonl("chat.jsonl", [turns] * 2))
    data = DataConfig(train_files=[file], layout="conversations", turns="all", chat="plain")
    [problem] = load_problems(training_task("held_out", {}), replace(data, eval_rows=1), tokenizer)
    [request] = requests_for([problem], 1, tokenizer, 8, None)
    asked = f"User: {TALK[0]['value']}\nAssistant:"
    assert tokenizer.decode(request.prompt_ids) == f"<s>{asked} {TALK[1]['value']}</s>\n{asked}"


def test_questions_that_are_cells_of_training_rows_are_found_whatever_their_case_and_spaces(
    task_of, write_jsonl
):
    questions = [f"How many apples has {name}?" for name in ("Ann", "Bob", "Cem", "Dan", "Eve")]
    asked = [GSM8K | {"question": question} for question in questions]
    problems = load_problems(task_of(asked, "gsm8k"))
    rows = [
        {"question": "HOW many\n apples  has bob? ", "answer": "3"},
        {
            "question": "x",
            "messages": [{"role": "user", "content": "How many apples has Cem?"}],
        },
        {"question": "Tell me. How many apples has Ann? Quick.", "answer": "3"},
        {"question": "How many apples has Ann?s sister", "answer": "How many apples"},
        {"question": "has Ann?", "answer": None},
        {"question": "How many apples has Dan?", "answer": "held out"},
    ]
    parts = []
    files = {
        "first": rows,
        "second": [{"question": questions[-1], "answer": "y"}] * 3,
        "silent": [{"question": questions[0], "answer": "not trained on"}] * 3,
    }
    for name, content in files.items():
        file = str(write_jsonl(f"{name}.jsonl", content))
        parts.append(MixPart(train_files=[file], weight=float(name != "silent")))
    data = DataConfig(prompt="{question}", completion="{answer}", eval_rows=1, mix=parts)
    assert trained_on(problems, data) == [questions[1], questions[2], questions[4]]
