"""Curves of text for a terminal. A braille character is a grid of 2 x 4 dots, so a curve has twice the columns and four
times the rows that its text has."""

from __future__ import annotations

import math
from collections.abc import Iterable

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""
BLANK = 0x2800
LARGEST = 1e300
LABEL = 9  # columns of a scale's labels, with the axis

Point = tuple[float, float]


def curve(points: Iterable[Point], width: int, height: int, right: float = 0.0) -> list[str]:
    """A curve in `height` + 1 lines of at most `width` characters, with its scales; nothing where there is no room. Its
    x axis reaches from 0 to `right` or the last point. Where several points share a column of dots, it goes through
    their mean; a point that is no finite number is left out."""
    points = [(x, y) for x, y in points if 0 <= x < LARGEST and abs(y) < LARGEST]
    columns = width - LABEL
    if not points or columns < 1 or height < 2:
        return []
    right = max(right, *(x for x, _ in points))
    means = _column_means(points, right, 2 * columns)
    low, high = min(means.values()), max(means.values())
    cells = [[BLANK] * columns for _ in range(height)]
    rows = {column: _row(mean, low, high, 4 * height) for column, mean in means.items()}
    for column, row in _joined(rows):
        cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    labels = [scale(high), *[""] * (height - 2), scale(low)]
    lines = [f"{label:>{LABEL - 1}}│" + "".join(map(chr, row)) for label, row in zip(labels, cells, strict=True)]
    return [*(line.rstrip(chr(BLANK)) for line in lines), " " * LABEL + "0" + scale(right).rjust(columns - 1)]


def scale(value: float) -> str:
    """A number in at most eight characters."""
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    text = f"{value:.3f}" if 1e-2 <= abs(value) < 1e3 else f"{value:.2g}"
    return text if len(text) < LABEL else f"{value:.1g}"


def _column_means(points: list[Point], right: float, columns: int) -> dict[int, float]:
    """The mean of y in every column of dots that has a point, from left to right."""
    inside: dict[int, list[float]] = {}
    for x, y in points:
        inside.setdefault(round(x / right * (columns - 1)) if right else 0, []).append(y)
    return {column: math.fsum(y / len(ys) for y in ys) for column, ys in sorted(inside.items())}


def _row(value: float, low: float, high: float, rows: int) -> int:
    """The row of dots of a value, from the top. Halves: the difference of two floats may be infinite."""
    share = (high / 2 - value / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.5
    return round(share * (rows - 1))


def _joined(rows: dict[int, int]) -> Iterable[tuple[int, int]]:
    """The dots of a line through one dot for each column."""
    (before, last), *others = rows.items()
    yield before, last
    for column, row in others:
        above = last
        for step in range(1, column - before + 1):
            now = round(last + (row - last) * step / (column - before))
            yield before + step, now
            yield from ((before + step, between) for between in range(min(above, now) + 1, max(above, now)))
            above = now
        before, last = column, row
