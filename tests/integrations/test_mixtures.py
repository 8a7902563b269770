"""Runs on mixtures: of data sets, and of experts."""

import re

import pytest
from evaluated_runs import evaluate
from moe_models import make_mixture
from safetensors.torch import load_file
from tiny_runs import folder_of, train_and_die_after

from cera_train.training.train import train


@pytest.fixture
def mixed(tiny_config, write_jsonl):
    """mixed("train.seed=1", ...) -> Config of a run on 30 and 6 rows, 2 : 1"""
    for name, size in (("a", 32), ("b", 8)):
        write_jsonl(
            f"{name}.jsonl",
            [{"prompt": f"{name}{row} is", "completion": f" {row}"} for row in range(size)],
        )
    folder = write_jsonl("c.jsonl", []).parent

    def mixed(*overrides: str):
        a = f"{{train_files:[{folder}/a.jsonl],weight:2}}"
        b = f"{{train_files:[{folder}/b.jsonl],weight:1}}"
        files = f"data.mix=[{a},{b}]"
        return tiny_config(
            "data=jsonl", files, "data.eval_rows=2", "data.train_rows=27", *overrides
        )

    return mixed


def test_a_finished_run_on_a_mix_is_evaluated_and_described_by_part(
    mixed, compose, tmp_path, capsys
):
    trained = train(mixed("train.max_updates=2"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "part a.jsonl: 18 rows an epoch, of 30 (66.67%), " in printed
    run = f"run={trained['folder']}"
    result = evaluate(compose(run, "task=perplexity", command="eval"))
    assert result["perplexity"] == pytest.approx(trained["eval/perplexity"], rel=1e-6)
    assert result["rows"] == 4
    card = (tmp_path / "outputs" / "run" / "adapter" / "README.md").read_text()
    assert "| Rows | a.jsonl + b.jsonl |" in card


def test_a_run_on_a_mix_does_not_resume_on_another(mixed, tmp_path):
    cut = mixed("name=cut")
    train_and_die_after(cut, 6)
    with pytest.raises(ValueError, match=r"data.mix.1.weight was 1.0, is 3.0. Set these back"):
        train(mixed("data.mix.1.weight=3", "name=cut"))
    rows = tmp_path / "a.jsonl"
    text = rows.read_text()
    rows.write_text(text + text.splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="the training rows are not those of"):
        train(cut)


EXPERTS = ["adapter.experts=true", "adapter.target_modules=all-linear"]


@pytest.fixture
def mixture(tmp_path, tokenizer):
    make_mixture("mixtral", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return f"model.path={tmp_path / 'base'}"


def test_experts_are_trained(tiny_config, mixture, capsys):
    config = tiny_config(mixture, *EXPERTS)
    result = train(config)
    assert result["eval/perplexity"] < 0.8 * result["perplexity_before"]
    assert "on all-linear and all experts" in capsys.readouterr().out
    folder = folder_of(config)
    assert 1 < result["spectrum/effective_rank/mean"] <= result["spectrum/effective_rank/max"] <= 4
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    B = tensors["base_model.model.model.layers.0.mlp.experts.cera_B.gate_up_proj.weight"]
    assert B.shape == (4, 256, 4)
    assert all(matrix.any() for matrix in B)


def test_all_linear_reports_that_it_leaves_out_experts(tiny_config, mixture, capsys):
    train(tiny_config(mixture, "adapter.target_modules=all-linear", "train.max_updates=1"))
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search("all-linear leaves out [0-9]+ modules: .*experts", printed)
