"""The curves of transformers' Trainer and of TRL: trainer_state.json, or a folder with
checkpoints."""

import math
from pathlib import Path
from typing import Any

from cera_train.adapters.folder import ADAPTER_CONFIG
from cera_train.report.readers.adapter import saved_adapter_config
from cera_train.report.readers.files import (
    files_in,
    holds_object,
    is_number,
    read_object,
    safe_name,
)
from cera_train.report.runs import Run
from cera_train.runs.records import Record
from cera_train.runs.results import EvaluationMetrics, Metrics, RunResult, UpdateMetrics

STATE = "trainer_state.json"
NAMES = {"learning_rate": "lr"}  # ours, where the last part differs


class TrainerState(Record):
    global_step: int
    max_steps: int
    epoch: float | None = None
    log_history: list[dict[str, Any]]


def find_run(path: Path) -> Run | None:
    files = _state_files(path)
    if not files:
        return None
    file = files[0]
    tree = read_object(file)
    if "log_history" not in tree:
        return None
    state = TrainerState.from_json(tree, file)
    metrics = metrics_of_trainer(state, file)
    result = None
    if state.global_step >= state.max_steps:
        figures = {"updates": state.global_step, "epochs": state.epoch}
        for line in metrics.evaluations:
            figures["eval/perplexity"] = line.perplexity
        for entry in state.log_history:
            if "train_runtime" in entry:
                figures["seconds"] = entry["train_runtime"]
        result = RunResult.from_json(figures, file)
    saved = [config for file in files for config in files_in(file.parent, ADAPTER_CONFIG)]
    return Run(
        path,
        safe_name(_name(path.resolve())),
        adapter=saved_adapter_config(saved[0].parent) if saved else None,
        is_training=True,
        result=result,
        metrics=metrics,
    )


def _state_files(path: Path) -> list[Path]:
    """The file itself; or that of the folder, and that of its last checkpoint."""
    if path.suffix == ".json" and path.is_file():
        return [path] if path.name == STATE or holds_object(path) else []
    checkpoints = files_in(path, f"checkpoint-*/{STATE}")
    checkpoints.sort(key=lambda file: (len(file.parent.name), file.parent.name))
    return [*files_in(path, STATE), *checkpoints[-1:]]


def _name(path: Path) -> str:
    """Such as `sft`, or `sft checkpoint-500`."""
    folder = path.parent if path.name == STATE else path
    if folder.name.startswith("checkpoint-"):
        return f"{folder.parent.name} {folder.name}"
    return folder.name


def metrics_of_trainer(state: TrainerState, file: Path) -> Metrics:
    """The updates and evaluations, by our names: train/loss, train/lr, eval/loss, ..."""
    metrics = Metrics()
    for number, entry in enumerate(state.log_history):
        place = f"{file}: log_history.{number}"
        numbers = {key: value for key, value in entry.items() if is_number(value)}
        values: dict[str, Any] = {"update": entry.get("step")}
        if "eval_loss" in numbers:
            loss = float(numbers["eval_loss"])
            perplexity = math.exp(loss) if loss < 700 else math.inf
            values |= {"eval/loss": loss, "eval/perplexity": perplexity}
            metrics.evaluations.append(EvaluationMetrics.from_json(values, place))
        elif "loss" in numbers:
            values |= {
                f"train/{NAMES.get(key, key)}": float(value)
                for key, value in numbers.items()
                if key not in ("step", "epoch")
            }
            metrics.updates.append(UpdateMetrics.from_json(values, place))
    return metrics
