"""The report of runs side by side: tables, pictures and notes in report.html, report.md and the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cera_train.common.drawing import Picture, render
from cera_train.common.errors import UserError
from cera_train.common.files import write_bytes, write_text
from cera_train.common.pages import Table, print_rows, template
from cera_train.common.terminal import print_line, terminal_width
from cera_train.common.trust import clean
from cera_train.report.comparison import cautions, differing_settings, missing_pieces, paired_tests
from cera_train.report.pictures import plan_pictures
from cera_train.report.runs import Run, read_runs
from cera_train.report.table import run_rows
from cera_train.runs.card import escape

CAPTION = (
    "Exact is the task's published rule, verified mathematical equality by math-verify or exact. Below an accuracy: "
    "its 95 % interval over problems. Difference: ours minus the paper's. A branch's effective rank is at most r."
)
TESTS = (
    "On the same problems; the verdict is on the first-named run. p is McNemar's, or of a sign-flip permutation test "
    "where a problem has several answers or a score, after Holm over the pairs of a task; it decides at 5 %. The "
    "interval is a paired bootstrap's."
)


@dataclass(frozen=True)
class Report:
    """A comparison of runs."""

    runs: list[Run]
    tables: list[Table]
    """The runs, the paired tests and the settings in which the runs differ."""
    notes: list[str]
    """What stands in the way of a comparison, and what is missing."""
    pictures: list[Picture]

    @property
    def trained(self) -> list[Run]:
        return [run for run in self.runs if run.is_training]

    @property
    def title(self) -> str:
        return self.runs[0].name if len(self.runs) == 1 else f"Comparison of {len(self.runs)} runs"


def compare_runs(folders: Sequence[Path]) -> Report:
    runs = read_runs(folders)
    tests, notes = paired_tests(runs)
    trained = [run for run in runs if run.is_training]
    settings = differing_settings([run.settings for run in trained])
    names = [run.name for run in trained]
    tables = [
        Table("Runs", run_rows(runs), CAPTION),
        Table("Paired tests", [test.row for test in tests], TESTS),
        Table("Settings", [{"setting": key, **dict(zip(names, texts, strict=True))} for key, texts in settings.items()],
              "In which the training runs differ."),
    ]  # fmt: skip
    notes = [*cautions(runs, tests), *notes, *missing_pieces(runs)]
    return Report(runs, [table for table in tables if table.rows], notes, plan_pictures(runs))


def write_report(folders: Sequence[Path], output: Path) -> Report:
    """Compares runs in report.md with its pictures, and in report.html, which needs nothing beside it. Files of an
    earlier report in `output` are replaced."""
    report = compare_runs(folders)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file: expected a folder for report.md and report.html.")
    output.mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        write_bytes(output / f"{picture.name}.png", render(picture, "png"))
    for name in ("report.md", "report.html"):
        write_text(output / name, page_template(name).render(report=report))
    return report


def page_template(name: str) -> Any:
    return template("cera_train.report", name, md=escape)


def print_report(report: Report, output: Path) -> None:
    wrap = textwrap.TextWrapper(terminal_width(), initial_indent="  - ", subsequent_indent="    ")
    for table in report.tables:
        if table.title != "Settings":
            print_rows(table.rows)
    for note in report.notes:
        print(wrap.fill(clean(note)))
    print_line("report", f" {output / 'report.html'}, {output / 'report.md'}")
