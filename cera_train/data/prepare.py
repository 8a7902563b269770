"""Rows -> token ids and loss masks in an Arrow file, tokenised once and cached by content. The file is written in
chunks and memory-mapped to read: neither takes more memory for more rows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow

from cera_train.common.errors import UserError
from cera_train.common.files import cached_folder
from cera_train.common.settings import Changes, leaves, to_plain
from cera_train.data.check import read_rows
from cera_train.data.config import DataConfig, Layout
from cera_train.data.format import encode, segmenter, start_ids
from cera_train.data.rows import Source, head
from cera_train.data.sources import open_sources

CACHE_VERSION = 2
"""Raised when the same rows would be tokenised differently than before."""

ROWS_AT_ONCE = 1000
"""Rows in memory at a time, which the tokenizer shares out to its threads."""

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "loss_mask": pyarrow.list_(pyarrow.bool_()),
        "prompt_key": pyarrow.string(),
        "length": pyarrow.int32(),
        "supervised": pyarrow.int32(),
    }
)


@dataclass
class RowCounts:
    """How many rows of a split were read, dropped and cut, and their tokens."""

    read: int = 0
    empty: int = 0
    """Dropped: no answer."""
    answer_truncated: int = 0
    """Dropped: the answer lies wholly beyond max_length."""
    truncated: int = 0
    """Kept, but cut at max_length."""
    tokens: int = 0
    supervised_tokens: int = 0

    @property
    def kept(self) -> int:
        return self.read - self.empty - self.answer_truncated


@dataclass
class TokenizedRows:
    """A split, memory-mapped: columns `input_ids` and `loss_mask` of equal lengths, and by row `length` and
    `supervised` (tokens) and `prompt_key`."""

    rows: pyarrow.Table
    counts: RowCounts
    digest: str
    """Digest of the rows, the tokenizer and the settings that change tokens."""

    def column(self, name: str) -> list:
        """A column that has one value for each row."""
        return self.rows[name].to_pylist()


@dataclass
class TokenizedData:
    train: TokenizedRows
    evaluation: TokenizedRows
    shared_prompts: int
    """Evaluation rows whose prompt is also a training row's."""


def prepare_data(config: DataConfig, tokenizer: Any) -> TokenizedData:
    """Tokenises both splits, or takes them from the cache.

    Raises:
        UserError: rows are missing, malformed or all dropped, or a prompt stands in both splits.
    """
    train_source, eval_source = open_sources(config)
    digest = _tokenization_digest(config, tokenizer)
    train = _tokenize(train_source, "training", config, tokenizer, digest)
    evaluation = _tokenize(eval_source, "evaluation", config, tokenizer, digest)
    train_keys = set(train.column("prompt_key"))
    shared = sum(key in train_keys for key in evaluation.column("prompt_key"))
    if shared and not config.allow_overlap:
        raise UserError(
            f"{eval_source.name}: {shared} of {evaluation.counts.kept} evaluation prompts are also training prompts"
            f"{_shared_file(config)}, so the perplexity would measure memory. Remove them from one side, or set "
            "data.allow_overlap=true."
        )
    return TokenizedData(train, evaluation, shared)


def _shared_file(config: DataConfig) -> str:
    """A file of both splits, for the message about their overlap."""
    train_files = {Path(name).resolve() for name in config.train_files}
    shared = [name for name in config.eval_files if Path(name).resolve() in train_files]
    return f" ({shared[0]} is also in data.train_files)" if shared else ""


def prepare_evaluation(config: DataConfig, tokenizer: Any, limit: int | None = None) -> TokenizedRows:
    """Only the evaluation split of `prepare_data`, or its first `limit` rows."""
    _, source = open_sources(config)
    return _tokenize(head(source, limit), "evaluation", config, tokenizer, _tokenization_digest(config, tokenizer))


def prepare_windows(text: str, tokenizer: Any, window: int, limit: int | None) -> TokenizedRows:
    """Running text in windows of at most `window` tokens, every token but a window's first supervised.

    Raises:
        UserError: there is not enough text to predict a token.
    """
    start = start_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    step = window - len(start)
    windows = [start + ids[first : first + step] for first in range(0, len(ids), step)][:limit]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UserError("the text has no token to predict: it is empty or a single token.")
    columns = {
        "input_ids": windows,
        "loss_mask": [[False, *[True] * (len(window) - 1)] for window in windows],
        "prompt_key": [""] * len(windows),
        "length": [len(window) for window in windows],
        "supervised": [len(window) - 1 for window in windows],
    }
    counts = RowCounts(len(windows), tokens=sum(columns["length"]), supervised_tokens=sum(columns["supervised"]))
    return TokenizedRows(pyarrow.table(columns, schema=SCHEMA), counts, _digest(text, window, limit))


def _tokenization_digest(config: DataConfig, tokenizer: Any) -> str:
    """Digest of the tokenizer and the settings that change tokens."""
    changing = {leaf.key for leaf in leaves(DataConfig) if leaf.changes == Changes.tokens}
    settings = {key: value for key, value in to_plain(config).items() if key in changing}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else [*tokenizer.get_vocab().items()]
    return _digest(CACHE_VERSION, settings, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenize(source: Source, split: str, config: DataConfig, tokenizer: Any, tokenization: str) -> TokenizedRows:
    digest = _digest(tokenization, source.fingerprint)
    folder = cached_folder(f"tokens/{digest}", lambda part: _write(source, split, config, tokenizer, part))
    counts = RowCounts(**json.loads((folder / "counts.json").read_text()))
    return TokenizedRows(_memory_mapped(folder), counts, digest)


def _memory_mapped(folder: Path) -> pyarrow.Table:
    """The rows of a folder, whose bytes are read when they are used."""
    files = sorted(folder.glob("*.arrow"))  # `datasets`, which wrote them once, made several of many rows
    return pyarrow.concat_tables(pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files)


def _write(source: Source, split: str, config: DataConfig, tokenizer: Any, folder: Path) -> None:
    counts = RowCounts()
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        for table in _tables(source, split, config, tokenizer, counts):
            writer.write_table(table)
    if not counts.kept:
        raise UserError(f"{source.name}: {_why_none_are_left(counts, split, config)}")
    (folder / "counts.json").write_text(json.dumps(asdict(counts)))


def _why_none_are_left(counts: RowCounts, split: str, config: DataConfig) -> str:
    if not counts.read:
        return f"no {split} rows are left: 0 read; the data is empty. Name files or a split with rows."
    mends = []
    if counts.empty:
        columns = (
            f"the columns of data.completion={config.completion!r}" if config.layout == Layout.text else "the turns"
        )
        mends.append(f"look at {columns}")
    if counts.answer_truncated:
        mends.append("raise data.max_length")
    mend = " or ".join(mends)
    return (
        f"no {split} rows are left: {counts.read} read, {counts.empty} without an answer, {counts.answer_truncated} "
        f"whose answer lies beyond data.max_length={config.max_length}. {mend[0].upper()}{mend[1:]}."
    )


def _tables(
    source: Source, split: str, config: DataConfig, tokenizer: Any, counts: RowCounts
) -> Iterator[pyarrow.Table]:
    """The tokenised rows, a chunk at a time. Adds to `counts`."""
    to_segments = segmenter(config, tokenizer)
    rows = iter(source.read())
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        rows_segments = read_rows(chunk, to_segments, source.name, first=counts.read + 1)
        counts.read += len(chunk)
        counts.empty += sum(not segments for segments in rows_segments)
        examples = encode([segments for segments in rows_segments if segments], config, tokenizer)
        kept = [example for example in examples if example.has_answer]
        counts.answer_truncated += len(examples) - len(kept)
        counts.truncated += sum(example.truncated for example in kept)
        columns = {
            "input_ids": [example.input_ids for example in kept],
            "loss_mask": [example.loss_mask for example in kept],
            "prompt_key": [example.prompt_key for example in kept],
            "length": [len(example.input_ids) for example in kept],
            "supervised": [example.supervised_tokens for example in kept],
        }
        counts.tokens += sum(columns["length"])
        counts.supervised_tokens += sum(columns["supervised"])
        yield pyarrow.table(columns, schema=SCHEMA)
