"""The curves of transformers' Trainer and of TRL: trainer_state.json, or a folder with
checkpoints."""

import math
from pathlib import Path
from typing import Any

from cera_train.report.readers.adapter import find_adapter
from cera_train.report.readers.files import files_in, is_number, name_of, read_object
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
    file = _state_file(path)
    if file is None:
        return None
    tree = read_object(file)
    if "log_history" not in tree:
        return None
    state = TrainerState.from_json(tree, file)
    metrics = read_metrics(state, file)
    summary = {key: value for entry in state.log_history for key, value in entry.items()}
    result = None
    if state.global_step >= state.max_steps:
        result = RunResult.from_json(
            {
                "eval/perplexity": metrics.so_far().perplexity,
                "updates": state.global_step,
                "epochs": state.epoch,
                "seconds": summary.get("train_runtime"),
            },
            file,
        )
    named = path if path.is_dir() or path.name != STATE else path.parent
    name = name_of(named.resolve().name)
    return Run(
        path,
        name,
        adapter=find_adapter(file.parent),
        is_training=True,
        result=result,
        metrics=metrics,
    )


def _state_file(path: Path) -> Path | None:
    """The file itself, that of the folder, or that of its last checkpoint."""
    if path.suffix == ".json" and path.is_file():
        return path
    checkpoints = files_in(path, f"checkpoint-*/{STATE}")
    checkpoints.sort(key=lambda file: (len(file.parent.name), file.parent.name))
    files = [*checkpoints, *files_in(path, STATE)]
    return files[-1] if files else None


def read_metrics(state: TrainerState, file: Path) -> Metrics:
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
