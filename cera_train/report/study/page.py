"""The report of a study: gathers what it found once; writes report.html, report.md with pictures, study_results.json,
and to the terminal."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cera_train.common.drawing import Picture, render
from cera_train.common.errors import UserError
from cera_train.common.files import write_bytes, write_text
from cera_train.common.settings import Changes, changes_of
from cera_train.common.terminal import print_line, terminal_width
from cera_train.common.trust import clean
from cera_train.report.comparison import differing_settings, shown
from cera_train.report.page import print_columns, template
from cera_train.report.runs import Run
from cera_train.report.study import pictures, tables, words
from cera_train.report.study.cells import CellResult, Outcome, outcomes_of, read_cells
from cera_train.report.study.contrasts import Comparison, RankLine, SlopeGap, compare_cells, rank_lines, slope_gaps
from cera_train.report.study.failures import Difficulty, by_difficulty
from cera_train.report.study.results import RESULTS, results_of
from cera_train.report.study.tables import StudyTable
from cera_train.settings.run import Config
from cera_train.settings.sweep import Equal

if TYPE_CHECKING:
    from cera_train.sweep.study import Study


@dataclass(frozen=True)
class Records:
    """What the sweep of a study left beside its runs."""

    command: str
    """Runs the study, and goes on with it."""
    decisions: list[str]
    """Which tuned values went on at each rung, and by which losses."""


@dataclass(frozen=True)
class StudyReport:
    """What a study found, and where its page lies."""

    study: Study
    records: Records
    outcomes: list[Outcome]
    cells: list[CellResult]
    comparisons: list[Comparison]
    lines: list[RankLine]
    gaps: list[SlopeGap]
    difficulties: list[Difficulty]
    output: Path

    @property
    def name(self) -> str:
        return self.study.folder.resolve().name

    @property
    def title(self) -> str:
        return self.study.config.question or f"Study {self.name}"

    @cached_property
    def verdicts(self) -> list[str]:
        """The first is the study's."""
        return words.verdicts(self.comparisons, self.study.config.contrasts)

    @property
    def plateau(self) -> list[str]:
        return words.plateau(self.lines, self.gaps)

    @cached_property
    def tables(self) -> list[StudyTable]:
        """Contrasts, cells, failures and difficulty."""
        found = [
            tables.contrast_table(self.comparisons, self.study.config.contrasts),
            tables.cell_table(self.cells, self.outcomes),
            *tables.failure_tables(self.cells, self.outcomes),
        ]
        return found + [tables.difficulty_table(own) for own in self.difficulties]

    @cached_property
    def planned(self) -> dict[str, Picture | str]:
        """The pictures, or why there is none."""
        styles, config = pictures.arm_styles(self.cells), self.study.config
        planned: dict[str, Picture | str] = {}
        for outcome in self.outcomes:
            own = [each for each in self.comparisons if each.outcome == outcome]
            planned[f"Differences in {outcome.title}"] = pictures.differences(own, styles)
        primary = [each for each in self.comparisons if each.outcome == self.outcomes[0]]
        planned["Against the rank"] = pictures.against_rank(self.lines, styles)
        planned["Why"] = pictures.why([own for own in primary if own.first.cell.arm == config.baseline], styles)
        for outcome in (own for own in self.outcomes if not own.is_loss):
            planned[f"Failures on {outcome.title}"] = pictures.failures(self.cells, outcome)
        for own in self.difficulties:
            cells = [cell for cell in self.cells if cell.name in own.losses]
            planned[f"Difficulty {own.task}".rstrip()] = pictures.difficulties(own, cells, config.baseline, styles)
        return planned

    @property
    def pictures(self) -> list[Picture]:
        return [own for own in self.planned.values() if isinstance(own, Picture)]

    @property
    def not_shown(self) -> list[str]:
        return [f"{title}: {reason}." for title, reason in self.planned.items() if isinstance(reason, str)]

    @property
    def changes(self) -> list[str]:
        scope = dict.fromkeys(f"{run.base}, {_rows(run)}, {run.figures.updates} updates" for run in self.runs)
        return words.changes(self.comparisons, self.cells, self.study.config.tune, words.listed(list(scope)))

    # --- protocol

    @property
    def runs(self) -> list[Run]:
        return [run for own in self.cells for run in own.runs.values()]

    @property
    def protocol(self) -> list[str]:
        return words.protocol(self.study.config, len(self.runs))

    @property
    def cautions(self) -> list[str]:
        return [f"Times are of different machines: {'; '.join(self.machines)}."] if len(self.machines) > 1 else []

    @property
    def machines(self) -> list[str]:
        found = [own for run in self.runs if (own := run.files.environment).machine]
        return list(dict.fromkeys(f"{own.machine}, {own.platform}, Python {own.python}" for own in found))

    @property
    def versions(self) -> dict[str, str]:
        """The versions of libraries; where runs differ, all."""
        found: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for name, version in (run.files.environment.packages or {}).items():
                found.setdefault(name, {})[str(version)] = None
        return {name: ", ".join(versions) for name, versions in found.items()}

    @property
    def arms(self) -> tuple[list[str], dict[str, list[str]]]:
        """What arms change: their names, and key -> a text for each, under the first condition."""
        cells = [own for own in self.cells if own.condition == self.cells[0].condition]
        settings = differing_settings([next(iter(own.runs.values())).settings for own in cells])
        tuned = self.study.config.tune
        return [own.arm for own in cells], {key: texts for key, texts in settings.items() if key not in tuned}

    @property
    def shared(self) -> dict[str, str]:
        """The settings that all runs share, of those that change a result."""
        first, *others = (run.settings for run in self.runs)
        keys = [key for key in first if all(own.get(key) == first[key] for own in others)]
        return {key: shown(first[key]) for key in keys if changes_of(Config, key) != Changes.nothing}

    @property
    def commands(self) -> dict[str, str]:
        return {"run it, or go on": self.records.command, "this page": f"cera-report {self.study.folder}"}

    @property
    def by_hand(self) -> dict[str, str]:
        """The command that runs a cell again, alone and into another folder, by the cell's name."""
        return {own.name: f"{self.records.command} {shlex.join(self._words(own))}" for own in self.cells}

    def _words(self, own: CellResult) -> list[str]:
        cell, task = own.cell, {"study.task": own.cell.task} if own.cell.task else {}
        settings = {"study.arm": cell.arm, **task, **cell.choices, **own.cell.chosen, "name": f"{self.name}_by_hand"}
        return [f"{key}={value}" for key, value in settings.items()]


def _rows(run: Run) -> str:
    """Where the rows of a run come from."""
    path, files, layout = (run.settings.get(f"data.{key}") for key in ("path", "train_files", "layout"))
    return path or ", ".join(files or []) or layout


# --- writing ---------------------------------------------------------------------------------------------------------


def write_study(study: Study, records: Records, output: Path) -> StudyReport:
    """Writes report.html, which needs nothing beside it, report.md with its pictures, and study_results.json.

    Raises:
        UserError: the study is unfinished or has one arm, or claims equal times and its arms took unequal ones.
    """
    report = report_study(study, records, output)
    output.mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        write_bytes(output / f"{picture.name}.png", render(picture, "png"))
    for name in ("report.md", "report.html"):
        write_text(output / name, template(name.replace("report", "study")).render(report=report))
    write_text(output / RESULTS, results_of(report))
    return report


def report_study(study: Study, records: Records, output: Path) -> StudyReport:
    """The report, before it is written to `output`."""
    if missing := study.missing():
        more = f", and {len(missing) - 1:,} more" * (len(missing) > 1)
        raise UserError(
            f"{study.folder} is an unfinished study: {missing[0]}{more}. {records.command} goes on; cera-sweep "
            f"{study.folder} shows where it is."
        )
    if not study.contrasts():
        arms = ", ".join(dict.fromkeys(cell.arm for cell in study.cells))
        raise UserError(
            f"{study.folder} has no two arms to compare, only {arms}. {records.command} without study.arm trains the "
            f"others; cera-report {study.folder}/* compares the runs that are there."
        )
    cells, by_task = read_cells(study), {}
    if study.config.equal == Equal.time and (unequal := words.unequal_times(cells)):
        raise UserError(
            f"{study.folder} claims study.equal=time, and {unequal}. Give the slower arm fewer train.max_updates under "
            f"another name=..., or drop the claim: the same command with study.equal=none, then cera-report."
        )
    for own in cells:
        by_task.setdefault(own.cell.task, []).append(own)
    difficulties = [by_difficulty(task, own) for task, own in by_task.items()]
    outcomes = outcomes_of(study)
    lines = rank_lines(outcomes[0], cells)
    return StudyReport(
        *(study, records, outcomes, cells, compare_cells(study, cells)),
        *(list(lines.values()), slope_gaps(study.config.pairs, lines)),
        difficulties=list(filter(None, difficulties)),
        output=output,
    )


def say_study(report: StudyReport) -> None:
    """Prints the verdict, the contrasts, the cells and what would change the verdict."""
    verdict, *others = report.verdicts
    wrap = textwrap.TextWrapper(terminal_width(), initial_indent="  - ", subsequent_indent="    ")
    print(f"{textwrap.fill(clean(verdict), terminal_width())}\n")
    for table in report.tables[:2]:
        print_columns(table.first, table.names, table.columns)
    sections = {
        "other verdicts": others,
        "plateau": report.plateau,
        "before comparing": report.cautions,
        "what would change the verdict": report.changes,
    }
    for heading, lines in sections.items():
        if lines:
            print("\n".join([heading, *(wrap.fill(clean(line)) for line in lines), ""]))
    print_line("report", f" {report.output / 'report.html'}, {report.output / 'report.md'}, {report.output / RESULTS}")
