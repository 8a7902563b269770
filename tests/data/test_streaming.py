"""A stream's order, what it leaves out, where it resumes; and a run on one."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import adapter_bytes, losses_of, train_and_die_after

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data
from cera_train.model.batches import MicroBatches
from cera_train.settings.data import DataConfig
from cera_train.training.train import train

pytest_plugins = ["examples"]
pytestmark = pytest.mark.usefixtures("cache")

TEXT = {"prompt": "{prompt}", "completion": "{completion}"}
SILENT = (7, 8, 40)
"""Rows without an answer."""


@pytest.fixture
def files(write_jsonl) -> list[str]:
    """Two files of 30 rows each."""
    rows = [{"prompt": f"{row} is", "completion": "" if row in SILENT else f" {row}"} for row in range(60)]
    return [str(write_jsonl(f"rows{part}.jsonl", rows[30 * part : 30 * part + 30])) for part in range(2)]


@pytest.fixture
def order(files, tokenizer):
    """order(**settings) -> the rows of each update, by their number, of a new stream in batches of 8"""

    def order(updates, **settings) -> list[list[int]]:
        config = DataConfig(**TEXT | {"train_files": files, "streaming": True, "shuffle_buffer": 16} | settings)
        rows = prepare_data(config, tokenizer).train.order(batch_size=8, seed=1)
        taken = []
        for update in updates:
            tokens = [rows.tokens("input_ids", row).to_pylist() for row in rows.sequences(update)]
            taken.append([int(tokenizer.decode(ids).split(" is")[0].removeprefix("<s>")) for ids in tokens])
        return taken

    return order


def test_rows_are_read_once_in_shuffled_blocks_and_the_first_evaluate(order):
    updates = order(range(7), eval_rows=5)
    rows = [row for update in updates for row in update]
    assert sorted(rows) == [row for row in range(5, 60) if row not in SILENT]
    assert {*rows[:14]} == {*range(5, 21)} - {*SILENT}  # the first block of 16, two of them without an answer
    assert rows[:14] != sorted(rows[:14])
    assert all(5 <= len(update) <= 8 for update in updates)


def test_an_update_follows_from_its_number(order):
    updates = order(range(7), eval_rows=5)
    assert order([3, 3, 4, 6, 0], eval_rows=5) == [updates[update] for update in (3, 3, 4, 6, 0)]


def test_rows_whose_prompt_evaluates_do_not_train(order, write_jsonl):
    evaluation = [str(write_jsonl("eval.jsonl", [{"prompt": f"{row} is", "completion": " x"} for row in (0, 33)]))]
    rows = [row for update in order(range(7), eval_files=evaluation) for row in update]
    assert not {0, 33} & {*rows}
    rows = [row for update in order(range(7), eval_files=evaluation, allow_overlap=0.05) for row in update]
    assert {0, 33} <= {*rows}


def test_a_data_set_is_streamed_too(tmp_path, write_jsonl, order, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    write_jsonl("folder/train.jsonl", [{"prompt": f"{row} is", "completion": f" {row}"} for row in range(20)])
    write_jsonl("folder/test.jsonl", [{"prompt": "99 is", "completion": " 99"}] * 3)
    updates = order(range(3), train_files=[], path=str(tmp_path / "folder"), eval_rows=2)
    assert sorted(row for update in updates for row in update) == [*range(20)]


def test_the_processes_share_out_the_rows_of_an_update(files, tokenizer):
    config = DataConfig(**TEXT, train_files=files, streaming=True, eval_rows=5)
    rows = prepare_data(config, tokenizer).train.order(batch_size=8, seed=1)
    batches = MicroBatches(rows, True, 20, torch.device("cpu"))
    numbers = rows.sequences(0)
    passes = [batches.passes(numbers, 2, process, in_step=False) for process in range(2)]
    assert sorted(row for each in passes for group, _ in each for row in group) == [*numbers]
    loaded = [batches.load(group).input_ids.numel() for each in passes for group, _ in each]
    assert sum(loaded) == sum(batches.lengths)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "data.streaming=true needs data.eval_rows, such as 1000."),
        ({"eval_rows": 5, "train_files": [], "layout": "logistic_map"}, "data.layout=logistic_map computes its rows"),
        ({"eval_rows": 5, "shuffle_buffer": 0}, "data.shuffle_buffer=0 must be positive."),
    ],
)
def test_what_cannot_be_streamed_is_refused(settings, line):
    with pytest.raises(UserError, match=line):
        DataConfig(**TEXT | {"train_files": ["t.jsonl"], "streaming": True} | settings)


def test_the_end_of_a_stream_and_rows_without_answers_are_named(order, write_jsonl):
    with pytest.raises(UserError, match=r"its rows are used up after 7 updates. Set train.max_updates=7 or less, or"):
        order(range(8), eval_rows=5)
    silent = [str(write_jsonl("silent.jsonl", [{"prompt": "a", "completion": "b" * (row < 5)} for row in range(9)]))]
    with pytest.raises(UserError, match=r"silent.jsonl:\d: no row of update 1 has an answer to train on. Look at them"):
        order([0], eval_rows=5, train_files=silent)


def test_a_run_on_a_stream_resumes_to_the_bit_and_needs_a_number_of_updates(tiny_config, files, monkeypatch):
    def config(name: str, *overrides: str):
        settings = [f"data.train_files=[{','.join(files)}]", "data.streaming=true", "data.shuffle_buffer=20"]
        settings += ["data.eval_rows=4", "train.batch_size=4", "adapter.dropout=0.1", f"name={name}"]
        return tiny_config("data=jsonl", *settings, *overrides)

    whole, cut = config("whole"), config("cut")
    train(whole)
    train_and_die_after(cut, 6, monkeypatch)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert losses_of(cut) == losses_of(whole)
    with pytest.raises(UserError, match=r"data.streaming=true reads rows once, not in epochs: set train.max_updates."):
        config("endless", "train.max_updates=null")
