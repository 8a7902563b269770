"""What a user writes -> the row that asks it: a text, or the turns of a conversation, becomes a
training row without its last answer. Nothing here imports torch."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cera_train.common.settings import require
from cera_train.data.chats import columns_read
from cera_train.data.messages import TURNS
from cera_train.data.rows import PROMPT, Row
from cera_train.settings.data import DataConfig, Layout

PLAIN = DataConfig(layout=Layout.text, path="a text", prompt="{text}", completion="{answer}")
"""A text as it is: also the question to a model that was trained on documents."""


def choose_rows(
    trained_on: DataConfig | None, tokenizer: Any, settings: dict[str, Any]
) -> DataConfig:
    """The rows as which questions are written: those of the run; where these are unknown, messages
    if the tokenizer has a chat template, else text as it is.

    Args:
        settings: of the chat template, which win over those of the run.
    """
    if trained_on is not None:
        _, rows = next(trained_on.trained_parts())
        if not rows.asks:
            return PLAIN
        settings = rows.template_settings | settings
        return replace(rows, rejected=None, template_settings=settings)
    if tokenizer.chat_template:
        return DataConfig(layout=Layout.messages, path="a chat", template_settings=settings)
    return PLAIN


def row_of_turns(turns: Sequence[str], data: DataConfig) -> Row:
    """The row of a conversation: question, answer, question, ..., ending in a question. Raises
    UserError where the template has more columns than one text can fill."""
    if data.layout in TURNS:
        speaker, text, speakers = TURNS[data.layout]
        pairs = zip(itertools.cycle(speakers[:2]), turns, strict=False)
        return {str(data.layout): [{speaker: name, text: turn} for name, turn in pairs]}
    columns, _ = columns_read(data)
    require(
        len(columns) == 1,
        f"data.prompt={data.prompt!r} of this run has {len(columns)} columns, and a text fills "
        "one: write rows with these columns for cera-eval task=jsonl.",
    )
    return {columns[0]: PROMPT.format(question=turns[-1]) if data.is_computed else turns[-1]}
