"""A run that pauses at `train.stop_at` evaluates and saves there, and ends as if it had not been paused."""

from __future__ import annotations

import json

import pytest
from tiny_runs import folder_of, timeless_metrics

from cera_train.training.train import train


def figures_of(result: dict) -> dict:
    return {
        key: value
        for key, value in result.items()
        if key not in {"seconds", "tokens_per_s", "folder", "peak_memory_bytes"}
    }


def test_a_paused_run_ends_as_if_it_had_not_been_paused(trained_config, tiny_config, capsys):
    stops = [3, 8]  # evaluations and checkpoints are due every 4 updates of 12
    settings = ["adapter.dropout=0.3", "optimizer.schedule=cosine", "optimizer.warmup_ratio=0.1", "train.patience=2"]
    whole, paused = trained_config(*settings), tiny_config("name=paused", *settings)
    for stop in stops:
        found = train(tiny_config("name=paused", *settings, f"train.stop_at={stop}"))
        assert found["update"] == stop
        assert f"paused after update {stop} of 12, saved." in capsys.readouterr().out
        assert not (folder_of(paused) / "result.json").exists()
        assert (folder_of(paused) / "checkpoints" / str(stop) / "progress.json").exists()
        line = timeless_metrics(paused)[-1]
        assert (line["update"], line["eval/perplexity"]) == (stop, found["eval/perplexity"])
    assert figures_of(train(paused)) == figures_of(json.loads((folder_of(whole) / "result.json").read_text()))
    names = ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors", "best/metrics.json")
    for name in names:
        assert (folder_of(paused) / name).read_bytes() == (folder_of(whole) / name).read_bytes()
    extra = [line for line in timeless_metrics(paused) if line not in timeless_metrics(whole)]
    assert [line["update"] for line in extra] == [stop for stop in stops if stop % 4]
    assert all(line.keys() == {"update", "epoch", "eval/loss", "eval/perplexity"} for line in extra)


@pytest.mark.parametrize("stop", [2, 100])
def test_a_stop_at_the_end_or_beyond_it_is_none(tiny_config, stop):
    assert train(tiny_config(f"train.stop_at={stop}", "train.max_updates=2"))["updates"] == 2
