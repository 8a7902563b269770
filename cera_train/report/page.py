"""The report: gathers the comparison once; writes report.html, report.md with pictures, and to the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cera_train.common.drawing import Picture, render
from cera_train.common.errors import UserError
from cera_train.common.files import write_bytes, write_text
from cera_train.common.pages import template
from cera_train.common.terminal import print_line, print_table, terminal_width
from cera_train.common.trust import clean
from cera_train.evaluation.tasks.task import display_name
from cera_train.report.comparison import PairedTest, cautions, differing_settings, missing_pieces, paired_tests
from cera_train.report.pictures import plan_pictures
from cera_train.report.runs import Run, read_runs
from cera_train.report.table import RANK, Column, build_columns
from cera_train.runs.card import escape


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
        if not any(column.group == RANK for column in self.columns):
            return ""
        return (
            "A branch's output lies in the column space of B, so its effective rank is at most r. The paper's largest "
            "effective rank, above 330, is of r = 512."
        )


def write_report(folders: Sequence[Path], output: Path) -> Report:
    """Compares runs in report.md with its pictures, and in report.html, which needs nothing beside it. Files of an
    earlier report in `output` are replaced."""
    report = compare_runs(folders, output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file: expected a folder for report.md and report.html.")
    output.mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        write_bytes(output / f"{picture.name}.png", render(picture, "png"))
    for name in ("report.md", "report.html"):
        write_text(output / name, page_template(name).render(report=report))
    return report


def compare_runs(folders: Sequence[Path], output: Path) -> Report:
    """The comparison, before it is written to `output`."""
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
        settings=differing_settings([run.settings for run in runs if run.is_training]),
        output=output,
    )


def page_template(name: str) -> Any:
    return template("cera_train.report", name, md=escape, task=display_name)


def say_report(report: Report) -> None:
    """Prints the table, the tests and what to know."""
    print_columns("run", [run.name for run in report.runs], report.columns)
    tests = [
        f"{display_name(own.task)}, {own.first} and {own.second}: {own.verdict}: {own.evidence}."
        for own in report.tests
    ]
    sections = {
        "effective rank": [report.rank_note] * bool(report.rank_note),
        "paired tests, p after Holm": tests + report.test_notes,
        "before comparing": report.cautions,
        "missing": report.missing + report.not_shown,
    }
    for heading, lines in sections.items():
        if lines:
            wrap = textwrap.TextWrapper(terminal_width(), initial_indent="  - ", subsequent_indent="    ")
            print("\n".join([heading, *(wrap.fill(clean(line)) for line in lines), ""]))
    print_line("report", f" {report.output / 'report.html'}, {report.output / 'report.md'}")


def print_columns(first: str, names: Sequence[str], columns: Sequence[Column]) -> None:
    """Prints as many tables as the width needs, each with the names of the rows under `first`."""
    from rich.cells import cell_len

    def width(block: list[str]) -> int:
        return max(cell_len(clean(line)) for text in block for line in text.split("\n"))

    names = [first, *names]
    tables = [[names]]
    for column in columns:
        block = [column.label.replace(", ", "\n"), *("\n".join([cell.text, *cell.notes]) for cell in column.cells)]
        if sum(map(width, [*tables[-1], block])) + 2 * len(tables[-1]) > terminal_width() and len(tables[-1]) > 1:
            tables.append([names])
        tables[-1].append(block)
    for table in tables:
        header, *rows = zip(*table, strict=True)
        print_table(header, rows, right=range(1, len(header)))
        print()
