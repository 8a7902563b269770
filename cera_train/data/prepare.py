"""Rows -> token ids and loss masks in an Arrow file, tokenised once and cached by content. The file is written in
chunks and memory-mapped to read: neither takes more memory for more rows."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow

from cera_train.common.errors import UserError
from cera_train.common.files import cached_folder
from cera_train.common.settings import Changes, leaves, to_plain
from cera_train.data.config import DataConfig, Layout, LossOn
from cera_train.data.rows import Source
from cera_train.data.segments import Segment, segmenter, segments_of
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
class Example:
    """Token ids of one row, and whether the prediction of each counts in the loss. The first is never predicted."""

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_key: str = ""
    """A digest of the text before the first supervised token: equal prompts have equal keys."""
    truncated: bool = False
    has_answer: bool = True
    """Whether a token of an answer is left, also where the loss is on all tokens."""


@dataclass
class RowCounts:
    """Rows of a split that were read, dropped and cut, and the tokens that are kept."""

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

    def add(self, read: int, examples: Sequence[Example]) -> pyarrow.Table:
        """Counts `read` rows, of which `examples` have an answer; the table of those that keep a part of it."""
        kept = [example for example in examples if example.has_answer]
        self.read += read
        self.empty += read - len(examples)
        self.answer_truncated += len(examples) - len(kept)
        self.truncated += sum(example.truncated for example in kept)
        columns = {name: [getattr(each, name) for each in kept] for name in ("input_ids", "loss_mask", "prompt_key")}
        columns["length"] = [len(example.input_ids) for example in kept]
        columns["supervised"] = [sum(example.loss_mask) for example in kept]
        self.tokens += sum(columns["length"])
        self.supervised_tokens += sum(columns["supervised"])
        return pyarrow.table(columns, schema=SCHEMA)


@dataclass
class TokenizedRows:
    """A split, memory-mapped."""

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
    """Tokenises both splits, or takes them from the cache. A prompt in both is refused unless the config allows it."""
    train_source, eval_source = open_sources(config)
    digest = _tokenization_digest(config, tokenizer)
    train = _tokenize(train_source, "training", config, tokenizer, digest)
    evaluation = _tokenize(eval_source, "evaluation", config, tokenizer, digest)
    train_keys = set(train.column("prompt_key"))
    shared = sum(key in train_keys for key in evaluation.column("prompt_key"))
    if shared and not config.allow_overlap:
        train_files = {Path(name).resolve() for name in config.train_files}
        in_both = [name for name in config.eval_files if Path(name).resolve() in train_files]
        file = f" ({in_both[0]} is also in data.train_files)" if in_both else ""
        count = f"{shared} of {evaluation.counts.kept} evaluation prompts are also training prompts{file}"
        mend = "Remove them from one side, or set data.allow_overlap=true."
        raise UserError(f"{eval_source.name}: {count}, so the perplexity would measure memory. {mend}")
    return TokenizedData(train, evaluation, shared)


def prepare_evaluation(config: DataConfig, tokenizer: Any, limit: int | None = None) -> TokenizedRows:
    """Only the evaluation split of `prepare_data`, or its first `limit` rows."""
    source = open_sources(config)[1].head(limit)
    return _tokenize(source, "evaluation", config, tokenizer, _tokenization_digest(config, tokenizer))


def prepare_windows(text: str, tokenizer: Any, window: int, limit: int | None) -> TokenizedRows:
    """Running text in windows of at most `window` tokens, every token but a window's first supervised."""
    start, ids = start_ids(tokenizer), ids_of(text, tokenizer)
    step = window - len(start)
    windows = [start + ids[first : first + step] for first in range(0, len(ids), step)][:limit]
    examples = [Example(window, [False] + [True] * (len(window) - 1)) for window in windows if len(window) > 1]
    if not examples:
        raise UserError("the text has no token to predict: it is empty or a single token.")
    counts = RowCounts()
    return TokenizedRows(counts.add(len(examples), examples), counts, _digest(text, window, limit))


def start_ids(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer writes one before a text; else nothing."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []


def ids_of(texts: str | list[str], tokenizer: Any) -> list:
    """The token ids of a text or of each of several, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def encode(rows_segments: Sequence[list[Segment]], config: DataConfig, tokenizer: Any) -> list[Example]:
    """Token ids and loss masks of many rows at once. None of them may be without segments."""
    end = tokenizer.eos_token_id
    if end is None:
        reason = "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json."
        raise UserError(f"model.path={tokenizer.name_or_path}: {reason}")
    is_chat = config.layout == Layout.messages
    start = [] if is_chat else start_ids(tokenizer)  # a chat template writes the start token
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    texts = [segment.text for segments in rows_segments for segment in segments]
    segment_ids = iter(ids_of(texts, tokenizer) if texts else [])

    examples = []
    for segments in rows_segments:
        input_ids, loss_mask = list(start), [False] * len(start)
        for segment in segments:
            ids = next(segment_ids)
            if segment.supervised and not (is_chat and ids and ids[-1] in special):  # a template may write it
                ids = [*ids, end]
            input_ids += ids
            loss_mask += [segment.supervised] * len(ids)
        has_answer = any(loss_mask[1 : config.max_length])
        if config.loss_on == LossOn.all:
            loss_mask = [True] * len(input_ids)
        loss_mask[0] = False
        prompt_key = hashlib.blake2b(segments[0].text.encode(), digest_size=16).hexdigest()
        is_cut = len(input_ids) > config.max_length
        kept = slice(config.max_length)
        examples.append(Example(input_ids[kept], loss_mask[kept], prompt_key, is_cut, has_answer))
    return examples


def _tokenization_digest(config: DataConfig, tokenizer: Any) -> str:
    changing = {leaf.key for leaf in leaves(DataConfig) if leaf.changes == Changes.tokens}
    settings = {key: value for key, value in to_plain(config).items() if key in changing}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else [*tokenizer.get_vocab().items()]
    return _digest(CACHE_VERSION, settings, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenize(source: Source, split: str, config: DataConfig, tokenizer: Any, tokenization: str) -> TokenizedRows:
    digest = _digest(tokenization, source.fingerprint)
    folder = cached_folder(f"tokens/{digest}", lambda part: _write(source, split, config, tokenizer, part))
    files = sorted(folder.glob("*.arrow"))  # `datasets`, which wrote them once, made several of many rows
    tables = (pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files)
    counts = RowCounts(**json.loads((folder / "counts.json").read_text()))
    return TokenizedRows(pyarrow.concat_tables(tables), counts, digest)


def _write(source: Source, split: str, config: DataConfig, tokenizer: Any, folder: Path) -> None:
    counts = RowCounts()
    to_segments = segmenter(config, tokenizer)
    rows = source.located()
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            examples = encode(list(filter(None, segments_of(chunk, to_segments))), config, tokenizer)
            writer.write_table(counts.add(len(chunk), examples))
    if not counts.kept:
        raise UserError(f"{source.name}: no {split} rows are left: {_why_none_are_left(counts, config)}")
    (folder / "counts.json").write_text(json.dumps(asdict(counts)))


def _why_none_are_left(counts: RowCounts, config: DataConfig) -> str:
    if not counts.read:
        return "0 read; the data is empty. Name files or a split with rows."
    columns = f"the columns of data.completion={config.completion!r}" if config.layout == Layout.text else "the turns"
    mends = [f"look at {columns}"] * bool(counts.empty) + ["raise data.max_length"] * bool(counts.answer_truncated)
    mend = " or ".join(mends)
    return (
        f"{counts.read} read, {counts.empty} without an answer, {counts.answer_truncated} whose answer lies beyond "
        f"data.max_length={config.max_length}. {mend[0].upper()}{mend[1:]}."
    )
