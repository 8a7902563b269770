"""`cera-report`: a comparison of runs, or the problems on which two runs disagree."""

from __future__ import annotations

import argparse
from pathlib import Path

from cera_train.cli.composition import Composition
from cera_train.cli.start import refuse_arguments, start
from cera_train.common.errors import UserError
from cera_train.config import Config


def main() -> None:
    start(Composition(Config, "cera-report"), report, is_hydra=False)


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
    arguments = parser.parse_args()

    if arguments.folders[0] == Path("disagree"):
        from cera_train.report.disagree import disagree

        if len(arguments.folders) != 3:
            raise UserError(f"disagree takes two runs, got {len(arguments.folders) - 1}: cera-report disagree A B.")
        if arguments.output is not None:
            raise UserError(f"--output={arguments.output}: disagree writes no files: leave it out.")
        disagree(*arguments.folders[1:], arguments.task)
    else:
        from cera_train.report.page import say_report, write_report

        if arguments.task is not None:
            raise UserError(
                f"--task={arguments.task} is for cera-report disagree A B: a report shows every task. Leave it out."
            )
        output = arguments.output or Path("report")
        if output.exists() and not output.is_dir():
            raise UserError(f"--output={output}: it is a file, and a report needs a folder: choose another.")
        say_report(write_report(arguments.folders, output))
