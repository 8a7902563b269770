"""docs/methods.md keeps its promises, and names every method of the installed PEFT."""

import re

import pytest

from benchmarks import methods
from benchmarks.cells import fill
from cera_train.adapters.build import check_quantised
from cera_train.common.errors import UserError


def ungrouped(text: str) -> list[str]:
    """The cases that `methods.grouped` has written."""
    names = []
    for method, word, variants in re.findall(r"([^ ,(]+)(?: \((also|with) ([^)]+)\))?", text):
        if word != "with":
            names.append(method)
        if variants:
            names += [f"{method} {variant}" for variant in variants.split(", ")]
    return names


CASES = {case.name: case for case in [*methods.our_cases(), *methods.peft_cases()]}
LINES = methods.PAGE.read_text().splitlines()
WHOLE = next(ungrouped(line) for line in LINES if line.startswith("adapter=cera, "))
EXCEPTIONS = [
    name
    for line in LINES
    if line.startswith("- ")
    for name in ungrouped(line.removeprefix("- ").partition(": ")[0])
]
MECHANISMS = ("OFT",)
"""Tested in CI: a method that turns W0; others have tests of their own."""


def test_every_method_is_on_the_page():
    assert {*CASES} <= {*WHOLE, *EXCEPTIONS}
    assert {*WHOLE} <= {*CASES}


def test_what_fails_over_4_bits_is_refused_before_it_is_built(compose):
    first = LINES.index("### Fails: 4-bit")
    last = LINES.index("### Fails: base")
    failing = {
        name
        for line in LINES[first:last]
        for name in ungrouped(line.removeprefix("- ").partition(": ")[0])
        if name in CASES and "velora" not in name  # PEFT refuses it itself
    }
    assert len(failing) > 30
    for name in failing:
        adapter = compose("data=dates", *CASES[name].words).adapter
        with pytest.raises(UserError, match="set model.quantization=none"):
            check_quantised(adapter)


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
