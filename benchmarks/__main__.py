"""All targets, in minutes: `python -m benchmarks --rows train.jsonl` (see the Makefile)."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import evaluation, training
from benchmarks.rows import random_rows, read_rows, write_rows
from benchmarks.targets import print_targets

ROWS = 256
ROUNDS = 5


def main() -> None:
    names = ["decoding", *training.WORKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=Path,
        help="jsonl with question and answer, such as GSM8K's; else random words",
    )
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    targets = []
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
        for name in options.only:
            if name == "decoding":
                targets += evaluation.measure_decoding(file, ROUNDS)
            else:
                targets += training.measure(file, name, ROUNDS)
    print_targets(targets)


if __name__ == "__main__":
    main()
