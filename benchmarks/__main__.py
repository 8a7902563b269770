"""All targets, in minutes: `python -m benchmarks --rows train.jsonl` (see the Makefile)."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import evaluation, training
from benchmarks.rows import random_rows, read_rows, write_rows
from benchmarks.targets import Target, print_targets

ROWS = 256


def main() -> None:
    names = ["decoding", *training.WORKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=Path,
        help="jsonl with question and answer, such as GSM8K's; else random words",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = random_rows(ROWS, 171)
        if options.rows:
            rows = [
                {
                    "prompt": f"Question: {row['question']}\nAnswer:",
                    "completion": f" {row['answer']}",
                }
                for row in read_rows(options.rows)[:ROWS]
            ]
        file = write_rows(Path(folder) / "rows.jsonl", rows)
        measures: dict[str, Callable[[int], list[Target]]] = {
            "decoding": partial(evaluation.measure_decoding, file),
            **{work: partial(training.measure, file, work) for work in training.WORKS},
        }
        for name in names:
            if name in options.only:
                targets += measures[name](options.rounds)
    print_targets(targets)


if __name__ == "__main__":
    main()
