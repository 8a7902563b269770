"""Runs that are killed, stopped or started again: they end with the bytes of an uninterrupted run,
or are refused."""

import json
import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import (
    adapter_bytes,
    assert_resumes_to_the_byte,
    folder_of,
    metrics_of,
    once_logged,
    scale_gradients,
    timeless_metrics,
    train_and_die_after,
)

from cera_train.common.errors import UserError
from cera_train.common.settings import Choice, to_plain
from cera_train.runs.results import SPECTRA
from cera_train.settings.model import Dtype
from cera_train.training.resolve import resolve
from cera_train.training.train import train


def test_resume_with_8_bit_moments_is_bit_exact(tiny_config):
    # bitsandbytes keeps 32-bit moments for tensors below 4096 numbers: B of the head is above.
    settings = ["optimizer=adamw_8bit", "optimizer.lr=1e-3", "adapter.r=32"]
    cut = assert_resumes_to_the_byte(tiny_config, *settings, "adapter.target_modules=[lm_head]")
    state = torch.load(folder_of(cut) / "checkpoints" / "8" / "optimizer.pt", weights_only=True)
    moments = state["state"][1]["__bnb_optimizer_quant_state__"]
    assert moments["state1"].dtype == torch.uint8


def test_a_gradient_scaler_resumes_where_it_was(tiny_config, monkeypatch):
    scalers = scale_gradients(monkeypatch)
    assert_resumes_to_the_byte(tiny_config)
    ends = [scaler.state_dict() for scaler in (scalers[0], scalers[-1])]
    assert ends[0] == ends[1]
    assert (ends[0]["scale"], ends[0]["_growth_tracker"]) == (16, 2)  # 12 updates are twice 5 and 2


def test_an_interrupted_run_saves_without_evaluating_and_resumes(finished_config, tiny_config):
    config = tiny_config()

    def interrupt() -> None:
        assert threading.current_thread() is threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)

    # An evaluation is due after update 8.
    with once_logged(7, interrupt), pytest.raises(SystemExit) as exit_info:
        train(config)
    assert exit_info.value.code == 130
    assert metrics_of(config)[-1]["update"] == 8
    assert "eval/loss" not in metrics_of(config)[-1]
    train_and_die_after(config, 9)  # after the evaluation, and before another checkpoint
    train(config)
    assert adapter_bytes(config) == adapter_bytes(finished_config)
    assert timeless_metrics(config) == timeless_metrics(finished_config)
    spectra, expected = (folder_of(run) / SPECTRA for run in (config, finished_config))
    assert spectra.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("update", "failing"),
    [(6, "cera_train.training.train.backward"), (8, "cera_train.runs.folder.RunFolder.save_best")],
    ids=["between two updates", "while an evaluation is written"],
)
def test_nothing_is_lost_by_an_error(finished_config, tiny_config, monkeypatch, update, failing):
    config = tiny_config()

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with (
        once_logged(update, lambda: monkeypatch.setattr(failing, fail)),
        pytest.raises(RuntimeError, match="a bug"),
    ):
        train(config)
    assert (folder_of(config) / "checkpoints" / str(update)).exists()
    monkeypatch.undo()
    train(config)
    assert adapter_bytes(config) == adapter_bytes(finished_config)
    assert timeless_metrics(config) == timeless_metrics(finished_config)
    best, of_whole = (
        (folder_of(run) / "best" / "metrics.json").read_text() for run in (config, finished_config)
    )
    assert best == of_whole


def test_a_finished_run_started_again_returns_its_result(
    finished_config, tmp_path, capsys, monkeypatch
):
    config = finished_config
    capsys.readouterr()
    monkeypatch.setattr("cera_train.training.build.load_model", None)  # it loads nothing
    assert train(config) == json.loads((folder_of(config) / "result.json").read_text())
    assert "finished" in capsys.readouterr().out

    moved = replace(config, output_dir=str(tmp_path), name="moved")
    shutil.copytree(folder_of(config), folder_of(moved))
    assert train(moved) == train(config) | {"folder": str(folder_of(moved))}


def test_a_run_resumes_on_the_base_and_the_rows_that_it_was_begun_with(
    tiny_config, tiny_folder, tmp_path, write_jsonl
):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    rows = [{"prompt": f"Say {number}:", "completion": f" {number}"} for number in range(8)]
    settings = [
        f"model.path={base}",
        "data=jsonl",
        f"data.train_files=[{write_jsonl('train.jsonl', rows[:5])}]",
        f"data.eval_files=[{write_jsonl('eval.jsonl', rows[5:])}]",
    ]
    config = tiny_config(*settings)
    train_and_die_after(config, 6)

    write_jsonl("eval.jsonl", rows[6:])
    with pytest.raises(UserError, match="^the held-out rows are not those of .*checkpoints/4"):
        train(config)
    write_jsonl("eval.jsonl", rows[5:])

    weights = load_file(base / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
        changed = weights | {name: 2 * weights[name]}
        save_file(changed, base / "model.safetensors", {"format": "pt"})
        message = f"checkpoints/4 was trained on another base than model.path={base} is now: "
        with pytest.raises(UserError, match=f"{message}other weights"):
            train(config)
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    for file, before, after, difference in (
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 5e5', f"{message}rope_.* is 5"),
        (
            "tokenizer.json",
            '_space": false',
            '_space": true',
            "the training rows are not those of .*checkpoints/4",
        ),
    ):
        text = (base / file).read_text()
        assert before in text, file
        (base / file).write_text(text.replace(before, after))
        with pytest.raises(UserError, match=difference):
            train(config)
        (base / file).write_text(text)
    assert train(config)["updates"] == 12


def test_a_finished_run_whose_adapter_is_gone_writes_it_again(tiny_config):
    config = tiny_config("train.eval_every=null")
    result = train(config)
    adapter = adapter_bytes(config)
    shutil.rmtree(folder_of(config) / "adapter")
    checkpoints = folder_of(config) / "checkpoints"
    checkpoints.rename(aside := checkpoints.with_name("aside"))
    with pytest.raises(UserError, match="adapter.r was 4"):
        train(tiny_config("adapter.r=8"))
    aside.rename(checkpoints)
    assert train(config)["adapter_digest"] == result["adapter_digest"]
    assert adapter_bytes(config) == adapter


@pytest.mark.parametrize("update", [3, 4])  # next is a line of metrics, or a checkpoint
def test_a_folder_that_is_renamed_while_it_trains_ends_the_run(tiny_config, update):
    config = tiny_config("train.eval_every=null")
    folder = folder_of(config)
    moved = folder.with_name("moved")
    with (
        once_logged(update, lambda: folder.rename(moved)),
        pytest.raises(UserError, match=f"^{folder} was renamed or removed while this run wrote"),
    ):
        train(config)
    assert not folder.exists()
    moved.rename(folder)
    assert train(config)["updates"] == 12


def test_a_mistake_does_not_harm_an_unfinished_run_and_partial_writes_are_removed(tiny_config):
    config = tiny_config()
    train_and_die_after(config, 6)
    (folder_of(config) / "checkpoints" / ".writing-8").mkdir()
    with pytest.raises(ValueError, match=r"adapter.r was 4"):
        train(tiny_config("adapter.r=8"))
    assert (folder_of(config) / "checkpoints" / "4").is_dir()
    assert len(metrics_of(config)) == 8
    # These settings change no number.
    train(tiny_config("train.micro_batch_tokens=300", "train.keep=1", "tracker.project=other"))
    assert not list(folder_of(config).rglob(".writing-*"))


def on(monkeypatch, dtype: str) -> None:
    """Makes the hardware report choose a precision."""

    def choose(wanted: Dtype, _: torch.device) -> Choice[Dtype]:
        return Choice(Dtype(dtype) if wanted == Dtype.auto else wanted, f"a {dtype} machine")

    monkeypatch.setattr("cera_train.training.resolve.choose_precision", choose)


@pytest.mark.parametrize(
    ("device", "has_compiler"), [("cpu", True), ("cuda", True), ("cuda", False)]
)
def test_layers_are_compiled_by_default_with_a_gpu_and_a_compiler(
    tiny_config, tmp_path, monkeypatch, device, has_compiler
):
    on(monkeypatch, "float32")
    monkeypatch.setattr("cera_train.training.resolve.this_device", lambda: torch.device(device))
    monkeypatch.setattr("cera_train.training.resolve.can_compile", lambda device: has_compiler)
    compiles = device == "cuda" and has_compiler
    assert resolve(tiny_config("train.compile=null"), tmp_path).config.train.compile is compiles
    config = tiny_config("train.compile=null", "adapter=dora")
    assert resolve(config, tmp_path).config.train.compile is False
    assert resolve(tiny_config(), tmp_path).config.train.compile is False


def test_values_chosen_by_auto_are_printed_recorded_and_kept_on_another_machine(
    tiny_config, monkeypatch, capsys
):
    on(monkeypatch, "bfloat16")
    settings = ["model.dtype=auto", "train.max_updates=3", "train.save_every=1"]
    config = tiny_config(*settings, "optimizer.lr=auto")
    folder = folder_of(config)
    train_and_die_after(config, 2)
    printed = capsys.readouterr().out
    assert "precision  bfloat16: a bfloat16 machine" in printed
    assert (
        "\nrate       0.038: optimizer.lr=auto, 7.5e-4 (2000 / 32)^0.781, x 2 for CeRA\n" in printed
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["precision"] == {"dtype": "bfloat16", "reason": "a bfloat16 machine"}
    on(monkeypatch, "float32")
    monkeypatch.setattr("cera_train.training.resolve.auto_rate", None)
    train(config)
    printed = capsys.readouterr().out
    assert f"precision  bfloat16: as {folder} was begun" in printed
    assert f"\nrate       0.038: as {folder} was begun\n" in printed
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert (recorded["model"]["dtype"], recorded["optimizer"]["lr"]) == ("bfloat16", 0.038)
    assert recorded["train"]["compile"] is False
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.038, is 0\.01"):
        train(tiny_config(*settings))


def test_auto_is_what_a_run_began_with_once_it_has_saved_something(tiny_config, tmp_path):
    auto = tiny_config("optimizer.lr=auto")
    begun = to_plain(tiny_config("optimizer.lr=0.5"))
    # A kill cut the writing of its first checkpoint.
    (tmp_path / "checkpoints" / ".writing-4").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun))
    assert resolve(auto, tmp_path).config.optimizer.lr == 0.038
    (tmp_path / "checkpoints" / "4").mkdir()
    assert resolve(auto, tmp_path).config.optimizer.lr == 0.5


def test_a_resumed_run_asks_as_it_was_begun_without_looking_at_its_rows(tiny_config, tmp_path):
    settings = ["data=jsonl", "data.train_files=[gone.jsonl]", "data.layout=messages"]
    chats = [*settings, "data.chat=auto", "data.template_settings={strftime_now: 2026-01-31}"]
    begun = to_plain(tiny_config(*chats))
    begun["data"]["template_settings"]["enable_thinking"] = False
    (tmp_path / "result.json").touch()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun))
    resumed = resolve(tiny_config(*chats), tmp_path).config
    assert resumed.data.template_settings == begun["data"]["template_settings"]
