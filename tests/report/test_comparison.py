"""Paired tests, and what the report refuses to compare."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest
from made_runs import add_evaluation, make_run, two_runs

from cera_train.report.comparison import paired_tests
from cera_train.report.page import compare_runs, write_report
from cera_train.report.runs import read_runs
from cera_train.runs.card import escape


def test_paired_tests_count_the_problems_that_one_run_solves(tmp_path: Path) -> None:
    (test,), notes = paired_tests(read_runs(two_runs(tmp_path)))
    assert (test.mcnemar.only_first, test.mcnemar.only_second, test.problems) == (12, 9, 40)
    assert test.difference.difference == pytest.approx(-3 / 40)
    assert test.verdict == "no difference shown"
    assert "12 to 9 of 40 problems that only one of them solves, p = 0.66" in test.evidence
    assert "−7.5 points for lora_512 (95 % interval by paired bootstrap −" in test.evidence
    assert notes == []


def test_a_shown_difference_names_the_better_run(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_evaluation(first, solved={0})
    add_evaluation(second, solved=set(range(15)))
    (test,), _ = paired_tests(read_runs([first, second]))
    assert test.verdict == "b is better"
    assert "0 to 14 of 40" in test.evidence
    assert "p < 0.001" in test.evidence


def test_problems_in_another_order_are_paired_by_name(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for run in (first, second):
        folder = add_evaluation(run, solved=set(range(10)), problems=20)
    lines = (folder / "problems.jsonl").read_text().splitlines(keepends=True)
    (folder / "problems.jsonl").write_text("".join(reversed(lines)))
    (test,), _ = paired_tests(read_runs([first, second]))
    assert "0 to 0 of 20" in test.evidence
    assert "no problem where they differ" in test.evidence


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


def test_few_problems_that_differ_are_not_shown_by_the_interval(tmp_path: Path) -> None:
    """Five problems of 40 all speak for b: p is 1/16 for one answer and for several, and the interval begins above
    zero."""
    for samples in (1, 4):
        runs = [make_run(tmp_path / f"{samples}{name}") for name in "ab"]
        for run, solved in zip(runs, (0, 5), strict=True):
            add_evaluation(run, solved=lambda n, sample, solved=solved: n < solved and sample < 2, samples=samples)
        (test,), _ = paired_tests(read_runs(runs))
        assert test.p_value == 1 / 16
        assert test.difference.lower > 0
        assert test.verdict == "no difference shown"
        assert "p = 0.062" in test.evidence


@pytest.mark.slow
def test_p_is_corrected_over_the_pairs_of_a_task(tmp_path: Path) -> None:
    """Seven problems to none: p is 1/64 for two runs alone, and 6/64 as the smallest of six pairs."""
    runs = [make_run(tmp_path / name) for name in "abcd"]
    for run in runs:
        add_evaluation(run, solved=set(range(7 if run.name == "d" else 0)))
        add_evaluation(run, "math", solved={0})
    (alone,) = [test for test in paired_tests(read_runs(runs[2:]))[0] if test.task == "gsm8k"]
    assert (alone.p_value, alone.verdict) == (1 / 64, "d is better")
    tests, notes = paired_tests(read_runs(runs))
    assert [test.p_value for test in tests if test.task == "gsm8k"] == [1, 1, 6 / 64, 1, 6 / 64, 6 / 64]
    assert not any(test.is_shown for test in tests)
    assert "p = 0.094" in tests[2].evidence
    assert notes == []
    for name in ("report.md", "report.html"):
        write_report(runs, tmp_path / "report")
        assert "after Holm over the pairs of a task" in (tmp_path / "report" / name).read_text()


def test_trajectories_are_tested_by_their_steps(tmp_path: Path) -> None:
    """The second run has one step of four right where the first has none, on every problem."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, right in zip(runs, (0, 1), strict=True):
        folder = add_evaluation(run, "logistic_map", solved=set(), verified=False)
        grades = [json.loads(line) for line in (folder / "grades.jsonl").read_text().splitlines()]
        for grade in grades:
            grade["matches"] = [step < right for step in range(4)]
        (folder / "grades.jsonl").write_text("".join(json.dumps(grade) + "\n" for grade in grades))
    (test,), _ = paired_tests(read_runs(runs))
    assert (test.problems, test.means, test.mcnemar) == (40, (0.0, 0.25), None)
    assert test.verdict == "b is better"
    assert test.evidence.startswith("mean over 40 problems, by steps: +25.0 points for b")


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
    assert notes == ["GSM8K: each of 7 runs is tested against the first only, a."]


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


def test_runs_that_solve_the_same_problems_have_no_interval_of_zero_width(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        add_evaluation(run, solved={0, 1})
    (test,), _ = paired_tests(read_runs(runs))
    assert test.evidence.endswith("; no problem where they differ")
    assert "interval" not in test.evidence


def test_a_difference_that_is_the_same_everywhere_is_named_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, solved in zip(runs, (set(), set(range(40))), strict=True):
        add_evaluation(run, solved=solved)
    (test,), _ = paired_tests(read_runs(runs))
    assert test.evidence.endswith("; +100.0 points for b on every problem")
