"""What a run's folder decides for a run that resumes in it: auto settings, earlier versions, its length."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from tiny_runs import folder_of, train_and_die_after

from cera_train.common.errors import UserError
from cera_train.common.files import write_checksums
from cera_train.model.precision import Precision
from cera_train.settings.model import Dtype
from cera_train.training.train import train


def on(monkeypatch, dtype: str) -> None:
    """Lets the hardware decide for a precision."""

    def choose(wanted: Dtype) -> Precision:
        return Precision(Dtype(dtype) if wanted == Dtype.auto else wanted, f"a {dtype} machine")

    monkeypatch.setattr("cera_train.training.session.choose_precision", choose)


def test_what_auto_took_is_recorded_and_kept_on_another_machine(tiny_config, monkeypatch, capsys):
    on(monkeypatch, "bfloat16")
    config = tiny_config("model.dtype=auto", "train.max_updates=2", "train.eval_every=1")
    folder = folder_of(config)
    train_and_die_after(config, 1, monkeypatch)
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert (recorded["model"]["dtype"], recorded["adapter"]["kernels"]) == ("bfloat16", "torch")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["precision"] == {"dtype": "bfloat16", "reason": "a bfloat16 machine"}
    assert "precision  bfloat16: a bfloat16 machine" in capsys.readouterr().out
    on(monkeypatch, "float32")
    train(config)
    assert f"precision  bfloat16: as {folder} was begun" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"


def test_what_peft_refuses_is_refused_before_anything_is_loaded(tiny_config, monkeypatch):
    monkeypatch.setattr("cera_train.training.session.load_tokenizer", None)
    with pytest.raises(UserError, match="adapter.settings.minir=2: MissConfig has"):
        train(tiny_config("adapter=miss", "+adapter.settings.minir=2"))


def test_a_config_of_an_earlier_version_is_resumed(tiny_config, monkeypatch):
    """It lacks settings that came later, and has the model's shape in model.facts."""
    config = tiny_config()
    folder = folder_of(config)
    train_and_die_after(config, 5, monkeypatch)
    for path in (folder / "config.yaml", *folder.glob("checkpoints/*/config.yaml")):
        old = yaml.safe_load(path.read_text())
        for name in ("kernels", "b_lr_ratio", "method", "settings", "label"):
            del old["adapter"][name]
        old["model"]["facts"] = {"of": config.model.path, "hidden_size": 32, "num_hidden_layers": 2, "license": "mit"}
        path.write_text(yaml.safe_dump(old))
        checksums = path.parent / "checksums.json"
        if checksums.exists():
            checksums.unlink()
            write_checksums(path.parent)
    assert train(config)["updates"] == 12


def test_more_updates_in_the_same_folder_are_answered_with_how_to_train_longer(tiny_config):
    config = tiny_config("train.max_updates=2")
    train(config)
    longer = replace(config, train=replace(config.train, max_updates=4))
    checkpoint = folder_of(config) / "checkpoints" / "2"
    with pytest.raises(UserError, match=f"To train longer, .*train.resume={checkpoint} name=NEW") as error:
        train(longer)
    assert "train.max_updates was 2, is 4" in str(error.value)
    further = replace(longer, name="longer", train=replace(longer.train, resume=str(checkpoint)))
    assert train(further)["updates"] == 4
