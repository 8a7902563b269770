"""The model card of a run: its evaluations in words, and as the Hub's library reads them."""

import json

import yaml
from evaluated_runs import evaluate
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import LlamaConfig

from cera_train.runs.card import EVALUATIONS, hub_datasets, snippet, write_card
from cera_train.runs.results import RunResult
from cera_train.settings.data import DataConfig, MixPart
from cera_train.settings.model import ModelConfig

pytest_plugins = ("evaluated_runs",)


def card_again(run, folder="gsm8k", **task):
    """The card after an evaluation whose config had other settings of the task."""
    path = run / "eval" / folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["task"] |= task
    path.write_text(yaml.safe_dump(config))
    write_card(run, RunResult.read(run / "result.json"), LlamaConfig())
    return run / "adapter" / EVALUATIONS / f"{folder}.yaml"


def test_the_card_has_the_evaluations_of_the_final_adapter(eval_config, run):
    result = evaluate(eval_config())
    card = ModelCard.load(run / "adapter" / "README.md")
    lower, upper = result["exact/pass@1/interval"]
    accuracy = f"{result['exact/pass@1']:.1%} (95 % interval {lower:.1%} to {upper:.1%})"
    assert f"| Evaluation, gsm8k | {accuracy}, exact/pass@1, greedy, 8 problems |" in card.content
    assert not (run / "adapter" / EVALUATIONS).exists()  # of files of the user's, not of the Hub's

    entries = card_again(run, files=[], revision="abc")
    (entry,) = parse_eval_result_entries(yaml.safe_load(entries.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("openai/gsm8k", "gsm8k")
    assert (entry.value, entry.dataset_revision) == (result["exact/pass@1"], "abc")
    assert accuracy in entry.notes

    assert not card_again(run, limit=3).exists()  # the Hub compares whole data sets


def test_the_card_has_no_evaluation_of_other_weights(eval_config, run):
    evaluate(eval_config())
    path = run / "eval" / "gsm8k" / "config.yaml"
    config = yaml.safe_load(path.read_text()) | {"adapter_digest": "of another adapter"}
    path.write_text(json.dumps(config))
    write_card(run, RunResult.read(run / "result.json"), LlamaConfig())
    assert "Evaluation, " not in (run / "adapter" / "README.md").read_text()


def test_the_card_asks_as_rows_of_a_mix_were_trained_on(tmp_path):
    (tmp_path / "chat_template.jinja").touch()
    chats = {"path": "a/b", "layout": "messages"}
    documents = {"path": "c/d", "layout": "documents"}
    for weights in ((0, 1), (1, 0)):
        parts = [
            MixPart(**part, weight=weight)
            for part, weight in zip((chats, documents), weights, strict=True)
        ]
        data = DataConfig(mix=parts)
        asks = "apply_chat_template" in snippet(
            tmp_path, "peft", data, ModelConfig(), LlamaConfig()
        )
        expected = ["a/b"] if asks else ["c/d"]
        assert asks == (weights == (1, 0))
        assert hub_datasets(data) == expected
