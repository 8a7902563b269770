"""The forest plot: where its marks are, what it says without colour, and that it is safe."""

import math
import re
from xml.etree import ElementTree

import pytest
from made_runs import HOSTILE

from cera_train.report.forest import HALF_PLOT, ZERO, Forest, Group, Row

SVG = "{http://www.w3.org/2000/svg}"


def row(label: str = "a - b", mark: str = "not shown", **numbers: float) -> Row:
    places = {"difference": -10.0, "lower": -20.0, "upper": -1.0, "detectable": 5.0} | numbers
    return Row(label, "-0.1 (-0.2 to -0.01)", mark, mark, **places, repeats=[-9.0, -11.0])


def forest(*rows: Row) -> Forest:
    return Forest("verdicts", "Which is better?", "What it shows.", [Group("One", "unit", rows)])


def drawn(picture: Forest) -> list[ElementTree.Element]:
    """The elements of each row."""
    svg = ElementTree.fromstring(picture.svg)
    return [group for group in svg.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]


def numbers_of(path: ElementTree.Element) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path.get("d"))]


def test_marks_are_at_the_inverse_hyperbolic_sine_of_a_difference():
    [group] = drawn(forest(row()))

    def place(difference: float) -> float:
        return pytest.approx(ZERO + HALF_PLOT * math.asinh(difference) / math.asinh(20), abs=0.06)

    interval, repeats = group.findall(f"{SVG}path")
    left, _, right = numbers_of(interval)
    assert (left, right) == (place(-20), place(-1))
    assert numbers_of(repeats)[::3] == [place(-9), place(-11)]
    assert float(group.find(f"{SVG}circle").get("cx")) == place(-10)
    band = group.find(f"{SVG}rect")
    assert float(band.get("x")) == place(-5)
    assert float(band.get("x")) + float(band.get("width")) == place(5)


def test_a_bound_that_is_not_known_is_at_the_end_of_the_plot():
    unbounded = {"lower": -math.inf, "upper": math.inf, "detectable": math.inf}
    [group] = drawn(forest(row(**unbounded)))
    left, _, right = numbers_of(group.find(f"{SVG}path"))
    assert (left, right) == (ZERO - HALF_PLOT, ZERO + HALF_PLOT)


def test_it_says_in_words_what_it_shows_and_hostile_text_stays_text():
    picture = forest(row(label=f"{HOSTILE} - b"))
    svg = ElementTree.fromstring(picture.svg)
    assert svg.find(f"{SVG}title").text == "Which is better?"
    assert "not shown, -0.1 (-0.2 to -0.01)." in svg.find(f"{SVG}desc").text
    assert "<script" not in picture.svg
    assert not re.search(r"(href|src|url\()", re.sub(r"&[^;]*;|\w+&", "", picture.svg))
