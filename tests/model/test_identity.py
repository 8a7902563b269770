"""What tells a base model from another: its files, however they are stored and loaded."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from cera_train.model.identity import identity_of
from cera_train.settings.model import ModelConfig


def difference(folder: Path, other: Path) -> str:
    return identity_of(ModelConfig(str(folder))).difference(identity_of(ModelConfig(str(other))))


@pytest.fixture
def copy(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_a_base_in_other_files_is_the_same(tiny_folder, copy, tmp_path, monkeypatch):
    """Saved again in several files by another version of transformers, and in the Hub's cache."""
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink()
    assert len([*copy.glob("*.safetensors")]) > 2
    settings = json.loads((copy / "config.json").read_text())
    theta = settings.pop("rope_parameters")["rope_theta"]
    early = {"rope_theta": theta, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
    early |= {"initializer_range": 0.5, "id2label": {"0": "a"}, "label2id": {"a": 0}}
    (copy / "config.json").write_text(json.dumps(settings | early))
    assert difference(tiny_folder, copy) == ""
    next(copy.glob("*.safetensors")).unlink()  # a download that was interrupted
    assert identity_of(ModelConfig(str(copy))).weights is None

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "models--someone--base"
    shutil.copytree(tiny_folder, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    on_hub = identity_of(ModelConfig("someone/base"))
    assert on_hub == identity_of(ModelConfig(str(tiny_folder)))
    assert identity_of(ModelConfig("someone/base", revision="v2")).weights is None
