"""Mirrors: W&B offline, TensorBoard, and one that fails. metrics.jsonl is always there. No secret leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_files import history, table

from cera_train.common.trust import redact
from cera_train.runs.tracking import Guarded, Tracker
from cera_train.settings.training import TrackerKind
from cera_train.training.train import train


def test_tensorboard_has_the_metrics_and_the_picture(tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config("tracker=tensorboard")
    result = train(config)
    events = EventAccumulator(f"{result['folder']}/tensorboard")
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "eval/perplexity", "spectrum/effective_rank/mean"} <= set(scalars)
    assert not any("q_proj" in name for name in scalars)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert events.Scalars("eval/perplexity")[-1].value == pytest.approx(result["eval/perplexity"], rel=1e-6)
    assert events.Tags()["images"] == ["run"]


@pytest.mark.slow
def test_wandb_without_a_key_is_offline_and_says_how_to_sync(tiny_config, tmp_path):
    """In a process of its own: W&B starts a service that outlives a test."""
    config = tiny_config("tracker=wandb", "tracker.log_adapter=true")
    arguments = [
        f"model.path={config.model.path}",
        *("model.dtype=float32", "data.max_length=256", "train.max_updates=3", "adapter.r=4", "name=run"),
        *("tracker=wandb", "tracker.log_adapter=true", f"output_dir={tmp_path}"),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_CONSOLE": "off"}
    done = subprocess.run(
        [sys.executable, "-m", "cera_train", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    assert "wandb sync" in done.stdout
    folder = Path(done.stdout.split("wandb sync --include-online ")[1].split()[0])
    assert folder.is_dir()
    recorded = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))
    for name in (b"eval/perplexity", b"spectrum/effective_rank/mean", b"max_updates", b"adapter_model.safetensors"):
        assert name in recorded
    assert list(folder.rglob("*.png"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_wandb_offline_has_the_figures_of_tasks_and_the_samples_as_tables(tiny_config, tmp_path):
    config = tiny_config()
    arguments = [
        *(f"model.path={config.model.path}", "model.dtype=float32", "data.max_length=256", "adapter.r=4", "name=run"),
        *("train.max_updates=2", "train.eval_every=1", "train.tasks=[logistic_map]", "train.tasks_limit=2"),
        *("train.task_settings={logistic_map: {max_new_tokens: 8}}", "train.tasks_every=2", "train.samples=2"),
        "tracker=wandb",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_CONSOLE": "off"}
    command = [sys.executable, "-m", "cera_train", *arguments, f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count("left out")) == (0, 0), done.stderr
    [folder] = (tmp_path / "run").glob("wandb/offline-run-*")
    rows = history(folder)
    assert [(row["update"], row["logistic_map/exact"]) for row in rows if "logistic_map/exact" in row] == [
        *((0, 0.0), (2, 0.0)),
    ]
    tables = {row["update"]: table(folder, row["samples/path"]) for row in rows if "samples/path" in row}
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert list(tables) == [0, 1, 2]
    assert [row for update in tables for row in tables[update]] == lines
    assert len(lines) == 6


class Failing(Tracker):
    def log(self, metrics, update):
        raise ConnectionError("the server is\ngone")


def test_a_tracker_that_fails_is_left_out_once_and_training_goes_on(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr("cera_train.training.session.start_tracker", lambda *args: Guarded(TrackerKind.wandb, Failing))
    result = train(tiny_config())
    assert result["updates"] == 12
    errors = capsys.readouterr().err
    assert errors.count("wandb failed and is left out (the server is gone)") == 1
    lines = Path(result["folder"], "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval/perplexity"] == result["eval/perplexity"]


def test_a_tracker_that_cannot_start_is_left_out(capsys):
    def cannot_start():
        raise ImportError("No module named 'wandb'")

    tracker = Guarded(TrackerKind.wandb, cannot_start)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert capsys.readouterr().err.count("left out") == 1


def test_secrets_of_the_environment_are_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    monkeypatch.setenv("MY_API_KEY", "short")
    assert redact("token=hf_abcdefghijk short") == "token=*** short"
    assert redact("https://hf_abc@host/x") == "https://***@host/x"
    assert redact("see https://user:pass@host/x and https://host/y") == "see https://***@host/x and https://host/y"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "API_KEYS"),
        *("GITHUB_TOKENS", "PGPASSWORD", "DB_PASSWD", "GOOGLE_APPLICATION_CREDENTIALS", "npm_config__authToken"),
    ],
)
def test_a_secret_is_known_by_the_words_of_its_name(monkeypatch, name):
    monkeypatch.setenv(name, "outputs/tiny")
    assert redact("path: outputs/tiny") == "path: ***"


@pytest.mark.parametrize("name", ["TOKENIZER_PATH", "KEYSTORE_DIR", "MONKEY_HOME", "KEYBOARD", "TOKENIZERS_CACHE"])
def test_a_name_that_begins_or_ends_like_a_secrets_is_none(monkeypatch, name):
    """A path in it may be model.path, which cera-eval reads from the run's config."""
    monkeypatch.setenv(name, "outputs/tiny")
    assert redact("path: outputs/tiny") == "path: outputs/tiny"


def test_no_secret_reaches_the_folder_or_the_terminal(tiny_config, monkeypatch, capfd):
    secret = "s3cr3t-value-of-a-key"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(sys, "argv", ["cera-train", f"tracker.project={secret}"])
    config = tiny_config(f"tracker.project={secret}", "tracker=tensorboard", "train.max_updates=2")
    result = train(config)
    files = [path for path in Path(result["folder"]).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    captured = capfd.readouterr()
    assert secret not in captured.out + captured.err
    assert "project: '***'" in Path(result["folder"], "config.yaml").read_text()
