"""Whatever bytes, rows and texts come in: a reader gives rows or says what is wrong, a grader gives its verdict."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import changed, fuzz, json_values, mutated, numbers, scalars, texts

from cera_train.common.files import read_json, read_yaml
from cera_train.common.trust import clean
from cera_train.config import Config
from cera_train.data import logistic_map as logistic_map_rows
from cera_train.data.config import DataConfig
from cera_train.data.files import READERS
from cera_train.data.prepare import encode
from cera_train.data.segments import columns_of, segmenter
from cera_train.evaluation.config import EvalConfig
from cera_train.runs.card import escape
from cera_train.runs.evaluation_folder import EvaluationFolder
from cera_train.runs.recorded_config import load_config
from cera_train.runs.subject import base_of, check_adapter
from cera_train.tasks import gsm8k, logistic_map
from cera_train.tasks import math as math_task
from cera_train.tasks.config import TaskConfig
from cera_train.tasks.records import Generation, Problem
from cera_train.tasks.task import load_problems


def result_or_value_error(function: Callable, *arguments: Any) -> Any:
    """The result, or None where there is an error that the user can mend."""
    with contextlib.suppress(ValueError):
        return function(*arguments)
    return None


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
    ".txt": "näch\u2028ste\r\n\0?".encode(),
}


def read_rows(path: Path, content: bytes) -> list | None:
    path.write_bytes(content)
    rows = result_or_value_error(lambda: list(READERS[path.suffix](path)))
    assert rows is None or all(isinstance(row, dict) for row in rows)
    return rows


def test_every_kind_of_file_is_fuzzed(tmp_path):
    assert VALID.keys() == READERS.keys()
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
def test_a_gigantic_line_is_refused_at_once(tmp_path, suffix, content):
    started = time.process_time()
    assert read_rows(tmp_path / f"x{suffix}", content.encode()) is None
    assert time.process_time() - started < 2


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

LATEX = [
    *(
        "\\boxed",
        "\\fbox",
        "{",
        "}",
        "\\{",
        "\\",
        "\\frac",
        "\\dfrac",
        "\\sqrt",
        "\\text",
        "\\mbox",
        "\\left",
        "\\!",
        "$",
    ),
    *(
        "%",
        "\\%",
        "^",
        "\\circ",
        "°",
        ",",
        "{,}",
        ".",
        " ",
        "\n",
        "~",
        "1",
        "12",
        "000",
        "/",
        "x",
        "=",
        "-",
        "−",
        "####",
    ),
    *("e", "9" * 400, "١", "²", "\0", "\ud800", "nan", "inf", "_", "(", ")", "\\quad", "km"),
]
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
    truth = logistic_map_rows.problem(0.4, 3.5, logistic_map.LogisticMapConfig(steps=steps, decimals=4))[
        "completion"
    ].strip()
    values = logistic_map.extract(text, steps)
    compared = logistic_map.compare(values, truth, 4)
    assert len(values) <= steps == len(compared.matches) == len(compared.errors)
    assert logistic_map.extract(text, steps) == values
    assert sum(error is not None for error in compared.errors) == len(values)


@pytest.mark.parametrize(
    "part", [*LATEX, "\\text{", "\\frac{", "{}", "\\boxed{", "1,", "1 ", ". ", "-.", "\\ ", "x=", "$-"]
)
def test_no_answer_takes_long(part):
    """Regular expressions that go back over what they have read take hours on the right text."""
    started = time.process_time()
    for text in (part * 4000, part * 4000 + "!", "\\boxed{" + part * 4000 + "}"):
        text = text[:40_000]
        for task in (math_task, gsm8k):
            task.extract(text)
            task.is_exact(text, text + "1")
        logistic_map.extract(text, 5)
    assert time.process_time() - started < 3


# --- what stands in a run's folder -----------------------------------------------------------------------------------


PLAIN_CONFIG = {
    "model": {"path": "a/b", "dtype": "bfloat16", "quantization": "none", "trust_remote_code": False},
    "adapter": {"kind": "cera", "r": 64, "alpha": None, "dropout": 0.1, "target_modules": ["q_proj"], "layers": [0]},
    "data": {
        "layout": "text",
        "path": "a/b",
        "prompt": "{a}",
        "completion": "{b}",
        "train_files": [],
        "eval_rows": None,
    },
    "optimizer": {"kind": "adamw", "lr": 3e-4},
    "train": {"epochs": 3, "autocast": None},
    "tracker": {"kind": "none"},
    "name": "run",
    "published": {"eval/perplexity": 1.97},
}


def test_the_config_that_is_damaged_is_one(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PLAIN_CONFIG))
    assert isinstance(load_config(tmp_path / "config.yaml"), Config)


@fuzz
@given(data=st.data())
def test_a_damaged_config_is_a_config_or_a_reason(tmp_path, data):
    path = tmp_path / "config.yaml"
    valid = yaml.safe_dump(PLAIN_CONFIG, sort_keys=False).encode()
    path.write_bytes(data.draw(st.binary(max_size=100) | mutated(valid)))
    config = result_or_value_error(load_config, path)
    assert config is None or isinstance(config, Config)


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_a_config_of_other_values_is_a_config_or_a_reason(tmp_path, data):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(data.draw(changed(PLAIN_CONFIG))))  # JSON is YAML
    config = result_or_value_error(load_config, path)
    assert config is None or isinstance(config, Config)
    result_or_value_error(load_config, path, EvalConfig)


@pytest.mark.slow
@fuzz
@given(prompt=st.text("\\${}abc:'\".?[]oc env,TOK\n", min_size=1, max_size=20))
@example(prompt="${oc.env:HOME}")
@example(prompt="\\${oc.env:HOME}")
@example(prompt="\\\\${name}")
def test_every_prompt_comes_back_as_it_was_written(tmp_path, prompt):
    assume(prompt != "???")  # OmegaConf's mark of a missing value
    tree = PLAIN_CONFIG | {"data": PLAIN_CONFIG["data"] | {"prompt": prompt}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_config(path).data.prompt == prompt


@pytest.mark.parametrize("read", [read_json, read_yaml])
@fuzz
@given(content=st.binary(max_size=100) | st.text("{}[]:,&*!<>|-? \n'\"%@`#~=019.aeT_", max_size=40).map(str.encode))
@example(content=b"!!int ''")
@example(content=b"!!bool x")
@example(content=b"!!timestamp x")
@example(content=b"a: 2001-99-99")
@example(content=b"!!python/object/apply:os.system [id]")
@example(content=b"a: &a [1]\nb: *a")
@example(content=b"[" * 100_000)
def test_any_bytes_are_names_and_values_or_a_reason(tmp_path, read, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    tree = result_or_value_error(read, path)
    assert tree is None or isinstance(tree, dict)


@fuzz
@given(data=st.data())
def test_an_adapter_is_checked_whatever_its_config_says(tmp_path, data):
    valid = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "r": 8, "auto_mapping": None, "loftq_config": {}}
    (tmp_path / "adapter_model.safetensors").touch()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(data.draw(changed(valid))))
    result_or_value_error(check_adapter, tmp_path)
    result_or_value_error(base_of, tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> tuple[Path, Any, Any]:
    """A checkpoint that can be loaded, its model and its optimizer."""
    import torch
    from conftest import make_tiny_llama

    from cera_train.adapters.build import build
    from cera_train.adapters.config import AdapterConfig
    from cera_train.runs.folder import Progress, RunFolder

    model = build(make_tiny_llama().requires_grad_(False), AdapterConfig(r=2))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    with RunFolder(tmp_path_factory.mktemp("run") / "run", {"name": "run"}) as folder:
        folder.save_checkpoint(model, optimizer, Progress(update=3), "digest", keep=1)
        (path,) = folder.checkpoints()
        folder.append_metrics({"update": 3})
    return path, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "progress.json"])
@fuzz
@given(data=st.data())
def test_a_damaged_checkpoint_is_loaded_or_refused(checkpoint, name, data):
    from cera_train.runs.folder import Progress, load_checkpoint

    folder, model = checkpoint
    path = folder / name
    valid = path.read_bytes()
    broken = mutated(valid)
    if path.suffix == ".json":
        broken = broken | changed(json.loads(valid)).map(lambda tree: json.dumps(tree).encode())
    path.write_bytes(data.draw(broken))
    try:
        loaded = result_or_value_error(load_checkpoint, folder, model, "digest")
    finally:
        path.write_bytes(valid)
    assert loaded is None or (isinstance(loaded[0], Progress) and isinstance(loaded[0].update, int))


PROBLEM = {"id": "a", "question": "q", "prompt": "p", "gold": "1", "level": 3}
ANSWER = {"problem": "a", "sample": 0, "text": "1", "tokens": 2, "truncated": False}


@fuzz
@given(data=st.data())
def test_lines_of_an_evaluation_are_read_or_named(tmp_path, data):
    for name, valid in (("problems.jsonl", PROBLEM), ("generations.jsonl", ANSWER), ("result.json", {"samples": 1})):
        line = json.dumps(data.draw(changed(valid))).encode()
        (tmp_path / name).write_bytes(data.draw(st.just(line) | mutated(line)))
    folder = EvaluationFolder(tmp_path)
    problems = result_or_value_error(folder.problems)
    assert problems is None or all(isinstance(problem, Problem) for problem in problems)
    answers, broken = folder.answers()
    assert all(isinstance(answer, Generation) and isinstance(answer.text, str) for answer in answers.values())
    assert answers or broken or not (tmp_path / "generations.jsonl").read_bytes().split()
    result_or_value_error(folder.is_finished)


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
