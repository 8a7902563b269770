"""Mistakes in a user's data, and the one line that each gets: the place, what is wrong, the mend."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path

import pytest

from cera_train.common.errors import UserError
from cera_train.data.files import from_files
from cera_train.data.prepare import prepare_data
from cera_train.data.segments import segmenter
from cera_train.settings.data import DataConfig

pytest_plugins = ["row_fixtures"]
pytestmark = pytest.mark.usefixtures("cache")

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(4)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
TEXT = {"prompt": "{prompt}", "completion": "{completion}"}


@pytest.fixture
def refusal(tmp_path, monkeypatch, tokenizer):
    """refusal(files, **settings) -> the line that training on x.jsonl, the last row held out, is refused with"""
    monkeypatch.chdir(tmp_path)

    def refusal(files: dict[str, str | bytes | list], tokenizer=tokenizer, **settings) -> str:
        for name, content in files.items():
            if isinstance(content, list):
                content = "".join(f"{json.dumps(row)}\n" for row in content)
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        settings.setdefault("train_files", [next(iter(files), "x.jsonl")])
        if not settings.get("eval_files") and settings["train_files"]:
            settings.setdefault("eval_rows", 1)
        with pytest.raises(UserError) as error:
            prepare_data(DataConfig(**(TEXT | settings)), tokenizer)
        line = str(error.value)
        assert "\n" not in line
        assert "site-packages" not in line
        return line

    return refusal


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("no.jsonl", "cannot read the file: No such file or directory (from {cwd}). Name one that is there."),
        ("*.parquet", "no file matches this pattern (from {cwd})."),
        ("", "an empty name: write the name of a file."),
        ("reference://t.jsonl", "files are read from this machine and s3://, gs://, az://, hf://, https://, http://: "),
        (
            "simplecache::t.jsonl",
            "files are read from this machine and s3://, gs://, az://, hf://, https://, http://: ",
        ),
        ("s3://bucket/t.jsonl", "cannot read the file: Install s3fs to access S3. Name one that is there."),
        (".", "it is a folder: name the files in it, such as ./*.jsonl."),
        ("/dev/zero", "it is a pipe, a socket or a device: rows are read more than once, write them to a file."),
        ("rows.xlsx", "unknown kind of file: expected .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt. Convert it"),
    ],
)
def test_what_is_no_file_of_rows_is_refused_before_any_is_opened(refusal, tmp_path, name, line):
    (tmp_path / "rows.xlsx").touch()
    expected = f"{name}: {line.format(cwd=tmp_path)}"
    assert refusal({"t.jsonl": LINES}, train_files=[name]).startswith(f"data.train_files={expected}")
    settings = {"train_files": ["t.jsonl"], "eval_files": ["t.jsonl", name]}
    assert refusal({}, **settings).startswith(f"data.eval_files={expected}")
    with pytest.raises(UserError, match=re.escape(f"task.files={expected}")):
        from_files([name], "task.files")


# --- content ---------------------------------------------------------------------------------------------------------

TWICE = '{"prompt": "a", "c": [{"k": 1, "k": 1}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.jsonl", LINES + '{"a": \n', "x.jsonl:5: broken JSON: Expecting value (column 6). Mend this line."),
        ("x.jsonl", "[\n", "x.jsonl:1: broken JSON: Expecting value (column 2). A row must stand on one line; a list"),
        ("x.jsonl", '[{"a": 1}]\n', "x.jsonl:1: expected a JSON object with a row's columns, got a list. A list of r"),
        (
            "x.json",
            '{"rows": [{"a": 1}]}',
            "x.json: expected a JSON list of rows, got a dict. Write the list in",
        ),
        ("x.json", LINES, "x.json:2: broken JSON: Extra data (column 1). One row a line is .jsonl: rename the file."),
        ("x.json", '[{"a": 1}, "b"]', "x.json, row 2: expected a JSON object with a row's columns, got a str."),
        ("x.jsonl", LINES + TWICE, "x.jsonl:5: 'k' stands twice in [('k', 1), ('k', 1)]: remove or rename one."),
        ("x.json", f"[{TWICE}]", "x.json: 'k' stands twice in [('k', 1), ('k', 1)]: remove or rename one."),
        ("x.jsonl", LINES.encode() + b'{"a": "\xe4"}\n', "x.jsonl:5: not UTF-8: invalid continuation byte. Write it"),
        ("x.txt", b"a\nb\xff", "x.txt:2: not UTF-8: invalid start byte at byte 3. Convert it with iconv -t UTF-8."),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", "x.jsonl:1: unusable JSON: maximum recursion depth exceeded"),
        ("x.jsonl.gz", gzip.compress(LINES.encode())[:-9], "x.jsonl.gz: cannot read it: Compressed file ended before"),
        ("x.csv", 'a,b\n1,2\n3,"4"5\n', "x.csv:3: ',' expected after '\"'. Write a quote in a quoted cell twice."),
        ("x.csv", "a,b\n1,2,3\n", "x.csv:2: 3 cells, and 2 columns: quote cells with commas."),
        ("x.csv", "a,a\n1,2\n", "x.csv:2: 'a' stands twice in [('a', '1'), ('a', '2')]: remove or rename one."),
        ("x.csv", b"a,b\n1,\xe4\n", "x.csv: not UTF-8: invalid continuation byte. Convert it with iconv -t UTF-8."),
        ("x.parquet", b"PAR1 and no more", "x.parquet: not a readable parquet file: "),
    ],
)
def test_a_broken_file_is_refused_by_its_line(refusal, name, content, line):
    assert refusal({name: content}, completion="{prompt}", prompt="{a}").startswith(line)
    settings = {"train_files": ["t.jsonl"], "eval_files": ["u.jsonl", name]}
    other = {"t.jsonl": [{"a": "1", "prompt": "1"}] * 2, "u.jsonl": [{"a": "2", "prompt": "1"}] * 40}
    assert refusal(other, completion="{prompt}", prompt="{a}", **settings).startswith(line)


def test_columns_of_a_parquet_file_that_are_no_text_are_refused(refusal, tmp_path):
    import pyarrow
    import pyarrow.parquet

    def refused(columns: list, names: list[str]) -> str:
        pyarrow.parquet.write_table(pyarrow.table(columns, names=names), tmp_path / "x.parquet")
        return refusal({}, train_files=["x.parquet"])

    texts, broken = pyarrow.array(["a", "b"]), pyarrow.array([b"\xff", b"b"]).view(pyarrow.string())
    start = "x.parquet, row 1: column 'prompt' (named in data.prompt) holds "
    assert refused([pyarrow.array([{"x": 1}] * 2), texts], list(TEXT)) == f"{start}a dict: expected text."
    assert refused([pyarrow.array([b"a", b"b"]), texts], list(TEXT)) == f"{start}a bytes: expected text."
    assert "not a readable parquet file: 'utf-8' codec can't decode byte 0xff" in refused([broken, texts], list(TEXT))
    assert refused([texts, texts], ["a", "a"]).startswith("x.parquet: not a readable parquet file: 'a' stands twice in")


# --- which rows ------------------------------------------------------------------------------------------------------


def test_a_file_without_rows_is_named_with_its_setting(refusal):
    mend = "Name files or a split with rows."
    assert refusal({"x.jsonl": ""}) == f"data.train_files=[x.jsonl] has no training rows. {mend}"
    settings = {"train_files": ["t.jsonl"], "eval_files": ["x.jsonl"]}
    assert refusal({"t.jsonl": ROWS}, **settings) == f"data.eval_files=[x.jsonl] has no evaluation rows. {mend}"


def test_rows_that_are_all_dropped_name_the_counts_and_the_setting(refusal):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "a" * 50, "completion": "b"}, *ROWS]
    assert refusal({"x.jsonl": rows}, train_rows=2, max_length=20) == (
        "data.train_files=[x.jsonl]: no training rows are left: 2 read, 1 without an answer, 1 whose answer lies "
        "beyond data.max_length=20. Look at the columns of data.completion='{completion}' or raise data.max_length."
    )
    assert refusal({"x.jsonl": ROWS}, max_length=1).endswith("beyond data.max_length=1. Raise data.max_length.")


def test_held_out_rows_must_leave_rows_to_train_on(refusal):
    line = "leaves nothing to train on: data.train_files=[x.jsonl] has"
    assert refusal({"x.jsonl": ROWS}, eval_rows=9) == f"data.eval_rows=9 {line} 4 rows. Lower it to at most 3."
    assert refusal({"x.jsonl": ROWS[:1]}) == f"data.eval_rows=1 {line} 1 row. Add rows."


# --- columns ---------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
MISSING = "column 'prompt' (named in data.prompt) is missing; its columns are"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "a", "r": "b"}, f"{MISSING} q, r. Set data.prompt and data.completion."),
        ({"messages": [USER, ANSWER]}, f"{MISSING} messages. Set data.layout=messages."),
        ({"conversations": [HUMAN, GPT]}, f"{MISSING} conversations. Set data.layout=conversations."),
        (
            {"prompt": "a"},
            "column 'completion' (named in data.completion) is missing; its columns are prompt.",
        ),
        (
            {"prompt": "\ud83d", "completion": "a"},
            "column 'prompt' (named in data.prompt) holds '\\ud83d', half of a",
        ),
    ],
)
def test_a_bad_row_is_refused_by_its_line_of_its_own_file(refusal, row, reason):
    files = {"a.jsonl": ROWS, "b.jsonl": [ROWS[0], row, ROWS[1]]}
    assert refusal(files, train_files=["a.jsonl", "b.jsonl"]).startswith(f"b.jsonl:2: {reason}")
    files = {"a.json": json.dumps(ROWS), "b.json": json.dumps([ROWS[0], row, ROWS[1]])}
    assert refusal(files, train_files=["a.json", "b.json"]).startswith(f"b.json, row 2: {reason}")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"prompt": "{prompt"}, "data.prompt='{prompt' is malformed: expected '}' before end of string. Write a lite"),
        ({"prompt": "{a.b}"}, "data.prompt='{a.b}': {a.b} is not just the name of a column. Write a literal brace tw"),
        ({"completion": "yes"}, "data.completion='yes' names no column: write one in braces, such as {answer}."),
    ],
)
def test_a_template_is_refused_by_its_key(refusal, settings, line):
    assert refusal({"x.jsonl": ROWS}, **settings).startswith(line)


def test_a_tokenizer_without_an_end_token_is_refused_by_its_model(refusal, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token, without.name_or_path = None, "some/model"
    assert refusal({"x.jsonl": ROWS}, tokenizer=without) == (
        "model.path=some/model: the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json."
    )


# --- turns -----------------------------------------------------------------------------------------------------------

ROLES = "expected one of system, user, assistant, tool, developer."


def turn_refusal(row: dict, tokenizer, layout: str, **settings) -> str:
    config = DataConfig(layout=layout, train_files=["t.jsonl"], eval_rows=1, **settings)
    with pytest.raises(UserError) as error:
        segmenter(config, tokenizer)(row)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        (
            [USER, {"role": "bot", "content": "b"}],
            f"messages[1] has role 'bot': {ROLES} Rename it, or remove",
        ),
        ([{}], "messages[0] has no 'role': expected role and content, got nothing. Write it"),
        ([{"role": "user"}], "messages[0] (user) has no 'content': expected role and content, got role."),
        ([{"role": "user", "content": None}], 'messages[0] (user) has null content: write its text, or "" if it is e'),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0] (user) 'content' holds a list: expected text"),
        (["a"], "messages[0] is a str: expected an object with role and content."),
        ("a", "column 'messages' holds a str: expected a list of turns. Write the list itself, not a JSON text of it."),
        ([HUMAN, GPT], "messages[0] has no 'role': expected role and content, got from, value. Rename column 'message"),
        ([USER, CALLING | {"tool_calls": [{}]}], "messages[1] (assistant) has tool_calls of another shape: expected a"),
        ([USER | {"tool_calls": [CALL]}], "messages[0] (user) has tool_calls: only an assistant calls tools."),
        ([USER, CALLING], "messages[1] has tool_calls, which this model's chat template leaves out: use a model whose"),
    ],
)
def test_malformed_messages_are_refused_by_their_turn(tokenizer, messages, line):
    assert turn_refusal({"messages": messages}, tokenizer, "messages").startswith(line)


@pytest.mark.parametrize("turns", ["first", "all"])
@pytest.mark.parametrize(
    ("conversations", "line"),
    [
        (
            [{"from": "user"}],
            "conversations[0] has from 'user': expected one of system, human, gpt. Rename it",
        ),
        ([{"from": "human"}], "conversations[0] has no 'value': write its text, or remove the turn."),
        ([{"from": "gpt", "value": ["a"]}], "conversations[0] 'value' holds a list: expected text."),
        ([USER], "conversations[0] has no 'from': expected from and value, got role, content. Rename column 'convers"),
    ],
)
def test_a_malformed_conversation_is_refused_by_its_turn(tokenizer, turns, conversations, line):
    row = {"conversations": conversations}
    assert turn_refusal(row, tokenizer, "conversations", turns=turns).startswith(line)


@pytest.mark.parametrize(
    ("layout", "row", "line"),
    [
        ("messages", {"conversations": [HUMAN]}, "its columns are conversations. Set data.layout=conversations."),
        ("messages", {"conversations": [USER]}, "its columns are conversations. Rename column 'conversations' to 'mes"),
        ("conversations", {"a": 1}, "its columns are a. Set data.layout=text with data.prompt and data.completion, or"),
    ],
)
def test_rows_of_another_layout_are_offered_theirs(tokenizer, layout, row, line):
    start = f"column '{layout}' is missing (data.layout={layout}); "
    assert turn_refusal(row, tokenizer, layout).startswith(start + line)
