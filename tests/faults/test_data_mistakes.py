"""Mistakes in a user's data, and the one line that each gets: the place, what is wrong, the
fix."""

import gzip
import json
import re
from pathlib import Path

import pytest
from examples import with_changes

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data
from cera_train.data.reader import Reader
from cera_train.settings.data import DataConfig

pytest_plugins = ["examples"]
pytestmark = pytest.mark.usefixtures("cache")

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(4)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
TEXT = {"prompt": "{prompt}", "completion": "{completion}"}


@pytest.fixture
def refusal(tmp_path, monkeypatch, tokenizer):
    """refusal(files, **settings) -> the error line of a run on the first file, with its last row
    held out"""
    monkeypatch.chdir(tmp_path)

    def refusal(files: dict[str, str | bytes | list], tokenizer=tokenizer, **settings) -> str:
        for name, content in files.items():
            if isinstance(content, list):
                content = "".join(f"{json.dumps(row)}\n" for row in content)
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        config = TEXT | {"train_files": [next(iter(files), "x.jsonl")], "eval_rows": 1} | settings
        with pytest.raises(UserError) as error:
            prepare_data(DataConfig(**config), tokenizer)
        line = str(error.value)
        assert "\n" not in line
        assert "site-packages" not in line
        return line

    return refusal


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("no.jsonl", "cannot read the file: No such file or directory. Name one that is there."),
        ("*.parquet", "no file matches this pattern (from {cwd})."),
        (
            "s3://bucket/t.jsonl",
            "cannot read the file: Install s3fs to access S3. Name one that is there.",
        ),
        (
            "rows.xlsx",
            "unknown kind of file: expected .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt. "
            "Convert it",
        ),
    ],
)
def test_a_name_that_is_no_file_of_rows_is_refused_before_any_file_is_opened(
    refusal, tmp_path, name, line
):
    (tmp_path / "rows.xlsx").touch()
    expected = f"{name}: {line.format(cwd=tmp_path)}"
    assert refusal({"t.jsonl": LINES}, train_files=[name]).startswith(
        f"data.train_files={expected}"
    )
    settings = {"train_files": ["t.jsonl"], "eval_files": ["t.jsonl", name]}
    assert refusal({}, **settings).startswith(f"data.eval_files={expected}")


# Without the time, because processes of pytest-xdist compare test names.
CUT = gzip.compress(LINES.encode(), mtime=0)[:-9]
CSV = "prompt,completion\n1,2\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "x.jsonl",
            LINES + '{"a": \n',
            "x.jsonl:5: broken JSON: Expecting value: line 1 column 6 (char 5). One row",
        ),
        (
            "x.jsonl",
            '[{"a": 1}]\n',
            "x.jsonl:1: expected a row's columns, got a list. A row is a JSON object; a list",
        ),
        (
            "x.json",
            '{"rows": [{"a": 1}]}',
            "x.json: expected a JSON list of objects. One row a line is .jsonl: rename",
        ),
        (
            "x.txt",
            b"a\nb\xff",
            "x.txt: cannot read it: 'utf-8' codec can't decode byte 0xff in position 3",
        ),
        ("x.jsonl.gz", CUT, "x.jsonl.gz: cannot read it: Compressed file ended before"),
        ("x.csv", CSV + "1,2,3\n", "x.csv:3: more or fewer cells than columns: quote commas."),
        ("x.parquet", b"PAR1 and no more", "x.parquet: cannot read it: "),
    ],
)
def test_a_broken_file_or_row_is_refused_with_its_line(refusal, name, content, line):
    assert refusal({name: content}).startswith(line)


def test_a_split_without_rows_names_the_counts_and_the_settings(refusal):
    start = "data.train_files=[x.jsonl]: no rows are left"
    fix = "hold out fewer by data.eval_rows."
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "a" * 50, "completion": "b"}, *ROWS]
    line = refusal({"x.jsonl": rows}, train_rows=2, max_length=20)
    assert line.startswith(
        f"{start}: 2 read, 1 without an answer, 1 without one within data.max_length=20. Name"
    )
    line = refusal({"x.jsonl": ""})
    assert line.startswith(f"{start}: 0 read")
    assert line.endswith(fix)
    line = refusal({"x.jsonl": ROWS}, eval_rows=4)
    assert line == "data.eval_rows=4 holds out all 4 rows of data.train_files=[x.jsonl]: lower it."
    settings = {"train_files": ["t.jsonl"], "eval_files": ["x.jsonl"]}
    assert refusal({"t.jsonl": ROWS, "x.jsonl": ""}, **settings).startswith(
        "data.eval_files=[x.jsonl]: no rows are"
    )
    assert (
        refusal({"x.jsonl": ROWS}, eval_rows=0)
        == "data.eval_rows=0: no rows to evaluate on. Raise it."
    )


USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
HUMAN = {"from": "human", "value": "a"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{}]}


def test_a_bad_row_is_refused_with_its_file_and_line(refusal):
    files = {"a.jsonl": ROWS, "b.jsonl": [ROWS[0], {"prompt": "a"}]}
    assert refusal(files, train_files=[*files]) == (
        "b.jsonl:2: column 'completion' is missing; its columns are prompt. Name another in "
        "data.completion."
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"prompt": "{prompt"},
            "data.prompt='{prompt' is malformed: expected '}' before end of string. Write a lite",
        ),
        (
            {"prompt": "{a.b}"},
            "data.prompt='{a.b}': {a.b} is not just the name of a column. Write a literal brace tw",
        ),
        (
            {"completion": "yes"},
            "data.completion='yes' names no column: write one in braces, such as {answer}.",
        ),
    ],
)
def test_a_bad_template_is_refused_with_its_key(refusal, settings, line):
    assert refusal({"x.jsonl": ROWS}, **settings).startswith(f"x.jsonl:1: {line}")


def test_a_tokenizer_without_an_end_token_is_refused_with_its_model(refusal, tokenizer):
    without = with_changes(tokenizer, eos_token=None, name_or_path="some/model")
    assert refusal({"x.jsonl": ROWS}, tokenizer=without) == (
        "model.path=some/model: the tokenizer has no end-of-text token: set eos_token in its "
        "tokenizer_config.json."
    )


@pytest.mark.parametrize(
    ("layout", "row", "line"),
    [
        (
            "messages",
            {"conversations": [HUMAN]},
            "column 'messages' is missing; its columns are conversations. Set data.layout=conversa",
        ),
        (
            "messages",
            {"messages": ["a"]},
            "messages[0] is 'a': expected an object with role (one of user, assistant",
        ),
        (
            "messages",
            {"messages": [HUMAN]},
            "messages[0] is \"{'from': 'human', 'value': 'a'}\": expected an object with role "
            "(one of user, assistant, system, tool, developer) and content. Rename the column to "
            "conversations, and set data.layout=conversations.",
        ),
        (
            "messages",
            {"messages": [USER | {"content": [1]}]},
            "messages[0] 'content' holds a part of type 'an int': expected text",
        ),
        (
            "messages",
            {"messages": [CALLING]},
            "messages[0] has tool_calls of another shape: ",
        ),
        (
            "messages",
            {"messages": [USER, ANSWER | {"train": "no"}]},
            "messages[1] has the flag 'no': expected train",
        ),
        ("messages", {"messages": [USER], "tools": "["}, "column 'tools' holds broken JSON"),
        (
            "messages",
            {"messages": [USER], "tools": [{"function": "w"}]},
            "column 'tools' is \"[{'function': 'w'}]\":",
        ),
    ],
)
def test_a_malformed_turn_is_refused_with_its_number(tokenizer, layout, row, line):
    config = DataConfig(layout=layout, train_files=["t.jsonl"], eval_rows=1)
    with pytest.raises(UserError, match=f"^a row: {re.escape(line)}"):
        Reader(config, tokenizer).examples([("a row", row)])
