"""A run on a tiny mixture: its experts learn, are measured, resumed and evaluated."""

from __future__ import annotations

import json

import pytest
from moe_models import make_mixture
from safetensors.torch import load_file
from tiny_runs import adapter_bytes, folder_of, train_and_die_after

from cera_train.training.train import train

EXPERTS = ["adapter.experts=true", "adapter.expert_r=2", "adapter.target_modules=all-linear"]


@pytest.fixture
def mixture(tmp_path, tokenizer):
    make_mixture("mixtral", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return f"model.path={tmp_path / 'base'}"


def test_experts_are_trained_measured_and_resumed(tiny_config, mixture, monkeypatch, capsys):
    config = tiny_config(mixture, *EXPERTS)
    result = train(config)
    assert result["eval/perplexity"] < 0.8 * result["perplexity_before"]
    assert "on all-linear and all experts at r=2" in capsys.readouterr().out
    folder = folder_of(config)
    spectrum = json.loads((folder / "spectrum.json").read_text())
    experts = [name for name in spectrum if ".experts." in name]
    assert len(experts) == 2 * 2 * 4
    assert 1 < result["spectrum/effective_rank/mean"] <= result["spectrum/effective_rank/max"] <= 4
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    B = tensors["base_model.model.model.layers.0.mlp.experts.cera_B.gate_up_proj.weight"]
    assert B.shape == (4, 128, 2)
    assert all(matrix.any() for matrix in B)
    expected = adapter_bytes(config)

    again = tiny_config(mixture, *EXPERTS, "name=cut", "train.resume=auto")
    train_and_die_after(again, 6, monkeypatch)
    train(again)
    assert adapter_bytes(again) == expected


def test_all_linear_without_experts_says_so(tiny_config, mixture, capsys):
    train(tiny_config(mixture, "adapter.target_modules=all-linear", "train.max_updates=1"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "all-linear leaves out the experts of 2 layers; adapter.experts=true adds them" in printed
