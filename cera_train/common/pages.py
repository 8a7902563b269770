"""A report of tables and pictures in HTML, Markdown and the terminal. Pictures are PNG files, and SVG inside the page,
where they follow the reader's light or dark. Methods differ in colour (Okabe and Ito's palette, for colour-blind
readers) and marker, runs of a method in marker and dash."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cera_train.common.files import write_bytes, write_text
from cera_train.common.terminal import print_line, print_table, terminal_width
from cera_train.common.trust import clean


@dataclass(frozen=True)
class Picture:
    name: str  # the stem of its file
    title: str
    alt: str
    caption: str
    draw: Callable[..., None]  # into matplotlib axes, one for each panel
    height: float = 3.1  # inches, without the legend
    panels: int = 1  # side by side, with one y axis


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
    """Tables without rows are not shown."""
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
        print_line("report", f" {folder / 'report.html'}, report.md")


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


# --- pictures --------------------------------------------------------------------------------------------------------

WIDTH = 4.5  # inches: on a telephone the text is still large enough
LEGEND_LINE = 0.2  # inches
LONGEST_LABEL = 48

TEXT, GRID, BACKGROUND = "#1f2328", "#d9dde2", "#ffffff"
COLORS = {
    "cera": "#0072b2",
    "lora": "#c04a00",
    "rslora": "#00795a",
    "dora": "#a8437f",
    "base": "#5f6670",
    "other": "#7a5c00",
}
VARIABLES = {TEXT: "text", GRID: "line", BACKGROUND: "card"} | {color: name for name, color in COLORS.items()}
"""The CSS variable of each colour."""
MARKERS = {"cera": "o", "lora": "s", "rslora": "^", "dora": "D", "base": "v", "other": "h"}
MORE_MARKERS = ["P", "X", "*", "p"]
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
LINE = {"markersize": 5.5, "linewidth": 1.5}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), BACKGROUND),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "font.size": 10.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a run may be named $x$
    "svg.fonttype": "none",  # text stays text
}


def render(picture: Picture, file_format: str) -> bytes:
    """The picture as `png` or `svg`, the same bytes for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": picture.name}):
        figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        (axes,) = figure.subplots(1, picture.panels, sharey=True, squeeze=False)
        picture.draw(*axes)
        handles, labels = axes[0].get_legend_handles_labels()
        columns = 2 if max(map(len, labels), default=0) <= LONGEST_LABEL // 2 else 1
        figure.set_figheight(picture.height + LEGEND_LINE * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
        stream = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(stream, format=file_format, dpi=180, metadata=metadata)
        return stream.getvalue()


def inline_svg(picture: Picture) -> tuple[str, str]:
    """The view box and the content of an SVG element that takes its colours and its font from the page around it."""
    svg = render(picture, "svg").decode()
    opening = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', svg)
    content = svg[opening.end() : svg.rindex("</svg>")]
    # The page has the style sheet, and the names of groups would repeat from picture to picture.
    content = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", content, flags=re.DOTALL)
    content = re.sub(r'<g id="[^"]*"', "<g", content)
    for color, name in VARIABLES.items():
        content = content.replace(color, f"var(--{name})")
    return opening[1], content


def styles_of(kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Arguments for `Axes.plot` that tell lines apart, from the kind of adapter of each line."""
    styles: dict[str, dict[str, Any]] = {}
    used = dict.fromkeys(COLORS, 0)
    for name, kind in kinds.items():
        color = kind if kind in COLORS else "other"
        markers = [MARKERS[color], *MORE_MARKERS]
        marker, dash = markers[used[color] % len(markers)], DASHES[used[color] % len(DASHES)]
        styles[name] = LINE | {"color": COLORS[color], "marker": marker, "linestyle": dash}
        used[color] += 1
    return styles


def shortened(text: str) -> str:
    """A label for a legend."""
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 13]}…{text[-12:]}"
