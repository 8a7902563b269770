"""What every command prints: labelled lines, aligned tables, quantities, and a line of progress
that becomes several in a log."""

import itertools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TextIO

from cera_train.common.trust import clean

TEXT_WIDTH = 100  # columns of running text in output that is not a terminal
LABEL_WIDTH = 11  # columns of a label and the space after it
FIELD_WIDTH = 16  # the same where a command has ended
CLEAR = "\r\x1b[K"  # empties a terminal's line
LINE_SECONDS = 60.0  # a log gets a line of progress at least so often
PLAIN_LINES = 10  # a log gets at least so many lines of progress, however short the run


def print_line(label: str, text: str, file: TextIO | None = None) -> None:
    """Prints one labelled line in a single write, so that lines of parallel jobs do not mix."""
    print(f"{label:<{LABEL_WIDTH}}{clean(text)}\n", end="", file=file, flush=True)


def print_command(label: str, words: Iterable[str]) -> None:
    """Prints a labelled command as a shell takes it, never wrapped: people copy it."""
    print(f"{label:<{LABEL_WIDTH}}{clean(shlex.join(words))}", flush=True)


def announce(label: str, text: str) -> None:
    """Prints one labelled line about slow work to stderr: stdout is for results."""
    print_line(label, text, sys.stderr)


def announce_import(libraries: str) -> None:
    """Prints a line before torch and libraries on it are imported, which takes seconds."""
    if "torch" not in sys.modules:
        announce("loading", libraries)


def print_fields(fields: Mapping[str, str]) -> None:
    """A label and a value on each line, values aligned."""
    width = max([FIELD_WIDTH, *(len(label) + 2 for label in fields)])
    for label, value in fields.items():
        print(clean(f"{label:<{width}}{value}"), flush=True)


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()
) -> None:
    """Prints aligned columns, without a header if all names are empty. Cells may have several
    lines; nothing is wrapped.

    Args:
        right: columns aligned to the right.
    """
    lines: list[Sequence[str]] = []
    for row in (header, *rows):
        cells = (clean(cell).split("\n") for cell in row)
        lines += itertools.zip_longest(*cells, fillvalue="")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first = 0 if any(header) else 1
    for line in lines[first:]:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def terminal_width() -> int:
    """Columns for running text."""
    return shutil.get_terminal_size((TEXT_WIDTH, 24)).columns if sys.stdout.isatty() else TEXT_WIDTH


class ProgressBar:
    """A line that changes in a terminal; elsewhere a line a minute, and one after each tenth of the
    work."""

    def __init__(self, unit: str, total: int, done: int, visible: bool = True) -> None:
        self.unit = unit
        self.total = total
        self.done = done
        self.visible = visible
        is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._is_live = visible and is_terminal
        self._every = max(1, total // PLAIN_LINES)
        self._printed = time.monotonic()
        self._announced: set[str] = set()

    def step(self, text: str, count: int = 1) -> None:
        """Counts finished units, and shows a text about them."""
        is_tenth = (
            self.done // self._every < (self.done + count) // self._every
            or self.done + count == self.total
        )
        self.done += count
        line = f"{self.unit} {self.done:>{len(str(self.total))}}/{self.total}  {text}"
        if self._is_live:
            self._show(line)
        elif self.visible and (is_tenth or time.monotonic() - self._printed >= LINE_SECONDS):
            self._printed = time.monotonic()
            print(line, flush=True)

    def _show(self, line: str) -> None:
        """Replaces the line that the cursor is in."""
        print(f"{CLEAR}{line[: terminal_width() - 1]}", end="\r", flush=True)

    def show_work(self, work: str) -> None:
        """Shows other work than the units, until their next step. A log gets a line the first
        time."""
        if self._is_live:
            self._show(work)
        elif self.visible and work not in self._announced:
            print_line("now", work)
        self._announced.add(work)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.visible:
            print(f"{CLEAR if self._is_live else ''}{clean(text)}", flush=True)

    def close(self) -> None:
        if self._is_live:
            self._show("")


def time_left(seconds: float) -> str:
    """The end of a line of progress; empty at the last, where other work may follow."""
    return f"  {duration(seconds)} left" if seconds else ""


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 job, 0 jobs."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def gigabytes(size: float, decimals: int = 1) -> str:
    """Gigabytes of 10^9 bytes."""
    return f"{size / 1e9:,.{decimals}f} GB"
