"""A report of tables and pictures in HTML, Markdown and the terminal. The HTML is
self-contained."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cera_train.common.files import write_bytes, write_text
from cera_train.common.terminal import print_line, print_table, terminal_width
from cera_train.common.trust import clean
from cera_train.report.forest import Forest
from cera_train.report.pictures import Picture
from cera_train.report.template import load_template


@dataclass
class Table:
    title: str
    rows: list[dict[str, str]]
    """Header -> cell. The lines of a cell after its first are notes. Columns without any text are
    left out."""
    caption: str

    def __post_init__(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name, cell in row.items() if cell)
        self.rows = [{name: row.get(name, "") for name in names} for row in self.rows]


@dataclass(frozen=True)
class Page:
    title: str
    tables: list[Table]  # tables without rows are not shown
    pictures: list[Picture]
    commands: dict[str, str]  # name -> the command line that made it
    notes: list[str] = field(default_factory=list)
    verdicts: Forest | None = None  # the page opens with them
    spectra: list[Picture] = field(default_factory=list)  # folded away

    def write(self, folder: Path) -> None:
        """Writes report.html, and report.md with its pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.verdicts:
            write_text(folder / f"{self.verdicts.name}.svg", self.verdicts.svg)
        images = {}
        for picture in [*self.pictures, *self.spectra]:
            write_bytes(folder / f"{picture.name}.png", picture.png)
            images[picture.name] = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        for name in ("report.md", "report.html"):
            write_text(folder / name, load_template(name).render(page=self, images=images))

    def print(self, folder: Path) -> None:
        """Prints the tables, the notes and where `write` wrote the page."""
        for table in self.tables:
            if table.rows:
                print_rows(table.rows)
        for note in self.notes:
            print(f"  - {clean(note)}")
        print_line("report", f" {folder / 'report.html'}, report.md")


def print_rows(rows: Sequence[dict[str, str]]) -> None:
    """Prints as many tables as the width needs, each with the first column."""

    def width(column: list[str]) -> int:
        return max(len(clean(line)) for text in column for line in text.split("\n"))

    columns = [[name.replace(", ", "\n"), *(row[name] for row in rows)] for name in rows[0]]
    first = columns[0]
    tables = [[first]]
    for column in columns[1:]:
        table = tables[-1]
        needed = sum(map(width, [*table, column])) + 2 * len(table)
        if needed > terminal_width() and len(table) > 1:
            table = [first]
            tables.append(table)
        table.append(column)
    for table in tables:
        header, *lines = zip(*table, strict=True)
        print_table(header, lines, right=range(1, len(header)))
        print()
