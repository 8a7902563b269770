"""The quickstart, with the real SmolLM2-135M-Instruct."""

from pathlib import Path

import pytest
from conftest import needs_smollm2
from evaluated_runs import evaluate

from cera_train.runs.results import read_metrics
from cera_train.training.train import train

pytestmark = [needs_smollm2, pytest.mark.slow]


def test_the_quickstart_learns(compose, tmp_path):
    short = (
        "train.max_updates=20",
        "train.eval_every=20",
        "train.tasks_every=20",
        "train.tasks_limit=20",
    )
    result = train(compose("+recipe=quickstart", *short, f"output_dir={tmp_path}"))
    assert result["trainable_parameters"] == 9_768_960
    folder = Path(result["folder"])
    before, *_ = read_metrics(folder / "metrics.jsonl").evaluations
    assert before.tasks["held_out/exact"] < 0.1
    assert result["held_out/exact"] > 0.5
    measured = evaluate(compose(f"run={folder}", "task=held_out", "task.limit=20", command="eval"))
    assert measured["exact/pass@1"] == pytest.approx(result["held_out/exact"], abs=0.1)
    assert measured["truncated"] == 0  # it has learned to stop
