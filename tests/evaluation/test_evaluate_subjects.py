"""What can be evaluated: every adapter of a run, one carried elsewhere, the untouched model; and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from conftest import make_tiny_llama
from evaluated_runs import base_settings, read, tiny_path
from safetensors.torch import load_file, save_file

from cera_train.evaluation.evaluate import evaluate

pytest_plugins = ("evaluated_runs",)


def multiply_weights(adapter: Path, factor: float) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = {name: factor * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.slow
def test_every_adapter_of_a_run_can_be_evaluated(eval_config, run, tmp_path):
    """The run's, its best, a checkpoint's, and one that was carried elsewhere. What is measured of best/ and
    checkpoints/ lies beside them: training replaces these folders."""
    evaluate(eval_config("task.limit=4"))
    elsewhere = Path(shutil.copytree(run / "adapter", tmp_path / "elsewhere"))
    generations = (run / "eval" / "gsm8k" / "generations.jsonl").read_bytes()
    evaluate(eval_config("task.limit=4", run=run / "checkpoints" / "6"))
    assert (run / "eval" / "gsm8k-checkpoints-6" / "generations.jsonl").read_bytes() == generations
    evaluate(eval_config("task.limit=4", *base_settings(run)[:3], run=elsewhere))
    assert (elsewhere / "eval" / "gsm8k" / "generations.jsonl").read_bytes() == generations
    assert evaluate(eval_config("task.limit=4", run=run / "best"))["task"] == "gsm8k-best"
    assert not list(run.glob("*/eval"))


def test_the_card_tells_of_its_own_adapter_only(eval_config, run):
    multiply_weights(run / "best", 2)
    evaluate(eval_config("task.limit=2", run=run / "best"))
    assert "gsm8k" not in (run / "adapter" / "README.md").read_text()
    evaluate(eval_config("task.limit=2"))
    text = (run / "adapter" / "README.md").read_text()
    assert text.count("gsm8k, exact pass@1") == 1
    assert "gsm8k-best" not in text


def test_the_untouched_model_has_a_folder_of_its_own(eval_config, run):
    evaluate(eval_config("task.limit=2", *base_settings(run), run="base"))
    (folder,) = (run.parent / "outputs").glob("base-*")
    assert folder.name == f"base-{Path(tiny_path(run)).name}"
    assert len(read(folder / "eval" / "gsm8k" / "generations.jsonl")) == 2


def test_a_name_tells_two_evaluations_of_a_task_apart(eval_config, run):
    evaluate(eval_config("task.limit=2"))
    evaluate(eval_config("task.limit=2", r"task.prompt='Q: {question} A:'", "name=short"))
    first, second = (read(run / "eval" / name / "problems.jsonl") for name in ("gsm8k", "short"))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert second[0]["prompt"].startswith("Q: 1 apples")


def test_what_is_no_finished_run_with_its_adapter_is_refused(eval_config, run, tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        evaluate(eval_config(run=tmp_path))
    (run / "adapter" / "adapter_model.safetensors").unlink()  # not looked for on the Hub
    with pytest.raises(ValueError, match=r"adapter lacks its weights, adapter_model.safetensors"):
        evaluate(eval_config())
    shutil.rmtree(run / "adapter")
    with pytest.raises(ValueError, match="lacks its adapter"):
        evaluate(eval_config())
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"is unfinished.*same cera-train command.*run=.*best"):
        evaluate(eval_config())
    assert not (run / "eval").exists()


def test_an_adapter_of_another_base_model_is_refused(eval_config, run, tmp_path, tokenizer):
    settings = ["model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"]
    tokenizer.save_pretrained(tmp_path / "other")
    other = make_tiny_llama(vocab_size=len(tokenizer))
    other.model.norm.weight.data += 0.1  # of the same shape
    for model in (other, make_tiny_llama(vocab_size=len(tokenizer), hidden_size=64)):
        model.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="was trained on other weights"):
            evaluate(eval_config(*settings))
    assert not (run / "eval").exists()
    (run / "environment.json").unlink()  # as an adapter that was carried elsewhere
    with pytest.raises(ValueError, match="belongs to another base model"):
        evaluate(eval_config(*settings, "name=again"))


def test_other_weights_in_the_same_folder_are_refused(eval_config, run):
    evaluate(eval_config("task.limit=2"))
    multiply_weights(run / "adapter", 2)
    with pytest.raises(ValueError, match=r"adapter_digest was .*Set name="):
        evaluate(eval_config("task.limit=2"))


def test_an_adapter_that_diverged_or_is_damaged_is_refused(eval_config, run):
    multiply_weights(run / "adapter", math.nan)
    for sampled in ([], ["generation=sample", "name=sampled"]):
        with pytest.raises(ValueError, match="logits are not finite"):
            evaluate(eval_config("task.limit=2", *sampled))
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(eval_config())
