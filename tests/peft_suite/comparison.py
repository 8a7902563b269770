"""PEFT's method comparison, its own unmodified run.py, trains CeRA: `make test-peft`.

The scripts are those at the tag of the installed PEFT, or of PEFT_COMPARISON=FOLDER, a checkout's
method_comparison/MetaMathQA. They load the model and the data sets by their ids on the Hub: folders
of these names hold a tiny Llama and a few rows.
"""

import json
import os
import subprocess
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama

from cera_train.cera import CeraConfig

SOURCE = f"https://raw.githubusercontent.com/huggingface/peft/v{version('peft')}/method_comparison/MetaMathQA"
SCRIPTS = ("run.py", "utils.py", "data.py", "default_training_params.json")
EXPERIMENT = "experiments/cera/tiny"
TRAINING = {
    "max_steps": 20,
    "eval_steps": 10,
    "optimizer_kwargs": {"lr": 1e-2, "weight_decay": 0.1},
    "generation_kwargs": {"max_length": 200, "max_new_tokens": 4},
}
ARTICLE = "The river rises in the hills, passes two towns and ends in the sea."


@pytest.fixture
def comparison(tmp_path, tokenizer):
    """A folder with the scripts and what they load."""
    local = os.environ.get("PEFT_COMPARISON")
    source = Path(local).absolute().as_uri() if local else SOURCE
    for name in SCRIPTS:
        try:
            with urllib.request.urlopen(f"{source}/{name}", timeout=20) as response:
                (tmp_path / name).write_bytes(response.read())
        except OSError as error:
            pytest.skip(f"{source}/{name}: {error}. PEFT_COMPARISON=FOLDER takes a local copy.")
    for name in ("results", "temporary_results", "cancelled_results"):
        (tmp_path / name).mkdir()

    questions = [f"Ann has {n} apples and buys 2 more. How many has she?" for n in range(80)]
    answers = [f"She has {n} + 2 = {n + 2}.\n#### {n + 2}" for n in range(80)]
    problems = [
        {"question": question, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    rows = [
        {
            "type": "GSM_Rephrased",
            "query": question,
            "original_question": question,
            "response": answer,
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    gsm8k = tmp_path / "openai" / "gsm8k"
    write_rows(tmp_path / "meta-math" / "MetaMathQA" / "train.jsonl", rows)
    write_rows(tmp_path / "HuggingFaceFW" / "finewiki" / "train.jsonl", [{"text": ARTICLE}] * 100)
    write_rows(gsm8k / "main" / "train.jsonl", problems)
    write_rows(gsm8k / "main" / "test.jsonl", problems[:8])
    (gsm8k / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_dir: main\n---\n")
    for part in (reader_of_the_article(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "meta-llama" / "Llama-3.2-3B")
    return tmp_path


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def reader_of_the_article(tokenizer):
    """A Llama whose loss on the article lies between 1 and 2, as run.py asserts of the base."""
    model = make_tiny_llama(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokenizer(ARTICLE, return_tensors="pt").input_ids
    while (loss := model(ids, labels=ids).loss) > 1.5:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_the_comparison_trains_cera_and_writes_its_result(comparison):
    experiment = comparison / EXPERIMENT
    CeraConfig(r=4, alpha=8, dropout=0.0, task_type="CAUSAL_LM").save_pretrained(experiment)
    (experiment / "training_params.json").write_text(json.dumps(TRAINING))

    launch = Path(__file__).with_name("launch.py")
    env = os.environ | {"HF_HOME": str(comparison / "cache")}
    subprocess.run(
        [sys.executable, launch, "-v", "--clean", EXPERIMENT], cwd=comparison, env=env, check=True
    )

    [path] = comparison.glob("*results/*.json")
    result = json.loads(path.read_text())
    trained = result["train_info"]
    assert trained["status"] == "success", result["run_info"]["error_msg"]
    assert result["run_info"]["peft_config"]["peft_type"] == "CERA"
    # r (d_in + d_out) of q_proj and v_proj in two layers
    assert trained["num_trainable_params"] == 896
    first, *_, last = trained["metrics"]
    assert (first["step"], last["step"]) == (10, 20)
    assert last["train loss"] < first["train loss"]
    assert 0 <= last["test accuracy"] <= 1
    assert last["forgetting"] != 0
