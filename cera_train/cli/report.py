"""`cera-report`: a comparison of runs, the page of a study, or the problems on which two runs disagree."""

from __future__ import annotations

import argparse
from pathlib import Path

from cera_train.cli.mistakes import refuse_arguments
from cera_train.cli.start import start
from cera_train.common.settings import require


def main() -> None:
    start("cera-report", report)


def report() -> None:
    parser = argparse.ArgumentParser(
        prog="cera-report",
        description="Compares runs: one table, paired tests on the same problems, pictures. Of a study: its verdict.",
        epilog="cera-report disagree A B [--task TASK] shows the problems that one run solves and the other does not.",
    )
    parser.error = refuse_arguments("cera-report")
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run, a folder of runs, or a study")
    parser.add_argument("--output", type=Path, help="where report.md and report.html go (default: report)")
    parser.add_argument("--task", help="the evaluation to look at (only with disagree)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    folders, output, task = arguments.folders, arguments.output, arguments.task

    if folders[0] == Path("disagree"):
        from cera_train.report.disagree import disagree

        require(len(folders) == 3, f"disagree takes two runs, got {len(folders) - 1}: cera-report disagree A B.")
        require(output is None, f"--output={output}: disagree writes no files: leave it out.")
        disagree(*folders[1:], task)
        return
    require(task is None, f"--task={task} is for cera-report disagree A B: a report shows every task. Leave it out.")
    output = output or Path("report")
    is_free = output.is_dir() or not output.exists()
    require(is_free, f"--output={output}: it is a file, and a report needs a folder: choose another.")
    from cera_train.study.cells import find_study

    if len(folders) == 1 and (study := find_study(folders[0])) is not None:
        from cera_train.study.page import write_study

        page = write_study(study, output)
    else:
        from cera_train.report.page import compare_runs

        page = compare_runs(folders)
        page.write(output)
    page.print(output)
