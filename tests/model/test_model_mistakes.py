"""Mistakes in `model.path`, and the one line that each gets: the place, what is wrong, the mend."""

from __future__ import annotations

import json
import shutil
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
from cera_train.model.folder import check_model
from cera_train.model.weights import check_length, load_model, load_tokenizer
from cera_train.settings.model import ModelConfig

ADDRESS = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path, tiny_folder, monkeypatch) -> Path:
    """A copy of the tiny model, under the working directory's `m`."""
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
    assert len(line) < 400
    return line


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("./no", "folder does not exist (from {cwd}). Set model.path to a local folder with config.json, or"),
        ("/abs/none", "folder does not exist (from {cwd}). Set model.path to a local folder with config.json, or"),
        ("~/x", "folder does not exist; a ~ is not expanded here: write {home}/x."),
        ("a/b/c", "folder does not exist (from {cwd}), and a Hub id looks like organisation/name. Set model.path to"),
        (f"https://huggingface.co/{ADDRESS}", f"not an address: write the Hub id alone, such as {ADDRESS}."),
        ("", "not a name: write a Hub id or a folder."),
        ("m/config.json", "it is a file: set model.path to the folder that it is in, m."),
        ("x.gguf", "GGUF files are not trained on: set model.path to the model's folder or Hub id with safetensors"),
    ],
)
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(folder, tmp_path, monkeypatch, path, line):
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Path("x.gguf").touch()
    assert refusal(path).startswith(f"model.path={path}: {line.format(cwd=tmp_path, home=Path.home())}")


# --- folders ---------------------------------------------------------------------------------------------------------


def with_only(name: str, content: str = "{}") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def configured(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def without_a_shard(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def model_of(name: str, **settings) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        kind = getattr(transformers, name)
        kind(kind.config_class(vocab_size=64, num_hidden_layers=1, **settings)).save_pretrained(folder)

    return change


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
SMALL_T5 = {"d_model": 16, "d_ff": 16, "num_heads": 2, "d_kv": 8}
SAFETENSORS = "m/model.safetensors: "


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without("config.json"), "model.path=m: the folder has no config.json. Copy the model's config.json into it"),
        (with_only("a.gguf"), "model.path=m: the folder has no config.json. It holds GGUF, which is not trained on"),
        (
            with_only("config.yaml"),
            "model.path=m: the folder has no config.json. It looks like a run's folder: set mod",
        ),
        (
            with_only("snapshots/1/config.json"),
            "model.path=m: the folder has no config.json. Did you mean m/snapshots/1",
        ),
        (
            with_only("adapter_config.json", '{"base_model_name_or_path": "a/b"}'),
            "model.path=m: the folder has no config.json. It is an adapter: set model.path to its base model, a/b.",
        ),
        (cut("config.json", 20), "m/config.json:2: broken JSON: "),
        (
            written("config.json", ""),
            "m/config.json:1: the file is empty (model.path=m). Download or copy the file aga",
        ),
        (written("config.json", "[]"), "m/config.json: expected a JSON object, got list (model.path=m). Copy the file"),
        (written("config.json", b"\xff\xff"), "m/config.json: cannot read the file: 'utf-8' codec can't decode byte"),
        (written("config.json", "{}"), "m/config.json: it has no model_type (model.path=m): copy the model's own conf"),
        (configured(model_type="lama"), "model.path=m: model_type 'lama' is not known to transformers"),
        (configured(hidden_size="big"), "model.path=m: not usable: Validation error for field 'hidden_size'. Download"),
        (configured(num_attention_heads=0), "model.path=m: cannot be loaded (ZeroDivisionError: "),
        (configured(hidden_size=64), "model.path=m: the weights have other shapes than config.json asks for: copy the"),
        (
            configured(num_hidden_layers=3),
            "model.path=m: the weights lack model.layers.2.input_layernorm.weight and 8 m",
        ),
        (
            without("tokenizer.json"),
            "model.path=m: the folder has no tokenizer: copy tokenizer.json and tokenizer_conf",
        ),
        (written("tokenizer.json", "{}"), "model.path=m: cannot be loaded (KeyError: 'added_tokens'): copy"),
        (
            cut("model.safetensors", 0),
            f"{SAFETENSORS}Error while deserializing header: header too small (model.path=m)",
        ),
        (cut("model.safetensors", 50_000), f"{SAFETENSORS}Error while deserializing header: incomplete metadata"),
        (written("model.safetensors", "version https://git-lfs"), f"{SAFETENSORS}it is a Git LFS pointer, not the wei"),
        (without("model.safetensors"), "model.path=m: cannot load it (Error no file named model.safetensors found in"),
        (without_a_shard, "m/model-00002-of-00"),
        (
            model_of("T5ForConditionalGeneration", **SMALL_T5),
            "model.path=m: T5ForConditionalGeneration does not predict",
        ),
        (
            model_of("BertForMaskedLM", **SMALL),
            "model.path=m: BertForMaskedLM does not predict the next token alone: a",
        ),
        (model_of("LlamaModel", **SMALL), "model.path=m: the weights lack lm_head.weight: they are not those of Llama"),
        (
            configured(architectures=None, model_type="vit"),
            "model.path=m: ViTConfig is not that of a causal language m",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_the_file_at_fault(folder, change, line):
    change(folder)
    assert refusal().startswith(line)


def test_tied_weights_are_not_missed(folder):
    model = make_tiny_llama(vocab_size=64, tie_word_embeddings=True)
    model.save_pretrained(folder)
    load("m")


def test_an_attention_that_is_not_known_is_refused_by_its_key(folder):
    assert refusal(attn_implementation="sdqa") == (
        "model.attn_implementation=sdqa: not known: set sdpa, eager or flash_attention_2."
    )


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_is_refused_at_once(folder, no_network, caplog):
    assert refusal("nobody/nothing") == (
        "model.path=nobody/nothing: no such folder here, and nothing comes from the Hub: http://127.0.0.1:9 does not "
        "answer, and the model is not in the cache. Where there is a network, log in with `hf auth login` if it is "
        "gated; without one, set model.path to a local folder or use model=smollm2_135m_pypi."
    )
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


def test_a_hub_that_answers_is_used(folder, no_network, monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    seen = []
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda path, **settings: seen.append(huggingface_hub.constants.HF_HUB_OFFLINE),
    )
    load_tokenizer(ModelConfig(path="some/model"))
    assert seen == [False]


def test_what_the_hub_refuses_has_a_mend(folder, monkeypatch):
    def refuse(path: str, **settings) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    assert "). Ask for access on its page and log in with `hf auth login`." in refusal("a/b")


def test_the_checks_of_a_folder_need_no_torch():
    import subprocess
    import sys

    program = "import sys; sys.argv[0] = 'cera-train'\n"
    program += "from cera_train.model.folder import check_model; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    check_model(ADDRESS)
