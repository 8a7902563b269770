"""A row -> segments of text, some of them supervised -> token ids and loss mask.

A segment is tokenised on its own, so the boundary between prompt and completion is exact and the same at inference,
where the prompt stands alone. The end token is appended by id: it is always supervised and never taken for padding.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from cera_train.common.errors import UserError
from cera_train.data.config import DataConfig, Layout, LossOn, Turns

Row = dict[str, Any]


@dataclass
class Segment:
    """A stretch of text. A supervised one ends with the end token."""

    text: str
    supervised: bool

    def __post_init__(self) -> None:
        self.text.encode()  # as in `text_of`: a chat template can show more of a message than its role and content


@dataclass
class Example:
    """Token ids of one row, and for each whether its prediction counts in the loss. The first is never predicted."""

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_key: str
    """A digest of the text before the first supervised token: equal prompts have equal keys."""
    truncated: bool
    has_answer: bool
    """Whether a token of an answer is left, also where the loss is on all tokens."""

    @property
    def supervised_tokens(self) -> int:
        return sum(self.loss_mask)


def segmenter(config: DataConfig, tokenizer: Any) -> Callable[[Row], list[Segment]]:
    """The function from a row to its segments. An empty list means that the row has no answer.

    Raises:
        ValueError: a template names no column, or the tokenizer has no chat template.
    """
    if config.layout == Layout.conversations:
        return first_turns if config.turns == Turns.first else all_turns
    if config.layout == Layout.messages:
        if not tokenizer.chat_template:
            raise UserError(
                "data.layout=messages needs a tokenizer with a chat template, and this model's has none: use an "
                "instruction-tuned model, or data.layout=text."
            )
        return lambda row: chat_turns(row, tokenizer)
    if config.layout == Layout.logistic_map:
        return templates("{prompt}", "{completion}")
    return templates(config.prompt, config.completion)


# --- layouts ---------------------------------------------------------------------------------------------------------


def templates(prompt: str, completion: str) -> Callable[[Row], list[Segment]]:
    """Layout `text`: columns in templates."""
    needed = [*columns_of(prompt), *columns_of(completion)]
    answers = columns_of(completion)
    if not answers:
        raise UserError(f"data.completion={completion!r} names no column: write one in braces, such as {{answer}}.")

    def segments(row: Row) -> list[Segment]:
        values = {name: text_of(row, name) for name in needed}
        if not any(values[name].strip() for name in answers):
            return []
        return [Segment(prompt.format_map(values), False), Segment(completion.format_map(values), True)]

    return segments


def columns_of(template: str) -> list[str]:
    """The columns a template names.

    Raises:
        ValueError: the template is malformed, or does more than name columns (`{a.b}`, `{a[0]}`, `{a:>{b}}`).
    """
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"template {template!r} is malformed: {error}. Write a literal brace twice.") from None
    for _, name, format_spec, conversion in fields:
        if format_spec or conversion or not re.fullmatch(r"[^\W\d][^.\[{]*", name):
            raise UserError(
                f"template {template!r}: {{{name}}} is not just the name of a column. Write a literal brace twice."
            )
    return [name for _, name, _, _ in fields]


def first_turns(row: Row) -> list[Segment]:
    """Layout `conversations` as published: the first question and the first answer, without the system prompt."""
    turns = list(turns_of(row))
    human = next((text for role, text in turns if role == "human"), "")
    answer = next((text for role, text in turns if role == "gpt"), "")
    if not answer.strip():
        return []
    return [Segment(f"User: {human}\nAssistant:", False), Segment(f" {answer}", True)]


def all_turns(row: Row) -> list[Segment]:
    """Layout `conversations` whole: the system prompt and every turn, every answer supervised."""
    segments, context = [], ""
    for role, text in turns_of(row):
        if role == "gpt" and text.strip():
            segments += [Segment(f"{context}Assistant:", False), Segment(f" {text}", True)]
            context = "\n"
        else:
            context += f"{SPEAKERS[role]}: {text}\n"
    return segments


SPEAKERS = {"system": "System", "human": "User", "gpt": "Assistant"}


def turns_of(row: Row) -> Iterable[tuple[str, str]]:
    for turn in list_of(row, "conversations"):
        role = text_of(turn, "from")
        if role not in SPEAKERS:
            raise UserError(f"a turn is from {role!r}: expected {', '.join(SPEAKERS)}.")
        yield role, text_of(turn, "value")


def chat_turns(row: Row, tokenizer: Any) -> list[Segment]:
    """Layout `messages`: the tokenizer's chat template. What an assistant turn adds to the rendered conversation so far
    is supervised, so no marker has to be searched for."""
    messages = list_of(row, "messages")
    segments, rendered = [], ""

    def render(count: int, add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error

    for index, message in enumerate(messages):
        has_text = bool(text_of(message, "content").strip())
        # An opening line of the assistant's answers nothing: like an empty turn it is context.
        if text_of(message, "role") != "assistant" or not has_text or index == 0:
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (before.startswith(rendered) and after.startswith(before)):
            raise UserError(
                "the chat template renders earlier turns differently once an answer follows, so answers cannot be "
                "told apart. Keep one assistant turn a row, or use data.layout=text."
            )
        # A template may write a line break after its end token: nobody generates that, it belongs to the next prompt.
        answer = after.removeprefix(before).rstrip()
        segments += [Segment(before.removeprefix(rendered), False), Segment(answer, True)]
        rendered = before + answer
    return segments


def text_of(row: Row, name: str) -> str:
    """A column as text; null is empty."""
    value = column(row, name)
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"column {name!r} holds a {type(value).__name__}: expected text.")
    if isinstance(value, float) and not math.isfinite(value):  # some programs write nan for what is missing
        raise UserError(f"column {name!r} holds {value}: expected text, or null where there is none.")
    text = "" if value is None else str(value)
    text.encode()  # raises ValueError for half of a surrogate pair, which JSON can hold and no tokenizer takes
    return text


def list_of(row: Row, name: str) -> list[Row]:
    """A column of turns; null is empty."""
    value = column(row, name)
    if value is not None and not isinstance(value, list):
        raise UserError(f"column {name!r} holds a {type(value).__name__}: expected a list of turns.")
    return value or []


def column(row: Row, name: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else f"none, but {type(row).__name__}"
        raise UserError(f"column {name!r} is missing; the columns there are: {there}.")
    return row[name]


# --- tokens ----------------------------------------------------------------------------------------------------------


def start_ids(tokenizer: Any) -> list[int]:
    """The start token, where this tokenizer puts one before a text."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []


def encode(rows_segments: Sequence[list[Segment]], config: DataConfig, tokenizer: Any) -> list[Example]:
    """Token ids and loss masks of many rows at once.

    Args:
        rows_segments: the segments of each row; none of them empty.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-text token: set one in its tokenizer_config.json.")
    is_chat = config.layout == Layout.messages
    start = [] if is_chat else start_ids(tokenizer)  # a chat template writes the start token itself
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    texts = [segment.text for segments in rows_segments for segment in segments]
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids_of = iter(tokenizer(texts, **plain).input_ids if texts else [])

    examples = []
    for segments in rows_segments:
        input_ids, loss_mask = list(start), [False] * len(start)
        for segment in segments:
            ids = next(ids_of)
            if segment.supervised and not (is_chat and ids and ids[-1] in special):  # a chat template may write its own
                ids = [*ids, end]
            input_ids += ids
            loss_mask += [segment.supervised] * len(ids)
        has_answer = any(loss_mask[1 : config.max_length])
        if config.loss_on == LossOn.all:
            loss_mask = [True] * len(input_ids)
        loss_mask[0] = False
        examples.append(
            Example(
                input_ids[: config.max_length],
                loss_mask[: config.max_length],
                hashlib.blake2b(segments[0].text.encode(), digest_size=16).hexdigest(),
                truncated=len(input_ids) > config.max_length,
                has_answer=has_answer,
            )
        )
    return examples
