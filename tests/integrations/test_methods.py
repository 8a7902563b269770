"""docs/methods.md keeps its promises, and names every method of the installed PEFT."""

import pytest

from benchmarks import methods
from benchmarks.cells import fill

CASES = {case.name: case for case in [*methods.our_cases(), *methods.peft_cases()]}
LINES = methods.PAGE.read_text().splitlines()
WHOLE = next(methods.ungrouped(line) for line in LINES if line.startswith("adapter=cera, "))
EXCEPTIONS = [
    name
    for line in LINES
    if line.startswith("- ")
    for name in methods.ungrouped(line.removeprefix("- ").partition(": ")[0])
]
MECHANISMS = ("OFT",)
"""Tested in CI: a method that turns W0; others have tests of their own."""


def test_every_method_is_on_the_page():
    assert {*CASES} <= {*WHOLE, *EXCEPTIONS}
    assert {*WHOLE} <= {*CASES}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in MECHANISMS else pytest.mark.nightly)
        for name in CASES
    ],
)
def test_the_page_is_right_about_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "WORK", tmp_path)
    row = fill(
        tmp_path / "cells.json",
        [name],
        [*methods.CHECKS],
        lambda _, check: methods.cell(CASES[name], check),
    )[name]
    assert name not in WHOLE or set(row.values()) == {methods.YES}, row
    # what is refused is refused by us, not by a traceback
    assert "Error: " not in row["trains"]
