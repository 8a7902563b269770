"""A pytest plugin with what tests of evaluations share: questions, a tiny finished run, configs to
evaluate it, and readers of what an evaluation leaves."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import folder_of

from cera_train.cli.compose import compose
from cera_train.distributed.accelerator import this_device
from cera_train.evaluation import grading
from cera_train.evaluation.engine import choose_dtype, load_subject
from cera_train.evaluation.evaluate import resolve_evaluation, run_evaluation
from cera_train.runs.results import RunResult
from cera_train.runs.subject import digest_of, find_subject
from cera_train.serving.chat import ask
from cera_train.serving.export import export_run
from cera_train.serving.verify import Certificate, verify
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.serving import ExportConfig

QUESTIONS = [
    {
        "question": f"{a} apples and {b} more, how many{'?' * length}",
        "answer": f"Add them.\n#### {a + b}",
    }
    for a, b, length in [
        (1, 2, 1),
        (3, 4, 9),
        (10, 5, 3),
        (2, 2, 30),
        (7, 8, 5),
        (1_000, 1, 2),
        (6, 0, 17),
        (9, 9, 1),
    ]
]


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """As `cera-eval`, in this process."""
    return run_evaluation(resolve_evaluation(config))


def chat(run: Path | str, *words: str) -> None:
    """As `cera-chat run=RUN ...`, in this process."""
    ask(compose(f"run={run}", *words, command="chat"))


def export(run: Path, *words: str) -> Certificate:
    """As `cera-export run=RUN ...`, in this process."""
    return export_run(compose(f"run={run}", *words, command="export"))


def checker_of(config: ExportConfig) -> Callable[..., Certificate]:
    """checker_of(config)(form, rows=2): as `cera-export check=FORM rows=2`; the run is loaded
    once."""
    subject = choose_dtype(find_subject(config))
    loaded = load_subject(subject, this_device())

    def check(form: Path, **settings: object) -> Certificate:
        changed = replace(config, check=str(form), **settings)
        return verify(form, subject, loaded, subject.data, changed)

    return check


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def keep_adapter(run: Path) -> None:
    """Records the adapter that a test has put into a run's folder as the one that it trained."""
    result = RunResult.read(run / "result.json")
    changed = result.replace(adapter_digest=digest_of(run / "adapter"))
    changed.write(run / "result.json")


@pytest.fixture
def one_verifier(monkeypatch) -> None:
    """Evaluations verify answers in this process, instead of starting two each, which takes longer
    than the answers."""
    monkeypatch.setattr(grading, "verify_answers", lambda pairs: list(map(grading._verdict, pairs)))


@pytest.fixture
def run(finished_config, tmp_path, one_verifier) -> Path:
    """A writable copy of the finished run of the tiny model on the logistic map, in float32."""
    return Path(shutil.copytree(folder_of(finished_config), tmp_path / "run"))


@pytest.fixture
def questions(write_jsonl) -> Path:
    return write_jsonl("questions.jsonl", QUESTIONS)


@pytest.fixture
def eval_config(compose, run, questions):
    """eval_config("task.limit=3", ...): GSM8K's way with the tiny run, 8 new tokens, several
    batches."""

    def eval_config(*overrides: str, task: str = "gsm8k", run: Path | str = run):
        settings = ["task.max_new_tokens=8", "generation.batch_tokens=150"]
        if task == "gsm8k":
            settings += [f"task.files=[{questions}]"]
        return compose(f"run={run}", f"task={task}", *settings, *overrides, command="eval")

    return eval_config
