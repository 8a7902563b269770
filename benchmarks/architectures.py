"""`make architectures`: tests every family of models, and writes docs/architectures.md from what
the tests record.

python -m benchmarks.architectures
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "integrations" / "test_architectures.py"
PAGE = ROOT / "docs" / "architectures.md"

COLUMNS = {  # test: (heading, meaning)
    "attaches": (
        "all-linear",
        "a fresh adapter changes nothing, and each of its modules changes the logits; what no "
        "pass in training calls "
        "is left out",
    ),
    "trains": ("trains", "every module gets a gradient, and the loss falls"),
    "generates": ("generates", "with a cache, the same tokens as without"),
    "packs": (
        "rows",
        "flat, with the loss and gradients of separate rows; padded, where flat rows would see "
        "each other",
    ),
    "saves_and_loads": (
        "saves, loads",
        "the same logits on another copy of the base, by `cera-train` and by PEFT",
    ),
    "plans": ("plans", "`cera-plan` counts the parameters from config.json alone"),
    "trains_over_4_bits": ("4-bit", "NF4 on a CPU: gradients everywhere, and the loss falls"),
}


class Record:
    """A pytest plugin that keeps what each test wrote into its cell."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped:
            self.failed.append(report.nodeid)
        found = re.search(r"::test_(\w+)\[(\w+)\]$", report.nodeid)
        if report.when == "call" and report.passed and found:
            self.cells.setdefault(found[2], {})[found[1]] = dict(report.user_properties)["cell"]


def page(cells: dict[str, dict[str, str]]) -> str:
    """The page, with one row for the families that are alike."""
    versions = (
        f"transformers {version('transformers')}, PEFT {version('peft')}, torch {version('torch')}"
    )
    meanings = "\n".join(f"- **{heading}**: {meaning}." for heading, meaning in COLUMNS.values())
    header = " | ".join([*(heading for heading, _ in COLUMNS.values()), "model types"])
    alike: dict[tuple[str, ...], list[str]] = {}
    for family, row in cells.items():
        alike.setdefault(tuple(row[column] for column in COLUMNS), []).append(family)
    rows = "\n".join(
        f"| {' | '.join(row)} | {', '.join(families)} |" for row, families in alike.items()
    )
    return f"""# Architectures

    make architectures

makes a tiny random model of every family, runs `tests/integrations/test_architectures.py` on it,
and writes this page. Each cell is a test's result, on a CPU without the packages of fused kernels,
with {versions}.

{meanings}

A model that is not listed works if its projections are called as modules: each run tests that on
its first rows. `adapter.experts` adapts experts that transformers holds as parameters.

| {header} |
|{"---|" * (len(COLUMNS) + 1)}
{rows}
"""


def main() -> int:
    record = Record()
    status = pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider"], plugins=[record])
    incomplete = [family for family, row in record.cells.items() if set(row) != set(COLUMNS)]
    if status != 0 or record.failed or incomplete:
        print(
            f"{PAGE} is left as it was: {len(record.failed)} tests failed; incomplete: {incomplete}"
        )
        return 1
    PAGE.write_text(page(record.cells))
    print(f"{PAGE}: {len(record.cells)} families")
    return 0


if __name__ == "__main__":
    sys.exit(main())
