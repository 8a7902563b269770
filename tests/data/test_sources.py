"""Rows from files, from the Hub's library, and what unusable input is told."""

from __future__ import annotations

import json

import pytest

from cera_train.data.sources import open_sources
from cera_train.settings.data import DataConfig

ROWS = [
    {"question": "what is the next value?", "answer": "it is 0.84", "level": 1},
    {"question": "näch\u2028ste?\r\nJa", "answer": None, "level": None},
    {"question": "third", "answer": "it\n{is} \\3", "level": 0.5},
]


def data_config(train, evaluation=(), **settings) -> DataConfig:
    files = {"train_files": list(map(str, train)), "eval_files": list(map(str, evaluation))}
    return DataConfig(**({"prompt": "{question}", "completion": "{answer}"} | files | settings))


def read(*sources) -> list:
    return [list(source.read()) for source in sources]


def rows_of(path) -> list[dict]:
    return read(open_sources(data_config([path], [path]))[0])[0]


def number_rows(count: int) -> list[dict]:
    return [{"question": f"q{number}", "answer": f"a{number}"} for number in range(count)]


# --- local files -----------------------------------------------------------------------------------------------------


def test_json_jsonl_and_parquet_give_the_same_rows(tmp_path, write_jsonl):
    import pyarrow
    import pyarrow.parquet

    rows = [row | {"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]} for row in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert rows_of(write_jsonl("rows.jsonl", rows)) == rows
    assert rows_of(tmp_path / "rows.json") == rows
    assert rows_of(tmp_path / "rows.parquet") == rows


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \r\n{"a": 2}')
    assert rows_of(path) == [{"a": 1}, {"a": 2}]


def test_files_are_read_in_the_order_they_are_named(write_jsonl):
    first, second = write_jsonl("z.jsonl", number_rows(2)), write_jsonl("a.jsonl", number_rows(3)[2:])
    train, _ = open_sources(data_config([first, second], [first]))
    assert read(train) == [number_rows(3)]


def test_a_file_without_rows_gives_none(tmp_path):
    for name, content in (("e.jsonl", b""), ("e.json", b" \n"), ("l.json", b"[]"), ("b.jsonl", b"\n\n")):
        (tmp_path / name).write_bytes(content)
        assert rows_of(tmp_path / name) == []


# --- which rows train, which evaluate --------------------------------------------------------------------------------


def test_without_evaluation_files_the_last_rows_are_held_out(write_jsonl):
    path, rows = write_jsonl("t.jsonl", number_rows(10)), number_rows(10)
    assert read(*open_sources(data_config([path], eval_rows=3))) == [rows[:7], rows[7:]]
    assert read(*open_sources(data_config([path], eval_rows=9))) == [rows[:1], rows[1:]]
    assert read(*open_sources(data_config([path], eval_rows=3, train_rows=2))) == [rows[:2], rows[7:]]
    assert read(*open_sources(data_config([path], eval_rows=3, train_rows=99))) == [rows[:7], rows[7:]]


@pytest.mark.parametrize("eval_rows", [10, 11])
def test_holding_out_every_row_is_refused(write_jsonl, eval_rows):
    path = write_jsonl("t.jsonl", number_rows(10))
    with pytest.raises(ValueError, match=rf"eval_rows={eval_rows} leaves nothing to train on: .* has 10 rows"):
        read(*open_sources(data_config([path], eval_rows=eval_rows)))


def test_held_out_rows_are_read_once_for_both_splits(write_jsonl, monkeypatch):
    from cera_train.data import files

    path, calls = write_jsonl("t.jsonl", number_rows(4)), []
    monkeypatch.setitem(files.READERS, ".jsonl", lambda path: calls.append(path) or number_rows(4))
    train, evaluation = open_sources(data_config([path], eval_rows=1))
    assert calls == []  # not before they are needed: the cache may have them
    assert read(train, evaluation) == [number_rows(4)[:3], number_rows(4)[3:]]
    assert calls == [path]


def test_held_out_rows_need_nobody_to_read_the_others(write_jsonl):
    path = write_jsonl("t.jsonl", number_rows(4))
    _, evaluation = open_sources(data_config([path], eval_rows=3))
    assert read(evaluation, evaluation) == [number_rows(4)[1:], number_rows(4)[1:]]
    train, evaluation = open_sources(data_config([path], eval_rows=1))
    next(iter(train.read()))
    assert read(evaluation, train) == [number_rows(4)[3:], number_rows(4)[:3]]


def test_train_rows_and_eval_rows_take_the_first(write_jsonl):
    path, rows = write_jsonl("t.jsonl", number_rows(10)), number_rows(10)
    assert read(*open_sources(data_config([path], [path]))) == [rows, rows]
    assert read(*open_sources(data_config([path], [path], train_rows=4, eval_rows=2))) == [rows[:4], rows[:2]]
    assert read(*open_sources(data_config([path], [path], train_rows=11, eval_rows=10))) == [rows, rows]


def test_a_row_beyond_train_rows_is_not_even_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": 2}\nbroken')
    path = tmp_path / "t.jsonl"
    assert read(*open_sources(data_config([path], [path], train_rows=2, eval_rows=1))) == [
        [{"a": 1}, {"a": 2}],
        [{"a": 1}],
    ]


def test_fingerprints_follow_the_content_not_the_name(write_jsonl):
    def fingerprints(rows: list, name: str = "t.jsonl", **settings) -> tuple[str, str]:
        path = write_jsonl(name, rows)
        train, evaluation = open_sources(data_config([path], **({"eval_rows": 1} | settings)))
        return train.fingerprint, evaluation.fingerprint

    rows = number_rows(5)
    first = fingerprints(rows)
    assert fingerprints(rows, name="other.jsonl") == first
    others = [
        fingerprints([*rows[:-1], rows[-1] | {"answer": "a9"}]),
        fingerprints(rows[::-1]),
        fingerprints(rows, eval_rows=2),
    ]
    assert len({first, *others}) == 4
    assert len({fingerprint for pair in (first, *others) for fingerprint in pair}) == 8
    train, evaluation = fingerprints(rows, train_rows=1)
    assert train != evaluation
    cut = fingerprints(rows, train_rows=2)
    assert cut[0] != first[0]
    assert cut[1] == first[1]


# --- the generator ---------------------------------------------------------------------------------------------------


def test_fingerprints_of_generated_rows_follow_every_setting():
    from cera_train.settings.data import LogisticMapConfig

    def fingerprints(eval_rows: int = 20, **settings) -> tuple[str, ...]:
        config = DataConfig(layout="logistic_map", eval_rows=eval_rows, logistic_map=LogisticMapConfig(**settings))
        return tuple(source.fingerprint for source in open_sources(config))

    changes = [
        {"seed": 1},
        {"growth": 3.6},
        {"growth": [3.5, 3.6]},
        {"steps": 5},
        {"decimals": 1, "eval_rows": 2},
        {"eval_rows": 10},
    ]
    others = [fingerprints(**change) for change in changes]
    assert fingerprints() == fingerprints()
    every = [fingerprint for pair in (fingerprints(), *others) for fingerprint in pair]
    assert len(set(every)) == len(every)


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slimorca", "mathinstruct"])
def test_published_splits_are_rows_0_to_99999_and_100000_to_101999(compose, name):
    config = compose(f"data={name}").data
    assert (config.train_split, config.eval_split) == ("train[:100000]", "train[100000:102000]")
    assert config.train_rows is None
    assert config.eval_rows is None


def test_split_notation_and_row_limits_reach_the_rows(tmp_path, write_jsonl, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = number_rows(10)
    (tmp_path / "folder").mkdir()
    write_jsonl("folder/train.jsonl", rows)
    config = DataConfig(
        path=str(tmp_path / "folder"),
        train_split="train[:6]",
        eval_split="train[6:9]",
        train_rows=4,
        prompt="{question}",
        completion="{answer}",
    )
    train, evaluation = open_sources(config)
    assert read(train, evaluation) == [rows[:4], rows[6:9]]
    again = open_sources(config)
    assert [source.fingerprint for source in again] == [train.fingerprint, evaluation.fingerprint]
    assert train.fingerprint != evaluation.fingerprint


def test_what_the_config_says_about_a_hub_data_set_reaches_the_library(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(number_rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"path": "a/b", "subset": "main", "revision": "v1", "train_split": "x[:2]", "eval_split": "y"}
    read(*open_sources(DataConfig(**settings, prompt="{question}", completion="{answer}")))
    assert calls == [(("a/b", "main"), {"split": split, "revision": "v1"}) for split in ("x[:2]", "y")]
