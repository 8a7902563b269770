"""All targets, in minutes: `python -m benchmarks --rows train.jsonl` (see the Makefile)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import data, evaluation, startup, training
from benchmarks.targets import Target, print_targets, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="jsonl with question and answer, such as GSM8K's; else logistic maps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/targets.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    targets: list[Target] = []
    found: dict[str, Any] = {}

    def keep(name: str, measured: tuple[list[Target], dict[str, Any]]) -> None:
        targets.extend(measured[0])
        found[name] = measured[1]
        print(f"{name}: {time.perf_counter() - started:,.0f} s so far", file=sys.stderr, flush=True)

    keep("start-up", startup.measure(arguments.rounds))
    keep("data", data.measure(arguments.rows))
    with evaluation.questions(arguments.rows) as file:
        keep("evaluation", evaluation.measure(file, arguments.rounds))
        keep("decoding", evaluation.decoding(file, arguments.rounds, batches=(1,)))
    with training.first_rows(arguments.rows) as file:
        for work in training.works_here():
            keep(f"training, {work}", training.measure(file, work, arguments.rounds))
    print_targets(targets)
    write_results(arguments.output, found, targets)


if __name__ == "__main__":
    main()
