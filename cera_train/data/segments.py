"""A row -> segments of text, some of them supervised: by templates (layout `text`), by Alpaca's
columns (`instruction`), or by the turns of a chat (chats.py). Nothing here imports torch."""

import itertools
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from cera_train.common.errors import UserError, errors_at
from cera_train.common.settings import require
from cera_train.data.chats import Exchange, chat, conversation, preference
from cera_train.data.rows import PROMPT, PlacedRow, Row, as_text, text_of
from cera_train.settings.data import COLUMN_TEMPLATES, DataConfig, Layout


@dataclass
class Segment:
    """A stretch of text. An answer ends with the end token, whether it is supervised or context."""

    text: str
    is_answer: bool = False
    supervised: bool = False


Segmenter = Callable[[Row], list[Segment]]
"""Makes the segments of a row. An empty list means that the row has no answer."""


def answered(prompt: str, answer: str, supervised: bool = True) -> list[Segment]:
    return [Segment(prompt), Segment(answer, True, supervised)]


def prompt_of(segments: list[Segment]) -> str:
    """The text before the first supervised answer; for a document, which has no answer, its whole
    text."""
    before = itertools.takewhile(lambda segment: not segment.supervised, segments)
    return "".join(segment.text for segment in before) or segments[0].text


def segments_of(rows: Iterable[PlacedRow], *segmenters: Segmenter) -> Iterator[list[Segment]]:
    """The segments of each row; of a preference, those of both answers. An error starts with the
    row's place."""
    for place, row in rows:
        with errors_at(place):
            answers = [to_segments(row) for to_segments in segmenters]
            if len(answers) > 1:
                check_preference(*answers)
        yield from answers


def check_preference(chosen: list[Segment], rejected: list[Segment]) -> None:
    """Raises UserError if there is nothing to prefer."""
    for side, segments in (("chosen", chosen), ("rejected", rejected)):
        require(bool(segments), f"the {side} answer is empty: write one, or remove the row.")
    sides = "the chosen and the rejected answer"
    require(
        prompt_of(chosen) == prompt_of(rejected),
        f"{sides} follow different prompts: pair answers to one prompt.",
    )
    require(chosen != rejected, f"{sides} are equal: remove the row.")


def segmenter(config: DataConfig, tokenizer: Any) -> Segmenter:
    """The first of `segmenters`: for preferences, that of the chosen answers."""
    return segmenters(config, tokenizer)[0]


def segmenters(config: DataConfig, tokenizer: Any) -> list[Segmenter]:
    """The function from a row to its segments; for preferences two, for the chosen and the rejected
    answer. Without a tokenizer, chats lack chat markup."""
    match config.layout:
        case Layout.instruction:
            return [instruction]
        case Layout.conversations:
            return [of_exchanges(partial(conversation, wanted=config.turns))]
        case Layout.messages:
            require(
                tokenizer is None or bool(tokenizer.chat_template),
                "data.layout=messages needs a tokenizer with a chat template, and this model's has "
                "none: use an instruction-tuned model, or data.layout=text.",
            )
            if not config.is_paired:
                return [of_exchanges(partial(chat, wanted=config.turns, tokenizer=tokenizer))]
            sides = ("chosen", config.rejected)
            return [
                of_exchanges(partial(preference, side=side, tokenizer=tokenizer)) for side in sides
            ]
    prompt, completion = templates_of(config)
    if not config.is_paired:
        return [templates(prompt, completion)]
    return [
        templates(prompt, completion),
        templates(prompt, config.rejected, "data.rejected"),
    ]


def of_exchanges(to_exchanges: Callable[[Row], list[Exchange]]) -> Segmenter:
    """A segmenter from a function that finds the exchanges of a row."""

    def segments(row: Row) -> list[Segment]:
        return [segment for exchange in to_exchanges(row) for segment in answered(*exchange)]

    return segments


def templates_of(config: DataConfig) -> tuple[str, str]:
    """The templates of layout text, of documents, and of computed rows."""
    if config.layout == Layout.documents:
        return "", "{text}"
    return COLUMN_TEMPLATES if config.is_computed else (config.prompt, config.completion)


# --- columns of text ------------------------------------------------------------------------------


def templates(prompt: str, completion: str, setting: str = "data.completion") -> Segmenter:
    """Layout `text`: columns in templates. Without a prompt a row is a document."""
    prompt_columns = columns_of(prompt, "data.prompt")
    answer_columns = columns_of(completion, setting)
    setting_of = dict.fromkeys([*prompt_columns, *answer_columns], setting)
    setting_of |= dict.fromkeys(prompt_columns, "data.prompt")
    fix = "write one in braces, such as {answer}."
    require(bool(answer_columns), f"{setting}={completion!r} names no column: {fix}")

    def segments(row: Row) -> list[Segment]:
        values = {name: text_of(row, name, setting) for name, setting in setting_of.items()}
        if not any(values[name].strip() for name in answer_columns):
            return []
        question, answer = answered(prompt.format_map(values), completion.format_map(values))
        return [question, answer] if prompt else [answer]

    return segments


def instruction(row: Row) -> list[Segment]:
    """Layout `instruction`: Alpaca's columns; `input` may be empty or missing."""
    asked = text_of(row, "instruction")
    context = as_text(row.get("input"), "column 'input'")
    answer = text_of(row, "output")
    question = f"{asked}\n{context}" if context else asked
    return answered(PROMPT.format(question=question), f" {answer}") if answer.strip() else []


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
