"""Whatever bytes, rows and texts come in: a reader gives rows or says what is wrong, a grader gives its verdict."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import fuzz, json_values, mutated, numbers, result_or_value_error, scalars, texts

from cera_train.common.trust import clean
from cera_train.data import logistic_map as logistic_map_rows
from cera_train.data.files import READERS, rows_of
from cera_train.data.prepare import encode
from cera_train.data.segments import columns_of, segmenter
from cera_train.evaluation.tasks import gsm8k, logistic_map
from cera_train.evaluation.tasks import math as math_task
from cera_train.evaluation.tasks.task import load_problems
from cera_train.runs.card import escape
from cera_train.settings.data import DataConfig, LogisticMapConfig
from cera_train.settings.tasks import TaskConfig

# --- files of rows ---------------------------------------------------------------------------------------------------

ROWS = [
    {
        "question": "what is the next value?",
        "answer": "0.84",
        "level": number,
        "turns": [{"from": "human", "value": None}],
    }
    for number in range(6)
]


def parquet_file() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, compression="none", row_group_size=4)
    return file.getvalue()


VALID = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS).encode(),
    ".parquet": parquet_file(),
    ".csv": b'question,answer\r\nwhat is it?,"0.84, or ""more"""\r\n',
    ".txt": "näch\u2028ste\r\n\0?".encode(),
}


def read_rows(path: Path, content: bytes) -> list | None:
    path.write_bytes(content)
    rows = result_or_value_error(lambda: [row for _, row in rows_of([str(path)])])
    assert rows is None or all(isinstance(row, dict) for row in rows)
    return rows


def test_every_kind_of_file_is_fuzzed(tmp_path):
    assert {READERS[suffix] for suffix in VALID} == {*READERS.values()}
    assert all(read_rows(tmp_path / f"x{suffix}", content) for suffix, content in VALID.items())


@pytest.mark.parametrize("suffix", VALID)
@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_reason(tmp_path, suffix, content):
    read_rows(tmp_path / f"x{suffix}", content)


@pytest.mark.parametrize("suffix", VALID)
@fuzz
@given(data=st.data())
def test_a_damaged_file_is_rows_or_a_reason(tmp_path, suffix, data):
    read_rows(tmp_path / f"x{suffix}", data.draw(mutated(VALID[suffix])))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@fuzz
@given(values=st.lists(json_values, max_size=3))
@example(values=[{"a": 10**5000}])
@example(values=[{"a": float("nan")}])
@example(values=[{"\ud800": "\0"}])
def test_any_json_is_rows_or_a_reason(tmp_path, suffix, values):
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    text = "".join(json.dumps(value) + "\n" for value in values) if suffix == ".jsonl" else json.dumps(values)
    sys.set_int_max_str_digits(limit)
    read_rows(tmp_path / f"x{suffix}", text.encode())


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("content", ["[" * 10**6, '{"a":' * 10**6, '"' + "x" * 10**7, "9" * 10**6, "-" * 10**6])
def test_a_gigantic_line_is_refused(tmp_path, suffix, content):
    assert read_rows(tmp_path / f"x{suffix}", content.encode()) is None


# --- rows ------------------------------------------------------------------------------------------------------------

TURNS = st.lists(
    st.one_of(
        json_values,
        st.fixed_dictionaries({"from": st.sampled_from(["system", "human", "gpt", "?"]), "value": scalars}),
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "?"]), "content": scalars}),
    ),
    max_size=4,
)
NAMES = ["question", "answer", "prompt", "completion", "conversations", "messages"]
HOSTILE_ROWS = st.dictionaries(st.sampled_from(NAMES), st.one_of(texts, json_values, TURNS), max_size=6)

LAYOUTS = {
    "text": {"prompt": "Q: {question}\nA:", "completion": " {answer}"},
    "text, all": {"prompt": "{question}", "completion": "{answer}", "loss_on": "all"},
    "conversations": {"layout": "conversations"},
    "conversations, all": {"layout": "conversations", "turns": "all"},
    "messages": {"layout": "messages"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@fuzz
@given(row=HOSTILE_ROWS, max_length=st.integers(1, 40))
def test_any_row_is_an_example_or_a_reason(tokenizer, layout, row, max_length):
    config = DataConfig(**LAYOUTS[layout], path="x", max_length=max_length)
    segments = result_or_value_error(segmenter(config, tokenizer), row)
    if not segments:
        return
    (made,) = encode([segments], config, tokenizer)
    assert len(made.input_ids) == len(made.loss_mask) <= max_length
    assert all(0 <= token < len(tokenizer) for token in made.input_ids)
    assert not made.loss_mask[0]
    if config.loss_on == "completion":
        assert made.has_answer == any(made.loss_mask)
    if not made.truncated and layout.startswith("text"):
        assert made.has_answer
        assert made.input_ids[-1] == tokenizer.eos_token_id


@fuzz
@given(template=st.text("{}[].:!ab \n", max_size=12))
def test_a_template_names_columns_or_is_refused(template):
    names = result_or_value_error(columns_of, template)
    if names is not None:
        template.format_map(dict.fromkeys(names, "x"))


TASKS = {"math": "problem", "gsm8k": "question"}


@pytest.mark.parametrize("task", TASKS)
@fuzz
@given(data=st.data())
def test_any_rows_are_problems_or_a_reason(tmp_path, task, data):
    gold = st.sampled_from(["#### 1,000", r"so \boxed{\frac12}", "12"]) | texts | json_values
    optional = {"solution": gold, "level": json_values, "type": json_values}
    rows = st.fixed_dictionaries({TASKS[task]: texts, "answer": gold, "hint": scalars}, optional=optional)
    path = tmp_path / "rows.jsonl"
    row = data.draw(rows)
    path.write_text(json.dumps(row) + "\n")
    level = data.draw(st.none() | st.integers(1, 5)) if task == "math" else None
    config = TaskConfig(kind=task, name=task, prompt=f"{{{TASKS[task]}}}{{hint}}", files=[str(path)], level=level)
    problems = result_or_value_error(load_problems, config, None)
    for problem in problems or []:
        problem.prompt.encode()  # else no tokenizer takes it
        assert json.dumps(problem.gold)


# --- graders ---------------------------------------------------------------------------------------------------------

SIGNS = r"""
\boxed \fbox { } \{ \ \frac \dfrac \sqrt \text \mbox \left \! $ % \% ^ \circ ° , {,} . ~ 1 12 000 / x = - − #### e ١ ²
nan inf _ ( ) \quad km
"""
LATEX = [*SIGNS.split(), " ", "\n", "9" * 400, "\0", "\ud800"]
ANSWERS = st.one_of(st.lists(st.sampled_from(LATEX), max_size=14).map("".join), texts)


@pytest.mark.parametrize("task", [math_task, gsm8k], ids=["math", "gsm8k"])
@fuzz
@given(text=ANSWERS, gold=ANSWERS)
def test_any_answer_gets_a_verdict_and_the_same_again(task, text, gold):
    answer = task.extract(text)
    assert answer is None or isinstance(answer, str)
    assert task.extract(text) == answer
    for one, other in ((text, gold), (answer or "", gold), (text, text)):
        verdict = task.is_exact(one, other)
        assert verdict is task.is_exact(one, other)
        assert task.is_exact(other, one) is verdict
    assert isinstance(task.normalize(text), str)


@pytest.mark.parametrize("task", [math_task, gsm8k], ids=["math", "gsm8k"])
@fuzz
@given(before=ANSWERS, inside=ANSWERS)
def test_an_answer_that_is_found_is_right_by_itself(task, before, inside):
    answer = task.extract(f"{before}\\boxed{{{inside}}} #### {inside} 1,234.50")
    assert answer is None or task.is_exact(answer, answer)


@fuzz
@given(text=st.one_of(ANSWERS, st.text("0123456789.,-=x \n", max_size=60)), steps=st.integers(1, 6))
def test_any_trajectory_is_compared_step_by_step(text, steps):
    truth = logistic_map_rows.problem(0.4, 3.5, LogisticMapConfig(steps=steps, decimals=4))["completion"].strip()
    values = logistic_map.extract(text, steps)
    compared = logistic_map.compare(values, truth, 4)
    assert len(values) <= steps == len(compared["matches"]) == len(compared["errors"])
    assert logistic_map.extract(text, steps) == values
    assert sum(error is not None for error in compared["errors"]) == len(values)


@pytest.mark.parametrize(
    "part", [*LATEX, "\\text{", "\\frac{", "{}", "\\boxed{", "1,", "1 ", ". ", "-.", "\\ ", "x=", "$-"]
)
def test_long_answers_are_read(part):
    """A regular expression that backtracks takes hours on the right text."""
    for text in (part * 4000, part * 4000 + "!", "\\boxed{" + part * 4000 + "}"):
        text = text[:40_000]
        for task in (math_task, gsm8k):
            task.extract(text)
            task.is_exact(text, text + "1")
        logistic_map.extract(text, 5)


# --- what is shown ---------------------------------------------------------------------------------------------------


@fuzz
@given(text=texts, number=numbers)
def test_what_is_shown_steers_nothing_and_can_be_written(text, number):
    for shown in (clean(text), escape(text), clean(str(number)[:99])):
        shown.encode()
        assert not any((ord(mark) < 32 and mark != "\n") or 127 <= ord(mark) < 160 for mark in shown)
    assert "\n" not in escape(text)
    assert "<" not in escape(text)
    assert escape(text).replace("\\\\", "").count("|") == escape(text).replace("\\\\", "").count("\\|")
