"""Rows -> token ids and loss masks, tokenised once: written to the cache in chunks, and
memory-mapped to read. Memory does not grow with the number of rows. Also what a run's rows ask."""

import hashlib
import itertools
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute

from cera_train.common.errors import UserError, errors_as, errors_at
from cera_train.common.files import cached_folder
from cera_train.common.settings import require
from cera_train.common.terminal import announce
from cera_train.data.reader import Example, Question, Reader
from cera_train.data.rows import Source
from cera_train.data.sources import drawn_of_parts, interleaved, open_sources
from cera_train.data.tokens import digest_of_parts, ids_of, start_ids
from cera_train.settings.data import DataConfig

ROWS_AT_ONCE = 1000  # rows in memory at a time, which the tokenizer divides among its threads

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "loss_mask": pyarrow.list_(pyarrow.bool_()),
        "prompt_key": pyarrow.string(),
        "has_answer": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
        "continues": pyarrow.bool_(),
        "length": pyarrow.int32(),
        "supervised": pyarrow.int32(),
    }
)


def table_of(examples: Iterable[Example]) -> pyarrow.Table:
    """The examples as rows of `SCHEMA`."""
    return pyarrow.Table.from_pylist([example.columns() for example in examples], SCHEMA)


class TokenizedRows:
    """The rows of a split as tokens.

    Args:
        table: the columns of `SCHEMA` for every row that was read.
        digest: a digest of the rows, the tokenizer and the settings that change tokens.
        numbers: indices of the table's rows that count, in order: a mix repeats rows and leaves
            some out. By default every row with an answer.
    """

    def __init__(
        self, table: pyarrow.Table, digest: str = "", numbers: Sequence[int] | None = None
    ) -> None:
        self.table = table
        self.digest = digest
        if numbers is None:
            # As one array: a column without chunks makes pyarrow 21 crash.
            has_answer = table["has_answer"].combine_chunks()
            numbers = pyarrow.compute.indices_nonzero(has_answer).to_pylist()
        self.numbers = array("q", numbers)
        self.lengths: list[int] = self.column("length")
        self.supervised: list[int] = self.column("supervised")
        self.truncated: list[bool] = self.column("truncated")
        self.continuing: list[bool] = self.column("continues")

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> list:
        """A column with one value for each row."""
        return self.table[name].take(pyarrow.array(self.numbers, pyarrow.int64())).to_pylist()

    def tokens(self, name: str, row: int) -> pyarrow.Array:
        """A row of a column with one value for each token."""
        return self.table[name][self.numbers[row]].values

    def continues(self, sequence: int) -> bool:
        """Whether a sequence is of the same row as the one before it."""
        if not 0 < sequence < len(self):
            return False
        # What it continues may have been dropped.
        is_next = self.numbers[sequence] == self.numbers[sequence - 1] + 1
        return is_next and self.continuing[sequence]

    @property
    def by_row(self) -> list[range]:
        """The sequences of each row; the two answers of a preference are two rows."""
        starts = [sequence for sequence in range(len(self)) if not self.continues(sequence)]
        return [range(*ends) for ends in itertools.pairwise([*starts, len(self)])]

    @property
    def dropped(self) -> tuple[int, int]:
        """Rows without an answer, and rows whose answer lies wholly beyond max_length."""
        empty = self.table["length"].to_pylist().count(0)
        return empty, self.table["has_answer"].to_pylist().count(False) - empty

    def describe(self, unit: str = "rows") -> str:
        """A line about the rows kept, dropped and truncated, and the supervised share."""
        tokens = sum(self.lengths)
        supervised = sum(self.supervised) / tokens
        empty, beyond = self.dropped
        rows = len(self) - sum(self.continuing)  # the two answers of a preference count both
        sequences = f" as {len(self):,} sequences" if rows < len(self) else ""
        return (
            f"{rows:,} {unit}{sequences}, {tokens:,} tokens, {supervised:.0%} supervised; "
            f"{empty + beyond:,} dropped ({empty:,} empty, {beyond:,} beyond max_length), "
            f"{sum(self.truncated):,} truncated"
        )


@dataclass
class TokenizedData:
    train: TokenizedRows
    evaluation: TokenizedRows
    shared_prompts: int = 0  # held-out rows whose prompt is also a training row's
    mix: list[str] = field(default_factory=list)
    """One line for each part of a mix: its rows and tokens in an epoch."""


# --- a run's rows ---------------------------------------------------------------------------------


def prepare_data(config: DataConfig, tokenizer: Any) -> TokenizedData:
    """Tokenises both splits, or loads them from the cache; those of a mix part by part. A prompt in
    both splits is refused unless the config allows it."""
    train = []
    evaluation = []
    for place, part in config.parts():
        with errors_at(place):
            reader = Reader(part, tokenizer)
            train_source, eval_source = open_sources(part)
            train.append(_tokenize(train_source, reader))
            if part.eval_rows != 0:
                evaluation.append(_tokenize(eval_source, reader))
    data = TokenizedData(train[0], _joined_evaluation(evaluation))
    if config.mix is not None:
        _mix(data, config, train)
    train_keys = set(data.train.column("prompt_key"))
    eval_keys = data.evaluation.column("prompt_key")[:: config.sequences]
    data.shared_prompts = check_overlap(config, train_keys, eval_keys)
    return data


def check_overlap(config: DataConfig, train: Container[str], held_out: Sequence[str]) -> int:
    """The number of held-out prompts that are also training prompts. Raises UserError for any,
    unless the config allows it."""
    count = sum(prompt in train for prompt in held_out)
    if count and not config.allow_overlap:
        shared = f"{count} of {len(held_out)} held-out prompts"
        problem = f"{shared} are also training prompts, so the perplexity would measure memory"
        fix = "Remove them from one side"
        if config.train_files and not config.eval_files and not config.holds_out_by_prompt:
            fix = "Leave out data.eval_rows, so that rows are held out by prompt"
        fix += ", or set data.allow_overlap=true."
        raise UserError(f"{config.title}: {problem}. {fix}")
    return count


def _mix(data: TokenizedData, config: DataConfig, train: Sequence[TokenizedRows]) -> None:
    """Draws the training rows of an epoch from those of each part, and describes the parts."""
    drawn = drawn_of_parts([part.by_row for part in train], config)
    data.train = _join(train, drawn)
    total = sum(data.train.lengths)
    for (_, part), rows, sequences in zip(config.parts(), train, drawn, strict=True):
        tokens = sum(rows.lengths[sequence] for sequence in sequences)
        data.mix.append(
            f"{part.title}: {len(sequences):,} sequences an epoch, of {len(rows):,}, with "
            f"{tokens / total:.2%} of the tokens"
        )


def prepare_evaluation(
    config: DataConfig, tokenizer: Any, limit: int | None = None
) -> TokenizedRows:
    """Only the held-out split of `prepare_data`, or its first `limit` rows; for preferences, the
    chosen answers."""
    splits = []
    for place, part in config.parts():
        if part.eval_rows != 0:
            with errors_at(place):
                reader = Reader(part, tokenizer, chosen_only=True)
                splits.append(_tokenize(open_sources(part)[1], reader))
    return _joined_evaluation(splits, limit)


def _joined_evaluation(splits: list[TokenizedRows], limit: int | None = None) -> TokenizedRows:
    """The held-out splits of all parts as one, or its first `limit` rows. If only one part has
    rows, its digest is kept: perplexities compare with those of runs on that part alone."""
    require(bool(splits), "data.eval_rows=0: no rows to evaluate on. Raise it.")
    if len(splits) == 1 and limit is None:
        return splits[0]
    return _join(splits, [range(len(rows)) for rows in splits], limit)


def _join(
    splits: Sequence[TokenizedRows], drawn: Sequence[Sequence[int]], limit: int | None = None
) -> TokenizedRows:
    """The drawn rows of several splits as one split, or its first `limit` rows. The tables are not
    copied."""
    tables = [split.table for split in splits]
    starts = itertools.accumulate(map(len, tables), initial=0)
    placed = [
        [start + split.numbers[row] for row in rows]
        for start, split, rows in zip(starts, splits, drawn, strict=False)
    ]
    numbers = array("q", interleaved(placed)[:limit])
    digest = digest_of_parts(
        [split.digest for split in splits], hashlib.sha256(numbers).hexdigest()
    )
    return TokenizedRows(pyarrow.concat_tables(tables), digest, numbers)


# --- rows to tokens -------------------------------------------------------------------------------


def _tokenize(source: Source, reader: Reader) -> TokenizedRows:
    """The rows of a source, from the cache or written to it."""
    digest = reader.digest(source.fingerprint)

    def write(folder: Path) -> None:
        rows = iter(source)
        with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), SCHEMA) as writer:
            for number, chunk in enumerate(
                iter(lambda: list(itertools.islice(rows, ROWS_AT_ONCE)), [])
            ):
                if number == 1:
                    announce(
                        "tokenising", f"{source.name}, once: it has more than {ROWS_AT_ONCE:,} rows"
                    )
                writer.write_table(table_of(reader.examples(chunk)))

    # A .txt file that is renamed to .jsonl has the same content, and other rows.
    folder = f"tokens/{digest}-txt" if source.is_text else f"tokens/{digest}"
    file = cached_folder(folder, write) / "rows.arrow"
    with errors_as(f"{file} is broken", f"Remove {file.parent}: it is written anew."):
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
        table = table.select(SCHEMA.names)  # 0.2.0 wrote another column
    rows = TokenizedRows(table, digest)
    if not rows:
        empty, beyond = rows.dropped
        raise UserError(
            f"{source.name}: no rows are left: {len(rows.table)} read, {empty} without an answer, "
            f"{beyond} without one within data.max_length={reader.config.max_length}. Name rows "
            "with answers, raise data.max_length, or hold out fewer by data.eval_rows."
        )
    return rows


def prepare_windows(text: str, tokenizer: Any, window: int, limit: int | None) -> TokenizedRows:
    """Running text in windows of at most `window` tokens, every token but a window's first
    supervised."""
    start = start_ids(tokenizer)
    ids = ids_of(text, tokenizer)
    step = window - len(start)
    windows = [start + ids[first : first + step] for first in range(0, len(ids), step)][:limit]
    examples = [
        Example(window, [False] + [True] * (len(window) - 1))
        for window in windows
        if len(window) > 1
    ]
    if not examples:
        raise UserError("the text has no token to predict: it is empty or a single token.")
    return TokenizedRows(table_of(examples), digest_of_parts(text, window, limit))


# --- questions ------------------------------------------------------------------------------------


def held_out_questions(config: DataConfig, tokenizer: Any) -> Iterator[Question]:
    """The first question of each held-out row, of all parts of a mix in turn."""
    parts = [_first_questions(part, tokenizer) for _, part in config.parts()]
    in_turn = itertools.zip_longest(*parts)
    return filter(None, itertools.chain.from_iterable(in_turn))


def _first_questions(config: DataConfig, tokenizer: Any) -> Iterator[Question]:
    reader = Reader(config, tokenizer)
    _, source = open_sources(config)
    for place, row in source:
        yield from reader.questions(place, row)[:1]


def training_questions(config: DataConfig, tokenizer: Any) -> list[Question]:
    """Every question of an epoch's rows."""
    asked = {}
    for place, part in config.trained_parts():
        with errors_at(place):
            reader = Reader(part, tokenizer)
            source, _ = open_sources(part)
            asked[place] = [*filter(None, (reader.questions(*each) for each in source))]
            require(
                bool(asked[place]),
                f"{source.name}: no prompt fits data.max_length: raise data.max_length.",
            )
    if config.mix is None:
        return [*itertools.chain.from_iterable(asked[""])]
    # From a part of weight 0, no row is drawn.
    parts = [asked.get(place, [[]]) for place, _ in config.parts()]
    return interleaved(drawn_of_parts(parts, config))
