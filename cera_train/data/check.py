"""A quick look at a run's data, before anything heavy is imported: most mistakes show in the first rows. Nothing here
imports torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from cera_train.common.errors import UserError
from cera_train.data.chat import messages_of
from cera_train.data.config import DataConfig, Layout
from cera_train.data.files import check_files, name_of, rows_of
from cera_train.data.format import segmenter
from cera_train.data.rows import Row, place_of

ROWS = 200
"""Rows of each file that are looked at."""

WHOLE_BYTES = 10_000_000
"""Files of kinds that are read as a whole are looked at up to this size."""


def check_data(config: DataConfig) -> None:
    """Looks at the files of a config and at their first rows. The tokenizer's chat template is not needed for that.

    Raises:
        UserError: a file or one of these rows is not usable.
    """
    splits = {"data.train_files": config.train_files, "data.eval_files": config.eval_files}
    files = {setting: check_files(names, setting) for setting, names in splits.items()}
    read_row = messages_of if config.layout == Layout.messages else segmenter(config, None)
    for setting, paths in files.items():
        for path in paths:
            if path.suffix.lower() == ".jsonl" or path.stat().st_size < WHOLE_BYTES:
                read_rows(itertools.islice(rows_of([path]), ROWS), read_row, name_of([path], setting))


def read_rows(rows: Iterable[Row], read_row: Callable[[Row], list], name: str, first: int = 1) -> list[list]:
    """What `read_row` makes of each row.

    Args:
        name: of the rows, for a row that does not know its place.
        first: the number of the first of these rows.

    Raises:
        UserError: a row is not usable; the message starts with its place.
    """
    made = []
    for number, row in enumerate(rows, start=first):
        try:
            made.append(read_row(row))
        except UserError as error:
            raise UserError(f"{place_of(row, f'{name}, row {number}')}: {error}") from error
    return made
