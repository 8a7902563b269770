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
    shutil.copy(run / "best" / "adapter_model.safetensors", tmp_path)  # other weights than the final adapter's
    assert evaluate(eval_config("task.limit=4", run=run / "best"))["task"] == "gsm8k-best"
    assert not list(run.glob("*/eval"))


def test_the_card_tells_of_its_own_adapter_only(eval_config, run):
    weights = run / "best" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
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
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(eval_config(run=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is not the folder of a run"):
        evaluate(eval_config(run=tmp_path))
    shutil.rmtree(run / "adapter")
    with pytest.raises(ValueError, match="lacks its adapter"):
        evaluate(eval_config())
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"is unfinished.*same cera-train command.*run=.*best"):
        evaluate(eval_config())
    assert not (run / "eval").exists()


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}], ids=str)
def test_an_adapter_of_another_base_model_is_refused(eval_config, run, tmp_path, tokenizer, changes):
    make_tiny_llama(vocab_size=len(tokenizer), **changes).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other weights|belongs to another base model") as error:
        evaluate(eval_config("model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"))
    assert len(str(error.value)) < 500
    assert not (run / "eval").exists()
    (run / "environment.json").unlink()  # as an adapter that was carried elsewhere
    with pytest.raises(ValueError, match="belongs to another base model"):
        evaluate(
            eval_config("model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32", "name=again")
        )


def test_other_weights_of_the_same_shape_are_refused(eval_config, run, tmp_path, tokenizer):
    other = make_tiny_llama(vocab_size=len(tokenizer))
    other.model.norm.weight.data += 0.1
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other weights"):
        evaluate(eval_config("model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"))


def test_an_adapter_without_its_weights_is_refused_and_not_looked_for_on_the_hub(eval_config, run):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    for folder in (run, run / "adapter"):
        with pytest.raises(ValueError, match=r"adapter lacks its weights, adapter_model.safetensors"):
            evaluate(eval_config(run=folder))


def test_other_weights_in_the_same_folder_are_refused(eval_config, run):
    evaluate(eval_config("task.limit=2"))
    shutil.copy(run / "best" / "adapter_model.safetensors", run / "adapter")
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_digest was .*Set name="):
        evaluate(eval_config("task.limit=2"))


def test_an_adapter_that_diverged_is_refused(eval_config, run):
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    for sampled in ([], ["generation=sample", "name=sampled"]):
        with pytest.raises(ValueError, match="logits are not finite"):
            evaluate(eval_config("task.limit=2", *sampled))


def test_a_damaged_adapter_is_refused(eval_config, run):
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(eval_config())
