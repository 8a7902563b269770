"""Rows from files and data sets, which of them train and which are held out, and the first look at
them."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from cera_train.common.errors import UserError
from cera_train.data.sources import open_sources
from cera_train.settings.data import DataConfig

pytest_plugins = ["examples"]

ROWS = [
    {"question": "what is the next value?", "answer": "it is 0.84", "level": 1},
    {"question": "näch\u2028ste?\r\nJa", "answer": None, "level": None},
    {"question": 'third, "quoted"', "answer": "it\n{is} \\3", "level": 0.5},
]
TEXT = {"prompt": "{question}", "completion": "{answer}"}


def data_config(train, evaluation=(), **settings) -> DataConfig:
    files = {"train_files": list(map(str, train)), "eval_files": list(map(str, evaluation))}
    return DataConfig(**(TEXT | files | settings))


def rows_in(*sources) -> list:
    return [[row for _, row in source] for source in sources]


def rows_of(*paths) -> list[dict]:
    return rows_in(open_sources(data_config(paths, paths))[0])[0]


def number_rows(count: int) -> list[dict]:
    return [{"question": f"q{number}", "answer": f"a{number}"} for number in range(count)]


def test_every_kind_of_file_gives_its_rows_unchanged(tmp_path, write_jsonl):
    import pyarrow
    import pyarrow.parquet

    rows = [
        row | {"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}
        for row in ROWS
    ]
    path = write_jsonl("rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(
        json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz"):
        assert rows_of(tmp_path / name) == rows


@pytest.mark.parametrize(("name", "separator"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_cells_of_a_table_are_text(tmp_path, name, separator):
    lines = [["question", "answer"], ["007", '"a ""b"", c\nd"'], ["2026-01-01", ""], []]
    (tmp_path / name).write_bytes(
        "".join(f"{separator.join(line)}\r\n" for line in lines).encode("utf-8-sig")
    )
    assert rows_of(tmp_path / name) == [
        {"question": "007", "answer": 'a "b", c\nd'},
        {"question": "2026-01-01", "answer": ""},
    ]


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \r\n{"a": 2}')
    assert rows_of(path) == [{"a": 1}, {"a": 2}]
    for name, content in (
        ("e.jsonl", b"\n\n"),
        ("e.json", b" \n"),
        ("l.json", b"[]"),
        ("c.csv", b""),
    ):
        (tmp_path / name).write_bytes(content)
        assert rows_of(tmp_path / name) == []


def test_files_are_read_in_the_order_given_and_those_of_a_pattern_by_name(write_jsonl, tmp_path):
    first = write_jsonl("z.jsonl", number_rows(2))
    second = write_jsonl("a.jsonl", number_rows(3)[2:])
    assert rows_of(first, second) == number_rows(3)
    assert rows_of(tmp_path / "*.jsonl") == [number_rows(3)[2], *number_rows(2)]


def test_without_evaluation_files_the_last_rows_are_held_out(write_jsonl):
    rows = number_rows(10)
    config = data_config([write_jsonl("t.jsonl", rows)], eval_rows=3, train_rows=2)
    assert rows_in(*open_sources(config)) == [rows[:2], rows[7:]]


def test_train_rows_and_eval_rows_take_the_first_rows_and_read_no_more(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken')
    config = data_config([path], [path], train_rows=2, eval_rows=1)
    assert rows_in(*open_sources(config)) == [[{"a": 1}, {"a": 2}], [{"a": 1}]]


@pytest.fixture
def folders(tmp_path, monkeypatch, write_jsonl) -> Path:
    """`ds` has four rows in a split `train`; `broken` has a malformed row."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    write_jsonl("ds/train.jsonl", number_rows(4))
    (tmp_path / "broken" / "train.jsonl").write_text('{"a": \n')
    return tmp_path


def refusal(path: str) -> str:
    with pytest.raises(UserError) as error:
        open_sources(DataConfig(path=path, **TEXT))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_split_that_is_not_there_is_named(folders):
    line = "data.path=ds: cannot load it: Unknown split \"test\". Should be one of ['train']. Check"
    assert refusal("ds").startswith(f"{line} data.eval_split=test")


def test_without_a_network_a_data_set_is_refused_at_once(folders, no_network, monkeypatch, caplog):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    line = (
        "data.path=some/set: cannot load it: http://127.0.0.1:9 does not answer, and the cache "
        "lacks it."
    )
    assert refusal("some/set").startswith(line)
    assert caplog.records == []
    assert not datasets.config.HF_HUB_OFFLINE
    # Libraries log again after loading.
    assert logging.getLogger("datasets").level != logging.CRITICAL


def test_split_notation_and_row_limits_reach_the_rows(folders):
    config = DataConfig(
        path="ds",
        subset="default",
        train_split="train[:3]",
        eval_split="train[3:]",
        train_rows=2,
        **TEXT,
    )
    train, evaluation = open_sources(config)
    assert rows_in(train, evaluation) == [number_rows(2), number_rows(4)[3:]]
    assert [source.fingerprint for source in open_sources(config)] == [
        train.fingerprint,
        evaluation.fingerprint,
    ]
    assert train.fingerprint != evaluation.fingerprint


def test_a_streamed_split_has_one_fingerprint_wherever_the_cache_lies(
    folders, monkeypatch, write_jsonl
):
    import datasets

    config = DataConfig(path="ds", eval_split="train", streaming=True, train_rows=3, **TEXT)
    train, _ = open_sources(config)
    assert rows_in(train) == [number_rows(3)]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folders / "elsewhere"))
    assert open_sources(config)[0].fingerprint == train.fingerprint
    write_jsonl("ds/train.jsonl", number_rows(5)[::-1])
    assert open_sources(config)[0].fingerprint != train.fingerprint


def test_a_streamed_row_that_cannot_be_read_is_one_line(folders):
    source, _ = open_sources(DataConfig(path="broken", eval_split="train", streaming=True, **TEXT))
    line = r"^data.path=broken, split train: cannot read its rows: .*JSON.* Fix the file, or repeat"
    with pytest.raises(UserError, match=line):
        rows_in(source)
