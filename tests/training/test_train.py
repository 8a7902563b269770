"""Whole runs of the tiny model, in this process: what they learn, print and leave."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from built_runs import build_run
from evaluated_runs import read
from safetensors.torch import load_file
from tiny_runs import folder_of, metrics_of, scale_gradients

from cera_train.common.files import read_json, read_yaml
from cera_train.common.settings import to_plain
from cera_train.distributed.accelerator import check_distribution
from cera_train.model.language_model import perplexity
from cera_train.runs.results import DIVERGED, LOSSES_AFTER, LOSSES_BEFORE, TokenLosses
from cera_train.settings.distributed import Strategy
from cera_train.training.resolve import resolve
from cera_train.training.train import backward, clip_gradients, train


@pytest.fixture
def finished(finished_config):
    """The config and the result of a finished run."""
    return finished_config, read_json(folder_of(finished_config) / "result.json")


def test_perplexity_falls_and_the_folder_holds_everything(finished):
    config, result = finished
    assert result["eval/perplexity"] < 0.5 * result["perplexity_before"]
    folder = folder_of(config)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "best",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "losses_after.safetensors",
        "losses_before.safetensors",
        "metrics.jsonl",
        "result.json",
        "spectra.jsonl",
        "spectrum.json",
    ]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["12", "8"]
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {(folder / "config.yaml").stat().st_mode}  # whoever may read one may read all
    assert read_yaml(folder / "config.yaml") == to_plain(resolve(config, folder).config)


def test_a_learned_mix_logs_its_gamma(tiny_config):
    config = tiny_config("adapter=cera_mix", "train.max_updates=2")
    train(config)
    gammas = [line["adapter/gamma"] for line in metrics_of(config) if "eval/loss" in line]
    assert gammas[0] == 0
    assert len(gammas) == 2
    modules = read_json(folder_of(config) / "spectrum.json")
    assert gammas[-1] == pytest.approx(sum(module["gamma"] for module in modules.values()) / 4) != 0
    weights = load_file(folder_of(config) / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith("cera_gate.gamma") for name in weights) == 4


def test_metrics_have_the_promised_names(finished):
    config, result = finished
    lines = metrics_of(config)
    assert [line["update"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert [line["update"] for line in lines if "eval/loss" in line] == [0, 4, 8, 12]
    assert {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_s"} <= lines[1].keys()
    evaluation = lines[-1]
    assert {
        "eval/loss",
        "eval/perplexity",
        "spectrum/effective_rank/mean",
        "spectrum/effective_rank/max",
        "spectrum/manifold_dimension/mean",
        "spectrum/linear_share/mean",
    } <= evaluation.keys()
    spectra = read(folder_of(config) / "spectra.jsonl")
    assert [line["update"] for line in spectra] == [0, 4, 8, 12]
    module = spectra[-1]["modules"]["model.layers.0.self_attn.q_proj"]
    assert module.keys() == {"effective_rank", "manifold_dimension", "linear_share"}
    assert evaluation["eval/perplexity"] == result["eval/perplexity"]
    assert 1 < result["spectrum/effective_rank/max"] <= 4
    before, after = (
        TokenLosses.read(folder_of(config) / name) for name in (LOSSES_BEFORE, LOSSES_AFTER)
    )
    assert [perplexity(losses.mean) for losses in (before, after)] == [
        result["perplexity_before"],
        result["eval/perplexity"],
    ]
    assert before.tokens.tolist() == after.tokens.tolist()


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_compiling_without_what_it_needs_is_refused(tiny_config, monkeypatch, missing):
    if missing == "compiler":
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setattr("cera_train.model.compiled.PYTHON_HEADER", Path("/nowhere/Python.h"))
    with pytest.raises(
        ValueError, match=r"needs a C\+\+ compiler on a CPU, .* Python's headers \(/.*/Python.h\)"
    ):
        train(tiny_config("train.compile=true"))


def test_gradients_are_clipped_to_the_norm(tiny_config, tmp_path):
    run = build_run(tiny_config(), tmp_path / "run")
    backward(run.model, run.objective.draw([0, 1, 2]))
    norm = clip_gradients(run.model, 1e-3)
    clipped = torch.cat([weight.grad.flatten() for weight in run.model.trained]).norm().item()
    assert norm > 0.01
    assert clipped == pytest.approx(1e-3, rel=1e-4)


def test_every_process_leaves_after_the_result_is_written(tiny_config, monkeypatch):
    config = tiny_config("train.max_updates=1")
    written = []
    result = folder_of(config) / "result.json"
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda _: written.append(result.exists()))
    train(config)
    assert written == [True]


def test_patience_ends_a_run_and_best_is_the_adapter_of_the_lowest_perplexity(tiny_config):
    config = tiny_config(
        "optimizer.lr=2",
        "train.max_updates=100",
        "train.eval_every=1",
        "train.save_every=1",
        "train.keep=9",
        "train.patience=2",
    )
    result = train(config)
    evaluations = {
        line["update"]: line["eval/perplexity"]
        for line in metrics_of(config)
        if "eval/loss" in line
    }
    best = min(evaluations, key=evaluations.get)
    assert (result["best_update"], result["best_perplexity"]) == (best, evaluations[best])
    assert best > 0
    assert result["updates"] == best + 2 < 100
    folder = folder_of(config)
    after = TokenLosses.read(folder / LOSSES_AFTER)
    assert perplexity(after.mean) == result["eval/perplexity"]
    assert read_json(folder / "best" / "metrics.json")["update"] == best
    kept = [
        place / "adapter_model.safetensors"
        for place in (folder / "best", folder / "checkpoints" / str(best))
    ]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_a_loss_that_is_not_finite_is_reported_with_its_rows_and_keeps_the_checkpoint(
    tiny_config, monkeypatch
):
    config = tiny_config()
    reduce = Accelerator.reduce
    updates = itertools.count(1)

    def poisoned(self, value, reduction="sum"):
        is_training_loss = reduction == "mean"  # an evaluation sums
        factor = float("nan") if is_training_loss and next(updates) == 6 else 1
        return reduce(self, value, reduction=reduction) * factor

    monkeypatch.setattr(Accelerator, "reduce", poisoned)
    message = (
        r"loss of update 6 or its gradient is not finite \(training rows \[\d+.*checkpoints/4, is "
        r"kept"
    )
    with pytest.raises(ValueError, match=message):
        train(config)
    assert (folder_of(config) / "checkpoints" / "4" / "adapter_model.safetensors").exists()
    assert "loss of update 6" in (folder_of(config) / DIVERGED).read_text()
    train(config)
    assert not (folder_of(config) / DIVERGED).exists()


def test_a_held_out_loss_that_is_not_finite_ends_the_run_too(tiny_config):
    """Such as where an evaluation follows the update that was too large."""
    config = tiny_config("optimizer.lr=1e30", "train.eval_every=1", "train.save_every=1")
    message = "^the held-out loss after update 1 is not finite. There was no checkpoint yet. Lower"
    with pytest.raises(ValueError, match=message):
        train(config)
    assert (folder_of(config) / DIVERGED).exists()
    assert not list((folder_of(config) / "checkpoints").glob("*"))


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(tiny_config, monkeypatch):
    """From a scale of 4, the scaler skips updates and halves it: the gradient overflows even at a
    half."""
    scale_gradients(monkeypatch)
    backward = Accelerator.backward

    def overflow(self, loss):
        backward(self, loss)
        for group in self._optimizers[0].param_groups:
            for weight in group["params"]:
                weight.grad.fill_(float("nan"))

    monkeypatch.setattr(Accelerator, "backward", overflow)
    config = tiny_config("train.check_coverage=false")
    with pytest.raises(ValueError, match=r"update 4 or its gradient is not finite"):
        train(config)
    assert [line["update"] for line in metrics_of(config) if "train/loss" in line] == [1, 2, 3]


def test_a_run_that_fails_before_its_first_update_leaves_no_folder(
    tiny_config, tiny_config_in, tmp_path
):
    config = tiny_config("adapter.target_modules=[no_such_module]")
    with pytest.raises(ValueError, match="no_such_module"):
        train(config)
    assert not folder_of(config).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):  # which commands explain
        train(tiny_config_in(tmp_path / "file"))


@pytest.mark.parametrize("precision", ["model.dtype=float16", "train.autocast=true"])
def test_a_run_in_every_precision_learns(tiny_config, precision):
    result = train(tiny_config(precision))
    assert result["eval/perplexity"] < 0.7 * result["perplexity_before"]


def test_foreign_sharding_engines_are_refused():
    with pytest.raises(
        ValueError, match="launcher set up FSDP, but distributed.strategy=ddp needs plain processes"
    ):
        check_distribution(SimpleNamespace(distributed_type=DistributedType.FSDP), Strategy.ddp)
