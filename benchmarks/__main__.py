"""All targets, in minutes: `python -m benchmarks --rows train.jsonl` (see the Makefile)."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import evaluation, training
from benchmarks.targets import Target, print_targets

Measured = tuple[list[Target], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=Path,
        help="jsonl with question and answer, such as GSM8K's; else logistic maps",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="evaluation, decoding, bfloat16, ...",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/targets.json"))
    arguments = parser.parse_args()
    rows = arguments.rows
    rounds = arguments.rounds
    started = time.perf_counter()
    targets: list[Target] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        questions = rows or evaluation.word_problems(Path(folder) / "questions.jsonl")
        first_rows = training.write_first_rows(rows, Path(folder) / "rows.jsonl")
        measures: dict[str, Callable[[], Measured]] = {
            "evaluation": lambda: evaluation.measure(questions, rounds),
            "decoding": lambda: evaluation.decoding(questions, rounds),
            **{
                work: lambda work=work: training.measure(first_rows, work, rounds)
                for work in training.WORKS
            },
        }
        for name, measure in measures.items():
            if arguments.only is None or name in arguments.only:
                more, found[name] = measure()
                targets += more
                print(
                    f"{name}: {time.perf_counter() - started:,.0f} s so far",
                    file=sys.stderr,
                    flush=True,
                )
    print_targets(targets)
    lines = [
        asdict(target) | {"value": target.value, "reached": target.is_reached} for target in targets
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"targets": lines, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
