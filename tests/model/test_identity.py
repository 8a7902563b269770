"""What tells a base model from another: its files, however they are stored and loaded."""

import json
import shutil

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from cera_train.model.folder import load_tokenizer
from cera_train.model.identity import identity_of
from cera_train.model.weights import load_model
from cera_train.settings.model import ModelConfig


def test_a_base_in_other_files_is_the_same(tiny_folder, tmp_path):
    """Saved again in several files by another version of transformers."""
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink()
    assert len([*copy.glob("*.safetensors")]) > 2
    settings = json.loads((copy / "config.json").read_text())
    theta = settings.pop("rope_parameters")["rope_theta"]
    early = {"rope_theta": theta, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
    early |= {"initializer_range": 0.5, "id2label": {"0": "a"}, "label2id": {"a": 0}}
    (copy / "config.json").write_text(json.dumps(settings | early))
    base, saved = (identity_of(ModelConfig(str(folder))) for folder in (tiny_folder, copy))
    assert base.difference(saved) == ""
    next(copy.glob("*.safetensors")).unlink()  # a download that was interrupted
    assert identity_of(ModelConfig(str(copy))).weights is None


def test_a_base_in_the_hubs_cache_is_the_same_and_loads_without_a_network(
    tiny_folder, tmp_path, no_network, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--someone--base"
    shutil.copytree(tiny_folder, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    cached = ModelConfig("someone/base")
    assert identity_of(cached) == identity_of(ModelConfig(str(tiny_folder)))
    assert identity_of(ModelConfig("someone/base", revision="v2")).weights is None
    load_tokenizer(cached)
    load_model(cached, torch.device("cpu"))
