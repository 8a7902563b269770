"""What tests of whole runs share: readers of what a run leaves, and a run that is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.amp import GradScaler

from cera_train.runs.folder import RunFolder
from cera_train.training import session
from cera_train.training.train import train

TIMINGS = {"train/tokens_per_s", "train/seconds"}


def folder_of(config) -> Path:
    return Path(config.output_dir) / config.name


def metrics_of(config) -> list[dict]:
    return [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]


def timeless_metrics(config) -> list[dict]:
    """The metrics without what a clock measured."""
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in metrics_of(config)]


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


def scale_gradients(monkeypatch) -> list[GradScaler]:
    """Lets every run of the test scale its gradients, as one in float16 on a GPU does: by 4 at first, and by twice as
    much after any 5 updates. Returns the runs' scalers."""
    scalers, start = [], session.start_accelerator

    def start_with_scaler(*arguments):
        accelerator = start(*arguments)
        accelerator.scaler = scaler = GradScaler("cpu", init_scale=4.0, growth_interval=5)
        accelerator.unscale_gradients = lambda: scaler.unscale_(accelerator._optimizers[0].optimizer)  # before clipping
        scalers.append(scaler)
        return accelerator

    monkeypatch.setattr(session, "start_accelerator", start_with_scaler)
    return scalers
