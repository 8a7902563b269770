"""Rows -> token ids and loss masks in an Arrow file, tokenised once and cached by content. It is written a chunk at a
time and read by memory map: neither takes more memory for more rows."""

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
from cera_train.data.config import DataConfig
from cera_train.data.format import encode, segmenter, start_ids
from cera_train.data.sources import Source, head, open_sources

CACHE_VERSION = 2
"""Raised when the same rows would be tokenised differently than before."""

ROWS_AT_ONCE = 1000
"""What is in memory at a time, and what the tokenizer shares out to its threads."""

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
    """What became of the rows of a split."""

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
    """Of the rows and of all that decides how they are tokenised."""

    def column(self, name: str) -> list:
        """One of the columns with a value a row."""
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
        ValueError: rows are missing, malformed or all dropped, or a prompt stands in both splits.
    """
    train_source, eval_source = open_sources(config)
    digest = _tokenization_digest(config, tokenizer)
    train = _tokenize(train_source, "training", config, tokenizer, digest)
    evaluation = _tokenize(eval_source, "evaluation", config, tokenizer, digest)
    train_keys = set(train.column("prompt_key"))
    shared = sum(key in train_keys for key in evaluation.column("prompt_key"))
    if shared and not config.allow_overlap:
        raise UserError(
            f"{shared} of {evaluation.counts.kept} evaluation prompts are also training prompts, so the perplexity "
            "would measure memory. Remove them from one side, or set data.allow_overlap=true."
        )
    return TokenizedData(train, evaluation, shared)


def prepare_evaluation(config: DataConfig, tokenizer: Any, limit: int | None = None) -> TokenizedRows:
    """Only the evaluation split of `prepare_data`, or its first `limit` rows."""
    _, source = open_sources(config)
    return _tokenize(head(source, limit), "evaluation", config, tokenizer, _tokenization_digest(config, tokenizer))


def prepare_windows(text: str, tokenizer: Any, window: int, limit: int | None) -> TokenizedRows:
    """Running text in windows of at most `window` tokens, every token but a window's first supervised.

    Raises:
        ValueError: there is not enough text to predict a token.
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
    """Of all that decides how a row is tokenised."""
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
        raise UserError(
            f"no {split} rows are left: {counts.read} read, {counts.empty} without an answer, "
            f"{counts.answer_truncated} whose answer lies beyond data.max_length={config.max_length}."
        )
    (folder / "counts.json").write_text(json.dumps(asdict(counts)))


def _tables(
    source: Source, split: str, config: DataConfig, tokenizer: Any, counts: RowCounts
) -> Iterator[pyarrow.Table]:
    """The tokenised rows, a chunk at a time; what becomes of them is added to `counts`."""
    to_segments = segmenter(config, tokenizer)
    rows = enumerate(source.read())
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        rows_segments = []
        for number, row in chunk:
            try:
                rows_segments.append(to_segments(row))
            except ValueError as error:
                raise UserError(f"{split} row {number}: {error}") from error
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
