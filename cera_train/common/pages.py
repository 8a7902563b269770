"""Pages of tables and pictures, in HTML, Markdown and the terminal. templates/ has the style of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cera_train.common.drawing import color_name, inline_svg
from cera_train.common.terminal import print_table, terminal_width
from cera_train.common.trust import clean


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[dict[str, str]]
    """Header -> cell. The lines of a cell after its first are notes."""
    caption: str


def without_empty_columns(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    return [{name: row[name] for name in names} for row in rows]


def template(package: str, name: str, **filters: Callable[[Any], Any]) -> Any:
    """The template NAME.jinja of a package's folder `templates`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(place) for place in (package, "cera_train.common")]),
        autoescape=name.endswith(".html"),
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"svg": inline_svg, "color": color_name} | filters
    return environment.get_template(f"{name}.jinja")


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
