"""A curve of braille dots goes through its points, keeps to its room, and takes any number."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cera_train.common.curves import BLANK, DOTS, LABEL, curve


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """The dots of a curve, as columns from the left and rows from the top."""
    return {
        (2 * column + x, 4 * row + y)
        for row, line in enumerate(lines[:-1])
        for column, character in enumerate(line[LABEL:])
        for y, bits in enumerate(DOTS)
        for x, bit in enumerate(bits)
        if (ord(character) - BLANK) & bit
    }


def test_a_straight_line_is_a_diagonal():
    lines = curve([(0, 8.0), (7, 1.0)], width=LABEL + 4, height=2)
    assert dots(lines) == {(n, n) for n in range(8)}
    assert [line[:LABEL] for line in lines] == ["       8│", "       1│", " " * LABEL]
    assert lines[-1][LABEL:] == "0  7"


def test_it_leaves_room_for_what_is_to_come_and_joins_its_dots():
    lines = curve([(0, 1.0), (10, 0.0), (20, 1.0)], width=LABEL + 20, height=3, right=40)
    drawn = dots(lines)
    assert max(column for column, _ in drawn) == round(20 / 40 * 39)
    assert {column for column, _ in drawn} == set(range(21))
    assert {row for _, row in drawn} == set(range(12))
    for column in range(20):  # no gap between a column's dots and the next one's
        here, there = ({row for at, row in drawn if at == number} for number in (column, column + 1))
        assert min(abs(a - b) for a in here for b in there) <= 1
    assert lines[-1].endswith("40")


def test_many_points_of_a_column_count_with_their_mean():
    noisy = [(n, n % 2 * 2.0 + n / 1000) for n in range(1000)]
    lines = curve(noisy, width=LABEL + 10, height=4)
    highest, lowest = (float(line.split("│")[0]) for line in (lines[0], lines[3]))
    assert (lowest, highest) == pytest.approx((1.0, 2.0), abs=0.1)  # of 0 to 3


def test_a_level_curve_lies_in_the_middle_and_no_room_gives_nothing():
    assert {row for _, row in dots(curve([(0, 2.0), (5, 2.0)], LABEL + 5, 2))} == {4}
    assert curve([], 40, 8) == curve([(1, 1.0)], LABEL, 8) == curve([(1, 1.0)], 40, 1) == []
    assert curve([(0, math.nan), (1, math.inf), (-1, 1.0), (10**400, 1.0)], 40, 8) == []


@example([(0, -4.6e-176)], 10, 2)
@example([(0, -999.9999)], 10, 2)
@given(
    st.lists(st.tuples(st.integers(-3, 10**400), st.floats() | st.integers(-(10**299), 10**299)), max_size=30),
    st.integers(-5, 120),
    st.integers(-2, 20),
)
def test_any_numbers_keep_to_their_room(points, width, height):
    lines = curve(points, width, height)
    assert len(lines) in (0, height + 1)
    assert all(len(line) <= width for line in lines[:-1])


@pytest.mark.parametrize("width", range(LABEL + 1, LABEL + 12))
def test_the_scale_fits_below_the_curve(width):
    assert len(curve([(0, 1.0), (5, 2.0)], width, 3)[-1]) <= max(width, LABEL + 2)
