"""Perplexity and spectra: the numbers are those of training and of the model itself."""

from __future__ import annotations

import json
import math

import datasets
import pytest
import torch
import yaml
from evaluated_runs import base_settings
from transformers import AutoModelForCausalLM

from cera_train.common.errors import UserError
from cera_train.evaluation.evaluate import evaluate
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)


def test_perplexity_and_spectra_of_a_saved_run_are_those_logged_in_training(tiny_config, compose):
    trained = train(tiny_config("adapter.r=4", "train.max_updates=4"))
    result = evaluate(compose(f"run={trained['folder']}", "task=perplexity", command="eval"))
    assert result["perplexity"] == pytest.approx(trained["eval/perplexity"], rel=1e-6)
    assert result["perplexity_base"] == pytest.approx(trained["perplexity_before"], rel=1e-6)
    for kind in ("effective_rank", "manifold_dimension"):
        for of in ("mean", "max"):
            name = f"spectrum/{kind}/{of}"
            assert result[name] == pytest.approx(trained[name], rel=1e-6)
    assert result["tokens"] > 0


def test_perplexity_on_other_rows(eval_config, questions):
    with pytest.raises(ValueError, match="task.files: this run computed its rows.*data=jsonl"):
        evaluate(eval_config(f"task.files=[{questions}]", task="perplexity"))
    result = evaluate(
        eval_config(
            *("data=jsonl", f"task.files=[{questions}]", "data.train_files=[unused.jsonl]", "data.eval_rows=1"),
            *(r"data.prompt='{question}'", r"data.completion=' {answer}'", "task.limit=5"),
            task="perplexity",
        )
    )
    assert result["rows"] == 5


@pytest.mark.parametrize(("limit", "rows"), [(7, 7), (60, 20)])
def test_a_limit_takes_the_first_held_out_rows_and_never_a_training_row(eval_config, run, limit, rows):
    assert evaluate(eval_config(f"task.limit={limit}", task="perplexity"))["rows"] == rows


def test_forgetting_is_the_perplexity_of_every_window(eval_config, run, tokenizer, tmp_path):
    """Against the model's own loss, window by window, with the adapter and without."""
    text = "the next value is hello there " * 20
    (tmp_path / "text.txt").write_text(text)
    settings = [f"task.files=[{tmp_path / 'text.txt'}]", "task.window=32"]
    result = evaluate(eval_config(*settings, task="forgetting"))

    model = AutoModelForCausalLM.from_pretrained(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])
    start, ids = tokenizer("").input_ids, tokenizer(text, add_special_tokens=False).input_ids
    assert len(start) == 1
    losses, tokens = 0.0, 0
    for first in range(0, len(ids), 31):
        window = torch.tensor([start + ids[first : first + 31]])
        with torch.no_grad():
            losses += model(window, labels=window).loss.item() * (window.shape[1] - 1)
        tokens += window.shape[1] - 1
    assert tokens == len(ids) == result["tokens"]
    assert result["perplexity_base"] == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert result["perplexity"] != pytest.approx(result["perplexity_base"], rel=1e-3)
    untouched = evaluate(eval_config(*settings, *base_settings(run), task="forgetting", run="base"))
    assert untouched["perplexity"] == pytest.approx(result["perplexity_base"], rel=1e-6)


def test_finewiki_measures_each_article_as_pefts_comparison_does(eval_config, run, tokenizer, tmp_path, monkeypatch):
    """Against the loss of the cut articles as PEFT's run.py takes it, the mean over all tokens; streamed."""
    articles = [f"hello there {number}, what is the next value? " * 4 for number in range(102)]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "finewiki"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in articles))
    result = evaluate(eval_config("data=finewiki", f"data.path={folder}", "data.max_length=16", task="perplexity"))

    model = AutoModelForCausalLM.from_pretrained(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])
    ids = tokenizer(articles[:100], truncation=True, max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert (result["rows"], result["tokens"]) == (100, 1500)
    assert result["perplexity_base"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "window", "message"),
    [
        ([{"text": ""}], 8, r"^task.files=\[.*text.jsonl\]: the text has no token to predict"),
        ([{"text": "hello"}, {"question": "?"}], 8, r"^\S+text.jsonl(:|, row )2: column 'text' is missing"),
        ([{"text": "hello"}], 1024, "task.window=1024 is beyond the 256 positions"),
    ],
)
def test_text_that_cannot_be_predicted_is_refused(eval_config, write_jsonl, rows, window, message):
    path = write_jsonl("text.jsonl", rows)
    with pytest.raises(UserError, match=message):
        evaluate(eval_config(f"task.files=[{path}]", f"task.window={window}", task="forgetting"))
