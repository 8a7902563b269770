"""What benchmarks leave behind in the process that runs several of them."""

from __future__ import annotations

import os

from conftest import needs_smollm2

from benchmarks import data


@needs_smollm2
def test_the_benchmark_of_data_leaves_the_environment_as_it_was():
    before = dict(os.environ)
    _, found = data.measure(rows=200)
    assert found["rows"] == 200
    assert dict(os.environ) == before
