"""The adapter of a run in the tools its users already have, after `import cera_train` and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_runs import folder_of
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def finished_run(trained_config) -> Path:
    return folder_of(trained_config("optimizer.lr=3e-2", "train.max_updates=6", "train.eval_every=null"))


HARNESS = """
import json, sys
import cera_train
import lm_eval
from lm_eval.tasks import TaskManager

tasks, model_args = sys.argv[1:]
results = lm_eval.simple_evaluate(
    model="hf", model_args=model_args, tasks=["continuation"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False), device="cpu", batch_size=2,
    log_samples=True, bootstrap_iters=0,
)
samples = results["samples"]["continuation"]
print(json.dumps([[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]))
"""


@pytest.mark.slow
def test_lm_evaluation_harness_scores_the_adapter(finished_run, tiny_folder, tmp_path, write_jsonl):
    """Its log-likelihoods of two choices equal those computed directly, with the adapter and without."""
    rows = [{"prompt": "Question: x\nAnswer:", "choices": ["0.84", "hello"], "label": 0}] * 2
    task = {
        "task": "continuation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_jsonl("rows.jsonl", rows))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "continuation.yaml").write_text(yaml.safe_dump(task))
    base_args = f"pretrained={tiny_folder},dtype=float32"

    def scores(model_args: str) -> list[float]:
        command = [sys.executable, "-c", HARNESS, str(tmp_path / "tasks"), model_args]
        env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])[0]

    def direct(model) -> list[float]:
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        prompt = tokenizer(rows[0]["prompt"]).input_ids
        log_likelihoods = []
        for choice in rows[0]["choices"]:
            ids = tokenizer(f"{rows[0]['prompt']} {choice}").input_ids
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            tokens = range(len(prompt), len(ids))
            log_likelihoods.append(sum(log_p[token - 1, ids[token]].item() for token in tokens))
        return log_likelihoods

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = scores(f"{base_args},peft={finished_run}/adapter")
    assert scores(base_args) == pytest.approx(direct(base), abs=1e-4)
    assert adapted == pytest.approx(direct(PeftModel.from_pretrained(base, finished_run / "adapter")), abs=1e-4)
    assert adapted != pytest.approx(direct(AutoModelForCausalLM.from_pretrained(tiny_folder)), abs=1e-2)


def test_the_card_says_what_the_adapter_is_and_its_code_loads_it(finished_run, tiny_folder):
    card = ModelCard.load(finished_run / "adapter" / "README.md")
    result = json.loads((finished_run / "result.json").read_text())
    assert card.data.library_name == "peft"
    assert card.data.license is None  # apache-2.0 is that of the model whose file of conf/model this config began with
    assert "licence of the base weights is not on record" in card.text
    for part in (
        *(str(tiny_folder), "CeRA of rank 4 on q_proj, v_proj", "logistic_map"),
        *(f"{result['eval/perplexity']:.3f}", f"{result['perplexity_before']:.3f}", "import cera_train"),
        f"{result['trainable_parameters']:,}",
    ):
        assert part in card.text.replace("\\", ""), part
    code = card.text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(finished_run / "adapter"))
    names: dict = {}
    exec(code, names)
    assert any("cera_A" in name for name, _ in names["model"].named_parameters())
