"""A pytest plugin with the fixtures of evaluations: a tiny finished run, and configs to evaluate it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from evaluation_files import QUESTIONS

from cera_train.evaluation import grading


@pytest.fixture
def one_verifier(monkeypatch) -> None:
    """Evaluations verify answers in this process, instead of starting two each, which takes longer than the answers."""
    monkeypatch.setattr(grading, "judge", lambda candidates, seconds: list(map(grading._verdict, candidates)))


@pytest.fixture
def run(trained_config, tmp_path, one_verifier) -> Path:
    """A copy to write into of a short run of the tiny model on the logistic map, in float32."""
    config = trained_config("train.max_updates=6")
    return Path(shutil.copytree(Path(config.output_dir) / config.name, tmp_path / "run"))


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
