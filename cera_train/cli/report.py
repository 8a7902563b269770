"""`cera-report`: a comparison of runs, or the problems on which two runs disagree."""

from __future__ import annotations

import argparse
from pathlib import Path

from cera_train.cli.composition import Composition
from cera_train.cli.start import refuse_arguments, start
from cera_train.common.settings import require
from cera_train.config import Config


def main() -> None:
    start(Composition(Config, "cera-report"), report)


def report() -> None:
    parser = argparse.ArgumentParser(
        prog="cera-report",
        description="Compares runs: one table, paired tests on the same problems, pictures.",
        epilog="cera-report disagree A B [--task TASK] shows the problems that one run solves and the other does not.",
    )
    parser.error = refuse_arguments("cera-report")
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--output", type=Path, help="where report.md and report.html go (report)")
    parser.add_argument("--task", help="the evaluation to look at (disagree)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    folders, output, task = arguments.folders, arguments.output, arguments.task

    if folders[0] == Path("disagree"):
        from cera_train.report.disagree import disagree

        require(len(folders) == 3, f"disagree takes two runs, got {len(folders) - 1}: cera-report disagree A B.")
        require(output is None, f"--output={output}: disagree writes no files: leave it out.")
        disagree(*folders[1:], task)
    else:
        from cera_train.report.page import mirror_report, say_report, write_report

        require(
            task is None, f"--task={task} is for cera-report disagree A B: a report shows every task. Leave it out."
        )
        output = output or Path("report")
        is_free = output.is_dir() or not output.exists()
        require(is_free, f"--output={output}: it is a file, and a report needs a folder: choose another.")
        report = write_report(folders, output)
        say_report(report)
        mirror_report(report)
