"""What the pictures show, and which are left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pytest
from made_runs import add_evaluation, cells, make_run, result_of, two_runs
from matplotlib.figure import Figure

from cera_train.common.drawing import LONGEST_LABEL, Picture, render, shortened
from cera_train.report.page import compare_runs, write_report
from cera_train.report.pictures import MOST_POINTS, thinned


def test_a_long_name_is_shortened_in_the_middle() -> None:
    assert shortened("math_r64") == "math_r64"
    assert len(short := shortened("x" * 100 + "r=64")) == LONGEST_LABEL
    assert short.endswith("r=64")


def test_a_picture_without_figures_is_left_out_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for name in ("spectrum.json", "metrics.jsonl"):
        (run / name).unlink()
    report = write_report([run], tmp_path / "report")
    assert report.pictures == []
    assert [line.split(":")[0] for line in report.not_shown] == [
        "Perplexity against rank",
        "Effective rank against rank",
        "Manifold dimension against rank",
        "Spectra",
        "Training curves",
        "Evaluation curves",
        "Linear share",
        "Accuracy against parameters",
    ]
    text = (tmp_path / "report/report.md").read_text()
    assert "Spectra: no run has a spectrum.json." in text
    assert "Effective rank against rank: only a has a figure" in text


def test_spectra_on_probes_of_different_size_are_said_not_to_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, **{"train.probe_tokens": size}) for name, size in (("a", 512), ("b", 2048))]
    (note,) = compare_runs(runs, tmp_path / "report").cautions
    assert note == "Spectra are taken on probes of different size: a | b."


def test_a_figure_that_no_run_has_is_left_out_of_its_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        result = result_of("cera", 64, 1.9)
        del result["spectrum/effective_rank/max"]
        (run / "result.json").write_text(json.dumps(result))
    report = write_report(runs, tmp_path / "report")
    assert "effective-rank" in [picture.name for picture in report.pictures]
    assert cells(*runs)["effective rank, mean / max"][0] == ("25.6 / –", "of r = 64")


def test_the_accuracy_of_trajectories_is_drawn_by_their_steps(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, share in zip(runs, (0.25, 0.5), strict=True):
        path = add_evaluation(run, "logistic_map", verified=False) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step_accuracy/mean": share}))
    pictures = {picture.name: picture for picture in compare_runs(runs, tmp_path / "report").pictures}
    picture = pictures["accuracy-logistic_map"]
    assert picture.alt.endswith("a: 25.0%; b: 50.0%.")
    assert picture.caption == "Steps right."
    picture.draw(axes := Figure().subplots())
    assert {point for line in axes.lines for point in line.get_ydata()} == {25, 50}


def test_the_figures_of_tasks_during_training_are_curves(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, **{"train.tasks_limit": 50}) for name in "abc"]
    for run, shares in zip(runs[:2], ((0.0, 0.25), (0.1, 0.5)), strict=True):
        path = run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for update, share in zip((0, 100), shares, strict=True):
            line = next(line for line in lines if "eval/loss" in line and line["update"] == update)
            line |= {"gsm8k/exact": share, "logistic_map/state_collapse": share}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = {picture.name: picture for picture in compare_runs(runs, tmp_path / "report").pictures}
    picture = pictures["training-gsm8k-exact"]
    assert picture.title == "GSM8K during training: exact"
    assert picture.alt == "Exact by update. a: 0 to 0.25; b: 0.1 to 0.5."
    assert picture.caption.startswith("Greedy answers to the first 50 problems")
    picture.draw(axes := Figure().subplots())
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 100], [0, 100]]
    assert pictures["training-logistic_map-state_collapse"].title == "logistic map during training: state collapse"


def test_the_linear_share_is_drawn_by_update(tmp_path: Path) -> None:
    report = compare_runs([make_run(tmp_path / "a")], tmp_path)
    (picture,) = (own for own in report.pictures if own.name == "linear-share")
    assert picture.alt == "Linear share by update. a: 0.98 to 0.9."
    picture.draw(axes := Figure().subplots())
    (line,) = axes.lines
    assert list(line.get_xdata()) == [20, 40, 60, 80, 100]  # at update 0 the branch gives no output
    assert list(line.get_ydata()) == pytest.approx([0.98, 0.96, 0.94, 0.92, 0.9])


def test_a_run_that_diverged_is_named_and_breaks_no_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", perplexity=float("inf"))]
    report = write_report([*runs, make_run(tmp_path / "c")], tmp_path / "report")
    assert "b has diverged (perplexity inf): pictures leave out what is not finite." in report.missing
    assert cells(*runs)["perplexity"][1][0] == "inf"
    assert "perplexity-rank" in [picture.name for picture in report.pictures]


def test_the_report_is_two_files_and_the_pictures_they_show(tmp_path: Path) -> None:
    report = write_report(two_runs(tmp_path / "runs"), tmp_path / "deep" / "report")
    text = (report.output / "report.md").read_text()
    shown = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(shown) == 8
    assert {path.name for path in report.output.iterdir()} == {"report.md", "report.html", *shown}
    for name in shown:
        assert (report.output / name).read_bytes().startswith(b"\x89PNG")
    assert "12 to 9 of 40 problems" in text
    assert "column space of B, so its effective rank is at most r" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", rows[0])) for row in rows[:4])


@pytest.mark.parametrize("losses", [(3.0, 0.25), (300.0, 0.002), (2.0, 0.0)])
def test_the_ticks_of_a_curve_are_plain_numbers(tmp_path: Path, losses: tuple[float, float]) -> None:
    run = make_run(tmp_path / "a")
    lines = [json.dumps({"update": update, "train/loss": loss}) for update, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (picture,) = [own for own in compare_runs([run], tmp_path).pictures if own.name == "training-curves"]
    figure = Figure()
    with matplotlib.rc_context({"text.parse_math": False}):
        picture.draw(axes := figure.subplots())
        figure.draw_without_rendering()
        axis = axes.yaxis
        low, high = axes.get_ylim()
        texts = [
            tick.label1.get_text()
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            if low <= tick.get_loc() <= high and tick.label1.get_text()
        ]
    assert len(texts) >= 3
    assert all(float(text) >= 0 for text in texts)


def test_every_run_has_its_line_in_the_legend() -> None:
    def draw(axes) -> None:
        for number in range(12):
            axes.plot([0, 1], [number, number], label=f"run {number}")

    svg = render(Picture("a", "A", "", "", draw), "svg").decode()
    assert [name for name in re.findall(r">(run \d+)<", svg)] == [f"run {number}" for number in range(12)]


def test_a_long_curve_is_averaged_over_stretches() -> None:
    line = [(update, float(update)) for update in range(4689)]
    thin = thinned(line)
    assert len(thin) <= MOST_POINTS
    assert thin[0] == (5.5, 5.5)
    assert thinned(line[:5]) == line[:5]
