"""Trackers mirror a run, several at once, and none that fails reaches it. No secret leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker

from cera_train.common.errors import UserError
from cera_train.common.trust import redact
from cera_train.runs import tracking
from cera_train.training.train import train


class Recording(GeneralTracker):
    """What a tracker of Accelerate's gets; `fails_at` is an update."""

    name, requires_logging_directory, tracker = "recording", False, None

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at, self.calls = fails_at, []

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        if step == self.fails_at:
            raise ConnectionError("the server is\ngone")
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


def test_several_trackers_at_once_and_one_that_fails_is_left_out_once(tiny_config, monkeypatch, capsys):
    trackers = {"trackio": Recording(), "wandb": Recording(fails_at=2)}
    monkeypatch.setattr(tracking, "build_tracker", lambda kind, *_: trackers[kind])
    result = train(tiny_config("tracker=[trackio,wandb]"))
    lines = [json.loads(line) for line in Path(result["folder"], "metrics.jsonl").read_text().splitlines()]
    mirrored = [(line["update"], {key: line[key] for key in line if "/" in key}) for line in lines]
    assert trackers["trackio"].calls == ["start", *mirrored, "finish"]
    assert trackers["trackio"].config["adapter.r"] == 4
    assert trackers["wandb"].calls == ["start", *mirrored[:2]]
    (error,) = capsys.readouterr().err.splitlines()
    assert "wandb failed and is left out (the server is gone)" in error


@pytest.mark.parametrize("name", ["trackio", "mlflow", "comet", "swanlab"])
def test_a_tracker_that_is_not_installed_is_left_out(name, compose, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, {"comet": "comet_ml"}.get(name, name), None)
    tracker = tracking.start_tracker(compose(f"tracker={name}").tracker, {}, "run", tmp_path, 0)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert capsys.readouterr().err.count(f"{name} failed and is left out") == 1


def test_a_resumed_run_goes_on_under_the_same_id(compose, tmp_path):
    config = compose("tracker=wandb", "tracker.kinds.wandb={entity: ours}", "tracker.group=grid").tracker
    first, second = (tracking.build_tracker("wandb", config, "run", tmp_path, 0).init_kwargs for _ in range(2))
    assert first == second
    assert (first["name"], first["group"], first["entity"], first["resume"]) == ("run", "grid", "ours", "allow")


def test_a_tracker_that_there_is_not_is_named(compose):
    with pytest.raises(UserError, match=r"tracker.kinds=\{nobody: ...\}: no such tracker: choose from wandb, "):
        compose("tracker.kinds={nobody: {}}")


@pytest.mark.slow
def test_wandb_without_a_key_is_offline_with_metrics_and_samples(tiny_config, tmp_path):
    """In a process of its own: W&B starts a service that outlives a test."""
    arguments = [
        *(f"model.path={tiny_config().model.path}", "model.dtype=float32", "data.max_length=256", "adapter.r=4"),
        *("train.max_updates=2", "train.samples=2", "tracker=wandb", "name=run", f"output_dir={tmp_path}"),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    command = [sys.executable, "-m", "cera_train", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"HOME": str(tmp_path)}, check=False
    )
    assert (done.returncode, done.stderr.count("left out")) == (0, 0), done.stderr
    folder = Path(done.stdout.split("to upload it: wandb sync ")[1].split()[0])
    recorded = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))
    for name in (b"eval/perplexity", b"spectrum/effective_rank/mean", b"train.max_updates"):
        assert name in recorded
    tables = [json.loads(path.read_text()) for path in folder.rglob("samples*.table.json")]
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert sorted(row[0] for table in tables for row in table["data"]) == [line["update"] for line in lines]


def test_secrets_of_the_environment_are_blotted_out(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY", "API_KEYS", "PGPASSWORD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "hf_abcdefghijk")
            assert redact("token=hf_abcdefghijk short") == "token=*** short", name
    # A path in one of these may be model.path, which cera-eval reads from the run's config.
    for name in ("TOKENIZER_PATH", "KEYSTORE_DIR", "MONKEY_HOME"):
        monkeypatch.setenv(name, "outputs/tiny")
    monkeypatch.setenv("MY_API_KEY", "short")
    assert redact("path: outputs/tiny, short") == "path: outputs/tiny, short"
    assert redact("see https://user:pass@host/x and https://host/y") == "see https://***@host/x and https://host/y"


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
