"""Records of a run: what is written reads back, and a broken file is named."""

import math
import re

import numpy
import pytest
from safetensors.numpy import save_file

from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.runs.evaluation_folder import PerplexityResult
from cera_train.runs.folder import Progress
from cera_train.runs.results import (
    LOSSES_AFTER,
    GradedProblem,
    RunResult,
    TokenLosses,
    figure,
    read_grades,
    write_grades,
)


def test_an_infinite_perplexity_is_null_on_disk_and_reads_back(tmp_path):
    path = tmp_path / "result.json"
    evaluation = PerplexityResult("forgetting", "perplexity", math.inf, rows=3)
    for result in (
        RunResult(math.inf, updates=3),
        evaluation,
        Progress(update=3, perplexity=math.inf),
    ):
        result.write(path)
        assert None in read_json(path).values()
        assert type(result).read(path) == result
    assert RunResult().perplexity is None
    assert [figure(value) for value in (math.inf, None)] == ["inf", "–"]


def test_a_broken_or_missing_file_of_losses_or_grades_is_named(tmp_path):
    path = tmp_path / LOSSES_AFTER
    broken = rf"^{re.escape(str(path))} is broken: "
    for tensors in ({"tokens": numpy.array([2, 1])}, {"a": numpy.ones(3)}):
        save_file(tensors, path)
        with pytest.raises(UserError, match=f"{broken}.* Restore it"):
            TokenLosses.read(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=broken):
        TokenLosses.read(path)
    with pytest.raises(
        UserError, match="gsm8k.jsonl is broken: No such file .* with this task in train.tasks"
    ):
        read_grades(tmp_path, "gsm8k")
    write_grades(tmp_path, "gsm8k", [GradedProblem("b", 1.0, "right")])
    path = tmp_path / "grades" / "gsm8k.jsonl"
    valid = path.read_text()
    for line in ('{"problem": "a", "score": "1", "ending": "right"}', '{"problem": "a"'):
        path.write_text(f"{valid}{line}\n")
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2 is broken"):
            read_grades(tmp_path, "gsm8k")
