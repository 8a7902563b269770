"""The real SmolLM2-135M-Instruct on real rows: every method over 16-bit and 4-bit weights lowers its perplexity."""

import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import SHARED_DATA, needs_shared_data, needs_smollm2
from transformers import AutoModelForCausalLM

from cera_train.evaluation.evaluate import evaluate
from cera_train.runs.results import read_metrics
from cera_train.training.train import train

pytestmark = [needs_smollm2, pytest.mark.slow]

GSM8K = [
    *("data=gsm8k", f"data.train_files=[{SHARED_DATA}/gsm8k_train_first3000.jsonl]"),
    f"data.eval_files=[{SHARED_DATA}/gsm8k_test.jsonl]",
]
OPENORCA = ["data=slimorca", f"data.train_files=[{SHARED_DATA}/openorca_284_sharegpt.jsonl]"]


@needs_shared_data
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("adapter", "data"), [("cera", GSM8K), ("dora", GSM8K), ("lora", OPENORCA)])
def test_perplexity_falls_on_real_rows_and_is_measured_again(compose, tmp_path, data, adapter, quantization):
    config = compose(
        "protocol=paper",
        *(*data, "data.train_rows=24", "data.eval_rows=4", "data.max_length=128", f"output_dir={tmp_path}"),
        *(f"adapter={adapter}", "adapter.r=16", "optimizer.lr=2e-3", f"model.quantization={quantization}"),
        *("train.batch_size=4", "train.max_updates=4", "train.eval_every=null", "train.probe_tokens=256"),
    )
    result = train(config)
    assert result["eval/perplexity"] < 0.97 * result["perplexity_before"]
    assert result["spectrum/effective_rank/max"] > 1
    again = evaluate(compose(f"run={result['folder']}", "task=perplexity", command="eval"))
    assert again["perplexity"] == pytest.approx(result["eval/perplexity"], rel=1e-3)
    mean_rank = "spectrum/effective_rank/mean"
    assert again[mean_rank] == pytest.approx(result[mean_rank], rel=1e-3)


def test_the_quickstart_learns_and_its_adapter_loads_in_plain_peft(compose, tmp_path):
    short = ("train.max_updates=20", "train.eval_every=20", "train.tasks_every=20", "train.tasks_limit=20")
    result = train(compose("+recipe=quickstart", *short, f"output_dir={tmp_path}"))
    assert result["trainable_parameters"] == 9_768_960
    folder = Path(result["folder"])
    before, *_ = read_metrics(folder / "metrics.jsonl").evaluations
    assert before.tasks["held_out/exact"] < 0.1
    assert result["held_out/exact"] > 0.5
    measured = evaluate(compose(f"run={folder}", "task=held_out", "task.limit=20", command="eval"))
    assert measured["exact/pass@1"] == pytest.approx(result["held_out/exact"], abs=0.1)
    assert measured["truncated"] == 0  # it has learned to stop
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(saved["base_model_name_or_path"], dtype=torch.bfloat16)
    ids = torch.arange(100, 140)[None]
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, again(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.equal(logits, model(input_ids=ids).logits)
