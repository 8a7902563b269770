"""A result of PEFT's method comparison: method_comparison/MetaMathQA/results/NAME.json. It says how
many of GSM8K's test problems were right, and not which."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cera_train.common.errors import errors_at
from cera_train.common.settings import flatten, require
from cera_train.report.readers.adapter import SavedAdapter
from cera_train.report.readers.files import holds_object, is_score, read_object, safe_name
from cera_train.report.runs import Evaluation, Run, Scores
from cera_train.runs.records import Record
from cera_train.runs.results import Environment, Metrics, RunResult, UpdateMetrics
from cera_train.settings.adapters import AdapterConfig, AdapterKind

TASK = "gsm8k"
ACCURACY = "test accuracy"
TEST_PROBLEMS = 1_319  # GSM8K's test set, of which a run answers all


Count = Annotated[int, Field(ge=0, lt=2**63)]


class RunInfo(Record):
    train_config: dict[str, Any]
    peft_config: dict[str, Any] | None = None  # None: every weight is trained


class TrainInfo(Record):
    status: str  # success, failed or cancelled
    metrics: list[dict[str, Any]]
    train_time: float | None = None
    cuda_memory_max: float | None = None
    num_trainable_params: Count | None = None
    num_total_params: Count | None = None


class SystemInfo(Record):
    gpu: str | None = None


class MetaInfo(Record):
    system_info: SystemInfo = SystemInfo()


class Comparison(Record):
    run_info: RunInfo
    train_info: TrainInfo
    meta_info: MetaInfo = MetaInfo()


def find_run(path: Path) -> Run | None:
    if path.suffix != ".json" or not path.is_file() or not holds_object(path):
        return None
    tree = read_object(path)
    if not {"run_info", "train_info"} <= tree.keys():
        return None
    comparison = Comparison.from_json(tree, path)
    trained = comparison.train_info
    settings = {
        f"train_config.{key}": value
        for key, value in flatten(comparison.run_info.train_config).items()
    }
    for key, name in (("model.path", "model_id"), ("model.dtype", "dtype")):
        settings[key] = settings.pop(f"train_config.{name}", None)
    updates = [
        UpdateMetrics.from_json(
            {"update": step.get("step"), "train/loss": step.get("train loss")},
            f"{path}: train_info.metrics.{number}",
        )
        for number, step in enumerate(trained.metrics)
    ]
    gpu = comparison.meta_info.system_info.gpu
    metrics = Metrics(updates)
    return Run(
        path,
        safe_name(path.stem),
        settings,
        _adapter(comparison.run_info, path),
        _evaluations_of_tasks(trained, path),
        is_training=True,
        result=_result(trained, metrics) if trained.status == "success" else None,
        metrics=metrics,
        environment=Environment(gpus=[gpu] if gpu else None),
    )


def _adapter(info: RunInfo, path: Path) -> AdapterConfig:
    place = f"{path}: run_info.peft_config"
    if info.peft_config is None:
        return AdapterConfig(AdapterKind.full, r=None, alpha=None)
    saved = SavedAdapter.from_json(info.peft_config, place)
    with errors_at(place):
        return saved.config


def _evaluations_of_tasks(trained: TrainInfo, path: Path) -> dict[str, Evaluation]:
    accuracies = [step[ACCURACY] for step in trained.metrics if ACCURACY in step]
    if not accuracies:
        return {}
    accuracy = accuracies[-1]
    right = round(accuracy * TEST_PROBLEMS) if is_score(accuracy) else -1
    require(
        right >= 0 and abs(right / TEST_PROBLEMS - accuracy) < 1e-6,
        f"{path}: {ACCURACY} {str(accuracy)[:40]}: expected a share of GSM8K's {TEST_PROBLEMS:,} "
        "test problems. Leave it out: how many there were is not on record.",
    )
    return {TASK: Evaluation.of_scores({ACCURACY: Scores.of_count(right, TEST_PROBLEMS)})}


def _result(trained: TrainInfo, metrics: Metrics) -> RunResult:
    share = None
    if trained.num_trainable_params and trained.num_total_params:
        share = trained.num_trainable_params / trained.num_total_params
    return RunResult(
        trainable_parameters=trained.num_trainable_params,
        trainable_share=share,
        updates=metrics.last_update,
        seconds=trained.train_time,
        peak_memory_bytes=trained.cuda_memory_max,
    )
