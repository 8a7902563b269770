"""The report: gathers the comparison once; writes report.html, report.md with pictures, and to the terminal."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.files import write_bytes, write_text
from cera_train.common.terminal import print_line
from cera_train.common.trust import clean
from cera_train.report.comparison import (
    PairedTest,
    cautions,
    differing_settings,
    missing_pieces,
    name_of,
    paired_tests,
)
from cera_train.report.disagree import terminal_width
from cera_train.report.pictures import DARK, LIGHT, Picture, plan_pictures, render
from cera_train.report.runs import Run, read_runs
from cera_train.report.table import QUALITY, RANK, Column, build_columns
from cera_train.runs.card import escape

RANK_NOTE = (
    "A branch's output lies in the column space of B, so its effective rank is at most r. The paper's largest "
    "effective rank, above 330, is of r = 512."
)


@dataclass(frozen=True)
class Report:
    """A comparison of runs, and where it lies."""

    runs: list[Run]
    columns: list[Column]
    tests: list[PairedTest]
    test_notes: list[str]
    cautions: list[str]
    missing: list[str]
    pictures: list[Picture]
    not_shown: list[str]
    settings: dict[str, list[str]]
    """In which training runs differ: key -> a text for each of `trained`."""
    output: Path

    @property
    def trained(self) -> list[Run]:
        return [run for run in self.runs if run.is_training]

    @property
    def title(self) -> str:
        return self.runs[0].name if len(self.runs) == 1 else f"Comparison of {len(self.runs)} runs"

    @property
    def rank_note(self) -> str:
        """Beside effective ranks, where there are any."""
        return RANK_NOTE if any(column.group == RANK for column in self.columns) else ""

    @property
    def tables(self) -> list[list[Column]]:
        """The columns as two tables, where one would be too wide."""
        first = [column for column in self.columns if column.group == QUALITY]
        return [table for table in (first, [column for column in self.columns if column not in first]) if table]


def write_report(folders: Sequence[Path], output: Path) -> Report:
    """Compares runs in report.md with its pictures, and in report.html, which needs nothing beside it.

    Args:
        folders: of runs, of sweeps, or of evaluations.
        output: the folder to write to. Files of an earlier report in it are replaced.

    Raises:
        ValueError: a folder holds no run, or a file in it is broken.
    """
    report = compare_runs(folders, output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: expected a folder for report.md and report.html in --output.")
    output.mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        write_bytes(output / f"{picture.name}.png", render(picture, LIGHT, "png"))
    light, dark = ({picture.name: _data_uri(picture, theme) for picture in report.pictures} for theme in (LIGHT, DARK))
    write_text(output / "report.md", _template("report.md.jinja").render(report=report))
    write_text(output / "report.html", _template("report.html.jinja").render(report=report, light=light, dark=dark))
    return report


def compare_runs(folders: Sequence[Path], output: Path) -> Report:
    """The comparison, before it is written to `output`.

    Raises:
        ValueError: as `write_report`.
    """
    runs = read_runs(folders)
    tests, test_notes = paired_tests(runs)
    pictures, not_shown = plan_pictures(runs)
    return Report(
        runs=runs,
        columns=build_columns(runs),
        tests=tests,
        test_notes=test_notes,
        cautions=cautions(runs, tests),
        missing=missing_pieces(runs),
        pictures=pictures,
        not_shown=not_shown,
        settings=differing_settings(runs),
        output=output,
    )


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cera_train.report", "templates"),
        autoescape=name.startswith("report.html"),
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape, "task": name_of}
    return environment.get_template(name)


def _data_uri(picture: Picture, theme: Any) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(render(picture, theme, "svg")).decode()


# --- the terminal ----------------------------------------------------------------------------------------------------


def say_report(report: Report) -> None:
    """The table, the tests and what to know, in the terminal."""
    width = terminal_width()
    print(_text_tables(report.runs, report.columns, width) + "\n")
    if report.rank_note:
        _say_list("effective rank", [report.rank_note], width)
    tests = [
        f"{name_of(test.task)}, {test.first} and {test.second}: {test.verdict}: {test.evidence}."
        for test in report.tests
    ]
    _say_list("paired tests", tests + report.test_notes, width)
    _say_list("before comparing", report.cautions, width)
    _say_list("missing", report.missing + report.not_shown, width)
    print_line("report", f" {report.output / 'report.html'}, {report.output / 'report.md'}")


def _text_tables(runs: Sequence[Run], columns: Sequence[Column], width: int) -> str:
    """As many tables as the width needs. What belongs beside a figure stands below it."""
    names = [["", "run"], *([clean(run.name)] for run in runs)]
    tables = [[names]]
    for column in columns:
        heading = column.label.rsplit(", ", 1) if ", " in column.label else ["", column.label]
        block = [heading, *([cell.text, *cell.notes] for cell in column.cells)]
        block = [[clean(line) for line in lines] for lines in block]
        if sum(map(_width, [*tables[-1], block])) + 2 * len(tables[-1]) > width and len(tables[-1]) > 1:
            tables.append([names])
        tables[-1].append(block)
    return "\n\n".join(map(_text_table, tables))


def _width(block: list[list[str]]) -> int:
    return max(len(line) for lines in block for line in lines)


def _text_table(blocks: list[list[list[str]]]) -> str:
    """Columns of cells of lines, aligned: the first to the left, figures to the right."""
    rows = []
    for cells in zip(*blocks, strict=True):
        for texts in zip_longest(*cells, fillvalue=""):
            aligned = [f"{text:>{_width(block)}}" for text, block in zip(texts, blocks, strict=True)]
            rows.append("  ".join([f"{texts[0]:<{_width(blocks[0])}}", *aligned[1:]]).rstrip())
    return "\n".join(filter(None, rows))  # headings of one line have nothing above it


def _say_list(heading: str, lines: Sequence[str], width: int) -> None:
    if not lines:
        return
    print(heading)
    for line in lines:
        print(textwrap.fill(clean(line), width, initial_indent="  - ", subsequent_indent="    "))
    print()
