"""What the pictures show, and which are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import add_evaluation, make_run, two_runs
from matplotlib.figure import Figure

from cera_train.common.pages import Picture
from cera_train.report.page import compare_runs
from cera_train.report.pictures import MOST_POINTS, thinned


def pictures_of(*runs: Path) -> dict[str, Picture]:
    return {picture.name: picture for picture in compare_runs(runs).pictures}


def test_the_pictures_of_two_runs(tmp_path: Path) -> None:
    names = ["perplexity-by-rank", "effective-rank-by-rank", "spectra", "training-curves", "evaluation-curves",
             "linear-share", "accuracy-math"]  # fmt: skip
    assert list(pictures_of(*two_runs(tmp_path))) == names


def test_the_linear_share_is_drawn_by_update(tmp_path: Path) -> None:
    picture = pictures_of(make_run(tmp_path / "a"))["linear-share"]
    assert picture.alt == "Linear share by update. a: 0.98 to 0.9."
    picture.draw(axes := Figure().subplots())
    (line,) = axes.lines
    assert list(line.get_xdata()) == [20, 40, 60, 80, 100]  # at update 0 the branch gives no output
    assert list(line.get_ydata()) == pytest.approx([0.98, 0.96, 0.94, 0.92, 0.9])


def test_the_accuracy_of_trajectories_is_drawn_by_their_steps(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, share in zip(runs, (0.25, 0.5), strict=True):
        path = add_evaluation(run, "logistic_map", verified=False) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step_accuracy/mean": share}))
    picture = pictures_of(*runs)["accuracy-logistic_map"]
    assert picture.alt.endswith("a: 25.0%; b: 50.0%.")
    picture.draw(axes := Figure().subplots())
    assert {point for line in axes.lines for point in line.get_ydata()} == {25, 50}


def test_runs_on_other_rows_or_that_diverged_are_not_drawn_beside_the_rest(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    runs.append(make_run(tmp_path / "c", held_out="others"))
    runs.append(make_run(tmp_path / "d", perplexity=float("inf")))
    assert pictures_of(*runs)["perplexity-by-rank"].alt.count("CeRA r = 64") == 2


def test_a_long_curve_is_thinned() -> None:
    line = [(update, float(update)) for update in range(4689)]
    assert MOST_POINTS / 2 < len(thinned(line)) <= MOST_POINTS
    assert thinned(line)[-1] == line[-1]
    assert thinned([*line[:5], (5, None)]) == line[:5]
