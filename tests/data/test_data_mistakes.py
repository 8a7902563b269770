"""Mistakes in a user's data, and the one line that each gets: the place, what is wrong, the mend."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import socket
from pathlib import Path

import pytest

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data
from cera_train.data.sources import from_files
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
        ("no.jsonl", "no.jsonl: cannot read the file: No such file or directory (from {cwd}). Its folder has t.jsonl."),
        ("a/no.jsonl", "a/no.jsonl: cannot read the file: No such file or directory (from {cwd}). Its folder does not"),
        ("~/t.jsonl", "~/t.jsonl: cannot read the file: No such file or directory (from {cwd}). A ~ is not expanded"),
        ("$HOME/t.jsonl", "$HOME/t.jsonl: cannot read the file: No such file or directory (from {cwd}). Variables are"),
        (
            "*.jsonl",
            "*.jsonl: cannot read the file: No such file or directory (from {cwd}). Patterns are not expanded: ",
        ),
        (
            "t?.jsonl",
            "t?.jsonl: cannot read the file: No such file or directory (from {cwd}). Patterns are not expanded",
        ),
        ("a\0.jsonl", "a\0.jsonl: cannot read the file: embedded null byte (from {cwd})."),
        ("x" * 300, f"{'x' * 300}: cannot read the file: File name too long (from {{cwd}})."),
        ("loop.jsonl", "loop.jsonl: cannot read the file: Too many levels of symbolic links (from {cwd})."),
        ("", ": an empty name: write the name of a file."),
        ("https://a.b/t.jsonl", "https://a.b/t.jsonl: only local files are read: download it first."),
        (".", ".: it is a folder: name the files in it, such as loop.jsonl."),
        ("folder", "folder: it is a folder: name the files in it, and it holds none of .jsonl, .json, .parquet, .txt."),
        ("pipe.jsonl", "pipe.jsonl: it is a pipe: rows are read more than once, write them to a file."),
        ("socket.jsonl", "socket.jsonl: it is a socket: rows are read more than once, write them to a file."),
        ("/dev/zero", "/dev/zero: it is a device: rows are read more than once, write them to a file."),
        ("t.csv", "t.csv: unknown kind of file: expected .jsonl, .json, .parquet, .txt; convert it with pandas."),
        (
            "t.jsonl.gz",
            "t.jsonl.gz: unknown kind of file: expected .jsonl, .json, .parquet, .txt; decompress it with g",
        ),
        ("rows", "rows: unknown kind of file: expected .jsonl, .json, .parquet, .txt; convert it, or rename it"),
    ],
)
def test_what_is_no_file_of_rows_is_refused_before_any_is_opened(refusal, tmp_path, name, line):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder").mkdir()
    for empty in ("t.csv", "t.jsonl.gz", "rows"):
        (tmp_path / empty).touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jsonl")
        if name in ("no.jsonl", "*.jsonl"):  # the mend lists what is there
            for special in ("pipe.jsonl", "socket.jsonl", "loop.jsonl"):
                (tmp_path / special).unlink()
        expected = line.format(cwd=tmp_path)
        assert refusal({"t.jsonl": LINES}, train_files=[name]).startswith(f"data.train_files={expected}")
        settings = {"train_files": ["t.jsonl"], "eval_files": ["t.jsonl", name]}
        assert refusal({}, **settings).startswith(f"data.eval_files={expected}")
        with pytest.raises(UserError) as error:
            from_files([name], "task.files")
        assert str(error.value).startswith(f"task.files={expected}")


def test_a_pattern_lists_the_files_that_it_would_match(refusal):
    assert refusal({"a.jsonl": LINES, "b.jsonl": LINES}, train_files=["*.jsonl"]).endswith("as [a.jsonl,b.jsonl].")


def test_a_file_that_may_not_be_read_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may read everything
    assert refusal({"x.jsonl": LINES}) == (
        "data.train_files=x.jsonl: cannot read the file: Permission denied. Run chmod +r on it, or copy it."
    )


# --- content ---------------------------------------------------------------------------------------------------------

TWICE = '{"prompt": "a", "completion": "b", "c": [{"k": 1, "k": 1}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.jsonl", LINES + '\n{"a": }\n', "x.jsonl:6: broken JSON: Expecting value (column 7). Mend this line."),
        ("x.jsonl", LINES + '{"a": 2', "x.jsonl:5: broken JSON: Expecting ',' delimiter (column 8). Mend this line."),
        ("x.jsonl", "{'prompt': 1}\n", "x.jsonl:1: broken JSON: Expecting property name enclosed in double quotes"),
        ("x.jsonl", '{\n  "prompt": "a"\n}\n', "x.jsonl:1: broken JSON: Expecting property name enclosed in double q"),
        ("x.jsonl", "[\n" + LINES + "]", "x.jsonl:1: broken JSON: Expecting value (column 2). A row must stand on one"),
        ("x.jsonl", LINES + "[1, 2]\n", "x.jsonl:5: expected a JSON object with a row's columns, got a list. A list"),
        ("x.jsonl", LINES + "null\n", "x.jsonl:5: expected a JSON object with a row's columns, got null."),
        ("x.jsonl", LINES + TWICE, "x.jsonl:5: key 'k' stands twice in one object: remove or rename one."),
        ("x.json", f"[{TWICE.replace('k', 'x', 1)},{TWICE}]", "x.json, row 2: key 'k' stands twice in one object: re"),
        ("x.json", f"[{'[' * 900}{TWICE}{']' * 900}]", "x.json, row 1: key 'k' stands twice in one object: remove or"),
        ("x.json", LINES, "x.json:2: broken JSON: Extra data (column 1). One row a line is .jsonl: rename the file."),
        ("x.json", '[\n{"a": 1},\n{"a" 2}\n]', "x.json:3: broken JSON: Expecting ':' delimiter (column 6). Mend this"),
        ("x.json", '[{"a": 1}, "b"]', "x.json, row 2: expected a JSON object with a row's columns, got a str."),
        ("x.json", '{"a": 1}', "x.json: expected a JSON list of rows, got a dict. One row a line is .jsonl: rename t"),
        ("x.json", '{"data": []}', "x.json: expected a JSON list of rows, got a dict. Write the list in 'data' alone."),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl:2: not UTF-8: invalid start byte. Write it as UTF-8, such"),
        ("x.json", b'[\n{"a": 1},\n\n{"a": "\xe4"}\n]', "x.json:4: not UTF-8: invalid continuation byte. Write it as"),
        ("x.txt", b"a\nb\xff", "x.txt:2: not UTF-8: invalid start byte at byte 3. Convert it with iconv -t UTF-8."),
        ("x.jsonl", LINES.encode("utf-16"), "x.jsonl:2: not UTF-8: truncated data. It is UTF-16: convert it with ic"),
        (
            "x.jsonl",
            gzip.compress(b"{}", mtime=0),
            "x.jsonl:1: not UTF-8: invalid start byte. It is compressed: decompress it",
        ),
        ("x.jsonl", "<!DOCTYPE html>", "x.jsonl:1: broken JSON: Expecting value (column 1). It is a web page or XML:"),
        ("x.jsonl", "version https://git-lfs.github.com/spec/v1\n", "x.jsonl:1: broken JSON: Expecting value (column"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", "x.jsonl:1: unusable JSON: maximum recursion depth exceeded"),
        ("x.jsonl", b'{}\n{"a": ' + b"9" * 5000 + b"}\n", "x.jsonl:2: unusable JSON: Exceeds the limit"),
        ("x.parquet", b"PAR1 and no more", "x.parquet: not a readable parquet file: "),
        ("x.parquet", b"", "x.parquet: not a readable parquet file: "),
    ],
)
def test_a_broken_file_is_refused_by_its_line(refusal, name, content, line):
    assert refusal({name: content}, completion="{prompt}", prompt="{a}").startswith(line)
    settings = {"train_files": ["t.jsonl"], "eval_files": ["u.jsonl", name]}
    other = {"t.jsonl": [{"a": "1", "prompt": "1"}] * 2, "u.jsonl": [{"a": "2", "prompt": "1"}] * 40}
    assert refusal(other, completion="{prompt}", prompt="{a}", **settings).startswith(line)


def test_a_cut_parquet_file_is_refused(refusal, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for part in (whole[: len(whole) // 2], whole[10:]):
        line = refusal({"x.parquet": part})
        assert line.startswith("x.parquet: not a readable parquet file: ")
        assert line.endswith(". Write or download it again: it may be cut off.")


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
    twice = refused([texts, texts], ["a", "a"])  # in the words of pyarrow, old or new
    assert re.search("not a readable parquet file: (Can't unify schema with duplicate|Multiple matches for)", twice)


# --- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_file_without_rows_is_named_with_its_setting(refusal, content):
    reason = "rows are left: 0 read; the data is empty. Name files or a split with rows."
    assert refusal({"x.jsonl": content}) == f"data.train_files=[x.jsonl]: no training {reason}"
    settings = {"train_files": ["t.jsonl"], "eval_files": ["x.jsonl"]}
    assert refusal({"t.jsonl": ROWS}, **settings) == f"data.eval_files=[x.jsonl]: no evaluation {reason}"


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
    assert refusal({"x.jsonl": ROWS[:1]}) == f"data.eval_rows=1 {line} 1 row. Add rows, or name another file."


def test_one_file_for_both_splits_is_named(refusal):
    assert refusal({"x.jsonl": ROWS}, eval_files=["x.jsonl"]) == (
        "data.eval_files=[x.jsonl]: 4 of 4 evaluation prompts are also training prompts (x.jsonl is also in "
        "data.train_files), so the perplexity would measure memory. Remove them from one side, or set "
        "data.allow_overlap=true."
    )


# --- columns ---------------------------------------------------------------------------------------------------------

CHAT_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHAREGPT_ROW = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
MISSING = "column 'prompt' (named in data.prompt) is missing; its columns are"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "a", "r": "b"}, f"{MISSING} q, r. Set data.prompt and data.completion."),
        ({}, f"{MISSING} none. Set data.prompt and data.completion."),
        (CHAT_ROW, f"{MISSING} messages. Set data.layout=messages."),
        (SHAREGPT_ROW, f"{MISSING} conversations. Set data.layout=conversations."),
        (
            {"prompt": "a"},
            "column 'completion' (named in data.completion) is missing; its columns are prompt. Set data",
        ),
        ({"prompt": ["a"], "completion": "b"}, "column 'prompt' (named in data.prompt) holds a list: expected text."),
        (
            {"prompt": "a", "completion": {}},
            "column 'completion' (named in data.completion) holds a dict: expected tex",
        ),
        ({"prompt": "a", "completion": float("nan")}, "column 'completion' (named in data.completion) holds nan: expe"),
        (
            {"prompt": float("inf"), "completion": "a"},
            "column 'prompt' (named in data.prompt) holds inf: expected text",
        ),
        (
            {"prompt": "\ud83d", "completion": "a"},
            "column 'prompt' (named in data.prompt) holds '\\ud83d', half of a s",
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
