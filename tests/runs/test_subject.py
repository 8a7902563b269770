"""`adapter.start_from`: a new run starts from another adapter's weights, and takes nothing else
from it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import adapter_bytes, evaluations_of, folder_of, train_and_die_after

from cera_train.common.files import read_yaml
from cera_train.runs.subject import digest_of, find_start
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)


def test_the_optimizer_starts_anew_and_config_names_the_source(run, tiny_config, capsys):
    later = tiny_config("name=later", "train.max_updates=1", f"adapter.start_from={run}")
    train(later)
    digest = digest_of(run / "adapter")
    assert (
        f"start      from {run}, digest {digest}; the optimizer starts anew\n"
        in capsys.readouterr().out
    )
    adapter = read_yaml(folder_of(later) / "config.yaml")["adapter"]
    assert (adapter["start_from"], adapter["start_digest"]) == (str(run), digest)
    # A new AdamW moves every weight by the learning rate in its first update; a resumed one does
    # not.
    before, after = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (run, folder_of(later))
    )
    name = next(name for name in before if "cera_B" in name)
    assert (after[name] - before[name]).abs().max().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("place", "update"), [("checkpoints/8", 8), ("copy", 12)])
def test_any_adapter_folder_can_be_a_start(run, tiny_config, tmp_path, place, update):
    folder = run / place
    if place == "copy":  # without the run's config: adapter_config.json decides
        folder = Path(shutil.copytree(run / "adapter", tmp_path / "copy"))
    later = tiny_config("name=later", "train.max_updates=1", f"adapter.start_from={folder}")
    logged = {line["update"]: line["eval/perplexity"] for line in evaluations_of(run)}
    assert train(later)["perplexity_before"] == logged[update]


def test_an_interrupted_run_resumes_without_its_source(run, tiny_config):
    settings = [f"adapter.start_from={run}", "train.max_updates=6"]
    whole = tiny_config("name=whole", *settings)
    cut = tiny_config("name=cut", *settings)
    train(whole)
    train_and_die_after(cut, 5)
    shutil.rmtree(run)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert train(cut)["updates"] == 6  # its result stands


def test_a_run_that_saved_nothing_begins_anew_from_weights_that_changed(run, tiny_config):
    start = shutil.copytree(run / "adapter", run.parent / "start")  # without its run's record
    later, new = (
        tiny_config(f"name={name}", f"adapter.start_from={start}") for name in ("later", "new")
    )
    train_and_die_after(later, 2)  # before its first checkpoint
    shutil.copy(run / "checkpoints" / "8" / "adapter_model.safetensors", start)
    assert train(later)["adapter_digest"] == train(new)["adapter_digest"]
    assert adapter_bytes(later) == adapter_bytes(new)


def test_another_dropout_or_init_starts_from_the_same_weights(run, tiny_config):
    adapter = tiny_config(f"adapter.start_from={run}").adapter
    changed = replace(adapter, dropout=0.5, init="kaiming_uniform")
    assert find_start(changed) == run / "adapter"
