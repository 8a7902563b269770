"""The model card of a run: its evaluations, without those of other weights."""

import json

import yaml
from evaluated_runs import evaluate
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from cera_train.runs.card import write_card
from cera_train.runs.results import RunResult

pytest_plugins = ("evaluated_runs",)


def test_the_card_has_the_evaluations_of_the_final_adapter(eval_config, run):
    result = evaluate(eval_config())
    card = ModelCard.load(run / "adapter" / "README.md")
    lower, upper = result["exact/pass@1/interval"]
    accuracy = f"{result['exact/pass@1']:.1%} (95 % interval {lower:.1%} to {upper:.1%})"
    assert f"| Evaluation, gsm8k | {accuracy}, exact/pass@1, 8 problems |" in card.content


def test_the_card_has_no_evaluation_of_other_weights(eval_config, run):
    evaluate(eval_config())
    path = run / "eval" / "gsm8k" / "config.yaml"
    config = yaml.safe_load(path.read_text()) | {"adapter_digest": "of another adapter"}
    path.write_text(json.dumps(config))
    write_card(run, RunResult.read(run / "result.json"), LlamaConfig())
    assert "Evaluation, " not in (run / "adapter" / "README.md").read_text()
