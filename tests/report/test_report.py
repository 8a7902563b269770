"""The files of a report and what the terminal shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_runs import cells, make_run, two_runs

from cera_train.report.page import compare_runs, say_report, write_report
from cera_train.report.runs import read_runs


def test_the_same_runs_give_the_same_report_byte_for_byte(tmp_path: Path) -> None:
    runs = two_runs(tmp_path / "runs")
    for name in ("one", "other"):
        write_report(runs, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_the_terminal_shows_table_tests_and_what_is_missing(tmp_path: Path, capsys) -> None:
    say_report(write_report(two_runs(tmp_path), tmp_path / "report"))
    shown = capsys.readouterr().out
    assert re.search(r"cera_64 +CeRA +64 +27,262,976 +1\.850 +55\.0%", shown)
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 100
    assert "difference +38.64 points" in shown
    assert "MATH, cera_64 and lora_512: no difference shown: 12 to 9" in shown
    assert "at most r" in shown
    assert f"report      {tmp_path}/report/report.html" in shown


def test_a_report_of_real_runs(tiny_config, tmp_path: Path) -> None:
    from cera_train.training.train import train

    for kind in ("cera", "lora"):
        train(
            tiny_config(f"adapter={kind}", "adapter.r=4", f"name={kind}", "train.max_updates=4", "train.eval_every=2")
        )
    report = write_report([tmp_path / "outputs"], tmp_path / "report")
    table = cells(tmp_path / "outputs")
    for index, kind in enumerate(("cera", "lora")):
        result = json.loads((tmp_path / "outputs" / kind / "result.json").read_text())
        assert table["perplexity"][index][0] == f"{result['eval/perplexity']:.3f}"
        assert table["parameters"][index][0] == f"{result['trainable_parameters']:,}"
        assert table["effective rank, mean / max"][index][0] == "{:.1f} / {:.1f}".format(
            result["spectrum/effective_rank/mean"], result["spectrum/effective_rank/max"]
        )
    assert report.settings == {"adapter.kind": ["cera", "lora"]}
    assert report.cautions == []
    assert [picture.name for picture in report.pictures] == [
        "perplexity-rank", "effective-rank", "manifold-dimension", "spectra", "training-curves", "evaluation-curves",
        "linear-share",
    ]  # fmt: skip


def test_copies_of_a_run_are_named_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", name="a"), make_run(tmp_path / "a_copy", name="a")]
    assert [run.name for run in read_runs(runs)] == ["a", "a_copy"]


def test_another_quantization_is_another_base_model(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"model.quantization": "nf4"})]
    assert "b: meta-llama/Llama-3.1-8B, bfloat16, nf4" in compare_runs(runs, tmp_path / "report").cautions[0]


def test_a_null_setting_is_as_good_as_none(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"data.later_key": None})]
    assert compare_runs(runs, tmp_path / "report").cautions == []


def test_different_machines_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    for run, gpus in zip(runs, ([], ["NVIDIA H100"]), strict=True):
        environment = {"gpus": gpus, "cpu_threads": 2, "processes": 1}
        (run / "environment.json").write_text(json.dumps(environment))
    caution = compare_runs(runs, tmp_path / "report").cautions[0]
    assert caution.endswith("a: CPU, 2 threads, 1 process; b: NVIDIA H100, 1 process.")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(ValueError, match="expected a folder"):
        write_report([make_run(tmp_path / "a")], tmp_path / "report")


def test_figures_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    result = json.loads((run / "result.json").read_text())
    odd = {"seconds": float("nan"), "eval/perplexity": float("nan"), "best_perplexity": None}
    (run / "result.json").write_text(json.dumps(result | odd))
    cells = {column.label: column.cells[0].text for column in compare_runs([run], tmp_path / "report").columns}
    assert (cells["time"], cells["perplexity"]) == ("nan", "nan")


def test_a_pipe_gets_plain_text_whose_cells_are_not_wrapped(tmp_path: Path, capsys) -> None:
    runs = [make_run(tmp_path / ("n" * 150)), make_run(tmp_path / "b")]
    say_report(write_report(runs, tmp_path / "report"))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "n" * 150 in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())
