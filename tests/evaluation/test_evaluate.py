"""Answers and grades: what an evaluation leaves, and that cutting it changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from evaluated_runs import QUESTIONS, contents, read, tiny_path

import cera_train.evaluation.evaluate as evaluate_module
from cera_train.data import logistic_map as logistic_map_rows
from cera_train.evaluation.evaluate import evaluate
from cera_train.evaluation.tasks import gsm8k
from cera_train.runs.evaluation_folder import Generation
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import ENDINGS, read_evaluation_result

pytest_plugins = ("evaluated_runs",)


def test_an_evaluation_leaves_what_it_did(eval_config, run):
    result = evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    problems, answers, grades = (read(folder / f"{name}.jsonl") for name in ("problems", "generations", "grades"))
    assert [problem["question"] for problem in problems] == [row["question"] for row in QUESTIONS]
    assert [problem["gold"] for problem in problems] == ["3", "7", "15", "4", "15", "1001", "6", "18"]
    assert problems[0]["prompt"] == f"Question: {QUESTIONS[0]['question']}\nAnswer:"
    ids = [problem["id"] for problem in problems]
    assert [(row["problem"], row["sample"]) for row in answers] == [(name, 0) for name in ids]
    assert [row["problem"] for row in grades] == ids
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["problems"], result["samples"], result["missing"]) == (8, 1, 0)
    assert result["truncated"] == sum(row["truncated"] for row in answers)
    assert result["no_answer"] == sum(row["answer"] is None for row in grades)
    for ending in ENDINGS:
        assert result[f"ending/{ending}"] == sum(row["ending"] == ending for row in grades) / 8
    assert read_evaluation_result(folder / "result.json").to_json() == result
    assert result["tokens"] == sum(row["tokens"] for row in answers)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["task"]["max_new_tokens"] == 8
    assert config["model"]["path"] == tiny_path(run)


class Cut(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("sampled", [[], ["generation=sample", "generation.samples=3"]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("broken_line", [False, True])
def test_interrupted_equals_uninterrupted(eval_config, run, monkeypatch, tmp_path, capsys, sampled, broken_line):
    whole = evaluate(eval_config(*sampled))
    expected = contents(run / "eval" / "gsm8k")
    shutil.move(run / "eval", tmp_path / "whole")

    generated, generate = [], evaluate_module.generate

    def die_at_the_third(model, base, tokenizer, batch, config):
        if len(generated) == 2:
            raise Cut
        generated.append(len(batch))
        return generate(model, base, tokenizer, batch, config)

    monkeypatch.setattr(evaluate_module, "generate", die_at_the_third)
    with pytest.raises(Cut):
        evaluate(eval_config(*sampled))
    answers = run / "eval" / "gsm8k" / "generations.jsonl"
    assert len(read(answers)) == sum(generated)
    if broken_line:
        answers.write_bytes(answers.read_bytes()[:-9])

    again = []
    monkeypatch.setattr(evaluate_module, "generate", lambda *args: again.append(len(args[3])) or generate(*args))
    capsys.readouterr()
    result = evaluate(eval_config(*sampled))
    assert contents(run / "eval" / "gsm8k") == expected
    differs = {"tokens_per_s", "peak_memory_bytes"}
    assert {k: v for k, v in result.items() if k not in differs} == {k: v for k, v in whole.items() if k not in differs}
    answers_in_all = 8 * whole["samples"]
    assert sum(again) == answers_in_all - sum(generated) + (generated[-1] if broken_line else 0)
    assert (f"generations.jsonl:{sum(generated)} is broken" in capsys.readouterr().out) == broken_line


def test_samples_give_pass_at_k_for_every_k(eval_config, run, monkeypatch):
    """Answers made by hand: problem i has i right ones of 3."""
    golds = [row["answer"].split()[-1] for row in QUESTIONS[:4]]

    def by_hand(model, base, tokenizer, batch, config):
        texts = [
            f"#### {golds[index] if request.sample < index else 'none'}"
            for request in batch
            for index in [int(position[request.problem])]
        ]
        return [
            Generation(request.problem, request.sample, text, 1, False)
            for request, text in zip(batch, texts, strict=True)
        ]

    problems = evaluate_module.load_problems(eval_config("task.limit=4").task, None)
    position = {problem.id: index for index, problem in enumerate(problems)}
    monkeypatch.setattr(evaluate_module, "generate", by_hand)
    result = evaluate(eval_config("task.limit=4", "generation=sample", "generation.samples=3"))
    assert result["exact/pass@1"] == pytest.approx((0 + 1 / 3 + 2 / 3 + 1) / 4)
    assert result["exact/pass@2"] == pytest.approx((0 + 2 / 3 + 1 + 1) / 4)
    assert result["exact/pass@3"] == pytest.approx(3 / 4)
    assert result["verified/pass@3"] == pytest.approx(3 / 4)
    lower, upper = result["exact/pass@3/interval"]
    assert 0 <= lower < 3 / 4 < upper <= 1
    assert result["no_answer"] == 6


def test_grading_again_needs_no_model(eval_config, compose, run, monkeypatch):
    before = evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    rows = read(folder / "generations.jsonl")
    rows[0]["text"] = " It is #### 3"
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluate_module, "load_model", None)
    monkeypatch.setattr(evaluate_module, "load_tokenizer", None)
    shutil.rmtree(run / "adapter")
    result = evaluate(compose(f"grade={folder}", command="eval"))
    assert result["exact/pass@1"] == before["exact/pass@1"] + 1 / 8
    assert result["tokens_per_s"] == before["tokens_per_s"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert read(folder / "grades.jsonl")[0]["exact"]


def test_grading_a_cut_file_names_the_broken_line_and_grades_the_rest(eval_config, compose, run, capsys):
    evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    kept = (folder / "result.json").read_bytes()
    path = folder / "generations.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    grades = (folder / "grades.jsonl").read_bytes()
    result = evaluate(compose(f"grade={folder}", command="eval"))
    out = capsys.readouterr().out
    assert "generations.jsonl:8 is broken" in out
    assert "1 answers are missing" in out
    assert result["missing"] == 1
    assert (folder / "result.json").read_bytes() == kept
    assert (folder / "grades.jsonl").read_bytes() == grades
    evaluate(eval_config())  # the evaluation's command redoes the line of a finished evaluation too
    assert "generations.jsonl:8 is broken: its problem is answered again" in capsys.readouterr().out
    assert len(read(path)) == 8
    assert json.loads((folder / "result.json").read_text())["missing"] == 0


def test_a_task_of_ones_own_is_graded_by_the_grader_it_names(eval_config, compose, write_jsonl, run, monkeypatch):
    rows = write_jsonl("halves.jsonl", [{"question": f"half of {n}", "answer": n / 2} for n in (1, 2)])

    def by_hand(model, base, tokenizer, batch, config):
        return [Generation(request.problem, 0, " It is 1/2", 5, False) for request in batch]

    monkeypatch.setattr(evaluate_module, "generate", by_hand)
    scores = {}
    for grader in ("number", "text"):
        settings = [f"task.files=[{rows}]", f"task.grader={grader}", f"task.name={grader}"]
        result = evaluate(eval_config(*settings, task="jsonl"))
        scores[grader] = {key: value for key, value in result.items() if key.endswith("pass@1")}
        assert evaluate(compose(f"grade={run}/eval/{grader}", command="eval")) == result
    assert scores == {"number": {"exact/pass@1": 0, "verified/pass@1": 0.5}, "text": {"exact/pass@1": 0}}


def test_a_grader_that_crashes_counts_as_wrong_and_is_kept(eval_config, run, monkeypatch):
    def crash(text):
        raise RecursionError("too deep")

    monkeypatch.setattr(gsm8k, "TASK", replace(gsm8k.TASK, extract=crash))
    result = evaluate(eval_config("task.limit=2"))
    assert (result["exact/pass@1"], result["grader_failures"]) == (0.0, 2)
    assert read(run / "eval" / "gsm8k" / "grades.jsonl")[0]["failure"] == "crash: RecursionError: too deep"


def test_logistic_map_reports_steps_errors_and_collapse(eval_config, run, monkeypatch, capsys):
    """Answers by hand: right at r = 3.5, one value repeated at r = 3.8, nothing at r = 3.2."""

    def by_hand(model, base, tokenizer, batch, config):
        def text(problem):
            repeated = ", ".join([problem.gold.split(",")[0]] * 6)
            return {3.5: f" {problem.gold}", 3.8: f" {repeated}", 3.2: " I do not know."}[problem.details["growth"]]

        return [
            Generation(request.problem, request.sample, text(by_id[request.problem]), 9, False) for request in batch
        ]

    config = eval_config("task.max_new_tokens=32", task="logistic_map")
    run_data = load_config(run / "config.yaml").data
    by_id = {problem.id: problem for problem in evaluate_module.load_problems(config.task, run_data)}
    assert len(by_id) == 3 * 20
    monkeypatch.setattr(evaluate_module, "generate", by_hand)
    result = evaluate(config)
    assert result["exact/pass@1"] == pytest.approx(1 / 3)
    own = result["by_growth"]
    assert (own["3.5"]["step_accuracy/mean"], own["3.5"]["absolute_error/mean"]) == (1.0, 0.0)
    assert own["3.8"]["state_collapse"] == 1.0
    assert own["3.2"] == {
        "trained": False,
        "step_accuracy/mean": 0.0,
        "absolute_error/mean": None,
        "steps_given": 0.0,
        "state_collapse": 0.0,
    }
    assert (result["problems"], result["steps_given"]) == (60, pytest.approx(2 / 3))
    assert result["state_collapse"] == pytest.approx(1 / 3)
    assert result["no_answer"] == 20
    printed = " ".join(capsys.readouterr().out.split())
    assert "r = 3.2 steps right 0.0%, absolute error none given, state collapse 0.0%, not trained on" in printed
    assert "state collapse 0.0% r = 3.8 steps right" in printed  # the run was trained on 3.5


def test_logistic_map_asks_from_the_starting_points_that_were_held_out(eval_config, run):
    config = load_config(run / "config.yaml")
    problems = evaluate_module.load_problems(eval_config(task="logistic_map").task, config.data)
    _, held_out = logistic_map_rows.problems(config.data.logistic_map, config.data.eval_rows)
    asked = {problem.prompt for problem in problems if problem.details["growth"] == 3.5}
    assert asked == {row["prompt"] for row in held_out}
    assert {problem.details["growth"] for problem in problems} == {3.2, 3.5, 3.8}
