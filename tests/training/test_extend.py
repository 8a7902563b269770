"""`train.extend`: a finished run trains on as one longer run would have; how it ended before is
kept."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_runs import (
    Cut,
    adapter_bytes,
    folder_of,
    metrics_of,
    timeless_metrics,
    train_and_die_after,
)

from cera_train.common.errors import UserError
from cera_train.report.runs import read_runs
from cera_train.runs.folder import COPIED_TO_END, MOVED_TO_END, RunFolder
from cera_train.runs.results import LOSSES_AFTER, LOSSES_BEFORE
from cera_train.runs.subject import find_adapter
from cera_train.training.train import train

SHORT = ["train.max_updates=null", "train.epochs=1"]
LONG = ["train.max_updates=null", "train.epochs=2"]
"""5 and 10 updates: 79 rows in batches of 16."""
EVERY = ["train.eval_every=5", "train.save_every=4", "adapter.dropout=0.3"]


@pytest.fixture
def short(trained_config, tiny_config):
    """The config of a finished run of one epoch."""
    return copy_of(trained_config(*EVERY, *SHORT), tiny_config(*EVERY, *SHORT))


@pytest.fixture
def whole(trained_config, tiny_config):
    """The config of a finished run of two epochs, which was not cut."""
    return copy_of(trained_config(*EVERY, *LONG), tiny_config(*EVERY, *LONG, "name=whole"))


def copy_of(trained, config):
    """A config whose folder is a copy of another run's."""
    shutil.copytree(folder_of(trained), folder_of(config))
    return config


def test_the_bytes_are_those_of_one_longer_run_which_stands(tiny_config, short, whole, capsys):
    config = tiny_config(*EVERY, *LONG, "train.extend=true")
    result = train(config)
    assert adapter_bytes(config) == adapter_bytes(whole)
    assert timeless_metrics(config) == timeless_metrics(whole)
    best = ("best/adapter_model.safetensors", "best/metrics.json")
    for name in (LOSSES_BEFORE, LOSSES_AFTER, *best, "spectrum.json", "spectra.jsonl"):
        assert (folder_of(config) / name).read_bytes() == (folder_of(whole) / name).read_bytes()
    line = "from update 5 to 10, learning rate 0.01 (0.01 before); ends/5 keeps the run as it ended"
    assert f"extend     {folder_of(config)} {line}\n" in capsys.readouterr().out
    assert json.loads((folder_of(config) / "environment.json").read_text())["updates"] == 10
    assert train(config) == train(tiny_config(*EVERY, *LONG)) == result
    with pytest.raises(UserError, match="train.epochs was 2, is 1"):
        train(short)


def test_the_end_so_far_is_a_runs_folder(tiny_config, short):
    folder = folder_of(short)
    (folder / "eval" / "gsm8k").mkdir(parents=True)
    before = {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    train(tiny_config(*EVERY, *LONG, "train.extend=true"))
    end = folder / "ends" / "5"
    assert {
        path.relative_to(end): path.read_bytes() for path in end.rglob("*") if path.is_file()
    } == {
        path: content
        for path, content in before.items()
        if path.parts[0] not in ("checkpoints", "best")
    }
    assert (end / "eval" / "gsm8k").is_dir()
    assert not (folder / "eval").exists()  # its answers are those of the earlier adapter
    assert find_adapter(end) == (end, end / "adapter")
    run, earlier = read_runs([folder, end])
    assert (run.figures.updates, earlier.figures.updates) == (10, 5)
    assert earlier.metrics.last_update == 5


@pytest.mark.parametrize("moved", [0, 4])
def test_keeping_the_end_can_be_cut_anywhere(tiny_config, short, whole, monkeypatch, moved):
    config = tiny_config(*EVERY, *LONG, "train.extend=true")
    calls = iter(range(99))
    folder_of(config).joinpath("eval").mkdir()
    rename = Path.rename

    def cut(self, target):
        if Path(target).parent.name == "5" and next(calls) == moved:
            raise Cut
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(Cut):
            train(config)
    train(config)
    assert adapter_bytes(config) == adapter_bytes(whole)
    expected = {*COPIED_TO_END, *MOVED_TO_END} - {"samples.jsonl", "grades"}  # this run has none
    assert {path.name for path in (folder_of(config) / "ends" / "5").iterdir()} == expected


def test_an_extension_that_was_cut_is_resumed_without_the_flag(tiny_config, short, whole):
    config = tiny_config(*EVERY, *LONG, "train.extend=true")
    train_and_die_after(config, 7)
    assert not (folder_of(config) / "result.json").exists()
    train(tiny_config(*EVERY, *LONG))
    assert adapter_bytes(config) == adapter_bytes(whole)
    assert [path.name for path in RunFolder(folder_of(config), {}).ends()] == ["5"]


def test_a_schedule_that_depends_on_the_length_is_named(tiny_config, capsys):
    settings = [*EVERY, "optimizer.schedule=linear"]
    train(tiny_config(*settings, *SHORT))
    config = tiny_config(*settings, *LONG, "train.extend=true")
    train(config)
    assert "from update 5 to 10, learning rate 0.005 (0.002 before)" in capsys.readouterr().out
    rates = [line["train/lr"] for line in metrics_of(config) if "train/lr" in line]
    assert rates[4:6] == pytest.approx([0.002, 0.005])


def test_what_cannot_be_extended_is_refused(tiny_config, short):
    def refused(message: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            train(tiny_config(*EVERY, *overrides))
        assert "\n" not in str(error.value)

    folder = folder_of(short)
    shorter = ["train.max_updates=4", "train.epochs=1", "train.extend=true"]
    refused(
        "ended at update 5, .* train.max_updates=4 train.patience=None it ends there too: set more",
        *shorter,
    )
    refused("optimizer.lr was 0.01, is 0.02", *LONG, "optimizer.lr=0.02", "train.extend=true")
    refused(
        "another config: train.epochs was 1, is 2. .* To train longer, add train.extend=true.",
        *LONG,
    )
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["train"]["patience"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    path = folder / "checkpoints" / "5" / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluations_since_best": 1}))
    path.with_name("checksums.json").unlink()
    refused(
        "ended at update 5, .* train.patience=1 it ends there too",
        *LONG,
        "train.patience=1",
        "train.extend=true",
    )
    assert (folder / "result.json").exists()
