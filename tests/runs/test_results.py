"""Typed files: what is written reads back, the keys are those that scripts rely on, and a broken file is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_runs import add_evaluation, make_run, result_of

from cera_train.common.errors import UserError
from cera_train.runs.evaluation_folder import (
    Accuracy,
    AccuracyResult,
    Grade,
    GradedAnswers,
    PerplexityResult,
    read_evaluation_result,
)
from cera_train.runs.folder import Progress
from cera_train.runs.results import (
    Environment,
    EvaluationMetrics,
    Metrics,
    ModuleSpectrumRecord,
    RunFiles,
    RunResult,
    SpectrumSummary,
    UpdateMetrics,
    figure,
    mean_spectrum,
    read_metrics,
    read_spectrum,
    write_spectrum,
)


def test_a_result_keeps_the_keys_of_the_file(tmp_path: Path) -> None:
    tree = result_of("cera", 64, 1.9)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(tree))
    result = RunResult.read(path)
    assert (result.perplexity, result.spectrum.effective_rank_max) == (1.9, 38.4)
    result.write(path)
    assert json.loads(path.read_text()) == tree


def test_the_keys_of_metrics_are_as_scripts_know_them() -> None:
    spectrum = SpectrumSummary(1.0, dead_units_max=0.2).to_json()
    metrics = EvaluationMetrics(0, 0, 1.0, 2.7, **spectrum, **{"gsm8k/exact": 0.5})
    assert list(metrics.to_json()) == [
        *("update", "epoch", "eval/loss", "eval/perplexity"),
        *("spectrum/effective_rank/mean", "spectrum/dead_units/max", "gsm8k/exact"),
    ]
    assert (metrics.spectrum.dead_units_max, metrics.tasks) == (0.2, {"gsm8k/exact": 0.5})
    assert list(UpdateMetrics(1, 0, 1.0, 2.7, 0.5, 1e-4, 100.0, 3.0).to_json()) == [
        "update", "epoch", "train/loss", "train/perplexity", "train/grad_norm", "train/lr", "train/tokens_per_s",
        "train/seconds",
    ]  # fmt: skip


def test_the_result_of_an_evaluation_keeps_what_its_task_adds(tmp_path: Path) -> None:
    accuracies = [Accuracy("exact", 1, 0.5, (0.25, 0.75)), Accuracy("verified", 4, 0.75, None)]
    added = {"step_accuracy": [0.5, None], "step_accuracy/mean": 0.5, "by_growth": {"3.2": {}}}
    details = added | accuracies[0].figures | accuracies[1].figures
    result = AccuracyResult("logistic_map", "logistic_map", 40, 4, truncated=1, **details)
    result.write(path := tmp_path / "result.json")
    tree = json.loads(path.read_text())
    assert (tree["exact/pass@1"], tree["exact/pass@1/interval"], tree["verified/pass@4"]) == (0.5, [0.25, 0.75], 0.75)
    assert "verified/pass@4/interval" not in tree
    assert read_evaluation_result(path) == result
    assert result.accuracies == accuracies
    assert result.accuracy("verified", 4).value == 0.75
    assert result.accuracy("verified") is None
    assert result.figure("step_accuracy/mean") == 0.5


def test_a_perplexity_that_is_infinite_is_null_on_disk_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    evaluation = PerplexityResult("forgetting", "perplexity", math.inf, rows=3)
    for result in (RunResult(math.inf, updates=3), evaluation, Progress(update=3, perplexity=math.inf)):
        result.write(path)
        assert None in json.loads(path.read_text()).values()
        assert type(result).read(path) == result
    assert RunResult().perplexity is None
    assert [figure(value) for value in (math.inf, None, 1234.5678, 1e12)] == ["inf", "–", "1,234.568", "1e+12"]


def test_metrics_are_updates_and_evaluations_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    lines = [EvaluationMetrics(0, 0, 1.25, 3.5), UpdateMetrics(1, 0, 1.1, seconds=2.0), UpdateMetrics(2, 0, 1.0)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line.to_json()) + "\n" for line in lines) + '{"update": 3, "train/lo')
    metrics = read_metrics(path)
    assert metrics == Metrics(updates=lines[1:], evaluations=lines[:1])
    assert metrics.last_update == 2
    assert metrics.so_far() == RunResult(perplexity=3.5)
    path.write_text('{"update": 1, "train/lo\n{"update": 2}\n')
    with pytest.raises(UserError, match=rf"{path}.* is broken"):
        read_metrics(path)


def test_spectra_read_back_with_their_nulls(tmp_path: Path) -> None:
    modules = {
        "q_proj": ModuleSpectrumRecord(2.0, 1, None, [3.0, 1.0]),
        "v_proj": ModuleSpectrumRecord(1.0, 1, 0.5, [2.0]),
    }
    write_spectrum(path := tmp_path / "spectrum.json", modules)
    assert read_spectrum(path) == modules
    assert mean_spectrum(modules) == [(0.75 + 1) / 2, 0.25 / 2]


def test_no_secret_reaches_an_environment_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    Environment(command=["cera-train", "key=0123456789abcdef"]).write(path := tmp_path / "environment.json")
    assert Environment.read(path).command_line == "cera-train 'key=***'"


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


def test_the_files_of_a_run_read_together(tmp_path: Path) -> None:
    whole, cut = (RunFiles.read(make_run(tmp_path / name, finished=name == "a")) for name in "ab")
    assert whole.figures == whole.result
    assert len(whole.spectrum) == 2
    assert (cut.result, cut.spectrum, cut.figures.seconds) == (None, {}, 300.0)
    assert RunFiles.read(tmp_path) == RunFiles()


def test_grades_read_back_with_what_their_task_adds(tmp_path: Path) -> None:
    grade = Grade("id1", 0, None, False, matches=[True])
    assert grade.to_json() == {"problem": "id1", "sample": 0, "answer": None, "exact": False, "matches": [True]}
    assert Grade.from_json(grade.to_json(), "grades.jsonl") == grade
    folder = add_evaluation(make_run(tmp_path / "a"), solved={0, 1}, problems=4)
    answers = GradedAnswers(folder)
    assert list(answers.scores(lambda grade: grade.exact).values()) == [1, 1, 0, 0]
    with pytest.raises(UserError, match=f"{folder}/grades.jsonl is broken: KeyError"):
        answers.scores(lambda grade: grade.details["matches"])
