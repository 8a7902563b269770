"""Paired tests of two runs on the same problems, and what stands in the way of a comparison."""

import pytest
from evaluated_runs import read
from made_files import write_json, write_lines
from made_runs import add_evaluation, make_run

from cera_train.common.errors import UserError
from cera_train.report.comparison import PairedTest, paired_tests
from cera_train.report.page import compare_runs
from cera_train.report.readers import read_runs


@pytest.fixture
def compare_two(tmp_path):
    """compare_two(first, second) -> the paired test of two runs with these evaluations."""

    def compare_two(first: dict, second: dict) -> PairedTest:
        runs = [make_run(tmp_path / name) for name in "ab"]
        for run, evaluation in zip(runs, (first, second), strict=True):
            add_evaluation(run, **evaluation)
        (test,), notes = paired_tests(read_runs(runs))
        assert not notes
        return test

    return compare_two


def test_several_samples_are_tested_by_their_mean_for_each_problem(compare_two):
    test = compare_two(
        {"solved": lambda n, sample: sample == 0, "samples": 4},
        {"solved": lambda n, sample: sample < 2, "samples": 4},
    )
    assert test.only is None
    assert test.difference == pytest.approx(0.25)
    assert test.verdict == "better"


def test_few_problems_that_differ_are_not_shown_by_the_interval(compare_two):
    """Five problems of 40 all speak for b: p is 1/16, and the interval begins above zero."""
    test = compare_two({"solved": set()}, {"solved": set(range(5))})
    assert test.p_value == pytest.approx(1 / 16)
    assert test.lower > 0
    assert test.verdict == "not shown"


@pytest.mark.slow
def test_p_is_corrected_over_the_pairs_of_a_task(tmp_path):
    """Seven problems to none: p is 1/64 for two runs alone, and 6/64 as the smallest of six
    pairs."""
    runs = [make_run(tmp_path / name) for name in "abcd"]
    for run in runs:
        add_evaluation(run, solved=set(range(7 if run.name == "d" else 0)))
    (alone,), _ = paired_tests(read_runs(runs[2:]))
    assert (alone.p_holm, alone.verdict) == (pytest.approx(1 / 64), "better")
    tests, _ = paired_tests(read_runs(runs))
    assert [test.p_holm for test in tests] == pytest.approx([1, 1, 6 / 64, 1, 6 / 64, 6 / 64])
    assert {test.verdict for test in tests} == {"not shown"}


def test_trajectories_are_tested_by_their_steps(tmp_path):
    """The second run has one step of four right where the first has none, on every problem."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, right in zip(runs, (0, 1), strict=True):
        folder = add_evaluation(run, "logistic_map", solved=set(), verified=False)
        grades = read(folder / "grades.jsonl")
        for grade in grades:
            grade["score"] = right / 4
        write_lines(folder / "grades.jsonl", grades)
    (test,), _ = paired_tests(read_runs(runs))
    assert (test.problems, test.difference, test.only) == (40, 0.25, None)
    assert (test.verdict, test.row["task"]) == ("better", "logistic_map, score")


def test_more_than_six_runs_are_each_tested_against_the_first(tmp_path):
    runs = [make_run(tmp_path / name) for name in "abcdefg"]
    for run in runs:
        add_evaluation(run, solved={1})
    tests, notes = paired_tests(read_runs(runs))
    assert [(test.first, test.second) for test in tests] == [("a", name) for name in "bcdefg"]
    assert notes == ["gsm8k: each of 7 runs is tested against the first only, a."]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"held_out": "others"},
            "held-out rows or tokens, so do not rank them, by digest: a: rows; b: others.",
        ),
        (
            {"model.quantization": "nf4"},
            "base models: a: meta-llama/Llama-3.1-8B, bfloat16; b: meta-llama/Llama-3.1-8B, "
            "bfloat16, nf4.",
        ),
        ({"optimizer.lr": 1e-3}, None),
    ],
)
def test_what_cannot_be_ranked_is_named(tmp_path, changes, note):
    notes = compare_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)]).notes
    assert len(notes) == (note is not None)
    assert note is None or notes[0].endswith(note)


def test_machines_and_settings_of_evaluations_that_differ_are_named(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, gpus in zip(runs, ([], ["NVIDIA H100"]), strict=True):
        environment = {"gpus": gpus, "cpu_threads": 2, "processes": 1}
        environment["rows"] = {"held_out": "the same"}
        write_json(run / "environment.json", environment)
    add_evaluation(runs[0])
    add_evaluation(runs[1], problems=30, **{"task.max_new_tokens": 256})
    machines, limit, tokens, problems = compare_runs(runs).notes
    assert machines.endswith("a: CPU, 2 threads, 1 process; b: NVIDIA H100, 1 process.")
    assert limit == "Evaluations on gsm8k differ in task.limit: a: 40; b: 30."
    assert tokens == "Evaluations on gsm8k differ in task.max_new_tokens: a: 512; b: 256."
    assert (
        "gsm8k, a and b: evaluated on different problems (40 and 30, 30 of them shared)" in problems
    )


def test_answers_of_two_engines_are_not_compared(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, engine in zip(runs, (None, "vLLM 0.32.0"), strict=True):
        add_evaluation(run, engine=engine)
    tests, notes = paired_tests(read_runs(runs))
    assert not tests
    assert notes == [
        "gsm8k, a and b: engines differ: this program and vLLM 0.32.0: evaluate both alike."
    ]


def test_a_run_is_compared_with_scores_of_another_program(tmp_path):
    """Whose engine and prompts are not on record."""
    run = make_run(tmp_path / "a")
    folder = add_evaluation(run, "logistic_map", verified=False)
    grades = [grade | {"score": 0.25} for grade in read(folder / "grades.jsonl")]
    write_lines(folder / "grades.jsonl", grades)
    theirs = [{"problem": grade["problem"], "score": 0.5} for grade in grades]
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "logistic_map.jsonl", theirs)
    for paths in ([run, tmp_path / "b"], [tmp_path / "b", run]):
        (test,), notes = paired_tests(read_runs(paths))
        assert not notes
        assert (test.problems, test.grader, abs(test.difference)) == (40, "score", 0.25)


def test_a_grade_beyond_the_whole_is_named(tmp_path):
    run = make_run(tmp_path / "a")
    grade = {"problem": "x", "sample": 0, "exact": True, "score": 2.0}
    write_lines(add_evaluation(run) / "grades.jsonl", [grade])
    with pytest.raises(UserError, match=r"grades.jsonl:1 is broken: score"):
        read_runs([run])
