"""All targets, in minutes: `python -m benchmarks --rows train.jsonl` (see the Makefile)."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import evaluation, training
from benchmarks.targets import Target, print_targets


def main() -> None:
    names = ["evaluation", "decoding", *training.WORKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=Path,
        help="jsonl with question and answer, such as GSM8K's; else logistic maps",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as folder:
        questions = options.rows or evaluation.word_problems(Path(folder) / "questions.jsonl")
        rows = training.write_first_rows(options.rows, Path(folder) / "rows.jsonl")
        measures: dict[str, Callable[[int], list[Target]]] = {
            "evaluation": partial(evaluation.measure, questions),
            "decoding": partial(evaluation.measure_decoding, questions),
            **{work: partial(training.measure, rows, work) for work in training.WORKS},
        }
        for name in names:
            if name in options.only:
                targets += measures[name](options.rounds)
    print_targets(targets)


if __name__ == "__main__":
    main()
