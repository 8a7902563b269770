"""The cache of tokenised rows: when it is taken, when the rows are read anew, and what a cut write leaves."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pyarrow.ipc
import pytest
from examples import TRAIN

from cera_train.common.files import cache_dir
from cera_train.data.prepare import SCHEMA, prepare_data

pytest_plugins = ["row_fixtures"]
pytestmark = pytest.mark.usefixtures("cache")


def test_rows_that_datasets_wrote_before_are_taken_from_the_cache(config_of, tokenizer, cache, reads):
    import datasets

    datasets.disable_progress_bars()
    written = prepare_data(config_of(), tokenizer).train
    rows = written.rows.to_pylist()
    (cache / written.digest / "rows.arrow").unlink()
    datasets.Dataset(pyarrow.Table.from_pylist(rows, schema=SCHEMA)).save_to_disk(cache / written.digest, num_shards=2)
    assert prepare_data(config_of(), tokenizer).train.rows.to_pylist() == rows
    assert reads == ["train.jsonl", "eval.jsonl"]


def test_a_second_call_reads_no_rows_and_gives_the_same(config_of, tokenizer, reads):
    first = prepare_data(config_of(), tokenizer)
    assert reads == ["train.jsonl", "eval.jsonl"]
    again = prepare_data(config_of(), copy.deepcopy(tokenizer))
    assert reads == ["train.jsonl", "eval.jsonl"]
    for split in ("train", "evaluation"):
        one, other = getattr(first, split), getattr(again, split)
        assert (one.digest, one.counts) == (other.digest, other.counts)
        assert one.rows.to_pylist() == other.rows.to_pylist()


def test_held_out_rows_come_from_the_cache_too(config_of, tokenizer, reads):
    prepare_data(config_of(evaluation=[], eval_rows=2), tokenizer)
    prepare_data(config_of(evaluation=[], eval_rows=2), tokenizer)
    assert reads == ["train.jsonl"]


def test_a_tokenizer_that_pads_and_truncates_by_itself_changes_nothing(config_of, tokenizer, reads):
    def padding():
        changed = copy.deepcopy(tokenizer)
        changed.backend_tokenizer.enable_padding(length=64)
        changed.backend_tokenizer.enable_truncation(max_length=5)
        return changed

    rows = prepare_data(config_of(), padding()).train.rows
    prepare_data(config_of(), padding())
    assert reads == ["train.jsonl", "eval.jsonl"]
    assert rows["input_ids"].to_pylist() == prepare_data(config_of(), tokenizer).train.rows["input_ids"].to_pylist()


@pytest.mark.parametrize(
    "change",
    [
        {"train": [*TRAIN[:-1], {"question": "what is 5?", "answer": "it is five"}]},
        {"train": TRAIN[::-1]},
        {"prompt": "Question: {question}\nSolution:"},
        {"completion": "  {answer}"},
        {"max_length": 511},
        {"loss_on": "all"},
        {"train_rows": 5},
    ],
    ids=str,
)
def test_what_decides_the_tokens_gives_another_entry(config_of, tokenizer, reads, change):
    before = prepare_data(config_of(), tokenizer)
    after = prepare_data(config_of(**change), tokenizer)
    assert before.train.digest != after.train.digest
    assert reads.count("train.jsonl") == 2
    assert before.train.rows.to_pylist() != after.train.rows.to_pylist() or change == {"max_length": 511}
    prepare_data(config_of(**change), tokenizer)
    assert reads.count("train.jsonl") == 2


def test_another_tokenizer_gives_another_entry(config_of, tokenizer):
    from tokenizers.processors import TemplateProcessing

    without_start, with_token, with_template, with_end = (copy.deepcopy(tokenizer) for _ in range(4))
    without_start.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with_token.add_tokens(["what is"])
    with_template.chat_template += " "
    with_end.eos_token = "<|im_end|>"
    tokenizers = [tokenizer, without_start, with_token, with_template, with_end]
    splits = [prepare_data(config_of(), each).train for each in tokenizers]
    assert len({split.digest for split in splits}) == 5
    rows = [split.rows["input_ids"].to_pylist() for split in splits]
    assert [each == rows[0] for each in rows] == [True, False, False, True, False]


def test_turns_and_layout_give_another_entry(config_of, tokenizer):
    def row(number: int) -> dict:
        turns = [("human", str(number)), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}

    first, whole = (
        prepare_data(config_of([row(0)], [row(1)], layout="conversations", turns=turns), tokenizer).train
        for turns in ("first", "all")
    )
    assert first.digest != whole.digest
    assert first.counts.tokens < whole.counts.tokens


def test_the_same_rows_in_another_place_come_from_the_cache(config_of, tokenizer, reads, tmp_path):
    config = config_of()
    prepare_data(config, tokenizer)
    moved = tmp_path / "moved.jsonl"
    Path(config.train_files[0]).rename(moved)
    config.train_files, config.allow_overlap = [str(moved)], True
    prepare_data(config, tokenizer)
    assert reads == ["train.jsonl", "eval.jsonl"]


@pytest.mark.parametrize("cut", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["half of the rows", "the counts"])
def test_a_cut_write_leaves_nothing_that_looks_whole(config_of, tokenizer, cache, reads, monkeypatch, cut, place):
    write_table = pyarrow.ipc.RecordBatchStreamWriter.write_table

    def write_half(writer: pyarrow.ipc.RecordBatchStreamWriter, table: pyarrow.Table) -> None:
        write_table(writer, table.slice(0, len(table) // 2))
        raise cut

    def write_no_counts(path: Path, text: str) -> None:
        raise cut

    config = config_of()
    with monkeypatch.context() as patched:
        if place == "the counts":
            patched.setattr(Path, "write_text", write_no_counts)
        else:
            patched.setattr(pyarrow.ipc.RecordBatchStreamWriter, "write_table", write_half)
        with pytest.raises(type(cut)):
            prepare_data(config, tokenizer)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    assert len(prepare_data(config, tokenizer).train.rows) == len(TRAIN)
    assert reads == ["train.jsonl", "train.jsonl", "eval.jsonl"]


PROCESS = """
import os, signal, sys, time
import pyarrow.ipc
from transformers import PreTrainedTokenizerFast  # AutoTokenizer takes twice as long to import
from cera_train.settings.data import DataConfig
from cera_train.data import files
from cera_train.data.prepare import SCHEMA, prepare_data

what, train, evaluation, tokenizer, log = sys.argv[1:]
read = files.READERS[".jsonl"]

def slow_read(path):
    with open(log, "a") as file:
        file.write(path.name + "\\n")
    time.sleep(0.5)  # long enough for the other process to come to the same rows
    return read(path)

def die(writer, table):
    os.kill(os.getpid(), signal.SIGKILL)

files.READERS[".jsonl"] = slow_read
if what == "killed":
    pyarrow.ipc.RecordBatchStreamWriter.write_table = die
texts = {"prompt": "Question: {question}\\nAnswer:", "completion": " {answer}"}
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
print("ready", flush=True)
sys.stdin.readline()
data = prepare_data(DataConfig(train_files=[train], eval_files=[evaluation], **texts), tokenizer)
print(data.train.digest, data.train.rows["input_ids"].to_pylist())
"""


@pytest.fixture
def start(config_of, tiny_folder, tmp_path):
    """start("whole" or "killed") -> a process that waits for a line before it prepares the rows"""
    config = config_of()
    files = [*config.train_files, *config.eval_files, str(tiny_folder), str(tmp_path / "reads.log")]

    def start(what: str) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", PROCESS, what, *files], **pipes)

    return start


@pytest.mark.slow
def test_two_processes_at_once_give_one_entry(start, cache, tmp_path):
    processes = [start("whole"), start("whole")]
    assert [process.stdout.readline() for process in processes] == ["ready\n", "ready\n"]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    one, other = (process.communicate()[0] for process in processes)
    assert one == other != ""
    assert (tmp_path / "reads.log").read_text().split() == ["train.jsonl", "eval.jsonl"]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


@pytest.mark.slow
def test_what_a_killed_process_left_is_not_taken_for_rows(start, cache, config_of, tokenizer):
    killed = start("killed")
    killed.communicate("\n")
    assert killed.returncode == -9
    assert [path.name.startswith(".writing-") for path in cache.iterdir() if path.is_dir()] == [True]
    assert len(prepare_data(config_of(), tokenizer).train.rows) == len(TRAIN)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CERA_TRAIN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("CERA_TRAIN_CACHE")
    assert cache_dir() == Path("/b/cera-train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/cera-train")
