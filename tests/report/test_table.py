"""The table's figures against the files they come from, which runs it has, and what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_runs import add_evaluation, cells, make_run, result_of, two_runs

from cera_train.report.page import compare_runs, page_template, write_report
from cera_train.report.runs import read_runs


def test_every_column_has_the_figures_of_the_files(tmp_path: Path) -> None:
    table = cells(*two_runs(tmp_path))
    assert table["method"] == [("CeRA",), ("LoRA",)]
    assert table["r"] == [("64",), ("512",)]
    assert table["parameters"][0] == ("27,262,976", "0.34% of the model")
    assert table["perplexity"][1] == ("2.020", "best 1.920 at update 80")
    assert table["effective rank, mean / max"] == [("25.6 / 38.4", "of r = 64"), ("204.8 / 307.2", "of r = 512")]
    assert table["manifold dimension, mean / max"] == [("12.8 / 21",), ("102.4 / 170",)]
    assert table["tokens/s"][0] == ("1,234",)
    assert table["peak memory"][0] == ("5.4 GB",)
    assert table["time"][0] == ("1:02:05", "100 updates")
    result = json.loads((tmp_path / "lora_512/eval/math/result.json").read_text())
    lower, upper = result["exact/pass@1/interval"]
    assert table["MATH exact"][1] == ("47.5%", f"{lower:.1%} to {upper:.1%}".replace("%", "", 1))
    assert table["MATH verified"][1][0] == "47.5%"


def test_both_graders_stand_in_the_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    add_evaluation(run, "gsm8k", solved=set(range(10)), verified=set(range(14)))
    table = cells(run)
    assert table["GSM8K exact"][0][0] == "25.0%"
    assert table["GSM8K verified"][0][0] == "35.0%"


def test_the_papers_figures_stand_beside_ours_with_the_difference(tmp_path: Path) -> None:
    table = cells(*two_runs(tmp_path))
    assert table["perplexity"][0] == ("1.850", "best 1.750 at update 80", "paper 1.97", "difference −0.12")
    limited = ("paper 16.36%", "difference +38.64 points", "ours of the first 40 problems")
    assert table["MATH exact"][0][2:] == limited
    assert not any("paper" in note for note in table["MATH exact"][1])


def test_a_published_figure_that_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", published={"math/exact/pass@1": 0.1636})
    assert cells(run)["MATH exact"] == [(None, "paper 16.36%, not measured here")]


def test_several_samples_give_pass_at_one_and_at_n(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    add_evaluation(run, "math", solved=lambda n, sample: sample == 0 and n < 20, samples=4)
    table = cells(run)
    assert table["MATH exact"][0][0] == "12.5%"
    assert table["MATH exact pass@4"][0][0] == "50.0%"


def test_below_pass_at_n_stand_those_of_fewer_answers_with_their_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    path = add_evaluation(run, "math", solved=lambda n, sample: n < 20, samples=8) / "result.json"
    result = json.loads(path.read_text())
    for k in range(2, 8):
        result |= {f"exact/pass@{k}": 0.5 + k / 100, f"exact/pass@{k}/interval": [0.4, 0.6]}
    path.write_text(json.dumps(result))
    table = cells(run)
    assert table["MATH exact pass@8"][0] == (
        *("50.0%", "0.0 to 100.0%", "pass@2 52.0%, 40.0 to 60.0%", "pass@4 54.0%, 40.0 to 60.0%", "8 samples each"),
    )
    assert not any("pass@" in note for note in table["MATH exact"][0])
    assert table["MATH verified pass@8"][0] == ("50.0%", "0.0 to 100.0%")


def test_how_answers_ended_has_a_table_of_its_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    paths = [add_evaluation(run, "gsm8k") / "result.json" for run in runs]
    shares = {"right": 0.125, "wrong": 0.5, "loop": 0.25, "truncated": 0.125, "collapsed": 0.0}
    result = json.loads(paths[0].read_text()) | {f"ending/{name}": share for name, share in shares.items()}
    paths[0].write_text(json.dumps(result))
    label = "GSM8K answers, right / wrong / loop / truncated / collapsed"
    assert cells(*runs)[label] == [("12.5 / 50.0 / 25.0 / 12.5 / 0.0 %",), (None,)]
    page = page_template("report.md").render(report=compare_runs(runs, tmp_path / "report"))
    assert f"\n| run | {label} |\n" in page


def test_none_or_all_of_the_problems_have_the_exact_interval(tmp_path: Path) -> None:
    """1 - 0.025^(1/40) = 8.8 %: a bootstrap of problems that came out alike gives a point."""
    run = make_run(tmp_path / "a")
    add_evaluation(run, "math", solved=set())
    add_evaluation(run, "gsm8k", solved=set(range(40)))
    assert cells(run)["MATH exact"] == [("0.0%", "0.0 to 8.8%")]
    assert cells(run)["GSM8K exact"] == [("100.0%", "91.2 to 100.0%")]


def test_logistic_map_and_forgetting_have_columns_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    add_evaluation(run, "logistic_map", solved={0}, verified=False)
    path = run / "eval/logistic_map/result.json"
    result = json.loads(path.read_text()) | {"step_accuracy/mean": 0.625, "state_collapse": 0.25}
    path.write_text(json.dumps(result))
    forgetting = run / "eval/forgetting"
    forgetting.mkdir()
    (forgetting / "config.yaml").write_text("task: {kind: text, name: forgetting}\n")
    result = {"task": "forgetting", "kind": "perplexity", "perplexity": 12.345, "perplexity_base": 12.0}
    (forgetting / "result.json").write_text(json.dumps(result))
    table = cells(run)
    assert table["logistic map steps right"][0] == ("62.5%",)
    assert table["logistic map state collapse"][0] == ("25.0%",)
    assert "logistic map verified" not in table
    assert table["forgetting perplexity"][0] == ("12.345", "12.000 without adapter")


def test_variants_of_a_method_are_told_apart(tmp_path: Path) -> None:
    relu = make_run(tmp_path / "a", **{"adapter.activation": "relu"})
    scaled = make_run(tmp_path / "b", **{"adapter.kind": "lora", "adapter.alpha": 32, "adapter.r": 512})
    matched = make_run(tmp_path / "c", **{"adapter.kind": "lora", "adapter.alpha": 512, "adapter.r": 512})
    mixed = make_run(tmp_path / "d", **{"adapter.mix": "learned"})
    assert cells(relu, scaled, matched, mixed)["method"] == [
        *(("CeRA (relu)",), ("LoRA (alpha 32)",), ("LoRA",), ("CeRA (learned mix)",))
    ]


def test_a_folder_of_runs_is_all_of_them_in_order_and_each_once(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name in ("r128", "r16", "r64"):
        make_run(sweep / name)
    (sweep / "notes").mkdir()
    runs = read_runs([sweep / "r64", sweep, sweep / ".." / "sweep" / "r16"])
    assert [run.name for run in runs] == ["r64", "r16", "r128"]


def test_the_jobs_of_a_sweep_come_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    names = [f"adapter.r={r},optimizer.lr={lr}" for r in (64, 512) for lr in ("1e-05", "0.0005", "0.001", "0.01")]
    for name in reversed(names):
        make_run(tmp_path / name)
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / ".jobs").mkdir()
    assert [run.name for run in read_runs([tmp_path])] == names


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert [run.name for run in read_runs([first, second])] == ["x/run", "y/run"]


def test_the_base_model_and_an_adapter_take_part_with_their_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", **{"adapter.kind": "dora"})
    for folder in (tmp_path / "base-Llama", run / "best"):
        folder.mkdir()
        add_evaluation(folder, "math", solved={1, 2})
    (run / "best" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True, "r": 64}))
    report = compare_runs([tmp_path / "base-Llama", run / "best"], tmp_path / "report")
    assert [run.name for run in report.runs] == ["base-Llama", "a/best"]
    assert cells(tmp_path / "base-Llama", run / "best")["method"] == [("untouched base",), ("DoRA",)]
    assert "base-Llama has evaluations only: no training figures." in report.missing


@pytest.mark.parametrize("content", ["nothing", "an evaluation", "no folder"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "folder"
    if content != "no folder":
        folder.mkdir()
    if content == "an evaluation":
        folder = add_evaluation(make_run(tmp_path / "a"), "math")
    with pytest.raises(ValueError, match=f"{folder} (holds neither|is not a folder).*expected") as error:
        read_runs([folder])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{broken\n{}\n", b"\xff{}\n", b'[1, "}"]\n{}\n'])
@pytest.mark.parametrize("name", ["config.yaml", "result.json", "spectrum.json", "metrics.jsonl"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / "a")
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{run / name}(:1)? is broken") as error:
        read_runs([run])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["null\n", "{}\n", ""])
@pytest.mark.parametrize("name", ["problems.jsonl", "grades.jsonl"])
def test_a_broken_file_of_an_evaluation_stops_its_test_and_is_named(tmp_path: Path, name: str, content: str) -> None:
    first, second = two_runs(tmp_path)
    (first / "eval/math" / name).write_text(content)
    report = compare_runs([first, second], tmp_path / "report")
    assert report.tests == []
    (note,) = report.test_notes
    assert re.search(rf"{name}:1 is broken|has no problems|no grades for 40", note)


def test_an_unfinished_run_shows_what_it_has_and_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", perplexity=2.0, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 60, "train/lo')  # the line a killed process was writing
    table = cells(run)
    assert table["perplexity"] == [("2.960", "unfinished, at update 40")]
    assert table["effective rank, mean / max"] == [("10.2 / –", "of r = 64")]
    assert table["time"] == [("5:00",)]
    assert "parameters" not in table
    report = compare_runs([run], tmp_path / "report")
    assert report.missing[0] == "a is unfinished (update 50): its row has its latest figures."


def test_what_a_run_lacks_is_named(tmp_path: Path) -> None:
    complete, poor = two_runs(tmp_path)
    poor_result = result_of("lora", 512, 2.0)
    del poor_result["peak_memory_bytes"]
    (poor / "result.json").write_text(json.dumps(poor_result))
    (poor / "spectrum.json").unlink()
    add_evaluation(complete, "gsm8k", finished=False)
    missing = compare_runs([complete, poor], tmp_path / "report").missing
    assert "lora_512 has no peak memory in its result.json." in missing
    assert "lora_512 has no spectrum.json, so the spectra are without it." in missing
    assert "cera_64 has an unfinished evaluation on GSM8K." in missing
    assert "Not evaluated on GSM8K: lora_512." in missing
    assert not any("paper" in line for line in missing)


@pytest.mark.parametrize("key", sorted(result_of("cera", 64, 1.9)))
def test_no_figure_is_needed(tmp_path: Path, key: str) -> None:
    first, second = two_runs(tmp_path)
    result = json.loads((first / "result.json").read_text())
    del result[key]
    (first / "result.json").write_text(json.dumps(result))
    report = compare_runs([first, second], tmp_path / "report")
    assert [run.name for run in report.runs] == ["cera_64", "lora_512"]
    if key == "eval/perplexity":
        assert cells(first)["perplexity"] == [(None, "paper 1.97, not measured here")]


def test_a_published_figure_without_a_column_and_an_evaluation_without_settings_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", published={"spectrum/dead_units/mean": 0.25, "spectrum/effective_rank/max": 330.0})
    (add_evaluation(run, "math") / "config.yaml").unlink()
    missing = compare_runs([run], tmp_path / "report").missing
    assert "a has no column for the paper's spectrum/dead_units/mean, 0.25." in missing
    assert not any("effective_rank" in line for line in missing)
    assert "a has no config.yaml in eval/math, which is left out." in missing


def test_adapters_that_give_no_output_have_no_spectra(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    module = {"effective_rank": 0.0, "manifold_dimension": 0, "dead_units": None, "singular_values": [0.0] * 4}
    (run / "spectrum.json").write_text(json.dumps({"q_proj": module}))
    assert "Spectra: no adapter gives an output." in write_report([run], tmp_path / "report").not_shown
