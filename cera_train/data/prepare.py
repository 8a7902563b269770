"""Rows -> token ids and loss masks in an Arrow file, tokenised once and cached by content. The file is written in
chunks and memory-mapped to read: neither takes more memory for more rows."""

import hashlib
import itertools
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow

from cera_train.common.errors import UserError
from cera_train.common.files import cached_folder
from cera_train.common.settings import Changes, leaves, to_plain
from cera_train.data.mix import PartRows, drawn_rows, interleaved, rows_of_parts
from cera_train.data.rows import Source
from cera_train.data.segments import Segment, segmenter, segments_of
from cera_train.data.sources import open_sources
from cera_train.settings.data import DataConfig, Layout, LossOn, at_part

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
    numbers: Sequence[int] | None = None
    """The table's row for each row of a mix, which repeats rows and leaves some out."""

    def __len__(self) -> int:
        return len(self.rows if self.numbers is None else self.numbers)

    def column(self, name: str) -> list:
        """A column that has one value for each row."""
        values = self.rows[name].to_pylist()
        return values if self.numbers is None else [values[number] for number in self.numbers]

    def tokens(self, name: str, row: int) -> pyarrow.Array:
        """A row of a column that has one value for each token."""
        return self.rows[name][row if self.numbers is None else self.numbers[row]].values


@dataclass
class TokenizedData:
    train: TokenizedRows
    evaluation: TokenizedRows
    shared_prompts: int = 0
    """Evaluation rows whose prompt is also a training row's."""
    repeated_prompts: int = 0
    """Training rows whose prompt is also an earlier one's."""
    parts: list[PartRows] = field(default_factory=list)
    """The parts of a mix."""


def prepare_data(config: DataConfig, tokenizer: Any) -> TokenizedData:
    """Tokenises both splits, or takes them from the cache; those of a mix part by part. A prompt in both is refused
    unless the config allows it."""
    config.check_evaluates()
    parts, train, evaluation = dict(config.parts()), {}, {}
    for place, part in parts.items():
        with at_part(place):
            (train_source, eval_source), digest = open_sources(part), _tokenization_digest(part, tokenizer)
            train[place] = _tokenize(train_source, "training", part, tokenizer, digest)
            if part.eval_rows != 0:
                evaluation[place] = _tokenize(eval_source, "evaluation", part, tokenizer, digest)
    data = TokenizedData(train["data"], evaluation["data"]) if config.mix is None else _mix(config, train, evaluation)
    train_keys = set(data.train.column("prompt_key"))
    data.repeated_prompts = len(data.train) - len(train_keys)
    train_files = [name for part in parts.values() for name in part.train_files]
    for place, rows in evaluation.items():
        shared = sum(key in train_keys for key in rows.column("prompt_key"))
        data.shared_prompts += shared
        if shared and not config.allow_overlap:
            with at_part(place):
                _refuse_shared(shared, rows.counts.kept, parts[place], train_files)
    return data


def _refuse_shared(shared: int, rows: int, config: DataConfig, train_files: list[str]) -> None:
    there = {Path(name).resolve() for name in train_files}
    in_both = [name for name in config.eval_files if Path(name).resolve() in there]
    file = f" ({in_both[0]} is also in data.train_files)" if in_both else ""
    count = f"{shared} of {rows} evaluation prompts are also training prompts{file}"
    mend = "Remove them from one side, or set data.allow_overlap=true."
    raise UserError(f"{open_sources(config)[1].name}: {count}, so the perplexity would measure memory. {mend}")


def prepare_evaluation(config: DataConfig, tokenizer: Any, limit: int | None = None) -> TokenizedRows:
    """Only the evaluation split of `prepare_data`, or its first `limit` rows."""
    config.check_evaluates()
    made = []
    for place, part in config.parts():
        if part.eval_rows != 0:
            with at_part(place):
                source = open_sources(part)[1].head(limit if config.mix is None else None)
                made.append(_tokenize(source, "evaluation", part, tokenizer, _tokenization_digest(part, tokenizer)))
    return made[0] if config.mix is None else _join(made, [range(len(rows)) for rows in made], limit)


def _mix(config: DataConfig, train: dict[str, TokenizedRows], evaluation: dict[str, TokenizedRows]) -> TokenizedData:
    """The parts of a mix as one, and what each gives to it."""
    available = list(map(len, train.values()))
    counts = rows_of_parts(available, config.weights, config.train_rows)
    drawn = [
        drawn_rows(size, count, f"{config.mix_seed} {part}")
        for part, (size, count) in enumerate(zip(available, counts, strict=True))
    ]
    parts = []
    for (place, part), weight, numbers in zip(config.parts(), config.weights, drawn, strict=True):
        lengths = train[place].column("length")
        tokens = sum(lengths[number] for number in numbers)
        parts.append(PartRows(part.title, weight, len(lengths), len(numbers), tokens, len(evaluation.get(place, ()))))
    whole = [range(len(rows)) for rows in evaluation.values()]
    return TokenizedData(_join([*train.values()], drawn), _join([*evaluation.values()], whole), parts=parts)


def _join(parts: Sequence[TokenizedRows], drawn: Sequence[Sequence[int]], limit: int | None = None) -> TokenizedRows:
    """The drawn rows of several splits as one, or its first `limit` rows. The tables are not copied."""
    starts = itertools.accumulate(map(len, parts), initial=0)
    placed = [[start + row for row in rows] for start, rows in zip(starts, drawn, strict=False)]
    numbers = array("q", interleaved(placed)[:limit])
    counts = RowCounts(*map(sum, zip(*(astuple(part.counts) for part in parts), strict=True)))
    digest = _digest([part.digest for part in parts], hashlib.sha256(numbers).hexdigest())
    joined = TokenizedRows(pyarrow.concat_tables([part.rows for part in parts]), counts, digest, numbers)
    counts.tokens, counts.supervised_tokens = sum(joined.column("length")), sum(joined.column("supervised"))
    return joined


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
