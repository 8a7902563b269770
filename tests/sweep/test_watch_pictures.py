"""What `cera-watch` draws of a run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from made_runs import make_run
from rich.cells import cell_len

from cera_train.sweep.watch import WatchedRun


@pytest.fixture
def hostile_run(tmp_path) -> Path:
    """A run whose texts steer a terminal, whose lines are broken, and whose figures are no numbers."""
    run = make_run(tmp_path / "run", finished=False)
    (run / "environment.json").write_text('{"updates": 100}')
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n{"update": 51, "train/loss": Infinity, "train/tokens_per_s": NaN}\n{"update": 52, "tr')
    sample = {"prompt": "What\nis \x1b]0;title\x07 \u202e 7?", "answer": "字" * 300, "gold": "7", "task": "sums"}
    rows = [sample | {"update": update, "exact": grade} for update, grade in ((0, True), (40, False), (40, None))]
    rows += [sample | {"update": 40, "exact": [1]}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"update": 41}x\n')
    return run


@pytest.mark.parametrize("width", [1, 9, 30, 79, 80, 200])
@pytest.mark.parametrize("height", [None, 1, 5, 24, 60])
def test_a_picture_keeps_to_the_terminal_and_steers_nothing(hostile_run, width, height):
    watched = WatchedRun(hostile_run)
    watched.look()
    picture = watched.picture(width, height)
    assert height is None or len(picture) <= height
    for line in picture:
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", line.plain)
        assert cell_len(line.plain) <= width


def test_a_picture_shows_samples_grades_and_how_many_lines_are_broken(hostile_run):
    watched = WatchedRun(hostile_run)
    watched.look()
    lines = [line.plain for line in watched.picture(60)]
    assert "note       4 lines of metrics.jsonl or samples.jsonl cannot be read" in " ".join(watched.lines())
    start = lines.index("samples at update 40")
    assert lines[start + 1] == "prompt     What is \ufffd]0;title\ufffd \ufffd 7?"
    assert lines[start + 2].startswith("  wrong    字字")
    assert lines[start + 3] == "  gold     7"
    assert lines[start + 5].startswith("  ungraded 字字")
    assert len(lines) == start + 7


def test_samples_of_an_evaluation_are_lines_in_a_pipe(hostile_run):
    watched = WatchedRun(hostile_run)
    line = list(watched.look())[-2]
    assert line.startswith("sample at update 40: What is \x1b]0;title\x07 \u202e 7? -> 字")
    assert line.endswith("字 (wrong, gold 7)")


def test_figures_of_tasks_stand_beside_those_of_the_evaluation(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lines = [{"update": 60, "eval/perplexity": 2.5, "gsm8k/exact": 0.25}, {"update": 80, "eval/perplexity": 2.0}]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    watched = WatchedRun(run)
    line = list(watched.look())[-2]
    assert line == "evaluation at update 60: perplexity 2.500; gsm8k exact 25.0%"
    assert watched.lines()[-1] == "tasks      at update 60: gsm8k exact 25.0%"


def test_figures_that_are_no_numbers_draw_nothing(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lines = [{"update": n, name: math.inf} for n in range(3) for name in ("train/loss", "eval/perplexity")]
    lines += [{"update": n, "eval/perplexity": 2.0 + n} for n in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    watched = WatchedRun(run)
    watched.look()
    assert watched.lines()[1] == "update     2  loss inf"
    assert any("│" in line.plain for line in watched.picture(100))
