"""A pytest plugin with the fixtures of evaluations: a tiny finished run, and configs to evaluate it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from evaluation_files import QUESTIONS

from cera_train.training.train import train


@pytest.fixture(scope="session")
def finished_run(compose, tiny_folder, tmp_path_factory) -> Path:
    """A short run of the tiny model on the logistic map, in float32."""
    output = tmp_path_factory.mktemp("evaluated")
    config = compose(
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "adapter.r=4", "name=run"),
        *("optimizer.lr=1e-2", "train.max_updates=6", "train.batch_size=16", f"output_dir={output}"),
    )
    return Path(train(config)["folder"])


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def questions(write_jsonl) -> Path:
    return write_jsonl("questions.jsonl", QUESTIONS)


@pytest.fixture
def eval_config(compose, run, questions):
    """eval_config("task.limit=3", ...): GSM8K's way with the tiny run, 8 new tokens, several batches."""

    def eval_config(*overrides: str, task: str = "gsm8k", run: Path | str = run):
        own = ["task.max_new_tokens=8", "generation.batch_tokens=150"]
        if task in ("gsm8k", "math"):
            own += [f"task.files=[{questions}]"]
        return compose(f"run={run}", f"task={task}", *own, *overrides, command="eval")

    return eval_config
