"""Mistakes in the settings or files of an evaluation get one line and leave no trace."""

from __future__ import annotations

import pytest

import cera_train.evaluation.evaluate as evaluate_module
from cera_train.evaluation.evaluate import evaluate

pytest_plugins = ("evaluated_runs",)


def test_a_mistake_before_the_first_answer_leaves_no_trace(eval_config, write_jsonl, run):
    """Nor does it bind the folder to its settings."""
    rows = write_jsonl("other.jsonl", [{"problem": "1 + 1"}])
    with pytest.raises(ValueError, match="is missing"):
        evaluate(eval_config(f"task.files=[{rows}]"))
    assert not (run / "eval").exists()
    assert evaluate(eval_config("task.limit=2"))["problems"] == 2


def test_other_settings_are_refused_and_named(eval_config):
    evaluate(eval_config("task.limit=2"))
    with pytest.raises(ValueError, match=r"task.limit was 2, is 3.*Set name="):
        evaluate(eval_config("task.limit=3"))


def test_other_problems_are_refused(eval_config, questions, run):
    evaluate(eval_config("task.limit=2"))
    (run / "eval" / "gsm8k" / "result.json").unlink()
    questions.write_text(questions.read_text().replace("1 apples", "one apple"))
    with pytest.raises(ValueError, match="a data file changed"):
        evaluate(eval_config("task.limit=2"))


def test_answers_beyond_the_models_positions_are_refused(eval_config):
    with pytest.raises(ValueError, match="beyond the 256 positions.*lower task.max_new_tokens"):
        evaluate(eval_config("task.max_new_tokens=250"))


def test_two_evaluations_do_not_write_to_one_folder(eval_config, run):
    with (
        evaluate_module.EvaluationFolder(run / "eval" / "gsm8k"),
        pytest.raises(ValueError, match="another evaluation is writing"),
    ):
        evaluate(eval_config())


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nothing", "does not exist"), ("", r"is not the folder of an evaluation.*Evaluations in it: .*eval/gsm8k")],
)
def test_grading_what_is_no_evaluation_is_refused(eval_config, compose, run, folder, message):
    evaluate(eval_config("task.limit=2"))
    with pytest.raises(ValueError, match=message):
        evaluate(compose(f"grade={run / folder}", command="eval"))
