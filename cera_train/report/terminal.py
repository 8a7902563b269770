"""A table in the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence

from cera_train.words import clean

PIPE_WIDTH = 100
"""Columns of an output that is not a terminal."""


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> None:
    """Prints aligned columns, whose cells may have several lines; none is wrapped.

    Args:
        right: the columns that are aligned to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(header):
        table.add_column(Text(clean(heading)), justify="right" if index in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def terminal_width() -> int:
    return shutil.get_terminal_size((PIPE_WIDTH, 24)).columns if sys.stdout.isatty() else PIPE_WIDTH
