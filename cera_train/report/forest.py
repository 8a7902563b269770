"""A forest plot as SVG: a row for each contrast with its difference, interval, verdict, and what
could have been detected.

    x = asinh(difference / unit)

Every row has its own unit, such as the smallest difference that matters to its study, so nats and
points, differences of 0.7 and of 0.002 nats, share one axis: linear near zero, logarithmic far from
it. Left of zero the first-named side is better.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cera_train.report.template import load_template
from cera_train.verdicts.verdict import JudgedContrast, Mark

# In units of the picture, which is narrow: on a telephone its text is still large enough.
ZERO = 363  # where the plot has its zero
HALF_PLOT = 107
LINE = 14  # of text
GAP = 8  # between rows
LONGEST_LABEL = 36  # characters beside the plot
LONGEST_HEADING = 56
LONGEST_CAPTION_LINE = 80
CHARACTER = 6  # the width of one of a verdict
TICKS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)


@dataclass(frozen=True)
class Row:
    """A contrast. Its differences are in units, below zero where the first-named side is better,
    and infinite where there is no bound."""

    label: str
    numbers: str  # such as `-0.0158 (-0.0217 to -0.0100)`
    verdict: str  # such as `not shown (detects 0.0142)`
    mark: Mark
    difference: float
    lower: float
    upper: float
    detectable: float
    repeats: Sequence[float]  # the difference of each seed or base

    @property
    def lines(self) -> list[str]:
        return [*textwrap.wrap(self.label, LONGEST_LABEL), self.numbers]

    @property
    def height(self) -> int:
        return LINE * len(self.lines) + GAP


def row_of(contrast: JudgedContrast, size: float, label: str) -> Row:
    """The row of a contrast, in units of this size."""
    # A loss is better below, a score above.
    unit = size if contrast.is_loss else -size
    lower, upper = sorted([contrast.lower / unit, contrast.upper / unit])
    numbers = contrast.difference_text
    if contrast.interval_text:
        numbers += f" ({contrast.interval_text})"
    return Row(
        label,
        numbers,
        contrast.words,
        contrast.mark,
        contrast.difference / unit,
        lower,
        upper,
        contrast.detectable / size,
        [repeat / unit for repeat in contrast.by_seed],
    )


@dataclass(frozen=True)
class Group:
    heading: str
    note: str  # such as the unit of its rows
    rows: Sequence[Row]

    @property
    def lines(self) -> list[str]:
        return textwrap.wrap(self.heading, LONGEST_HEADING)

    @property
    def heading_height(self) -> int:
        return LINE * (len(self.lines) + 2) + GAP

    @property
    def height(self) -> int:
        return self.heading_height + sum(row.height for row in self.rows)


@dataclass(frozen=True)
class Forest:
    name: str  # the stem of its file
    title: str
    caption: str
    groups: Sequence[Group]

    @property
    def svg(self) -> str:
        """The picture for light and dark pages: it brings a background of the reader's theme."""
        return load_template("forest.svg").render(forest=self, zero=ZERO, half=HALF_PLOT, line=LINE)

    @property
    def sentences(self) -> list[str]:
        """What the picture shows, in words."""
        return [
            f"{group.heading} {row.label}: {row.verdict}, {row.numbers}."
            for group in self.groups
            for row in group.rows
        ]

    @property
    def caption_lines(self) -> list[str]:
        return textwrap.wrap(self.caption, LONGEST_CAPTION_LINE)

    @property
    def limit(self) -> float:
        """The largest difference on the axis, in units."""
        numbers = [1.0]
        for group in self.groups:
            for row in group.rows:
                numbers += [row.difference, row.lower, row.upper, row.detectable, *row.repeats]
        return max(abs(number) for number in numbers if math.isfinite(number))

    @property
    def ticks(self) -> list[int]:
        step = 1 if self.limit <= 40 else 2 if self.limit <= 500 else 4  # closer ones would touch
        inside = [tick for tick in TICKS[::step] if tick <= self.limit]
        return [*(-tick for tick in reversed(inside)), 0, *inside]

    def x(self, difference: float) -> float:
        """Its place in the picture; without a bound, the end of the plot."""
        inside = max(-self.limit, min(self.limit, difference))
        return round(ZERO + HALF_PLOT * math.asinh(inside) / math.asinh(self.limit), 1)

    def word_x(self, row: Row) -> float:
        """The middle of a verdict's word, over its mark and inside the plot."""
        space = max(0.0, HALF_PLOT - CHARACTER * len(row.verdict) / 2)
        return max(ZERO - space, min(ZERO + space, self.x(row.difference)))
