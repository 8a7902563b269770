"""Mistakes in `model.path`, and the one line that each gets: the place, what is wrong, the mend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import make_tiny_llama

from cera_train.common import hub
from cera_train.common.errors import UserError
from cera_train.model.weights import check_length, load_model, load_tokenizer
from cera_train.settings.model import ModelConfig

ADDRESS = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture
def folder(tmp_path, tiny_folder, monkeypatch) -> Path:
    """A copy of the tiny model, under the working directory's `m`."""
    transformers.utils.logging.set_verbosity_error()
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(tiny_folder, Path("m"))


def load(path: str, **settings) -> None:
    """The calls by which a run loads its model, in their order."""
    config = ModelConfig(path=path, dtype="float32", **settings)
    load_tokenizer(config)
    check_length(config, 8, "data.max_length")
    load_model(config, torch.device("cpu"))


def refusal(path: str = "m", **settings) -> str:
    with pytest.raises(UserError) as error:
        load(path, **settings)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"model.path={path}: ")
    assert len(line) < 600
    return line


@pytest.mark.parametrize("path", ["./no", "/abs/none", "~/x", "a/b/c", f"https://huggingface.co/{ADDRESS}", ""])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(folder, monkeypatch, path):
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "folder does not exist (from " in refusal(path)
    assert refusal("m/config.json").startswith("model.path=m/config.json: it is a file. Set model.path to a folder")


# --- folders ---------------------------------------------------------------------------------------------------------


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def save(kind: type, **settings) -> Callable[[Path], None]:
    small = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    return lambda folder: kind(kind.config_class(**small, **settings)).save_pretrained(folder)


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50_000])


def lose_a_shard(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


AGAIN = "Download or copy the model again"
MISTAKES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json", "Set model.path to a folder"),
    "broken config": (write("config.json", "{"), "not a valid JSON file", AGAIN),
    "unknown type": (lambda folder: configure(folder, model_type="lama"), "`lama`", "Upgrade transformers"),
    "wrong value": (lambda folder: configure(folder, num_attention_heads=0), "ZeroDivisionError", AGAIN),
    "other shapes": (lambda folder: configure(folder, hidden_size=64), "mismatched", "Copy the config.json that"),
    "images": (
        lambda folder: configure(folder, architectures=None, model_type="vit"),
        "ViTConfig",
        "a causal language",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", AGAIN),
    "broken tokenizer": (write("tokenizer.json", "{}"), "KeyError: 'added_tokens'", AGAIN),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors", "Weights in other"),
    "cut weights": (cut_weights, "incomplete metadata", AGAIN),
    "a pointer": (write("model.safetensors", "version https://git-lfs"), "header", "`git lfs pull` in a clone"),
    "a missing shard": (lose_a_shard, "model-00002-of-00", AGAIN),
    "both directions": (save(transformers.BertForMaskedLM), "does not predict the next token", "such as Llama"),
    "no head": (save(transformers.LlamaModel), "the weights lack lm_head.weight", "download the model again"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_is_no_model_is_refused(folder, mistake):
    change, cause, mend = MISTAKES[mistake]
    change(folder)
    line = refusal()
    assert cause in line
    assert mend in line


def test_tied_weights_are_not_missed(folder):
    model = make_tiny_llama(vocab_size=64, tie_word_embeddings=True)
    model.save_pretrained(folder)
    load("m")


def test_an_attention_that_is_not_known_is_refused_with_those_that_are(folder):
    assert "Set model.attn_implementation=sdpa or eager" in refusal(attn_implementation="sdqa")


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_is_refused_at_once(folder, no_network, caplog):
    line = refusal("nobody/nothing")
    assert "http://127.0.0.1:9 does not answer. Without a network, set model.path to a local folder" in line
    assert caplog.records == []
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # a later job of a sweep may have a network


def test_a_model_of_the_cache_loads_without_a_network(folder, tmp_path, no_network, monkeypatch):
    cache = tmp_path / "hub" / "models--some--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cache / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load("some/tiny")


def test_a_hub_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_session", answered.wait)
    assert not hub.hub_answers()
    answered.set()


def test_what_the_hub_refuses_has_a_mend(folder, monkeypatch):
    def refuse(path: str, **settings) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    assert "). Ask for access on its page and log in with `hf auth login`." in refusal("a/b")


def test_the_check_of_a_path_needs_no_torch():
    program = "import sys; sys.argv[0] = 'cera-train'; from cera_train.model.folder import check_model\n"
    program += f"check_model({ADDRESS!r}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
