"""Tests marked `gpu`, a group a piece."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from benchmarks.gpu.place import ROOT, Place
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Found

DEVICE = "CERA_TRAIN_GPU_TESTS"
"""The environment variable that lets the tests of tests/gpu run on another device than CUDA."""


class Outcomes:
    """A pytest plugin that counts, and keeps which failed and why some were skipped."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.skips: Counter[str] = Counter()

    def pytest_collectreport(self, report: Any) -> None:
        """A module that does not import fails, and one may skip as a whole."""
        if not report.passed:
            self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.counts[FAILED] += 1
            self.failures.append(report.nodeid)
        elif report.skipped:
            self.counts[SKIPPED] += 1
            self.skips[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.counts[PASSED] += 1


def run_tests(place: Place, group: str) -> Found:
    """Runs tests/gpu/test_gpu_GROUP.py."""
    import pytest

    os.environ[DEVICE] = place.device
    os.chdir(ROOT)
    scratch = place.folder / "tests"
    scratch.mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes()
    status = pytest.main(
        [
            *(f"tests/gpu/test_gpu_{group}.py", "-m", "gpu", "-v", "--showlocals", "-p", "no:cacheprovider"),
            # of plugins that this process has imported before pytest, such as anyio's: it rewrites no assert there
            *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
            f"--basetemp={scratch / group}",
        ],
        plugins=[outcomes],
    )
    counts = outcomes.counts
    figures = {**{state: counts[state] for state in (PASSED, FAILED, SKIPPED)}, "skips": dict(outcomes.skips)}
    is_whole = status == pytest.ExitCode.OK or (status == pytest.ExitCode.NO_TESTS_COLLECTED and counts[SKIPPED])
    if counts[FAILED] or not is_whole:
        failures = outcomes.failures or [f"pytest ended with status {int(status)}"]
        return Found(FAILED, "; ".join(name.removeprefix("tests/gpu/") for name in failures), figures)
    if not counts[PASSED]:
        return Found(SKIPPED, "; ".join(outcomes.skips), figures)
    return Found(PASSED, "; ".join(f"{number} skipped: {why}" for why, number in outcomes.skips.items()), figures)
