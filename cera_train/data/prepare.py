"""Rows -> token ids and loss masks, tokenised once: written to the cache in chunks, and
memory-mapped to read. Memory does not grow with the number of rows."""

import hashlib
import itertools
import json
from array import array
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow
import pyarrow.compute

from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import cached_folder
from cera_train.common.settings import Changes, fields_of, require, to_plain
from cera_train.common.terminal import announce
from cera_train.data.chats import uses_template
from cera_train.data.messages import TURNS
from cera_train.data.rows import Source
from cera_train.data.segments import Segment, prompt_of, segmenters, sequences_of
from cera_train.data.sources import drawn_rows, interleaved, open_sources, rows_of_parts
from cera_train.data.templates import open_templates
from cera_train.settings.data import DataConfig, Layout, LossOn

CACHE_VERSION = 7  # raised when a new version tokenises or stores the same rows differently

ROWS_AT_ONCE = 1000  # rows in memory at a time, which the tokenizer divides among its threads

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "loss_mask": pyarrow.list_(pyarrow.bool_()),
        "prompt_key": pyarrow.string(),
        "has_answer": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
        "continues": pyarrow.bool_(),
        "opening": pyarrow.string(),
        "length": pyarrow.int32(),
        "supervised": pyarrow.int32(),
    }
)


@dataclass
class Example:
    """Token ids of a sequence, and whether the prediction of each counts in the loss. The first
    token is never predicted."""

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_key: str = ""
    """A digest of the text before the first supervised token: equal prompts have equal keys."""
    has_answer: bool = True
    """Whether a token of an answer is left, even if the loss is on all tokens. A row without one is
    dropped."""
    truncated: bool = False
    continues: bool = False
    """Whether it holds more answers of the row of the example before."""
    opening: str = ""
    """That of its first prompt, for display; empty where inference opens it so by default."""

    def columns(self) -> dict[str, Any]:
        return vars(self) | {"length": len(self.input_ids), "supervised": sum(self.loss_mask)}


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

    def sequences_of_row(self, sequence: int, together: int) -> range:
        """The sequences of the row that one of them is of; a row has at least `together`. In a mix,
        those that lie side by side."""
        first = sequence
        while self.continues(first):
            first -= 1
        end = first + together
        while self.continues(end):
            end += 1
        return range(first, end)

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
    def row_count(self) -> int:
        """The rows, each of one sequence or several; the two answers of a preference count both."""
        return len(self) - sum(self.continuing)

    @property
    def unit(self) -> str:
        """What is counted where `len` counts."""
        return "rows" if len(self) == self.row_count else "sequences"

    @property
    def dropped(self) -> tuple[int, int]:
        """Rows without an answer, and rows whose answer lies wholly beyond max_length."""
        empty = self.table["length"].to_pylist().count(0)
        return empty, self.table["has_answer"].to_pylist().count(False) - empty

    def uncut(self) -> Self:
        """The rows without the truncated ones, which then count as dropped. Raises UserError if
        none is left."""
        whole = pyarrow.compute.and_not(self.table["has_answer"], self.table["truncated"])
        table = self.table.set_column(
            self.table.column_names.index("has_answer"), "has_answer", whole
        )
        numbers = [
            number
            for number, is_cut in zip(self.numbers, self.truncated, strict=True)
            if not is_cut
        ]
        require(bool(numbers), "all training rows are longer than data.max_length: raise it.")
        return TokenizedRows(table, self.digest, numbers)

    def describe(self, unit: str = "rows") -> str:
        """A line about the rows kept, dropped and truncated, and the supervised share."""
        tokens = sum(self.lengths)
        supervised = sum(self.supervised) / tokens
        empty, beyond = self.dropped
        rows = self.row_count
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
    repeated_prompts: int = 0  # training rows whose prompt is also an earlier one's
    mix: list[str] = field(default_factory=list)
    """One line for each part of a mix: its rows and tokens in an epoch."""


# --- a run's rows ---------------------------------------------------------------------------------


def prepare_data(config: DataConfig, tokenizer: Any, asks: bool = False) -> TokenizedData:
    """Tokenises both splits, or loads them from the cache; those of a mix part by part. A prompt in
    both splits is refused unless the config allows it.

    Args:
        asks: as of `chats.chat_exchanges`.
    """
    train = []
    evaluation = []
    for place, part in config.parts():
        with errors_at(place):
            train_source, eval_source = open_sources(part)
            rows = _tokenize(train_source, part, tokenizer, asks=asks)
            # A part of a right answer would be another answer.
            train.append(rows.uncut() if asks else rows)
            if part.eval_rows == 0:
                evaluation.append(TokenizedRows(table_of([])))
            else:
                evaluation.append(_tokenize(eval_source, part, tokenizer, asks=asks))
    data = TokenizedData(train[0], _joined_evaluation(evaluation))
    if config.mix is not None:
        _mix(data, config, train, evaluation)
    train_keys = set(data.train.column("prompt_key"))
    data.repeated_prompts = len(data.train) // config.sequences - len(train_keys)
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


def _mix(
    data: TokenizedData,
    config: DataConfig,
    train: Sequence[TokenizedRows],
    evaluation: Sequence[TokenizedRows],
) -> None:
    """Draws the training rows of an epoch from those of each part, and describes the parts."""
    available = [part.by_row for part in train]
    counts = rows_of_parts([*map(len, available)], config.weights, config.train_rows)
    drawn = []  # sequences of each part
    for number, (rows, count) in enumerate(zip(available, counts, strict=True)):
        # "0 " as in 0.2.0, which had a seed here: its mixes keep their rows.
        taken = drawn_rows(len(rows), count, f"0 {number}")
        drawn.append([sequence for row in taken for sequence in rows[row]])
    data.train = _join(train, drawn)
    total = sum(data.train.lengths)
    for (_, part), rows, sequences, evaluating in zip(
        config.parts(), train, drawn, evaluation, strict=True
    ):
        tokens = sum(rows.lengths[sequence] for sequence in sequences)
        data.mix.append(
            f"{part.title}: {len(sequences):,} {rows.unit} an epoch, of {len(rows):,} "
            f"({len(sequences) / len(data.train):.2%}), {tokens:,} tokens ({tokens / total:.2%}); "
            f"{len(evaluating):,} {evaluating.unit} evaluate"
        )


def prepare_evaluation(
    config: DataConfig, tokenizer: Any, limit: int | None = None, asks: bool = False
) -> TokenizedRows:
    """Only the held-out split of `prepare_data`, or its first `limit` rows; for preferences, the
    chosen answers."""
    splits = []
    for place, part in config.parts():
        if part.eval_rows != 0:
            with errors_at(place):
                source = open_sources(part)[1]
                splits.append(_tokenize(source, part, tokenizer, chosen_only=True, asks=asks))
    return _joined_evaluation(splits, limit)


def _joined_evaluation(splits: list[TokenizedRows], limit: int | None = None) -> TokenizedRows:
    """The held-out splits of all parts as one, or its first `limit` rows. If only one part has
    rows, its digest is kept: perplexities compare with those of runs on that part alone."""
    splits = [rows for rows in splits if rows]
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


def _tokenize(
    source: Source,
    config: DataConfig,
    tokenizer: Any,
    chosen_only: bool = False,
    asks: bool = False,
) -> TokenizedRows:
    """The rows of a source, from the cache or written to it; of preferences, both answers or only
    the chosen ones."""
    sides = segmenters(config, tokenizer, asks)[: 1 if chosen_only else None]
    digest = digest_of_tokens(source, config, tokenizer, len(sides), asks)

    def write(folder: Path) -> None:
        rows = iter(source.located())
        with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), SCHEMA) as writer:
            for number, chunk in enumerate(
                iter(lambda: list(itertools.islice(rows, ROWS_AT_ONCE)), [])
            ):
                if number == 1:
                    announce(
                        "tokenising", f"{source.name}, once: it has more than {ROWS_AT_ONCE:,} rows"
                    )
                examples = encode(sequences_of(chunk, *sides), config, tokenizer, asks)
                if len(sides) > 1:  # a preference that lacks an answer is dropped as a whole
                    for chosen, rejected in zip(examples[::2], examples[1::2], strict=True):
                        chosen.has_answer = rejected.has_answer = (
                            chosen.has_answer and rejected.has_answer
                        )
                writer.write_table(table_of(examples))

    # A .txt file that is renamed to .jsonl has the same content, and other rows.
    folder = f"tokens/{digest}-txt" if source.is_text else f"tokens/{digest}"
    file = cached_folder(folder, write) / "rows.arrow"
    try:
        rows = TokenizedRows(
            pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all(), digest
        )
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"{file} is broken: {error}. Remove {file.parent}: it is written anew."
        ) from error
    if not rows:
        empty, beyond = rows.dropped
        raise UserError(
            f"{source.name}: no rows are left: {len(rows.table)} read, {empty} without an answer, "
            f"{beyond} without one within data.max_length={config.max_length}. Name rows with "
            "answers, raise data.max_length, or hold out fewer by data.eval_rows."
        )
    return rows


def digest_of_tokens(
    source: Source, config: DataConfig, tokenizer: Any, sides: int, asks: bool
) -> str:
    """The digest of all that the tokens of a source follow from.

    Args:
        sides: answers of each row.
        asks: as of `chats.chat_exchanges`.
    """
    changing = {
        key
        for key, field in fields_of(DataConfig).items()
        if field.metadata["changes"] == Changes.tokens
    }
    settings = {
        key: value for key, value in to_plain(config).items() if key in changing - {"rejected"}
    }
    settings |= {"rejected": config.rejected} if sides > 1 else {}
    if config.layout in TURNS and config.loss_on == LossOn.all:
        settings["left_out"] = True  # earlier versions trained on answers of weight 0
    if asks:
        # "each": earlier versions asked a plain chat for its first answer alone.
        is_plain_chat = config.layout in TURNS and not uses_template(config, tokenizer)
        settings["asks"] = "each" if is_plain_chat else True
        end = answer_end(config, tokenizer, asks)
        if end != tokenizer.eos_token_id:  # earlier versions ended answers by that one
            settings["end"] = end
    vocabulary, special = words_of(tokenizer)
    template = tokenizer.chat_template
    return digest_of_parts(
        CACHE_VERSION, settings, vocabulary, template, special, source.fingerprint
    )


def words_of(tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """All that says how a tokenizer cuts text, and its special tokens."""
    # The first call removes truncation and padding, which tokenizer.json may hold.
    ids_of("", tokenizer)
    is_fast = tokenizer.is_fast
    words = tokenizer.backend_tokenizer.to_str() if is_fast else [*tokenizer.get_vocab().items()]
    return words, tokenizer.special_tokens_map


def tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """Digests of what a model's folder says of how rows become tokens."""
    return {
        "tokenizer": digest_of_parts(*words_of(tokenizer)),
        "chat template": digest_of_parts(tokenizer.chat_template),
    }


def answer_end(config: DataConfig, tokenizer: Any, asks: bool) -> int | None:
    """The token that ends an answer whose text has no end token: the tokenizer's; where a sampled
    answer follows the prompt of a chat template, the template's."""
    if asks and uses_template(config, tokenizer):
        template, *_ = open_templates(tokenizer, None, config.template_settings, {})
        if (end := template.end()) is not None:
            return tokenizer.convert_tokens_to_ids(end)
    return tokenizer.eos_token_id


def encode(
    rows: Iterable[list[list[Segment]]], config: DataConfig, tokenizer: Any, asks: bool = False
) -> list[Example]:
    """Token ids and loss masks of the sequences of many rows at once; a document longer than
    max_length becomes several examples.

    Args:
        asks: as of `chats.chat_exchanges`.
    """
    end = answer_end(config, tokenizer, asks)
    if end is None:
        reason = (
            "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json."
        )
        raise UserError(f"model.path={tokenizer.name_or_path}: {reason}")
    # A chat template writes the start token itself, and may write an end token.
    is_chat = uses_template(config, tokenizer)
    is_document = config.layout == Layout.documents
    start = [] if is_chat else start_ids(tokenizer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    rows = list(rows)
    pieces = [
        (segment.text, number > 0)
        for row in rows
        for sequence in row
        for number, segment in enumerate(sequence)
    ]
    segment_ids = iter(_ids_of_pieces(pieces, tokenizer) if pieces else [])

    examples = []
    step = config.max_length - len(start)
    for row in rows:
        if not row:
            examples.append(Example([], [], has_answer=False))
        for index, sequence in enumerate(row):
            input_ids = []
            loss_mask = []
            left_out = []
            for segment in sequence:
                ids = next(segment_ids)
                if segment.is_answer and not (is_chat and ids and ids[-1] in special):
                    ids = [*ids, end]
                input_ids += ids
                loss_mask += [segment.supervised] * len(ids)
                left_out += [segment.left_out] * len(ids)
            prompt_key = hashlib.blake2b(prompt_of(sequence).encode(), digest_size=16).hexdigest()
            opening = next((segment.opening for segment in sequence if segment.supervised), None)
            is_cut = len(input_ids) > step and not is_document
            firsts = [0]
            if is_document:
                # Without a start token, nothing comes before a single last token.
                predicted = len(input_ids) if start else len(input_ids) - 1
                firsts = range(0, max(1, predicted), step)
            for first in firsts:
                kept = slice(first, first + step)
                ids = start + input_ids[kept]
                mask = [False] * len(start) + loss_mask[kept]
                has_answer = any(mask[1:])
                if config.loss_on == LossOn.all:
                    mask = [True] * len(start) + [not is_out for is_out in left_out[kept]]
                mask[0] = False
                key = f"{prompt_key}{first or ''}"
                examples.append(
                    Example(ids, mask, key, has_answer, is_cut, index > 0, str(opening or ""))
                )
    return examples


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


def start_ids(tokenizer: Any) -> list[int]:
    """The start token if the tokenizer writes one before a text, else nothing."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []


def stop_ids(tokenizer: Any, model_ends: int | list[int] | None) -> set[int]:
    """The tokens at which generation stops: the tokenizer's end token, and those of a model's
    generation settings."""
    return {
        tokenizer.eos_token_id,
        *(model_ends if isinstance(model_ends, list) else [model_ends]),
    } - {None}


def ids_of(texts: str | list[str], tokenizer: Any) -> list:
    """The token ids of a text or of each of several, without special tokens."""
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids


def _ids_of_pieces(pieces: list[tuple[str, bool]], tokenizer: Any) -> list[list[int]]:
    """The token ids of texts, each with whether it follows another. Llama 2's tokenizer and others
    add a space before what they take for the start of a text, but not after a line break."""
    texts = [text for text, _ in pieces]
    plain = ids_of(texts, tokenizer)
    [first, *_] = tokenizer.convert_ids_to_tokens(ids_of("a", tokenizer)) or [""]
    if not first.startswith(("\u2581", "\u0120")):  # how tokens spell a space
        return plain
    line_break = ids_of("\n", tokenizer)
    after = ids_of([f"\n{text}" for text in texts], tokenizer)
    count = len(line_break)
    return [
        long[count:] if follows and long[:count] == line_break else ids
        for (_, follows), ids, long in zip(pieces, plain, after, strict=True)
    ]


def digest_of_parts(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
