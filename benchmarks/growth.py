"""How time and memory of an update grow: `make growth`.

Every point is measured in a process of its own, whose memory is the most it ever held: one update
as a warm-up, then the median of three more.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants import Work
from benchmarks.rows import random_rows, write_rows
from benchmarks.training import PACKAGE, race

UPDATES = 3


@dataclass(frozen=True)
class Point:
    """One update of `sequences` sequences of `length` tokens, two thirds of them supervised, in
    bf16."""

    kind: str = "CeRA"
    rank: int = 64
    length: int = 256
    sequences: int = 8
    rows: int = 0
    """Rows of the data set, if more than what is updated on."""


POINTS = {
    "rank": [Point(kind, rank) for kind in ("CeRA", "LoRA") for rank in (16, 64, 128, 256, 512)],
    "length": [Point(length=2**power, sequences=1) for power in range(7, 13)],
    "sequences": [Point(sequences=2**power) for power in range(6)],
    "rows": [Point(rows=10**power) for power in (3, 4, 5)],
}
"""The field that grows -> its points."""


def measure(point: Point, file: Path) -> tuple[float, int]:
    """Seconds of an update, and bytes of memory."""
    count = max(point.rows, (UPDATES + 1) * point.sequences + 1)  # one is held out
    rows = random_rows(count, point.length - 1, prompt=1 / 3, spread=0)
    work = Work(
        "bfloat16",
        point.sequences,
        rank=point.rank,
        max_length=4096,
        micro_batch_tokens=4096,
    )
    name = f"ours with {point.kind}"
    found = race([name], work, PACKAGE, write_rows(file, rows), UPDATES)
    return statistics.median(found.seconds[name]), found.peak_memory[name]


def main() -> None:
    for field, points in POINTS.items():
        print(f"\n{field:<12}{'adapter':<8}{'seconds':>10}{'GB':>8}")
        for point in points:
            with tempfile.TemporaryDirectory() as folder:
                seconds, memory = measure(point, Path(folder) / "rows.jsonl")
            value = getattr(point, field)
            print(f"{value:<12,}{point.kind:<8}{seconds:>10.2f}{memory / 1e9:>8.2f}")


if __name__ == "__main__":
    main()
