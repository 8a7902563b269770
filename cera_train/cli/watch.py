"""`cera-watch`: a run or a sweep, followed from another terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from cera_train.cli.composition import Composition
from cera_train.cli.start import refuse_arguments, start
from cera_train.settings.run import Config
from cera_train.sweep.watch import watch


def main() -> None:
    start(Composition(Config, "cera-watch"), follow)


def follow() -> None:
    parser = argparse.ArgumentParser(
        prog="cera-watch",
        description="Follows a run or a sweep until it ends: curves, tokens/s, time left, samples; the jobs' table.",
        epilog="In a terminal one picture, which Ctrl-C ends; in a pipe a line for each update and evaluation.",
    )
    parser.error = refuse_arguments("cera-watch")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run or a sweep, such as outputs/quickstart")
    parser.add_argument("--once", action="store_true", help="show where it stands, and end")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    watch(arguments.folder, arguments.once)
