"""For any bytes, rows and texts, a reader returns what they hold or says what is wrong, and a
grader gives a verdict."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import folder_of

from cera_train.adapters.build import build
from cera_train.adapters.folder import check_saved
from cera_train.common.files import read_json, read_yaml
from cera_train.common.trust import clean, for_markdown
from cera_train.data.reader import Reader
from cera_train.data.rows import rows_of
from cera_train.evaluation.tasks import gsm8k
from cera_train.evaluation.tasks import math as math_task
from cera_train.model.weights import load_model
from cera_train.runs.folder import Progress, load_checkpoint
from cera_train.runs.subject import base_of
from cera_train.settings.data import DataConfig

fuzz = settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


def result_or_value_error(function: Callable, *arguments: Any) -> Any:
    """The result, or None for an error that the user can fix."""
    try:
        return function(*arguments)
    except ValueError:
        return None


texts = st.text(st.characters(exclude_categories=[]), max_size=30)
"""With control characters, and halves of surrogate pairs."""

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([-0.0, 1e308, 5e-324, 2**31, 2**63, 2**64, -(10**30), 10**400]),
)

scalars = st.one_of(st.none(), st.booleans(), numbers, texts)

json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: Any, valid: bytes) -> bytes:
    """A valid file with bytes changed, left out, put in, repeated or cut off."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.sampled_from([start, start + 1, start + 16, len(content)]))
        content[start:end] = draw(
            st.binary(max_size=8) | st.just(bytes(content[start : start + 16]))
        )
    return bytes(content)


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A JSON tree with some value replaced by any other, or some key left out or added."""
    if not isinstance(tree, dict) or not tree or draw(st.booleans()):
        return draw(json_values)
    key = draw(st.sampled_from(sorted(tree)))
    others = {name: value for name, value in tree.items() if name != key}
    return draw(
        st.just(others)
        | st.builds(lambda value: others | {key: value}, changed(tree[key]))
        | st.builds(lambda name, value: tree | {name: value}, texts, json_values)
    )


# --- files of rows --------------------------------------------------------------------------------

ROW = {
    "question": "what is it?",
    "answer": "0.84",
    "level": 1,
    "turns": [{"from": "human", "value": None}],
}
ROWS = [ROW] * 6


def parquet_file() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), file, compression="none", row_group_size=4
    )
    return file.getvalue()


VALID = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS).encode(),
    ".parquet": parquet_file(),
    ".csv": b'question,answer\r\nwhat is it?,"0.84, or ""more"""\r\n',
    ".txt": "näch\u2028ste\r\n\0?".encode(),
}


@pytest.mark.parametrize("suffix", VALID)
@fuzz
@given(data=st.data())
def test_any_bytes_give_rows_or_a_reason(tmp_path, suffix, data):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data.draw(st.binary(max_size=200) | mutated(VALID[suffix])))
    rows = result_or_value_error(lambda: [row for _, row in rows_of([str(path)])])
    assert rows is None or all(isinstance(row, dict) for row in rows)


# --- rows -----------------------------------------------------------------------------------------

TURNS = st.lists(
    st.one_of(
        json_values,
        st.fixed_dictionaries(
            {"from": st.sampled_from(["system", "human", "gpt", "?"]), "value": scalars}
        ),
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "?"]), "content": scalars}
        ),
    ),
    max_size=4,
)
NAMES = ["question", "answer", "prompt", "completion", "conversations", "messages"]
HOSTILE_ROWS = st.dictionaries(
    st.sampled_from(NAMES), st.one_of(texts, json_values, TURNS), max_size=6
)

LAYOUTS = {
    "text": {"prompt": "Q: {question}\nA:", "completion": " {answer}"},
    "conversations, all": {"layout": "conversations", "turns": "all"},
    "messages": {"layout": "messages"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@fuzz
@given(row=HOSTILE_ROWS, max_length=st.integers(2, 40))
def test_any_row_gives_an_example_or_a_reason(tokenizer, layout, row, max_length):
    config = DataConfig(**LAYOUTS[layout], path="x", max_length=max_length)
    examples = result_or_value_error(Reader(config, tokenizer).examples, [("a row", row)])
    if not examples or not examples[0].input_ids:
        return
    (example,) = examples
    assert len(example.input_ids) == len(example.loss_mask) <= max_length
    assert all(0 <= token < len(tokenizer) for token in example.input_ids)
    assert not example.loss_mask[0]
    if config.loss_on == "completion":
        assert example.has_answer == any(example.loss_mask)
    if not example.truncated and layout.startswith("text"):
        assert example.has_answer
        assert example.input_ids[-1] == tokenizer.eos_token_id


# --- graders --------------------------------------------------------------------------------------

SIGNS = r"""
\boxed \fbox { } \{ \ \frac \dfrac \sqrt \text \mbox \left \! $ % \% ^ \circ ° ,
{,} . ~ 1 12 000 / x = - − #### e ١ ²
nan inf _ ( ) \quad km
"""
LATEX = [*SIGNS.split(), " ", "\n", "9" * 400, "\0", "\ud800"]
ANSWERS = st.one_of(st.lists(st.sampled_from(LATEX), max_size=14).map("".join), texts)


@pytest.mark.parametrize(
    ("task", "plain"),
    [(math_task.TASK, math_task.plain_latex), (gsm8k.TASK, gsm8k.plain_number)],
    ids=["math", "gsm8k"],
)
@fuzz
@given(text=ANSWERS, gold=ANSWERS)
def test_any_answer_gets_the_same_verdict_twice(task, plain, text, gold):
    answer = task.extract(text)
    assert answer is None or isinstance(answer, str)
    assert task.extract(text) == answer
    for one, other in ((text, gold), (answer or "", gold), (text, text)):
        verdict = task.is_exact(one, other)
        assert verdict is task.is_exact(one, other)
        assert task.is_exact(other, one) is verdict
    assert isinstance(plain(text), str)


# --- what is shown --------------------------------------------------------------------------------


@fuzz
@given(text=texts, number=numbers)
def test_cleaned_text_cannot_control_a_terminal_and_can_be_written(text, number):
    markdown = for_markdown(text)
    for shown in (clean(text), markdown, clean(str(number)[:99])):
        shown.encode()
        assert not any(
            (ord(mark) < 32 and mark != "\n") or 127 <= ord(mark) < 160 for mark in shown
        )
    assert "\n" not in markdown
    assert "<" not in markdown
    unescaped = markdown.replace("\\\\", "")
    assert unescaped.count("|") == unescaped.count("\\|")


# --- folders of runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_json, read_yaml])
@fuzz
@given(
    content=st.binary(max_size=100)
    | st.text("{}[]:,&*!<>|-? \n'\"%@`#~=019.aeT_", max_size=40).map(str.encode)
)
@hypothesis.example(content=b"!!int ''")
@hypothesis.example(content=b"!!bool x")
@hypothesis.example(content=b"!!timestamp x")
@hypothesis.example(content=b"a: 2001-99-99")
@hypothesis.example(content=b"!!python/object/apply:os.system [id]")
@hypothesis.example(content=b"a: &a [1]\nb: *a")
@hypothesis.example(content=b"[" * 100_000)
def test_any_bytes_give_names_and_values_or_a_reason(tmp_path, read, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    tree = result_or_value_error(read, path)
    assert tree is None or isinstance(tree, dict)


@fuzz
@given(data=st.data())
def test_an_adapter_is_checked_whatever_its_config_says(tmp_path, data):
    valid = {
        "peft_type": "LORA",
        "base_model_name_or_path": "a/b",
        "r": 8,
        "auto_mapping": None,
        "loftq_config": {},
    }
    (tmp_path / "adapter_model.safetensors").touch()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(data.draw(changed(valid))))
    result_or_value_error(check_saved, tmp_path)
    result_or_value_error(base_of, tmp_path)


@pytest.fixture(scope="module")
def checkpoint(finished_config, tmp_path_factory) -> tuple[Path, torch.nn.Module, str, str]:
    """A checkpoint that can be loaded, its model, and the digests of its rows."""
    saved = folder_of(finished_config) / "checkpoints" / "12"
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("run") / "12")
    base = load_model(finished_config.model, torch.device("cpu"))
    progress = Progress.read(folder / "progress.json")
    digests = (progress.data_digest, progress.held_out_digest)
    return folder, build(base, finished_config.adapter), *digests


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "progress.json"])
@fuzz
@given(data=st.data())
def test_a_damaged_checkpoint_is_loaded_or_refused(checkpoint, name, data):
    folder, *expected = checkpoint
    path = folder / name
    valid = path.read_bytes()
    broken = mutated(valid)
    if path.suffix == ".json":
        broken = broken | changed(json.loads(valid)).map(lambda tree: json.dumps(tree).encode())
    path.write_bytes(data.draw(broken))
    try:
        loaded = result_or_value_error(load_checkpoint, folder, *expected)
    finally:
        path.write_bytes(valid)
    assert loaded is None or (isinstance(loaded[0], Progress) and isinstance(loaded[0].update, int))
