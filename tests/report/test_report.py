"""The report's figures against the files they come from; what it refuses to compare; what it says is missing."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import matplotlib
import pytest
from made_runs import add_evaluation, make_run, result_of, two_runs
from matplotlib.figure import Figure

from cera_train.card import escape
from cera_train.drawing import LONGEST_LABEL, Picture, render, shortened
from cera_train.report import say_report, write_report
from cera_train.report.comparison import paired_tests
from cera_train.report.page import compare_runs
from cera_train.report.pictures import MOST_POINTS, thinned
from cera_train.report.runs import read_runs
from cera_train.report.table import build_columns


def cells(*folders: Path) -> dict[str, list]:
    """Columns by label: [(value, notes), ...] in the order of the runs."""
    columns = build_columns(read_runs(folders))
    return {column.label: [(cell.value, *cell.notes) for cell in column.cells] for column in columns}


# --- the table -------------------------------------------------------------------------------------------------------


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
    assert cells(relu, scaled, matched)["method"] == [("CeRA (relu)",), ("LoRA (alpha 32)",), ("LoRA",)]


# --- which runs ------------------------------------------------------------------------------------------------------


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


def test_a_long_name_is_shortened_in_the_middle() -> None:
    assert shortened("math_r64") == "math_r64"
    assert len(short := shortened("x" * 100 + "r=64")) == LONGEST_LABEL
    assert short.endswith("r=64")


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
    assert re.search(rf"{name}:1 is broken|evaluated on different problems \(0 and 40|no grades for 40", note)


# --- what is missing -------------------------------------------------------------------------------------------------


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
        "Accuracy against parameters",
    ]
    text = (tmp_path / "report/report.md").read_text()
    assert "Spectra: no run has a spectrum.json." in text
    assert "Effective rank against rank: only a has a figure" in text


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_paired_tests_count_the_problems_that_one_run_solves(tmp_path: Path) -> None:
    (test,), notes = paired_tests(read_runs(two_runs(tmp_path)))
    assert (test.mcnemar.only_first, test.mcnemar.only_second, test.problems) == (12, 9, 40)
    assert test.difference.difference == pytest.approx(-3 / 40)
    assert test.verdict == "no difference shown"
    assert "12 to 9 of 40 problems that only one of them solves, p = 0.66" in test.evidence
    assert "−7.5 points for lora_512 (95 % interval by paired bootstrap −" in test.evidence
    assert "disagree" not in test.evidence
    assert notes == []


def test_a_shown_difference_names_the_better_run(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_evaluation(first, solved={0})
    add_evaluation(second, solved=set(range(15)))
    (test,), _ = paired_tests(read_runs([first, second]))
    assert test.verdict == "b is better"
    assert "0 to 14 of 40" in test.evidence
    assert "p < 0.001" in test.evidence


def test_tests_use_the_exact_rule_where_one_run_was_not_verified(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_evaluation(first, solved={0, 1}, verified={0, 1, 2, 3})
    add_evaluation(second, solved={0, 1}, verified=False)
    (test,), _ = paired_tests(read_runs([first, second]))
    assert test.grader == "exact"
    assert test.difference.difference == 0


def test_several_samples_are_tested_by_their_mean_for_each_problem(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_evaluation(first, solved=lambda n, sample: sample == 0, samples=4)
    add_evaluation(second, solved=lambda n, sample: sample < 2, samples=4)
    (test,), _ = paired_tests(read_runs([first, second]))
    assert test.mcnemar is None
    assert test.difference.difference == pytest.approx(0.25)
    assert test.verdict == "b is better"


def test_different_problems_are_not_compared_and_the_report_says_why(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_evaluation(first)
    add_evaluation(second, problems=30)
    report = write_report([first, second], tmp_path / "report")
    assert report.tests == []
    assert "GSM8K, a and b: evaluated on different problems (40 and 30, 30 of them shared)" in report.test_notes[0]
    assert "different problems (40 and 30" in (tmp_path / "report/report.html").read_text()


def test_where_the_two_tests_disagree_the_exact_one_decides(tmp_path: Path) -> None:
    """None to five of 40: McNemar's p is 1/16, and the bootstrap's interval begins above zero."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, solved in zip(runs, (set(), set(range(5))), strict=True):
        add_evaluation(run, solved=solved)
    (test,), _ = paired_tests(read_runs(runs))
    assert test.mcnemar.p_value == 1 / 16
    assert test.interval_leaves_out_zero
    assert test.verdict == "no difference shown"
    assert "the two tests disagree, and McNemar's, which is exact, decides" in test.evidence


def test_trajectories_are_tested_by_their_steps_without_the_papers_case(tmp_path: Path) -> None:
    """The second run has one step of four right where the first has none, on every problem but the paper's."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, right in zip(runs, (0, 1), strict=True):
        folder = add_evaluation(run, "logistic_map", solved=set(), verified=False)
        grades = [json.loads(line) for line in (folder / "grades.jsonl").read_text().splitlines()]
        for grade in grades:
            is_paper_case = grade is grades[-1]
            grade["matches"] = [is_paper_case or step < right for step in range(4)]
        (folder / "grades.jsonl").write_text("".join(json.dumps(grade) + "\n" for grade in grades))
        lines = (folder / "problems.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | {"paper_case": True})
        (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")
    (test,), _ = paired_tests(read_runs(runs))
    assert (test.problems, test.means, test.mcnemar) == (39, (0.0, 0.25), None)
    assert test.verdict == "b is better"
    assert test.evidence.startswith("mean over 39 problems, by steps: +25.0 points for b")


def test_grades_that_are_missing_stop_the_test_not_the_report(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    grades = first / "eval/math/grades.jsonl"
    grades.write_text("".join(grades.read_text().splitlines(keepends=True)[:-2]))
    report = compare_runs([first, second], tmp_path / "report")
    assert "no grades for 2 of its 40 problems" in report.test_notes[0]


def test_more_than_six_runs_are_each_tested_against_the_first(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abcdefg"]
    for run in runs:
        add_evaluation(run, solved={1})
    tests, notes = paired_tests(read_runs(runs))
    assert [(test.first, test.second) for test in tests] == [("a", name) for name in "bcdefg"]
    assert notes[0] == "GSM8K: each of 7 runs is tested against the first only, a."
    assert notes[1].startswith("These are 6 tests")


def test_perplexities_on_different_rows_are_said_not_to_compare(tmp_path: Path) -> None:
    same = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"data.train_rows": 1000})]
    assert compare_runs(same, tmp_path / "report").cautions == []
    other = make_run(tmp_path / "c", **{"data.loss_on": "completion"})
    report = compare_runs([*same, other], tmp_path / "report")
    assert "tokens (data.loss_on), and cannot be ranked: a, b | c." in report.cautions[0]
    assert "Perplexity against rank (a, b)" in [picture.title for picture in report.pictures]
    assert any("evaluation rows and model as c" in line for line in report.not_shown)


def test_the_hub_does_not_matter_to_rows_from_files(tmp_path: Path) -> None:
    files = {"data.train_files": ["train.jsonl"], "data.eval_files": ["test.jsonl"]}
    runs = [make_run(tmp_path / "a", **files), make_run(tmp_path / "b", **files, **{"data.path": "other/set"})]
    assert compare_runs(runs, tmp_path / "report").cautions == []


def test_held_out_rows_depend_on_the_training_files(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, **{"data.train_files": [f"{name}.jsonl"], "data.eval_rows": 9}) for name in "ab"]
    assert (
        "tokens (data.train_files), and cannot be ranked: a | b." in compare_runs(runs, tmp_path / "report").cautions[0]
    )


def test_spectra_on_probes_of_different_size_are_said_not_to_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, **{"train.probe_tokens": size}) for name, size in (("a", 512), ("b", 2048))]
    (note,) = compare_runs(runs, tmp_path / "report").cautions
    assert note == "Spectra are taken on probes of different size: a | b."


def test_accuracies_on_different_problems_are_said_not_to_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, problems in zip(runs, (40, 30, 40), strict=True):
        add_evaluation(run, problems=problems)
    assert (
        "Accuracies on GSM8K are of different problems: a, c | b." in compare_runs(runs, tmp_path / "report").cautions
    )


def test_perplexities_of_a_task_on_different_rows_are_said_not_to_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, window in zip(runs, (1024, 512, 1024), strict=True):
        folder = run / "eval/forgetting"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"task: {{kind: text, name: forgetting, window: {window}}}\n")
        (folder / "result.json").write_text('{"task": "forgetting", "kind": "perplexity", "perplexity": 12.0}')
    (note,) = compare_runs(runs, tmp_path / "report").cautions
    assert note.startswith("The perplexities of task forgetting are on different rows")
    assert note.endswith("a, c | b.")


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


def test_a_run_that_diverged_is_named_and_breaks_no_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", perplexity=float("inf"))]
    report = write_report([*runs, make_run(tmp_path / "c")], tmp_path / "report")
    assert "b has diverged (perplexity inf): pictures leave out what is not finite." in report.missing
    assert cells(*runs)["perplexity"][1][0] == "inf"
    assert "perplexity-rank" in [picture.name for picture in report.pictures]


def test_different_base_models_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"model.path": "meta-llama/Llama-3.2-1B"})]
    assert (
        "share a tokenizer: a: meta-llama/Llama-3.1-8B, bfloat16; b: meta-llama/Llama-3.2-1B, bfloat16"
        in (compare_runs(runs, tmp_path / "report").cautions[0])
    )


def test_evaluations_with_other_settings_are_said(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_evaluation(first)
    add_evaluation(second, **{"task.max_new_tokens": 256})
    report = compare_runs([first, second], tmp_path / "report")
    assert report.cautions == ["Evaluations on GSM8K differ in their settings: task.max_new_tokens 512 and 256."]


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"optimizer.lr": 1e-3})]
    assert compare_runs(runs, tmp_path / "report").settings == {"optimizer.lr": ["0.0003", "0.001"]}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (
            ["/opt/bin/cera-train", "+recipe=math_r64", "data.prompt=Q: {q}"],
            "cera-train +recipe=math_r64 'data.prompt=Q: {q}'",
        ),
        (["/src/cera_train/__main__.py", "name=a"], "python -m cera_train name=a"),
        (None, "not on record"),
    ],
)
def test_the_command_of_a_run_is_shown(tmp_path: Path, words: list[str] | None, command: str) -> None:
    run = make_run(tmp_path / "a")
    (run / "environment.json").write_text(json.dumps({"command": words} if words else {}))
    write_report([run], tmp_path / "report")
    html = unescape((tmp_path / "report/report.html").read_text())
    assert f"<code>{command}</code>" in html or f"<dd>{command}</dd>" in html
    assert f"- a: {escape(command)}" in (tmp_path / "report/report.md").read_text()


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_report_is_two_files_and_the_pictures_they_show(tmp_path: Path) -> None:
    report = write_report(two_runs(tmp_path / "runs"), tmp_path / "deep" / "report")
    text = (report.output / "report.md").read_text()
    shown = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(shown) == 7
    assert {path.name for path in report.output.iterdir()} == {"report.md", "report.html", *shown}
    for name in shown:
        assert (report.output / name).read_bytes().startswith(b"\x89PNG")
    assert "12 to 9 of 40 problems" in text
    assert "column space of B, so its effective rank is at most r" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", rows[0])) for row in rows[:4])


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


def test_a_report_of_real_runs(tiny_config, tmp_path: Path) -> None:
    from cera_train.train import train

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
    assert caution.endswith("a: CPU, 2 threads, 1 processes; b: NVIDIA H100, 1 processes.")


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
