"""What the rows of a run ask: those held out, and those of an epoch of training. Nothing here
imports torch."""

import itertools
from collections.abc import Iterator
from typing import Any

from cera_train.common.errors import errors_at
from cera_train.common.settings import require
from cera_train.data.reader import Question, Reader
from cera_train.data.sources import drawn_of_parts, interleaved, open_sources
from cera_train.settings.data import DataConfig


def held_out_questions(config: DataConfig, tokenizer: Any) -> list[Iterator[Question]]:
    """The first question of each held-out row, for each part of a mix."""
    return [_first_questions(part, tokenizer) for _, part in config.parts()]


def _first_questions(config: DataConfig, tokenizer: Any) -> Iterator[Question]:
    reader = Reader(config, tokenizer)
    _, source = open_sources(config)
    for place, row in source.located():
        yield from reader.questions(place, row)[:1]


def training_questions(config: DataConfig, tokenizer: Any) -> list[Question]:
    """Every question of an epoch's rows, except those longer than max_length."""
    parts = []
    for place, part in config.parts():
        with errors_at(place):
            reader = Reader(part, tokenizer)
            source, _ = open_sources(part)
            longest = part.max_length
            rows = []
            for each in source.located():
                questions = reader.questions(*each)
                rows.append([asked for asked in questions if len(asked.prompt_ids) <= longest])
            parts.append([*filter(None, rows)])
            fix = "raise data.max_length."
            require(bool(parts[-1]), f"{source.name}: no prompt fits data.max_length: {fix}")
    if config.mix is None:
        return [*itertools.chain.from_iterable(parts[0])]
    return interleaved(drawn_of_parts(parts, config))
