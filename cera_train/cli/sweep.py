"""`cera-sweep`: a sweep's jobs, their states and the best, from the files in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from cera_train.cli.mistakes import refuse_arguments
from cera_train.cli.start import start
from cera_train.sweep.table import print_sweep


def main() -> None:
    start("cera-sweep", sweep)


def sweep() -> None:
    description = "Shows every job of a sweep, its state and `sweep.metric`, and the best, also while it runs."
    parser = argparse.ArgumentParser(prog="cera-sweep", description=description)
    parser.error = refuse_arguments("cera-sweep")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the sweep's folder, such as outputs/rank_lr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    print_sweep(parser.parse_args().folder)
