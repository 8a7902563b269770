"""Whole runs of the tiny model, in this process: what they leave, and that cutting them changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import peft
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cera_train.common.settings import to_plain
from cera_train.distributed.accelerator import check_distribution
from cera_train.distributed.config import Strategy
from cera_train.model.loss import perplexity
from cera_train.runs.folder import RunFolder
from cera_train.runs.outcomes import LOSSES_AFTER, LOSSES_BEFORE, read_losses
from cera_train.training.session import settle
from cera_train.training.train import train


def folder_of(config) -> Path:
    return Path(config.output_dir) / config.name


def metrics_of(config) -> list[dict]:
    return [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(config) -> bytes:
    return (folder_of(config) / "adapter" / "adapter_model.safetensors").read_bytes()


class Cut(Exception):
    """Stands for the death of the process: nothing of the run's own code runs after it."""


def train_and_die_after(config, update: int, monkeypatch) -> None:
    """Runs until the metrics of that update are logged, then stops between two statements."""
    log = RunFolder.append_metrics

    def append(self, metrics):
        log(self, metrics)
        if "train/loss" in metrics and metrics["update"] == update:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append)
        with pytest.raises(Cut):
            train(config)


@pytest.fixture
def finished(tiny_config):
    config = tiny_config()
    return config, train(config)


def test_perplexity_falls_and_the_folder_holds_everything(finished, tiny_folder):
    config, result = finished
    assert result["eval/perplexity"] < 0.5 * result["perplexity_before"]
    folder = folder_of(config)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter", "best", "checkpoints", "config.yaml", "environment.json"),
        *("losses_after.safetensors", "losses_before.safetensors"),
        *("metrics.jsonl", "result.json", "run.png", "spectra.jsonl", "spectrum.json"),
    ]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["12", "8"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == to_plain(settle(config, folder)[0])
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((folder / "spectrum.json").read_text())) == 4
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_learned_mix_logs_its_gamma(tiny_config):
    config = tiny_config("adapter=cera_mix", "adapter.r=4", "adapter.recurrent_steps=1")
    train(config)
    gammas = [line["adapter/gamma"] for line in metrics_of(config) if "eval/loss" in line]
    assert gammas[0] == 0
    assert len(gammas) == 4
    modules = json.loads((folder_of(config) / "spectrum.json").read_text())
    assert gammas[-1] == pytest.approx(sum(module["gamma"] for module in modules.values()) / 4) != 0
    weights = load_file(folder_of(config) / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith("cera_gate.gamma") for name in weights) == 4


def test_metrics_have_the_promised_names(finished):
    config, result = finished
    lines = metrics_of(config)
    updates = [line["update"] for line in lines if "train/loss" in line]
    assert updates == list(range(1, 13))
    assert [line["update"] for line in lines if "eval/loss" in line] == [0, 4, 8, 12]
    assert {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_s"} <= lines[1].keys()
    evaluation = lines[-1]
    assert {
        *("eval/loss", "eval/perplexity", "spectrum/effective_rank/mean", "spectrum/effective_rank/max"),
        *("spectrum/manifold_dimension/mean", "spectrum/dead_units/mean"),
    } <= evaluation.keys()
    assert not [name for name in evaluation if "layers" in name]
    spectra = [json.loads(line) for line in (folder_of(config) / "spectra.jsonl").read_text().splitlines()]
    assert [line["update"] for line in spectra] == [0, 4, 8, 12]
    module = spectra[-1]["modules"]["model.layers.0.self_attn.q_proj"]
    assert module.keys() == {"effective_rank", "manifold_dimension", "dead_units", "linear_share"}
    assert evaluation["eval/perplexity"] == result["eval/perplexity"]
    assert 1 < result["spectrum/effective_rank/max"] <= 4


def test_losses_of_tokens_are_those_of_the_reported_perplexities(finished):
    config, result = finished
    before, after = read_losses(folder_of(config))
    assert [perplexity(losses.mean) for losses in (before, after)] == [
        *(result["perplexity_before"], result["eval/perplexity"]),
    ]
    assert before.tokens.tolist() == after.tokens.tolist()
    assert after.sums().sum() / after.tokens.sum() == pytest.approx(metrics_of(config)[-1]["eval/loss"], rel=1e-12)


def test_the_final_adapter_gives_the_reported_perplexity_through_plain_peft(finished, tiny_folder, tokenizer):
    config, result = finished
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder_of(config) / "adapter").eval()
    from cera_train.data.logistic_map import problems

    total, count = 0.0, 0
    _, losses = read_losses(folder_of(config))
    sums, tokens = iter(losses.sums()), iter(losses.tokens)
    for row in problems(config.data.logistic_map, 20)[1]:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*prompt, *tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert next(tokens) == len(ids) - len(prompt)
        assert next(sums) == pytest.approx(loss.item() * (len(ids) - len(prompt)), rel=1e-4)
        total, count = total + loss.item() * (len(ids) - len(prompt)), count + len(ids) - len(prompt)
    assert torch.tensor(total / count).exp().item() == pytest.approx(result["eval/perplexity"], rel=1e-4)


def test_the_same_run_twice_is_the_same_to_the_bit(tiny_config):
    first, second = tiny_config("name=first"), tiny_config("name=second")
    train(first)
    train(second)
    assert adapter_bytes(first) == adapter_bytes(second)
    other = tiny_config("name=other", "train.seed=1")
    train(other)
    assert adapter_bytes(other) != adapter_bytes(first)


# 79 rows in batches of 16 are 5 updates an epoch: 12 updates cross two epoch boundaries.
@pytest.mark.parametrize("died_after", [2, 4, 5, 7, 11])
@pytest.mark.parametrize("adapter", ["cera", "dora"])
def test_resume_is_bit_exact(tiny_config, monkeypatch, died_after, adapter):
    settings = [f"adapter={adapter}", "adapter.dropout=0.3", "optimizer.schedule=cosine", "optimizer.warmup_ratio=0.1"]
    whole = tiny_config("name=whole", *settings)
    cut = tiny_config("name=cut", *settings)
    train(whole)
    train_and_die_after(cut, died_after, monkeypatch)
    assert not (folder_of(cut) / "result.json").exists()
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    for name in (LOSSES_BEFORE, LOSSES_AFTER):
        assert (folder_of(cut) / name).read_bytes() == (folder_of(whole) / name).read_bytes()

    def comparable(config):
        timings = {"train/tokens_per_s", "train/seconds"}
        return [{key: value for key, value in line.items() if key not in timings} for line in metrics_of(config)]

    assert comparable(cut) == comparable(whole)


def test_resume_with_8_bit_moments_is_bit_exact(tiny_config, monkeypatch):
    # bitsandbytes keeps 32-bit moments for tensors below 4096 numbers: B of the head is above.
    settings = ["optimizer=adamw_8bit", "optimizer.lr=1e-3", "adapter.r=32", "adapter.target_modules=[lm_head]"]
    whole, cut = tiny_config("name=whole", *settings), tiny_config("name=cut", *settings)
    train(whole)
    train_and_die_after(cut, 7, monkeypatch)
    state = torch.load(folder_of(cut) / "checkpoints" / "4" / "optimizer.pt", weights_only=True)
    moments = state["state"][1]["__bnb_optimizer_quant_state__"]
    assert moments["state1"].dtype == torch.uint8
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_resume_from_a_path_goes_on_from_there(tiny_config):
    whole = tiny_config("name=whole", "train.keep=9")
    train(whole)
    checkpoint = folder_of(whole) / "checkpoints" / "8"
    branch = tiny_config("name=branch", f"train.resume={checkpoint}")
    train(branch)
    assert adapter_bytes(branch) == adapter_bytes(whole)
    assert min(line["update"] for line in metrics_of(branch)) == 9
    before, after = read_losses(folder_of(branch))  # no update came before the first of this folder's
    assert before is None
    assert after.losses.tolist() == read_losses(folder_of(whole))[1].losses.tolist()


def test_a_finished_run_started_again_returns_its_result(finished, capsys, monkeypatch):
    config, result = finished
    monkeypatch.setattr("cera_train.training.session.load_model", None)  # nothing is loaded for it
    assert train(config) == result
    assert "finished" in capsys.readouterr().out


def test_resume_never_starts_anew_but_not_over_a_finished_run(tiny_config, monkeypatch):
    config = tiny_config("train.resume=never")
    train_and_die_after(config, 6, monkeypatch)
    train(config)
    assert [line["update"] for line in metrics_of(config) if "train/loss" in line] == list(range(1, 13))
    with pytest.raises(ValueError, match="holds a finished run"):
        train(config)


def test_another_config_in_the_same_folder_is_refused_by_key(finished, tiny_config):
    with pytest.raises(ValueError, match=r"adapter.r was 4, is 8.*optimizer.lr was 0.01, is 0.02"):
        train(tiny_config("adapter.r=8", "optimizer.lr=0.02"))


def test_settings_that_change_no_number_may_differ(tiny_config, monkeypatch):
    train_and_die_after(tiny_config(), 6, monkeypatch)
    result = train(tiny_config("train.micro_batch_tokens=300", "train.keep=1", "tracker.project=other"))
    assert result["updates"] == 12


def test_other_rows_under_the_same_name_are_refused(tiny_config, write_jsonl, monkeypatch):
    rows = [{"prompt": f"{number} is", "completion": f" number {number}"} for number in range(40)]
    path = write_jsonl("rows.jsonl", rows)
    settings = ["data=jsonl", f"data.train_files=[{path}]", "data.eval_rows=8"]
    train_and_die_after(tiny_config(*settings), 6, monkeypatch)
    write_jsonl("rows.jsonl", rows[::-1])
    with pytest.raises(ValueError, match="training rows are not those of"):
        train(tiny_config(*settings))


def test_two_runs_on_one_folder_are_refused(tiny_config):
    config = tiny_config()
    with RunFolder(folder_of(config), {}), pytest.raises(ValueError, match="another run is writing to"):
        train(config)


def test_the_result_does_not_depend_on_the_micro_batch(tiny_config):
    runs = []
    for number, tokens in enumerate((256, 300, 4096)):
        for layout in ("flat", "padded"):
            config = tiny_config(
                f"name={layout}{number}",
                f"train.micro_batch_tokens={tokens}",
                f"train.batch_layout={layout}",
                "adapter.dropout=0",
                "train.max_updates=5",
                "optimizer.lr=1e-3",
            )
            result = train(config)
            losses = [line["train/loss"] for line in metrics_of(config) if "train/loss" in line]
            runs.append([*losses, result["eval/perplexity"]])
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_change_nothing(tiny_config):
    def run(is_compiled: bool) -> list[float]:
        settings = ["adapter.dropout=0", "train.max_updates=4", "optimizer.lr=1e-3", f"train.compile={is_compiled}"]
        config = tiny_config(f"name=compiled_{is_compiled}", *settings)
        result = train(config)
        losses = [line["train/loss"] for line in metrics_of(config) if "train/loss" in line]
        return [*losses, result["eval/perplexity"], result["spectrum/effective_rank/mean"]]

    assert run(True) == pytest.approx(run(False), rel=1e-5)


def test_compiling_without_a_compiler_is_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on a CPU"):
        train(tiny_config("train.compile=true"))


def test_gradients_are_clipped_to_the_norm(tiny_config):
    config = tiny_config("optimizer.max_grad_norm=1e-9", "optimizer.weight_decay=0", "optimizer.eps=1")
    result = train(config)
    assert result["eval/perplexity"] == pytest.approx(result["perplexity_before"], rel=1e-5)


def test_patience_stops_when_perplexity_no_longer_falls(tiny_config):
    config = tiny_config("optimizer.lr=3", "train.max_updates=100", "train.eval_every=2", "train.patience=2")
    result = train(config)
    assert result["updates"] < 100
    assert result["updates"] == result["best_update"] + 4
    assert perplexity(read_losses(folder_of(config))[1].mean) == result["eval/perplexity"]


def test_best_is_the_adapter_of_the_lowest_perplexity(tiny_config):
    config = tiny_config("optimizer.lr=0.2", "train.keep=9")
    result = train(config)
    evaluations = {line["update"]: line["eval/perplexity"] for line in metrics_of(config) if "eval/loss" in line}
    best = min(evaluations, key=evaluations.get)
    assert (result["best_update"], result["best_perplexity"]) == (best, evaluations[best])
    folder = folder_of(config)
    assert json.loads((folder / "best" / "metrics.json").read_text())["update"] == best
    checkpoint = folder / "checkpoints" / str(best) / "adapter_model.safetensors"
    if best:
        assert (folder / "best" / "adapter_model.safetensors").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_finishes_the_update_saves_and_goes_on(tiny_config, monkeypatch, number, status):
    whole, config = tiny_config("name=whole"), tiny_config()
    train(whole)
    log = RunFolder.append_metrics

    def append(self, metrics):
        log(self, metrics)
        if metrics["update"] == 6:
            assert threading.current_thread() is threading.main_thread()
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append)
        with pytest.raises(SystemExit) as exit_info:
            train(config)
    assert exit_info.value.code == status
    assert (folder_of(config) / "checkpoints" / "7").is_dir()  # the signal came when update 6 was over
    train(config)
    assert adapter_bytes(config) == adapter_bytes(whole)


def test_a_loss_that_is_not_finite_names_update_and_rows_and_keeps_the_checkpoint(tiny_config, monkeypatch):
    config = tiny_config()
    reduce = Accelerator.reduce
    updates = iter(range(1, 100))

    def poisoned(self, value, reduction="sum"):
        is_training_loss = reduction == "mean"  # an evaluation sums
        return reduce(self, value, reduction=reduction) * (
            float("nan") if is_training_loss and next(updates) == 6 else 1
        )

    monkeypatch.setattr(Accelerator, "reduce", poisoned)
    with pytest.raises(
        ValueError,
        match=r"loss of update 6 or its gradient is not finite \(training rows \[\d+.*checkpoints/4, is kept",
    ):
        train(config)
    assert (folder_of(config) / "checkpoints" / "4" / "adapter_model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tiny_config, monkeypatch):
    config = tiny_config()
    clip = Accelerator.clip_grad_norm_
    updates = iter(range(1, 100))

    def overflowing(self, parameters, max_norm):
        norm = clip(self, parameters, max_norm)
        return norm * float("inf") if next(updates) == 6 else norm

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", overflowing)
    with pytest.raises(ValueError, match=r"update 6 or its gradient is not finite"):
        train(config)


def test_a_learning_rate_that_explodes_is_stopped(tiny_config):
    with pytest.raises(ValueError, match="is not finite"):
        train(tiny_config("optimizer.lr=1e30", "optimizer.weight_decay=0"))


def test_a_checkpoint_of_another_adapter_is_refused(tiny_config):
    whole = tiny_config("name=whole")
    train(whole)
    checkpoint = folder_of(whole) / "checkpoints" / "8"
    with pytest.raises(ValueError, match="adapter.r was 4, is 8"):
        train(tiny_config("name=other", f"train.resume={checkpoint}", "adapter.r=8"))
    with pytest.raises(ValueError, match="adapter.kind was 'cera', is 'lora'"):
        train(tiny_config("name=other", f"train.resume={checkpoint}", "adapter=lora", "adapter.r=4"))
    for name in ("checksums.json", "config.yaml"):  # without them, the tensors tell
        (checkpoint / name).unlink()
    with pytest.raises(ValueError, match="does not fit this"):
        train(tiny_config("name=other", f"train.resume={checkpoint}", "adapter.r=8"))
    assert not folder_of(tiny_config("name=other")).exists()


def test_a_path_that_is_no_checkpoint_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="expected auto, never or the folder of a checkpoint"):
        train(tiny_config(f"train.resume={tmp_path}"))


def test_a_mistake_costs_an_unfinished_run_nothing(tiny_config, monkeypatch):
    config = tiny_config()
    train_and_die_after(config, 6, monkeypatch)
    for settings in (["train.resume=never", "adapter.target_modules=[none]"], ["adapter.r=8"]):
        with pytest.raises(ValueError, match=r"matches no module|adapter.r was 4"):
            train(tiny_config(*settings))
    assert (folder_of(config) / "checkpoints" / "4").is_dir()
    assert len(metrics_of(config)) == 8


@pytest.mark.slow
def test_resume_from_an_earlier_checkpoint_of_the_folder_goes_back(tiny_config, monkeypatch):
    whole, config = tiny_config("name=whole"), tiny_config("train.keep=9")
    train(whole)
    train_and_die_after(config, 11, monkeypatch)
    result = train(tiny_config("train.keep=9", f"train.resume={folder_of(config) / 'checkpoints' / '4'}"))
    assert result["updates"] == 12
    assert [line["update"] for line in metrics_of(config) if "train/loss" in line] == list(range(1, 13))
    assert adapter_bytes(config) == adapter_bytes(whole)


def test_a_run_that_fails_before_its_first_update_leaves_no_folder(tiny_config):
    config = tiny_config("adapter.target_modules=[no_such_module]")
    with pytest.raises(ValueError, match="no_such_module"):
        train(config)
    assert not folder_of(config).exists()


def test_what_a_cut_write_left_is_removed(tiny_config, monkeypatch):
    config = tiny_config()
    train_and_die_after(config, 6, monkeypatch)
    half = folder_of(config) / "checkpoints" / ".writing-8"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    train(config)
    assert not list(folder_of(config).rglob(".writing-*"))


@pytest.mark.parametrize("adapter", ["cera", "lora", "rslora", "dora"])
def test_every_kind_of_adapter_learns(tiny_config, adapter):
    result = train(tiny_config(f"adapter={adapter}", "adapter.r=4"))
    assert result["eval/perplexity"] < 0.7 * result["perplexity_before"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_learns(tiny_config, quantization):
    result = train(tiny_config(f"model.quantization={quantization}", "model.dtype=bfloat16"))
    assert result["eval/perplexity"] < 0.7 * result["perplexity_before"]


@pytest.mark.parametrize(
    ("dtype", "autocast"), [("bfloat16", "null"), ("bfloat16", "false"), ("float32", "true"), ("float16", "null")]
)
def test_every_precision_learns(tiny_config, dtype, autocast):
    result = train(tiny_config(f"model.dtype={dtype}", f"train.autocast={autocast}"))
    assert result["eval/perplexity"] < 0.7 * result["perplexity_before"]


def test_gradient_checkpointing_changes_nothing(tiny_config):
    plain, recomputed = tiny_config("name=plain"), tiny_config("name=recomputed", "model.gradient_checkpointing=true")
    train(plain)
    train(recomputed)
    assert adapter_bytes(plain) == adapter_bytes(recomputed)


@pytest.mark.parametrize("adapter", ["cera", "lora"])
def test_only_the_chosen_layers_are_adapted(tiny_config, adapter):
    config = tiny_config(f"adapter={adapter}", "adapter.layers=[1]", "adapter.target_modules=all-linear")
    train(config)
    names = json.loads((folder_of(config) / "spectrum.json").read_text())
    assert len(names) == 7
    assert all(name.startswith("model.layers.1.") for name in names)


def test_an_adapted_head_learns_and_has_a_spectrum(tiny_config):
    config = tiny_config("adapter.target_modules=[q_proj,lm_head]")
    result = train(config)
    assert result["eval/perplexity"] < 0.7 * result["perplexity_before"]
    assert "lm_head" in json.loads((folder_of(config) / "spectrum.json").read_text())


@pytest.mark.parametrize("adapter", ["cera", "lora"])
def test_resume_of_flat_batches_is_bit_exact_with_dropout(tiny_config, monkeypatch, adapter):
    settings = [f"adapter={adapter}", "adapter.dropout=0.3", "train.batch_layout=flat"]
    whole, cut = tiny_config("name=whole", *settings), tiny_config("name=cut", *settings)
    train(whole)
    train_and_die_after(cut, 7, monkeypatch)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_a_signal_at_an_evaluation_saves_first_and_evaluates_on_resuming(tiny_config, monkeypatch):
    whole, config = tiny_config("name=whole"), tiny_config()
    train(whole)
    log = RunFolder.append_metrics

    def append(self, metrics):
        log(self, metrics)
        if metrics["update"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append)
        with pytest.raises(SystemExit):
            train(config)
    lines = metrics_of(config)
    assert lines[-1]["update"] == 8
    assert "eval/loss" not in lines[-1]
    train(config)
    assert adapter_bytes(config) == adapter_bytes(whole)
    assert [line["update"] for line in metrics_of(config) if "eval/loss" in line] == [0, 4, 8, 12]


def test_a_branch_from_another_folder_has_a_best_of_its_own(tiny_config):
    whole = tiny_config("name=whole", "train.keep=9")
    train(whole)
    checkpoint = folder_of(whole) / "checkpoints" / "8"
    branch = tiny_config("name=branch", f"train.resume={checkpoint}")
    assert train(branch)["best_update"] == 12
    assert (folder_of(branch) / "best" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match=r"another config: train.batch_size was 16, is 8; train.seed was 0, is 1"):
        train(tiny_config("name=other", f"train.resume={checkpoint}", "train.batch_size=8", "train.seed=1"))


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "progress.json"])
def test_a_damaged_checkpoint_without_checksums_is_named(tiny_config, monkeypatch, name):
    """Earlier versions wrote none: their checkpoints still load, and damage shows where it makes one unreadable."""
    config = tiny_config()
    train_and_die_after(config, 6, monkeypatch)
    (folder_of(config) / "checkpoints" / "4" / "checksums.json").unlink()
    file = folder_of(config) / "checkpoints" / "4" / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"checkpoints/4 is damaged or no checkpoint"):
        train(config)


def test_a_checkpoint_of_another_optimizer_is_refused(tiny_config):
    whole = tiny_config("name=whole", "adapter.r=32", "train.max_updates=4")
    train(whole)
    checkpoint = folder_of(whole) / "checkpoints" / "4"
    with pytest.raises(ValueError, match="optimizer.kind was 'adamw', is 'adamw_8bit'"):
        train(tiny_config("name=other", f"train.resume={checkpoint}", "adapter.r=32", "optimizer=adamw_8bit"))


def test_a_folder_that_cannot_be_made_is_named(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the run's folder .*Set output_dir"):
        train(tiny_config(f"output_dir={tmp_path / 'file'}"))


def test_metrics_are_strict_json_also_when_perplexity_overflows(tmp_path):
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.append_metrics({"update": 1, "eval/perplexity": float("inf")})
        line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"update": 1, "eval/perplexity": None}


def test_one_process_is_not_sharded(tiny_config):
    with pytest.raises(ValueError, match="shards the weights over several processes, and there is one"):
        train(tiny_config("distributed.strategy=fsdp"))


def test_an_engine_that_shards_the_model_is_refused():
    class Sharded:
        distributed_type = DistributedType.FSDP

    with pytest.raises(ValueError, match="FSDP is not what distributed.strategy=ddp says"):
        check_distribution(Sharded(), Strategy.ddp)
