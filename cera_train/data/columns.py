"""A row -> its prompt and its answer: by templates of columns (layout `text`), or by Alpaca's
columns (`instruction`). Nothing here imports torch."""

import functools
import re
import string
from collections.abc import Callable

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import PROMPT, Row, as_text, text_of
from cera_train.settings.data import COLUMN_TEMPLATES, DataConfig, Layout

PairReader = Callable[[Row], tuple[str, str] | None]
"""Finds the prompt and the answer of a row; None without an answer."""


def pair_readers(config: DataConfig, is_templated: bool) -> list[PairReader]:
    """What reads the rows of a layout without turns; of preferences the chosen and the rejected
    answer.

    Args:
        is_templated: a chat template marks the prompt, instead of words around it.
    """
    if config.layout == Layout.instruction:
        return [instruction if is_templated else instruction_as_text]
    prompt, completion = templates_of(config)
    readers = [templates(prompt, completion)]
    if config.is_paired:
        readers.append(templates(prompt, config.rejected, "data.rejected"))
    return readers


def templates_of(config: DataConfig) -> tuple[str, str]:
    """The templates of layout text, of documents, and of computed rows."""
    if config.layout == Layout.documents:
        return "", "{text}"
    return COLUMN_TEMPLATES if config.is_computed else (config.prompt, config.completion)


@functools.lru_cache
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
