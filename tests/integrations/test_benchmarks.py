"""That benchmarks still find what they measure, and what they leave behind in the process that runs several."""

from __future__ import annotations

import os

import pytest
from conftest import needs_smollm2

from benchmarks import data, startup


@needs_smollm2
def test_the_benchmark_of_data_leaves_the_environment_as_it_was():
    before = dict(os.environ)
    _, found = data.measure(rows=200)
    assert found["rows"] == 200
    assert dict(os.environ) == before


@needs_smollm2
@pytest.mark.slow
def test_the_benchmark_of_the_start_up_finds_every_line_it_waits_for():
    targets, found = startup.measure(rounds=1)
    assert [target.name for target in targets] == list(startup.AT_MOST)
    seconds = {name: taken for name, (taken,) in found["seconds"].items()}
    assert seconds["imports"] > seconds["a config error"]  # torch's are among them
    assert seconds["the first update"] > seconds["imports"] + seconds["model load"]
