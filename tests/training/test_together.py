"""Several runs on one base at once: each has the numbers, the files and the errors that it would have alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cera_train.training.train import train, train_together

ARMS = {
    "cera": ["adapter.dropout=0"],
    "relu": ["adapter.activation=relu", "adapter.dropout=0", "optimizer.lr=3e-3", "train.seed=1"],
    "rank": ["adapter.r=8", "adapter.alpha=16", "adapter.dropout=0", "optimizer.schedule=cosine", "train.max_updates=4"],
    "lora": ["adapter=lora", "adapter.r=4", "adapter.dropout=0", "train.seed=2"],
    "rslora": ["adapter=rslora", "adapter.r=4", "adapter.dropout=0"],
    "mix": ["adapter.mix=learned", "adapter.dropout=0", "adapter.target_modules=all-linear", "train.eval_every=2"],
    "input": ["adapter.dropout_on=input", "adapter.dropout=0", "adapter.target_modules=[down_proj]"],
}


def metrics_of(config) -> list[dict]:
    path = Path(config.output_dir) / config.name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(config) -> list[dict]:
    """The metrics without what a clock measured."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "/s" not in key and "_s" not in key}
        for line in metrics_of(config)
    ]


def weights(config) -> dict:
    return load_file(Path(config.output_dir) / config.name / "adapter" / "adapter_model.safetensors")


def assert_equal_runs(config, other) -> None:
    ours, theirs = numbers(config), numbers(other)
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for name, value in weights(config).items():
        assert (value - weights(other)[name]).abs().max() < 1e-4


@pytest.mark.parametrize(("layout", "tokens"), [("flat", 512), ("padded", 4096)])
def test_each_arm_has_the_numbers_of_its_run_alone(tiny_config, layout, tokens):
    fixed = (f"train.batch_layout={layout}", f"train.micro_batch_tokens={tokens}", "train.max_updates=5")
    arms = [tiny_config(*fixed, *arm, f"name=together_{name}") for name, arm in ARMS.items()]
    outcomes = train_together(arms)
    for name, arm, config, outcome in zip(ARMS, ARMS.values(), arms, outcomes, strict=True):
        alone = tiny_config(*fixed, *arm, f"name=alone_{name}")
        result = train(alone)
        assert outcome["eval/perplexity"] == pytest.approx(result["eval/perplexity"], rel=1e-5)
        assert outcome.keys() == result.keys()
        assert_equal_runs(config, alone)
