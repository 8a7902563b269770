"""Records of a run: what is written reads back, and a broken file is named."""

import json
import math
import re
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from cera_train.common.errors import UserError
from cera_train.runs.evaluation_folder import PerplexityResult
from cera_train.runs.folder import Progress
from cera_train.runs.outcomes import LOSSES_AFTER, GradedProblem, TokenLosses, read_grades, read_losses, write_grades
from cera_train.runs.results import RunResult, figure, mean_spectrum


def test_a_perplexity_that_is_infinite_is_null_on_disk_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    evaluation = PerplexityResult("forgetting", "perplexity", math.inf, rows=3)
    for result in (RunResult(math.inf, updates=3), evaluation, Progress(update=3, perplexity=math.inf)):
        result.write(path)
        assert None in json.loads(path.read_text()).values()
        assert type(result).read(path) == result
    assert RunResult().perplexity is None
    assert [figure(value) for value in (math.inf, None, 1234.5678, 1e12)] == ["inf", "–", "1,234.568", "1e+12"]


def test_the_mean_spectrum_is_over_modules_of_any_rank(tmp_path: Path) -> None:
    path = tmp_path / "spectrum.json"
    path.write_text('{"q_proj": {"singular_values": [3.0, 1.0]}, "v_proj": {"singular_values": [2.0]}}')
    assert mean_spectrum(path) == [(0.75 + 1) / 2, 0.25 / 2]
    path.write_text('{"q_proj": {"singular_values": []}}')
    with pytest.raises(UserError, match="spectrum.json: 'q_proj' is broken: singular_values: List should have"):
        mean_spectrum(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"eval/perplexity": "low"}', "eval/perplexity: Input should be a valid number, got 'low'"),
        ('{"eval/perplexity": true}', "eval/perplexity: Input should be a valid number, got 'True'"),
        ('{"gsm8k/exact": "half"}', "gsm8k/exact: Input should be a valid number, got 'half'"),
        (f'{{"seconds": 1{"0" * 400}}}', "seconds: Input should be a valid number, got '1000"),
        ("[1]", "expected names and values"),
        ("{", "Expecting property name"),
    ],
)
def test_a_broken_result_is_named_in_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (path := tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match=f"^{path} is broken") as error:
        RunResult.read(path)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def losses_of(*rows: list[float]) -> TokenLosses:
    tokens = numpy.array([len(row) for row in rows], numpy.int64)
    return TokenLosses(tokens, numpy.array([loss for row in rows for loss in row], numpy.float32))


TOKENS, LOSSES = numpy.array([2, 1]), numpy.ones(3, numpy.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"tokens": TOKENS},
        {"tokens": TOKENS.astype(numpy.float32), "losses": LOSSES},
        {"tokens": TOKENS, "losses": LOSSES.astype(numpy.float64)},
        {"tokens": TOKENS, "losses": LOSSES[:2]},
        {"tokens": numpy.array([4, -1]), "losses": LOSSES},
    ],
)
def test_a_broken_file_of_losses_is_named(tmp_path: Path, tensors: dict) -> None:
    save_file(tensors, path := tmp_path / LOSSES_AFTER)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is broken: .* Restore it"):
        read_losses(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is broken: "):
        read_losses(tmp_path)


def test_an_unfinished_run_has_no_outcomes_yet(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="losses_after.safetensors is missing: let the command that began the run finish"
    ):
        read_losses(tmp_path)
    with pytest.raises(UserError, match=r"grades/gsm8k.jsonl is missing: train with train.tasks=\[gsm8k\]"):
        read_grades(tmp_path, "gsm8k")


@pytest.mark.parametrize(
    "line",
    [
        '{"problem": "a", "scores": [1.0], "endings": []}',
        '{"problem": "a", "scores": [1.0], "endings": ["no such"]}',
        '{"problem": "a", "scores": ["1"], "endings": ["right"]}',
        '{"problem": "a"',
    ],
)
def test_a_broken_line_of_grades_is_named(tmp_path: Path, line: str) -> None:
    write_grades(tmp_path, "gsm8k", [GradedProblem("b", [1.0], ["right"])])
    path = tmp_path / "grades" / "gsm8k.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2 is broken"):
        read_grades(tmp_path, "gsm8k")
