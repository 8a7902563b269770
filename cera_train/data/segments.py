"""A row -> sequences of segments of text, some of them supervised: by templates (layout `text`), by
Alpaca's columns (`instruction`), or by the turns of a chat (chats.py). Nothing here imports
torch."""

import itertools
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from cera_train.common.errors import UserError, errors_at
from cera_train.common.settings import require
from cera_train.data.chats import chat_exchanges, uses_template
from cera_train.data.messages import TURNS
from cera_train.data.rendering import Exchange
from cera_train.data.rows import PROMPT, PlacedRow, Row, as_text, text_of
from cera_train.data.templates import Opening
from cera_train.settings.data import COLUMN_TEMPLATES, DataConfig, Layout


@dataclass
class Segment:
    """A stretch of text. An answer ends with the end token, whether it is supervised or context."""

    text: str
    is_answer: bool = False
    supervised: bool = False
    opening: Opening | None = None  # of the prompt before an answer
    left_out: bool = False
    """Whether no loss counts it, not even one on all tokens."""


Segmenter = Callable[[Row], list[list[Segment]]]
"""Makes the sequences of a row, each of segments. An empty list means that the row has no
answer."""


def answered(
    prompt: str,
    answer: str,
    supervised: bool = True,
    opening: Opening | None = None,
    left_out: bool = False,
) -> list[Segment]:
    return [Segment(prompt), Segment(answer, True, supervised, opening, left_out)]


def prompt_of(sequence: list[Segment]) -> str:
    """The text before the first supervised answer; for a document, which has no answer, its whole
    text."""
    before = itertools.takewhile(lambda segment: not segment.supervised, sequence)
    return "".join(segment.text for segment in before) or sequence[0].text


def sequences_of(
    rows: Iterable[PlacedRow], *segmenters: Segmenter
) -> Iterator[list[list[Segment]]]:
    """The sequences of each row; of a preference, those of either answer. An error starts with the
    row's place."""
    for place, row in rows:
        with errors_at(place):
            sides = [to_sequences(row) for to_sequences in segmenters]
            if len(sides) > 1:
                check_preference(*sides)
        yield from sides


def check_preference(chosen: list[list[Segment]], rejected: list[list[Segment]]) -> None:
    """Raises UserError if there is nothing to prefer."""
    for side, sequences in (("chosen", chosen), ("rejected", rejected)):
        require(bool(sequences), f"the {side} answer is empty: write one, or remove the row.")
    sides = "the chosen and the rejected answer"
    require(
        prompt_of(chosen[0]) == prompt_of(rejected[0]),
        f"{sides} follow different prompts: pair answers to one prompt.",
    )
    require(chosen != rejected, f"{sides} are equal: remove the row.")


def segmenter(config: DataConfig, tokenizer: Any) -> Segmenter:
    """The first of `segmenters`: for preferences, that of the chosen answers."""
    return segmenters(config, tokenizer)[0]


def segmenters(config: DataConfig, tokenizer: Any, asks: bool = False) -> list[Segmenter]:
    """The function from a row to its sequences; for preferences two, for the chosen and the
    rejected answer.

    Args:
        tokenizer: None: chats lack the markup of their template.
        asks: as of `chats.chat_exchanges`.
    """
    if config.layout in TURNS:
        sides = ("chosen", config.rejected) if config.is_paired else (None,)
        return [
            of_exchanges(
                partial(chat_exchanges, side=side, config=config, tokenizer=tokenizer, asks=asks)
            )
            for side in sides
        ]
    is_templated = uses_template(config, tokenizer)
    if config.layout == Layout.instruction:
        pairs = [instruction if is_templated else instruction_as_text]
    else:
        prompt, completion = templates_of(config)
        pairs = [templates(prompt, completion)]
        if config.is_paired:
            pairs.append(templates(prompt, config.rejected, "data.rejected"))
    if not is_templated:
        return [partial(plain, to_pair=to_pair) for to_pair in pairs]
    messages = DataConfig(
        layout=Layout.messages,
        path=config.title,
        chat=config.chat,
        template_settings=config.template_settings,
    )
    return [
        of_exchanges(
            partial(chat_of_pair, to_pair=to_pair, config=messages, tokenizer=tokenizer, asks=asks)
        )
        for to_pair in pairs
    ]


def of_exchanges(to_exchanges: Callable[[Row], list[list[Exchange]]]) -> Segmenter:
    """A segmenter from a function that finds the exchanges of each sequence of a row."""

    def sequences(row: Row) -> list[list[Segment]]:
        return [
            [segment for exchange in exchanges for segment in answered(*exchange)]
            for exchanges in to_exchanges(row)
        ]

    return sequences


def templates_of(config: DataConfig) -> tuple[str, str]:
    """The templates of layout text, of documents, and of computed rows."""
    if config.layout == Layout.documents:
        return "", "{text}"
    return COLUMN_TEMPLATES if config.is_computed else (config.prompt, config.completion)


# --- columns of text ------------------------------------------------------------------------------

PairReader = Callable[[Row], tuple[str, str] | None]
"""Finds the prompt and the answer of a row; None without an answer."""


def plain(row: Row, to_pair: PairReader) -> list[list[Segment]]:
    pair = to_pair(row)
    if pair is None:
        return []
    question, answer = answered(*pair)
    return [[question, answer] if question.text else [answer]]


def chat_of_pair(
    row: Row, to_pair: PairReader, config: DataConfig, tokenizer: Any, asks: bool
) -> list[list[Exchange]]:
    """A prompt and its answer as messages: the spaces that templates of text need go."""
    pair = to_pair(row)
    if pair is None:
        return []
    roles = ("user", "assistant")
    messages = [
        {"role": role, "content": text.strip()} for role, text in zip(roles, pair, strict=True)
    ]
    return chat_exchanges(row | {"messages": messages}, config, tokenizer, asks=asks)


def templates(prompt: str, completion: str, setting: str = "data.completion") -> PairReader:
    """Layout `text`: columns in templates. Without a prompt a row is a document."""
    prompt_columns = columns_of(prompt, "data.prompt")
    answer_columns = columns_of(completion, setting)
    setting_of = dict.fromkeys([*prompt_columns, *answer_columns], setting)
    setting_of |= dict.fromkeys(prompt_columns, "data.prompt")
    fix = "write one in braces, such as {answer}."
    require(bool(answer_columns), f"{setting}={completion!r} names no column: {fix}")

    def pair(row: Row) -> tuple[str, str] | None:
        values = {name: text_of(row, name, setting) for name, setting in setting_of.items()}
        if not any(values[name].strip() for name in answer_columns):
            return None
        return prompt.format_map(values), completion.format_map(values)

    return pair


def instruction(row: Row) -> tuple[str, str] | None:
    """Layout `instruction`: Alpaca's columns; `input` may be empty or missing."""
    asked = text_of(row, "instruction")
    context = as_text(row.get("input"), "column 'input'")
    answer = text_of(row, "output")
    question = f"{asked}\n{context}" if context else asked
    return (question, answer) if answer.strip() else None


def instruction_as_text(row: Row) -> tuple[str, str] | None:
    pair = instruction(row)
    if pair is None:
        return None
    question, answer = pair
    return PROMPT.format(question=question), f" {answer}"


def columns_read(config: DataConfig) -> tuple[list[str], list[str]]:
    """The columns of the question and those of the answer, for a layout without turns."""
    if config.layout == Layout.instruction:
        return ["instruction"], ["output"]
    prompt, completion = templates_of(config)
    question = list(dict.fromkeys(columns_of(prompt, "data.prompt")))
    return question, columns_of(completion, "data.completion")


def columns_of(template: str, setting: str = "template") -> list[str]:
    """The columns that a setting's template names. A template that does more is refused: `{a.b}`,
    `{a[0]}`, `{a:>9}`."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(
            f"{setting}={template!r} is malformed: {error}. Write a literal brace twice."
        ) from None
    for _, name, format_spec, conversion in fields:
        if format_spec or conversion or not re.fullmatch(r"[^\W\d][^.\[{]*", name):
            reason = f"{{{name}}} is not just the name of a column. Write a literal brace twice."
            raise UserError(f"{setting}={template!r}: {reason}")
    return [name for _, name, _, _ in fields]
