"""A row -> segments of text, some of them supervised -> token ids and loss mask.

A segment is tokenised on its own, so the boundary between prompt and completion is exact and the same at inference,
where the prompt stands alone. The end token is appended by id: it is always supervised and never taken for padding.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cera_train.config import DataConfig, Layout, LossOn, Turns

Row = dict[str, Any]


@dataclass
class Segment:
    """A stretch of text. A supervised one ends with the end token."""

    text: str
    supervised: bool


@dataclass
class Example:
    """Token ids of one row, and for each whether its prediction counts in the loss. The first is never predicted."""

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_key: str
    """A digest of the text before the first supervised token: equal prompts have equal keys."""
    truncated: bool

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
            raise ValueError(
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
        raise ValueError(f"data.completion={completion!r} names no column: write one in braces, such as {{answer}}.")

    def segments(row: Row) -> list[Segment]:
        for name in needed:
            column(row, name)
        if all(row[name] is None or not str(row[name]).strip() for name in answers):
            return []
        values = {name: "" if row[name] is None else row[name] for name in needed}
        return [Segment(prompt.format_map(values), False), Segment(completion.format_map(values), True)]

    return segments


def columns_of(template: str) -> list[str]:
    """The columns a template names.

    Raises:
        ValueError: the template is malformed, or reaches into a value (`{a.b}`, `{a[0]}`).
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed: {error}. Write a literal brace twice.") from None
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"template {template!r}: {{{name}}} is not a column name.")
    return names


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
        if role == "gpt":
            segments += [Segment(f"{context}Assistant:", False), Segment(f" {text}", True)]
            context = "\n"
        else:
            context += f"{'System' if role == 'system' else 'User'}: {text}\n"
    has_answer = any(segment.supervised and segment.text.strip() for segment in segments)
    return segments if has_answer else []


def turns_of(row: Row) -> Iterable[tuple[str, str]]:
    for turn in column(row, "conversations"):
        role, text = column(turn, "from"), column(turn, "value")
        if role not in ("system", "human", "gpt"):
            raise ValueError(f"a turn is from {role!r}: expected system, human or gpt.")
        yield role, text or ""


def chat_turns(row: Row, tokenizer: Any) -> list[Segment]:
    """Layout `messages`: the tokenizer's chat template. What an assistant turn adds to the rendered conversation so far
    is supervised, so no marker has to be searched for."""
    messages = column(row, "messages")
    segments, rendered = [], ""

    def render(count: int, add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
        )

    for index, message in enumerate(messages):
        if column(message, "role") != "assistant" or not (column(message, "content") or "").strip():
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (before.startswith(rendered) and after.startswith(before)):
            raise ValueError(
                "the chat template renders earlier turns differently once an answer follows, so answers cannot be "
                "told apart. Keep one assistant turn a row, or use data.layout=text."
            )
        segments += [Segment(before.removeprefix(rendered), False), Segment(after.removeprefix(before), True)]
        rendered = after
    return segments


def column(row: Row, name: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else f"none, but {type(row).__name__}"
        raise ValueError(f"column {name!r} is missing; the columns there are: {there}.")
    return row[name]


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode(rows_segments: Sequence[list[Segment]], config: DataConfig, tokenizer: Any) -> list[Example]:
    """Token ids and loss masks of many rows at once.

    Args:
        rows_segments: the segments of each row; none of them empty.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token: set one in its tokenizer_config.json.")
    is_chat = config.layout == Layout.messages
    # A chat template writes the start token itself.
    start = [] if is_chat or tokenizer.bos_token_id not in tokenizer("").input_ids else [tokenizer.bos_token_id]
    texts = [segment.text for segments in rows_segments for segment in segments]
    ids_of = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids if texts else [])
    special = set(tokenizer.all_special_ids)

    examples = []
    for segments in rows_segments:
        input_ids, loss_mask = list(start), [False] * len(start)
        for segment in segments:
            ids = list(next(ids_of))
            supervised = [segment.supervised] * len(ids)
            if segment.supervised:
                if not (is_chat and special.intersection(ids)):
                    ids, supervised = [*ids, end], [*supervised, True]
                # A template may write a line break after its end token: nobody generates that.
                last = max(index for index, token in enumerate(ids) if token in special)
                supervised[last + 1 :] = [False] * (len(ids) - last - 1)
            input_ids += ids
            loss_mask += supervised
        if config.loss_on == LossOn.all:
            loss_mask = [True] * len(input_ids)
        loss_mask[0] = False
        prompt = segments[0].text if not segments[0].supervised else ""
        examples.append(
            Example(
                input_ids[: config.max_length],
                loss_mask[: config.max_length],
                hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(),
                truncated=len(input_ids) > config.max_length,
            )
        )
    return examples
