"""Rows -> token ids and loss masks, tokenised once: `datasets` writes them to the cache, in chunks, and they are
memory-mapped to read. Neither takes more memory for more rows."""

import functools
import hashlib
import itertools
import json
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute

from cera_train.common.errors import UserError
from cera_train.common.files import cache_dir
from cera_train.common.settings import Changes, leaves, to_plain
from cera_train.data.mix import PartRows, drawn_rows, interleaved, rows_of_parts
from cera_train.data.order import RowOrder, StreamedRows
from cera_train.data.rows import PlacedRow, Source
from cera_train.data.segments import Segment, segmenter, segments_of
from cera_train.data.sources import open_sources
from cera_train.settings.data import DataConfig, Layout, LossOn, at_part

CACHE_VERSION = 3
"""Raised when the same rows would be tokenised differently than before."""

ROWS_AT_ONCE = 1000
"""Rows in memory at a time, which the tokenizer shares out to its threads."""

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "loss_mask": pyarrow.list_(pyarrow.bool_()),
        "prompt_key": pyarrow.string(),
        "has_answer": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
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
    has_answer: bool = True
    """Whether a token of an answer is left, also where the loss is on all tokens. A row without one is dropped."""
    truncated: bool = False

    def columns(self) -> dict[str, Any]:
        return vars(self) | {"length": len(self.input_ids), "supervised": sum(self.loss_mask)}


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


class TokenizedRows:
    """A split, memory-mapped.

    Args:
        table: the columns of `SCHEMA` for every row that was read.
        digest: a digest of the rows, the tokenizer and the settings that change tokens.
        numbers: the rows of the table that count, in order: a mix repeats rows and leaves some out. None: every row
            with an answer.
    """

    def __init__(self, table: pyarrow.Table, digest: str, numbers: Sequence[int] | None = None) -> None:
        self.table, self.digest = table, digest
        if numbers is None:
            numbers = pyarrow.compute.indices_nonzero(table["has_answer"]).to_pylist()
        self.numbers = array("q", numbers)
        self.lengths: list[int] = self.column("length")
        self.supervised: list[int] = self.column("supervised")

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> list:
        """A column that has one value for each row."""
        return self.table[name].take(pyarrow.array(self.numbers, pyarrow.int64())).to_pylist()

    def tokens(self, name: str, row: int) -> pyarrow.Array:
        """A row of a column that has one value for each token."""
        return self.table[name][self.numbers[row]].values

    @functools.cached_property
    def counts(self) -> RowCounts:
        has_answer, truncated, length = (self.table[name].to_pylist() for name in ("has_answer", "truncated", "length"))
        empty = length.count(0)
        return RowCounts(
            read=len(has_answer),
            empty=empty,
            answer_truncated=has_answer.count(False) - empty,
            truncated=sum(map(operator.and_, has_answer, truncated)),
            tokens=sum(self.lengths),
            supervised_tokens=sum(self.supervised),
        )

    def order(self, batch_size: int, seed: int) -> RowOrder:
        """Which rows each update takes."""
        return RowOrder(len(self), batch_size, seed)

    def describe(self) -> str:
        """Rows kept, dropped and truncated, and the supervised share, for people."""
        counts = self.counts
        return (
            f"{len(self):,} rows, {counts.tokens:,} tokens, {counts.supervised_tokens / counts.tokens:.0%} supervised; "
            f"{counts.empty + counts.answer_truncated:,} dropped ({counts.empty:,} empty, {counts.answer_truncated:,} "
            f"beyond max_length), {counts.truncated:,} truncated"
        )


@dataclass
class TokenizedData:
    train: TokenizedRows | StreamedRows
    evaluation: TokenizedRows
    shared_prompts: int = 0
    """Evaluation rows whose prompt is also a training row's."""
    repeated_prompts: int = 0
    """Training rows whose prompt is also an earlier one's."""
    parts: list[PartRows] = field(default_factory=list)
    """The parts of a mix."""

    @property
    def sample(self) -> TokenizedRows:
        """Rows to look at: those that train, of a stream those that evaluate."""
        return self.evaluation if isinstance(self.train, StreamedRows) else self.train


def prepare_data(config: DataConfig, tokenizer: Any) -> TokenizedData:
    """Tokenises both splits, or takes them from the cache; those of a mix part by part. A prompt in both is refused
    unless the config allows it."""
    config.check_evaluates()
    if config.streaming:
        return _stream(config, tokenizer)
    train, evaluation, names = {}, {}, {}
    for place, part in config.parts():
        with at_part(place):
            train_source, eval_source = open_sources(part)
            names[place] = eval_source.name
            train[place] = _tokenize(train_source, "training", part, tokenizer)
            if part.eval_rows != 0:
                evaluation[place] = _tokenize(eval_source, "evaluation", part, tokenizer)
    data = TokenizedData(train["data"], evaluation["data"]) if config.mix is None else _mix(config, train, evaluation)
    train_keys = set(data.train.column("prompt_key"))
    data.repeated_prompts = len(data.train) - len(train_keys)
    for place, rows in evaluation.items():
        shared = sum(key in train_keys for key in rows.column("prompt_key"))
        data.shared_prompts += shared
        if shared and not config.allow_overlap:
            mend = "Remove them from one side, or set data.allow_overlap=true."
            count = f"{shared} of {len(rows)} evaluation prompts are also training prompts"
            with at_part(place):
                raise UserError(f"{names[place]}: {count}, so the perplexity would measure memory. {mend}")
    return data


def _stream(config: DataConfig, tokenizer: Any) -> TokenizedData:
    """Training rows that are read as they train. Those with a prompt that evaluates are left out."""
    train, evaluation = open_sources(config)
    held_out = _tokenize(evaluation, "evaluation", config, tokenizer)
    left_out = set() if config.allow_overlap else set(held_out.column("prompt_key"))
    to_segments = segmenter(config, tokenizer)

    def tokenize(rows: list[PlacedRow]) -> TokenizedRows:
        examples = encode(segments_of(rows, to_segments), config, tokenizer)
        return in_memory(example for example in examples if example.prompt_key not in left_out)

    digest = _digest(held_out.digest, train.fingerprint, config.shuffle_buffer)
    return TokenizedData(StreamedRows(train, tokenize, config.shuffle_buffer, digest), held_out)


def prepare_evaluation(config: DataConfig, tokenizer: Any, limit: int | None = None) -> TokenizedRows:
    """Only the evaluation split of `prepare_data`, or its first `limit` rows."""
    config.check_evaluates()
    splits = []
    for place, part in config.parts():
        if part.eval_rows != 0:
            with at_part(place):
                source = open_sources(part)[1].head(limit if config.mix is None else None)
                splits.append(_tokenize(source, "evaluation", part, tokenizer))
    return splits[0] if config.mix is None else _join(splits, [range(len(rows)) for rows in splits], limit)


def _mix(config: DataConfig, train: dict[str, TokenizedRows], evaluation: dict[str, TokenizedRows]) -> TokenizedData:
    """The parts of a mix as one, and what each gives to it."""
    available = list(map(len, train.values()))
    counts = rows_of_parts(available, config.weights, config.train_rows)
    drawn, parts = [], []
    for number, (place, part) in enumerate(config.parts()):
        drawn.append(drawn_rows(available[number], counts[number], f"{config.mix_seed} {number}"))
        tokens, eval_rows = sum(train[place].lengths[row] for row in drawn[-1]), len(evaluation.get(place, ()))
        weight = config.weights[number]
        parts.append(PartRows(part.title, weight, available[number], counts[number], tokens, eval_rows))
    whole = [range(len(rows)) for rows in evaluation.values()]
    return TokenizedData(_join([*train.values()], drawn), _join([*evaluation.values()], whole), parts=parts)


def _join(parts: Sequence[TokenizedRows], drawn: Sequence[Sequence[int]], limit: int | None = None) -> TokenizedRows:
    """The drawn rows of several splits as one, or its first `limit` rows. The tables are not copied."""
    starts = itertools.accumulate((len(part.table) for part in parts), initial=0)
    placed = [
        [start + part.numbers[row] for row in rows] for start, part, rows in zip(starts, parts, drawn, strict=False)
    ]
    numbers = array("q", interleaved(placed)[:limit])
    digest = _digest([part.digest for part in parts], hashlib.sha256(numbers).hexdigest())
    return TokenizedRows(pyarrow.concat_tables([part.table for part in parts]), digest, numbers)


def prepare_windows(text: str, tokenizer: Any, window: int, limit: int | None) -> TokenizedRows:
    """Running text in windows of at most `window` tokens, every token but a window's first supervised."""
    start, ids = start_ids(tokenizer), ids_of(text, tokenizer)
    step = window - len(start)
    windows = [start + ids[first : first + step] for first in range(0, len(ids), step)][:limit]
    examples = [Example(window, [False] + [True] * (len(window) - 1)) for window in windows if len(window) > 1]
    if not examples:
        raise UserError("the text has no token to predict: it is empty or a single token.")
    return in_memory(examples, _digest(text, window, limit))


def in_memory(examples: Iterable[Example], digest: str = "") -> TokenizedRows:
    """A split of these rows, which is not cached."""
    return TokenizedRows(pyarrow.Table.from_pylist([each.columns() for each in examples], SCHEMA), digest)


def start_ids(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer writes one before a text; else nothing."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []


def ids_of(texts: str | list[str], tokenizer: Any) -> list:
    """The token ids of a text or of each of several, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def encode(rows_segments: Iterable[list[Segment]], config: DataConfig, tokenizer: Any) -> list[Example]:
    """Token ids and loss masks of many rows at once."""
    end = tokenizer.eos_token_id
    if end is None:
        reason = "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json."
        raise UserError(f"model.path={tokenizer.name_or_path}: {reason}")
    is_chat = config.layout == Layout.messages
    start = [] if is_chat else start_ids(tokenizer)  # a chat template writes the start token
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    rows_segments = list(rows_segments)
    texts = [segment.text for segments in rows_segments for segment in segments]
    segment_ids = iter(ids_of(texts, tokenizer) if texts else [])

    examples = []
    for segments in rows_segments:
        if not segments:
            examples.append(Example([], [], has_answer=False))
            continue
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
        kept, is_cut = slice(config.max_length), len(input_ids) > config.max_length
        examples.append(Example(input_ids[kept], loss_mask[kept], prompt_key, has_answer, is_cut))
    return examples


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenize(source: Source, split: str, config: DataConfig, tokenizer: Any) -> TokenizedRows:
    changing = {leaf.key for leaf in leaves(DataConfig) if leaf.changes == Changes.tokens}
    settings = {key: value for key, value in to_plain(config).items() if key in changing}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else [*tokenizer.get_vocab().items()]
    template, special = tokenizer.chat_template, tokenizer.special_tokens_map
    digest = _digest(CACHE_VERSION, settings, vocabulary, template, special, source.fingerprint)
    folder = cache_dir() / "tokens" / digest
    if not (files := _arrow_files(folder)):
        rows = _examples(source, config, tokenizer)
        if (first := next(rows, None)) is None:
            raise UserError(f"{source.name} has no {split} rows. Name files or a split with rows.")
        _write(folder, digest, itertools.chain([first], rows))
        files = _arrow_files(folder)
    # Not opened by `datasets`: importing it takes half a second, and a run whose rows are cached needs nothing of it.
    tables = (pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files)
    rows = TokenizedRows(pyarrow.concat_tables(tables), digest)
    if not rows:
        raise UserError(f"{source.name}: no {split} rows are left: {_why_none_are_left(rows.counts, config)}")
    return rows


def _examples(source: Source, config: DataConfig, tokenizer: Any) -> Iterator[dict[str, Any]]:
    rows, to_segments = iter(source.located()), segmenter(config, tokenizer)
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for example in encode(segments_of(chunk, to_segments), config, tokenizer):
            yield example.columns()


def _write(folder: Path, digest: str, rows: Iterator[dict[str, Any]]) -> None:
    """Lets `datasets` write a split to the cache: whole or not at all, and of several processes by one."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features.from_arrow_schema(SCHEMA)
    try:
        datasets.Dataset.from_generator(lambda: rows, features, str(folder), fingerprint=digest)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _arrow_files(folder: Path) -> list[Path]:
    """The files of a split that is written whole."""
    folders = [info.parent for info in folder.rglob("dataset_info.json") if info.parent.suffix != ".incomplete"]
    return sorted(file for folder in folders for file in folder.glob("*.arrow"))


def _why_none_are_left(counts: RowCounts, config: DataConfig) -> str:
    columns = f"the columns of data.completion={config.completion!r}" if config.layout == Layout.text else "the turns"
    mends = [f"look at {columns}"] * bool(counts.empty) + ["raise data.max_length"] * bool(counts.answer_truncated)
    mend = " or ".join(mends)
    return (
        f"{counts.read} read, {counts.empty} without an answer, {counts.answer_truncated} whose answer lies beyond "
        f"data.max_length={config.max_length}. {mend[0].upper()}{mend[1:]}."
    )
