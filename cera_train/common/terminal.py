"""What every command prints: labelled lines, aligned tables, quantities, and a progress bar that
becomes plain lines in a log. Colours and a live bar appear in a terminal only."""

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cera_train.common.trust import clean

PIPE_WIDTH = 10_000  # columns of output that is not a terminal: nothing wraps, since its reader can
TEXT_WIDTH = 100  # columns of running text in output that is not a terminal
LABEL_WIDTH = 11  # columns of a label and the space after it
FIELD_WIDTH = 16  # the same where a command has ended
BAR_WIDTH = 16  # columns: its text fits beside it in 80
LINE_SECONDS = 60.0  # a log gets a line of progress at least so often
PLAIN_LINES = 10  # a log gets at least so many lines of progress, however short the run


def console(wraps: bool = True) -> Console:
    """A console for one print: it uses the current stdout, which tests and pipes replace."""
    width = None if wraps and sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


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
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int] = (),
    colors: Mapping[str, str] | None = None,
) -> None:
    """Prints aligned columns, without a header if all names are empty. Cells may have several
    lines; nothing is wrapped.

    Args:
        right: columns aligned to the right.
        colors: the text of a cell -> its colour in a terminal.
    """
    colors = colors or {}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(
            Text(clean(name)), justify="right" if index in right else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(clean(cell), colors.get(cell, "")) for cell in row))
    target = console(wraps=False)  # which would cut cells that a terminal is too narrow for
    with target.capture() as capture:
        target.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def terminal_width() -> int:
    """Columns for running text."""
    return shutil.get_terminal_size((TEXT_WIDTH, 24)).columns if sys.stdout.isatty() else TEXT_WIDTH


class ProgressBar:
    """A bar in a terminal; elsewhere a line a minute, and one after each tenth of the work."""

    def __init__(self, unit: str, total: int, done: int, visible: bool = True) -> None:
        self.unit = unit
        self.total = total
        self.done = done
        self.visible = visible
        self._every = max(1, total // PLAIN_LINES)
        self._printed = time.monotonic()
        self._announced: set[str] = set()
        self._bar: Progress | None = None
        target = console()
        if visible and sys.stdout.isatty() and not target.is_dumb_terminal:
            columns = (MofNCompleteColumn(), BarColumn(BAR_WIDTH), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=target, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def step(self, text: str, count: int = 1) -> None:
        """Counts finished units, and shows a text about them."""
        is_tenth = (
            self.done // self._every < (self.done + count) // self._every
            or self.done + count == self.total
        )
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=text)
        elif self.visible and (is_tenth or time.monotonic() - self._printed >= LINE_SECONDS):
            self._printed = time.monotonic()
            print(
                f"{self.unit} {self.done:>{len(str(self.total))}}/{self.total}  {text}", flush=True
            )

    @contextlib.contextmanager
    def doing(self, work: str) -> Iterator[None]:
        """Shows other work than the units. A log gets a line the first time."""
        if self._bar is not None:
            self._bar.update(self._task, description=work)
        elif self.visible and work not in self._announced:
            print_line("now", work)
        self._announced.add(work)
        yield
        if self._bar is not None:
            self._bar.update(self._task, description="")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(clean(text))
        elif self.visible:
            print(clean(text), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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
