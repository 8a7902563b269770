"""A run, adapter, model or data file from a stranger runs no code, reads no secret and
cannot control the terminal.

The attacks are real: code that runs creates a file, `marker`.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from made_files import change_json
from tiny_runs import folder_of, train_and_die_after
from transformers import LlamaConfig

from cera_train.common.files import write_text
from cera_train.common.settings import to_plain
from cera_train.common.terminal import print_line
from cera_train.data.look import print_example
from cera_train.data.sources import from_hub
from cera_train.model.folder import check_length
from cera_train.model.weights import load_model
from cera_train.runs.card import write_card
from cera_train.runs.records import load_config
from cera_train.runs.results import RunResult
from cera_train.runs.subject import find_subject
from cera_train.settings.data import DataConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.run import Config
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)


def write_config(run: Path, config: Config) -> None:
    """Makes a run a stranger's."""
    (run / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


# --- runs and adapters ----------------------------------------------------------------------------


@pytest.fixture
def config(run) -> Config:
    return load_config(run / "config.yaml")


@pytest.fixture
def model_with_code(tmp_path, tiny_folder, marker, monkeypatch) -> str:
    """A model whose Python file creates the marker as soon as it is imported."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(tiny_folder, tmp_path / "model-with-code")
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change_json(folder / "config.json", {"model_type": "evil", "auto_map": classes})
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
    )
    return str(folder)


def test_a_runs_config_cannot_ask_to_run_its_models_code(
    tmp_path, run, config, eval_config, model_with_code, marker
):
    trust = "trust_remote_code=true"
    trusting = replace(config.model, path=model_with_code, trust_remote_code=True)
    write_config(run, replace(config, model=trusting))
    for folder in (run, run / "adapter"):
        with pytest.raises(ValueError, match=f"asks to run the Python code .*: {trust}"):
            find_subject(eval_config(run=folder))
        assert find_subject(eval_config(trust, run=folder)).model == trusting
    adapter = shutil.copytree(run / "adapter", tmp_path / "download")
    change_json(adapter / "adapter_config.json", {"base_model_name_or_path": model_with_code})
    with pytest.raises(ValueError, match=f"set model.{trust}"):
        load_model(find_subject(eval_config(run=adapter)).model, "cpu")
    assert not marker.exists()
    check_length(find_subject(eval_config(trust, run=adapter)).model, 1, "x")
    assert marker.exists()


def test_a_runs_config_is_plain_text_without_lookups(run, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_reader")
    prompt = "${oc.env:HF_TOKEN} {question} ${name} \\${x}"
    write_config(run, replace(config, data=replace(config.data, prompt=prompt)))
    assert load_config(run / "config.yaml").data.prompt == prompt


def test_a_runs_yaml_creates_no_objects(tmp_path, marker):
    text = f"name: !!python/object/apply:io.open [{marker}, w]\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml"):
        load_config(tmp_path / "config.yaml")
    assert not marker.exists()


# --- pickles --------------------------------------------------------------------------------------


def test_an_adapters_pickle_is_not_read(run, eval_config, marker):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Payload(marker), run / "adapter" / "adapter_model.bin")
    for folder in (run, run / "adapter"):
        with pytest.raises(
            ValueError, match="lacks its weights, adapter_model.safetensors: .*convert a pickle"
        ):
            find_subject(eval_config(run=folder))
    assert not marker.exists()
    torch.load(run / "adapter" / "adapter_model.bin", weights_only=False)
    assert marker.exists()


def test_a_base_models_pickle_is_not_read(tmp_path, tiny_folder, marker):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(marker), folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"model\.safetensors.*Weights in other formats are not read: convert them"
    ):
        load_model(ModelConfig(path=str(folder), dtype="float32"), "cpu")
    assert not marker.exists()


def test_a_checkpoints_pickle_is_not_read(tiny_config, marker):
    config = tiny_config()
    train_and_die_after(config, 5)
    checkpoint = folder_of(config) / "checkpoints" / "4"
    torch.save(Payload(marker), checkpoint / "optimizer.pt")
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(ValueError, match=f"{checkpoint} is damaged or no checkpoint"):
        train(config)
    assert not marker.exists()


def test_code_of_a_data_set_is_not_run(tmp_path, marker, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ValueError, match=f"data.path={folder}"):
        from_hub(DataConfig(path=str(folder), layout="documents"), "data.train_split")
    assert not marker.exists()


# --- what is shown --------------------------------------------------------------------------------

STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\u202e\ud800"
STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_no_line_controls_the_terminal(capsys):
    print_line("run", f"a{STEERING}b")
    print_example([(f"x{STEERING}y", True)])
    assert not STEERS.search(capsys.readouterr().out)


def test_a_card_shows_hostile_text_as_text(run, config):
    name = "<script>x|`*_[a](javascript:b)![c](data:d)"  # others are refused
    hostile = f"{name}\n---\n# e{STEERING}"
    model = replace(config.model, path=hostile, revision=hostile)
    write_config(run, replace(config, name=name, model=model))
    write_card(run, RunResult.read(run / "result.json"), LlamaConfig())
    text = (run / "adapter" / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert "\n# e" not in body
    assert "<script" not in body
    assert not re.search(r"(?<!\\)[\[|`]a?\]?\(", body)
    assert not STEERS.search(body)


# --- links ----------------------------------------------------------------------------------------


def test_a_write_replaces_a_link_instead_of_following_it(tmp_path):
    (tmp_path / "precious").write_text("precious")
    for name in ("result.json", f".writing-{os.getpid()}-result.json"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_text(tmp_path / "result.json", "{}")
    assert (tmp_path / "result.json").read_text() == "{}"
    assert not (tmp_path / "result.json").is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"
