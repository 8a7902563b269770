"""`cera-report` and `cera-sweep`: what lies in the folders of runs, studies and sweeps."""

from __future__ import annotations

from pathlib import Path

from cera_train.cli.mistakes import Parser
from cera_train.common.settings import require

LONGEST_NAME = 100
"""Characters. A file system takes 255."""


def parser_of(program: str, description: str) -> Parser:
    parser = Parser(program, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def report() -> None:
    parser = parser_of(
        "cera-report",
        "Compares runs: one table, paired tests on the same problems, pictures. Of a study: its verdict.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run, a folder of runs, or a study")
    parser.add_argument("--output", type=Path, help="where the page goes (default: report/NAMES_OF_THE_FOLDERS)")
    parser.add_argument("--across-engines", action="store_true", help="test answers of different engines too")
    arguments = parser.parse_args()
    folders = arguments.folders
    names = "_and_".join(folder.resolve().name for folder in folders)
    output = arguments.output or Path("report") / names[:LONGEST_NAME]
    is_free = output.is_dir() or not output.exists()
    require(is_free, f"--output={output}: it is a file, and a report needs a folder: choose another.")
    from cera_train.study.cells import find_study

    if len(folders) == 1 and (study := find_study(folders[0])) is not None:
        from cera_train.study.page import write_study

        page = write_study(study, output)
    else:
        from cera_train.report.page import compare_runs

        page = compare_runs(folders, arguments.across_engines)
        page.write(output)
    page.print(output)


def sweep() -> None:
    from cera_train.sweep.folder import print_sweep

    parser = parser_of(
        "cera-sweep", "Shows every job of a sweep, its state and `sweep.metric`, and the best, also while it runs."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the sweep's folder, such as outputs/rank_lr")
    print_sweep(parser.parse_args().folder)
