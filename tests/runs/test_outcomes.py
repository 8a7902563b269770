"""What a run leaves for a study reads back, is binned by hand, and is refused where it is broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from cera_train.common.errors import UserError
from cera_train.runs.outcomes import (
    LOSSES_AFTER,
    LOSSES_BEFORE,
    GradedProblem,
    TokenLosses,
    read_grades,
    read_losses,
    write_grades,
)


def losses_of(*rows: list[float]) -> TokenLosses:
    tokens = numpy.array([len(row) for row in rows], numpy.int64)
    return TokenLosses(tokens, numpy.array([loss for row in rows for loss in row], numpy.float32))


def test_losses_read_back_row_by_row(tmp_path: Path) -> None:
    before, after = losses_of([1.0, 3.0], [], [0.5, 0.5, 2.0]), losses_of([1.0, 2.0], [], [0.5, 0.25, 1.0])
    after.write(tmp_path / LOSSES_AFTER)
    assert read_losses(tmp_path)[0] is None
    before.write(tmp_path / LOSSES_BEFORE)
    first, last = read_losses(tmp_path)
    assert (first.tokens.tolist(), first.losses.tolist()) == ([2, 0, 3], [1.0, 3.0, 0.5, 0.5, 2.0])
    assert last.sums().tolist() == [3.0, 0.0, 1.75]
    assert last.mean == 4.75 / 5


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
    losses_of([1.0]).write(tmp_path / LOSSES_BEFORE)
    with pytest.raises(
        UserError, match="losses_after.safetensors is missing: let the command that began the run finish"
    ):
        read_losses(tmp_path)
    with pytest.raises(UserError, match=r"grades/gsm8k.jsonl is missing: train with train.tasks=\[gsm8k\]"):
        read_grades(tmp_path, "gsm8k")


def test_grades_read_back_by_task(tmp_path: Path) -> None:
    problems = [GradedProblem("b", [1.0], ["right"]), GradedProblem("a", [0.0, 0.5], ["loop", "collapsed"])]
    write_grades(tmp_path, "gsm8k", problems)
    write_grades(tmp_path, "math", problems[:1])
    assert read_grades(tmp_path, "gsm8k") == problems
    assert read_grades(tmp_path, "math") == problems[:1]
    assert json.loads((tmp_path / "grades" / "math.jsonl").read_text()) == {
        **{"problem": "b", "scores": [1.0], "endings": ["right"]}
    }


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
