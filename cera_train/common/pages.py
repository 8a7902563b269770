"""A report of tables and pictures in HTML, Markdown and the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cera_train.common.drawing import Picture, inline_svg, render
from cera_train.common.files import write_bytes, write_text
from cera_train.common.terminal import print_line, print_table, terminal_width
from cera_train.common.trust import clean


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[dict[str, str]]
    """Header -> cell. The lines of a cell after its first are notes."""
    caption: str
    in_terminal: bool = True


@dataclass(frozen=True)
class Page:
    title: str
    tables: list[Table]
    """Those without rows are left out."""
    pictures: list[Picture]
    commands: dict[str, str]
    """Name -> the command line that made it."""
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes report.html, which needs nothing beside it, and report.md with its pictures."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("cera_train.common"),
            autoescape=lambda name: name.endswith(".html.jinja"),
            finalize=lambda value: clean(value) if type(value) is str else value,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters |= {"svg": inline_svg, "md": escape}
        folder.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            write_bytes(folder / f"{picture.name}.png", render(picture, "png"))
        for name in ("report.md", "report.html"):
            write_text(folder / name, environment.get_template(f"{name}.jinja").render(page=self))

    def print(self, folder: Path) -> None:
        """Prints the tables, the notes and where `write` wrote the page."""
        wrap = textwrap.TextWrapper(terminal_width(), initial_indent="  - ", subsequent_indent="    ")
        for table in self.tables:
            if table.rows and table.in_terminal:
                print_rows(table.rows)
        for note in self.notes:
            print(wrap.fill(clean(note)))
        print_line("report", f" {folder / 'report.html'}, {folder / 'report.md'}")


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = clean(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]|#$~":
        text = text.replace(mark, f"\\{mark}")
    return text


def without_empty_columns(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    return [{name: row[name] for name in names} for row in rows]


def print_rows(rows: Sequence[dict[str, str]]) -> None:
    """Prints as many tables as the width needs, each with the first column."""
    from rich.cells import cell_len

    def width(column: list[str]) -> int:
        return max(cell_len(clean(line)) for text in column for line in text.split("\n"))

    first, *others = ([name.replace(", ", "\n"), *(row[name] for row in rows)] for name in rows[0])
    tables = [[first]]
    for column in others:
        if sum(map(width, [*tables[-1], column])) + 2 * len(tables[-1]) > terminal_width() and len(tables[-1]) > 1:
            tables.append([first])
        tables[-1].append(column)
    for table in tables:
        header, *lines = zip(*table, strict=True)
        print_table(header, lines, right=range(1, len(header)))
        print()
