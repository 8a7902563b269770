"""A question -> the token ids that the model was trained to answer: a training row without its last answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError, words_of
from cera_train.data.files import READERS, from_files
from cera_train.data.prepare import encode
from cera_train.data.rows import PROMPT, Row
from cera_train.data.segments import columns_of, segmenter, turns_of
from cera_train.settings.data import DataConfig, Layout, Turns
from cera_train.settings.serving import Template

ANSWER = "?"
"""Stands for the answer in a row. Its segment is cut off, so its text changes nothing."""

SPEAKERS = {Layout.conversations: ("human", "gpt"), Layout.messages: ("user", "assistant")}


def choose_rows(template: Template, trained_on: DataConfig | None, tokenizer: Any) -> DataConfig:
    """How a question is written for a model.

    Args:
        trained_on: the rows of its run; None where that is unknown.

    Raises:
        UserError: the template is not to be had.
    """
    if template == Template.run and trained_on is None:
        raise UserError("template=run: run= is no run's folder, so its template is unknown. Set template=chat or none.")
    if template == Template.chat and not tokenizer.chat_template:
        raise UserError(f"template=chat: {tokenizer.name_or_path} has no chat template. Set template=run or none.")
    if template in (Template.auto, Template.run) and trained_on is not None:
        _, first = next(trained_on.parts())
        return first
    if template != Template.none and tokenizer.chat_template:
        return DataConfig(layout=Layout.messages, path="a chat")
    return DataConfig(layout=Layout.text, path="a text", prompt="{text}", completion="{answer}")


class Prompts:
    """Writes questions as the rows of a data set."""

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self.data, self.tokenizer = replace(data, max_length=sys.maxsize), tokenizer
        self._segments = segmenter(data, tokenizer)

    @property
    def keeps_turns(self) -> bool:
        """Whether a question is read together with the turns before it."""
        return self.data.layout == Layout.messages or (
            self.data.layout == Layout.conversations and self.data.turns == Turns.all
        )

    def row(self, turns: Sequence[str]) -> Row:
        """The row of a conversation: question, answer, question, ..., ending in a question.

        Raises:
            UserError: the template has more columns than one text can fill.
        """
        question, layout = turns[-1], self.data.layout
        if self.data.is_computed:
            return {"prompt": PROMPT.format(question=question)}
        if layout == Layout.text:
            columns = list(dict.fromkeys(columns_of(self.data.prompt, "data.prompt")))
            if len(columns) != 1:
                raise UserError(
                    f"data.prompt={self.data.prompt!r} of this run has {len(columns)} columns, and a text fills one: "
                    "write prompts=FILE.jsonl with these columns, or set template=none."
                )
            return {columns[0]: question}
        role, text = ("from", "value") if layout == Layout.conversations else ("role", "content")
        speakers = SPEAKERS[layout]
        kept = turns if self.keeps_turns else [question]
        return {str(layout): [{role: speakers[index % 2], text: turn} for index, turn in enumerate(kept)]}

    def ids(self, row: Row) -> list[int]:
        """The token ids of a row's prompt.

        Raises:
            UserError: the row lacks a column, or is not one of this layout.
        """
        *prompt, _ = self._segments(self._answered(row))
        return encode([prompt], self.data, self.tokenizer)[0].input_ids

    def _answered(self, row: Row) -> Row:
        """The row with an answer at its end."""
        layout = self.data.layout
        if layout == Layout.text:
            return row | dict.fromkeys(columns_of(self.data.completion), ANSWER)
        if self.data.is_computed:
            return row | {"completion": ANSWER}
        role, text = ("from", "value") if layout == Layout.conversations else ("role", "content")
        return row | {str(layout): [*turns_of(row, str(layout)), {role: SPEAKERS[layout][1], text: ANSWER}]}


def read_prompts(file: str, prompts: Prompts) -> Iterator[tuple[str, Row]]:
    """The questions of a file, each after its place: rows of a data set, or lines of text.

    Raises:
        UserError: the file cannot be read.
    """
    if Path(file).suffix.lower() in READERS.keys() - {".txt"}:
        yield from from_files([file], "prompts").located()
        return
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file}: cannot read it: {words_of(error)}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file}:{number}", prompts.row([line])
