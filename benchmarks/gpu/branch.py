"""The race of benchmarks.kernels: CeRA's branch alone, by every way that computes it."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.gpu.place import Place
from benchmarks.gpu.results import SKIPPED, Found


def branch(place: Place, r: int) -> Found:
    """All shapes at one rank."""
    if place.device == "cpu":
        return Found(SKIPPED, "a CPU has no Triton kernels: tests interpret them")
    from benchmarks.kernels import SHAPES, race

    return Found(figures={"branch": [asdict(row) for shape in SHAPES for row in race(shape, r)]})
