"""A report of tables and pictures in HTML, Markdown and the terminal. The HTML is
self-contained. In pictures colours stand for methods (Okabe and Ito's palette, for colour-blind
readers), and markers for lines."""

import base64
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.cells import cell_len

from cera_train.common.files import write_bytes, write_text
from cera_train.common.terminal import print_line, print_table, terminal_width
from cera_train.common.trust import clean
from cera_train.report.forest import Forest
from cera_train.report.template import load_template


@dataclass(frozen=True)
class Picture:
    name: str  # the stem of its file
    title: str
    alt: str
    caption: str
    draw: Callable[[Axes], None]


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
            png = render(picture)
            write_bytes(folder / f"{picture.name}.png", png)
            images[picture.name] = f"data:image/png;base64,{base64.b64encode(png).decode()}"
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
        return max(cell_len(clean(line)) for text in column for line in text.split("\n"))

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


# --- pictures -------------------------------------------------------------------------------------

WIDTH = 4.5  # inches: on a telephone the text is still large enough
HEIGHT = 3.1  # without the legend
LEGEND_LINE = 0.2  # inches
LONGEST_LABEL = 48

COLORS = {
    "cera": "#0072b2",
    "lora": "#c04a00",
    "rslora": "#00795a",
    "dora": "#a8437f",
    "base": "#5f6670",
    "other": "#7a5c00",
}
MARKERS = "os^DvhPX*p"
STYLE = Path(__file__).with_name("templates") / "report.mplstyle"


def shortened(label: str, longest: int) -> str:
    """A label, without its middle if it is longer."""
    return label if len(label) <= longest else f"{label[: longest - 13]}…{label[-12:]}"


def render(picture: Picture) -> bytes:
    """The picture as PNG."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        picture.draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        labels = [shortened(label, LONGEST_LABEL) for label in labels]
        columns = 2 if max(map(len, labels), default=0) <= LONGEST_LABEL // 2 else 1
        figure.set_figheight(HEIGHT + LEGEND_LINE * math.ceil(len(labels) / columns))
        figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9
        )
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=180)
        return stream.getvalue()


def styles_of(kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Arguments for `Axes.plot` of every line, from the kind of its adapter."""
    lines = zip(kinds.items(), itertools.cycle(MARKERS), strict=False)
    return {
        name: {"color": COLORS.get(kind, COLORS["other"]), "marker": marker}
        for (name, kind), marker in lines
    }
