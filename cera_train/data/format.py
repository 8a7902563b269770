"""A row -> segments of text, some of them supervised -> token ids and loss mask.

Each segment is tokenised separately, so the boundary between prompt and completion is exact, and the same at inference,
where the prompt stands alone. The end token is appended by id: it is always supervised and never taken for padding.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cera_train.common.errors import UserError
from cera_train.data.chat import all_turns, bare_turns, chat_turns, first_turns, layout_of
from cera_train.data.config import DataConfig, Layout, LossOn, Turns
from cera_train.data.rows import Row, Segment, at, text_of

Segmenter = Callable[[Row], list[Segment]]
"""Makes the segments of a row. An empty list means that the row has no answer."""


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

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        return sum(self.loss_mask)


def segments_of(rows: Iterable[tuple[str, Row]], to_segments: Segmenter) -> Iterator[list[Segment]]:
    """The segments of each of some `located` rows; an error starts with the row's place."""
    for place, row in rows:
        with at(place):
            segments = to_segments(row)
        yield segments


def segmenter(config: DataConfig, tokenizer: Any) -> Segmenter:
    """The function from a row to its segments. Without a tokenizer, chats lack the marks of a chat template."""
    match config.layout:
        case Layout.conversations:
            return first_turns if config.turns == Turns.first else all_turns
        case Layout.messages if tokenizer is None:
            return bare_turns
        case Layout.messages:
            if not tokenizer.chat_template:
                raise UserError(
                    "data.layout=messages needs a tokenizer with a chat template, and this model's has none: use an "
                    "instruction-tuned model, or data.layout=text."
                )
            return partial(chat_turns, tokenizer=tokenizer)
        case Layout.logistic_map:
            return templates("{prompt}", "{completion}")
    return templates(config.prompt, config.completion)


def templates(prompt: str, completion: str) -> Segmenter:
    """Layout `text`: columns in templates."""
    asked, answers = columns_of(prompt, "data.prompt"), columns_of(completion, "data.completion")
    setting_of = dict.fromkeys([*asked, *answers], "data.completion") | dict.fromkeys(asked, "data.prompt")
    if not answers:
        raise UserError(f"data.completion={completion!r} names no column: write one in braces, such as {{answer}}.")

    def segments(row: Row) -> list[Segment]:
        mend = layout_of(row) or "Set data.prompt and data.completion."
        values = {name: text_of(row, name, setting, mend) for name, setting in setting_of.items()}
        if not any(values[name].strip() for name in answers):
            return []
        return [Segment(prompt.format_map(values), False), Segment(completion.format_map(values), True)]

    return segments


def columns_of(template: str, setting: str = "template") -> list[str]:
    """The columns that the template of a setting names. One that does more is refused: `{a.b}`, `{a[0]}`, `{a:>9}`."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{setting}={template!r} is malformed: {error}. Write a literal brace twice.") from None
    for _, name, format_spec, conversion in fields:
        if format_spec or conversion or not re.fullmatch(r"[^\W\d][^.\[{]*", name):
            raise UserError(
                f"{setting}={template!r}: {{{name}}} is not just the name of a column. Write a literal brace twice."
            )
    return [name for _, name, _, _ in fields]


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
        raise UserError(
            f"model.path={tokenizer.name_or_path}: the tokenizer has no end-of-text token: set eos_token in its "
            "tokenizer_config.json."
        )
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
