"""Reads the runs of a report. What is not on disk is None, or empty."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cera_train.adapters.families import title
from cera_train.adapters.folder import ADAPTER_CONFIG, FULL_MODEL
from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import read_yaml
from cera_train.common.settings import flatten, to_plain
from cera_train.common.trust import clean
from cera_train.evaluation.tasks.task import Metric, Task, all_tasks
from cera_train.runs.evaluation_folder import (
    AccuracyResult,
    Grade,
    PerplexityResult,
    find_evaluation_result,
)
from cera_train.runs.records import Record, load_config, read_lines
from cera_train.runs.results import (
    DIVERGED,
    METRICS,
    SPECTRUM,
    Environment,
    Metrics,
    RunResult,
    mean_spectrum,
    read_metrics,
)
from cera_train.settings.adapters import AdapterConfig, AdapterKind

PERPLEXITY = Metric("perplexity", "perplexity", is_share=False)

NUMBER_IN_NAME = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"

Settings = dict[str, Any]  # A config.yaml with dotted keys


@dataclass(frozen=True)
class SavedEvaluation:
    """RUN/eval/NAME."""

    folder: Path
    settings: Settings
    result: AccuracyResult | PerplexityResult | None  # None while it is unfinished

    @property
    def task(self) -> Task:
        """The benchmark; one that shows nothing of its own for an unknown kind."""
        kind = (self.result and self.result.kind) or self.settings.get("task.kind", "")
        return all_tasks().get(kind, Task())

    @property
    def is_graded(self) -> bool:
        """Whether it is finished and has answers."""
        return isinstance(self.result, AccuracyResult)

    @cached_property
    def grades(self) -> dict[str, list[Grade]]:
        """By the problem's id, one for each sample. Raises UserError where the file is broken."""
        grades: dict[str, list[Grade]] = {}
        for grade in read_lines(self.folder / "grades.jsonl", Grade):
            grades.setdefault(grade.problem, []).append(grade)
        return grades

    @property
    def metrics(self) -> list[Metric]:
        """The figures to show: pass@1 and pass@n of n samples by each grader, and what the task
        adds."""
        if not self.is_graded:
            return [PERPLEXITY] if self.result else []
        first = "/pass@1"
        last = f"/pass@{self.result.samples}"
        rates = [key for key in self.result.accuracies if key.endswith((first, last))]
        rates.sort(key=lambda key: (not key.endswith(first), key))
        added = [metric for metric in self.task.shown if metric.key in self.result.details]
        return [*map(accuracy_metric, rates), *added]

    def figure(self, metric: Metric) -> tuple[float | None, tuple[float, float] | None]:
        """A figure, and the 95 % interval of an accuracy."""
        if self.is_graded:
            return self.result.figure(metric.key), self.result.accuracies.get(metric.key)
        if self.result and metric == PERPLEXITY:
            return self.result.perplexity, None
        return None, None


def accuracy_metric(name: str) -> Metric:
    """The column of GRADER/pass@K."""
    return Metric(name, name.removesuffix("/pass@1").replace("/", " "))


@dataclass(frozen=True)
class Run:
    """A training run, an adapter, or the untouched base model, with its evaluations."""

    folder: Path
    name: str
    settings: Settings  # config.yaml; without training, what is known of it
    adapter: AdapterConfig | None  # None for the untouched base model
    evaluations: dict[str, SavedEvaluation]  # by the name of their task
    is_training: bool = False  # else there are evaluations only
    has_diverged: bool = False
    result: RunResult | None = None
    metrics: Metrics = field(default_factory=Metrics)
    environment: Environment = field(default_factory=Environment)
    spectrum: list[float] = field(default_factory=list)
    """Singular values over their sum, in the mean over modules."""
    published: dict[str, float] = field(default_factory=dict)
    """The paper's figures, by a key of result.json or by TASK/METRIC."""

    @property
    def figures(self) -> RunResult:
        """The result; while the run is unfinished, its latest figures."""
        return self.result or self.metrics.so_far()

    @property
    def is_unfinished(self) -> bool:
        return self.is_training and self.result is None

    @property
    def kind(self) -> str:
        return self.adapter.kind if self.adapter else "base"

    @property
    def rank(self) -> int | None:
        """`adapter.r`, or the default of PEFT's method."""
        if self.adapter is None:
            return None
        return self.adapter.r or self.figures.adapter_r

    @property
    def method(self) -> str:
        """The method, with what sets a variant of it apart: CeRA (relu), LoRA (alpha 32)."""
        if self.adapter is None:
            return "untouched base"
        text = title(self.adapter)
        if self.adapter.alpha not in (None, self.rank):
            text += f" (alpha {self.adapter.alpha:g})"
        return text

    @property
    def base(self) -> str:
        """The base model and the precision of its weights, which changes a perplexity too."""
        keys = ("path", "revision", "dtype", "quantization")
        values = [self.settings.get(f"model.{key}") for key in keys]
        known = [str(value) for value in values if value not in (None, "none")]
        return ", ".join(known) or "not on record"


def group_by(runs: Sequence[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


class SavedAdapter(Record):
    """The fields of PEFT's adapter_config.json that a report reads."""

    peft_type: str = ""
    use_dora: bool | None = None
    use_rslora: bool | None = None
    r: int | None = None
    alpha: float | None = None
    lora_alpha: float | None = None
    activation: Any = None
    mix: Any = None

    @property
    def config(self) -> AdapterConfig:
        if self.use_dora:
            kind = "dora"
        elif self.use_rslora:
            kind = "rslora"
        else:
            kind = self.peft_type.lower()
        settings: dict[str, Any] = {"kind": kind}
        if kind not in list(AdapterKind):
            settings = {"kind": AdapterKind.peft, "method": self.peft_type}
        if kind == AdapterKind.cera and self.activation is not None:
            settings["activation"] = self.activation
        if kind == AdapterKind.cera and self.mix is not None:
            settings["mix"] = self.mix
        # PEFT writes a rank of 0 where another setting decides.
        alpha = self.lora_alpha or self.alpha or None
        return AdapterConfig(**settings, r=self.r or None, alpha=alpha)


# --- folders --------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in some folders, each once, in the order given; those of a sweep by name. A folder
    is that of a run, of an adapter or a base model with evaluations, or holds such folders."""
    by_folder: dict[Path, Run] = {}
    for folder in folders:
        for run in _runs_in(folder):
            by_folder.setdefault(run.folder.resolve(), run)
    runs = list(by_folder.values())
    count = Counter(run.name for run in runs)
    return [run if count[run.name] == 1 else replace(run, name=str(run.folder)) for run in runs]


def _runs_in(folder: Path) -> list[Run]:
    if run := _read_run(folder):
        return [run]
    runs = []
    if folder.is_dir():
        inside = sorted(filter(Path.is_dir, folder.iterdir()), key=_by_number)
        runs = [run for run in map(_read_run, inside) if run is not None]
    if not runs:
        what = "holds neither a run nor folders of runs" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} {what}: expected a folder that cera-train left (with config.yaml), one with "
            "evaluations (eval/TASK), or a folder of these. Check the path: runs lie in "
            "outputs/NAME."
        )
    return runs


def _by_number(path: Path) -> list[str | float]:
    """Sorts r16 before r128, and lr=0.0005 before lr=0.001."""
    parts = re.split(NUMBER_IN_NAME, path.name)  # text, number, text, ...
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def _read_run(folder: Path) -> Run | None:
    """The run or the evaluations in a folder; None where there is neither."""
    path = folder / "config.yaml"
    evaluations = {}
    for file in sorted(folder.glob("eval/*/config.yaml")):
        settings = flatten(read_yaml(file))
        result = find_evaluation_result(file.parent)
        evaluations[file.parent.name] = SavedEvaluation(file.parent, settings, result)
    # The config.yaml of an evaluation has no adapter.
    if not path.is_file() or "adapter" not in read_yaml(path):
        return _without_training(folder, evaluations) if evaluations else None
    config = load_config(path)
    # no picture can show half of a surrogate pair
    settings = flatten(to_plain(config))
    name = clean(config.name)
    return Run(
        folder,
        name,
        settings,
        config.adapter,
        evaluations,
        is_training=True,
        has_diverged=(folder / DIVERGED).exists(),
        result=RunResult.find(folder / "result.json"),
        metrics=read_metrics(folder / METRICS),
        environment=Environment.find(folder / "environment.json") or Environment(),
        spectrum=mean_spectrum(folder / SPECTRUM),
        published=config.published,
    )


def _without_training(folder: Path, evaluations: dict[str, SavedEvaluation]) -> Run:
    """The folder of an adapter from elsewhere, known by PEFT's file, or of a base model, known by
    its evaluations."""
    path = folder / ADAPTER_CONFIG
    adapter = None
    evaluation = next(iter(evaluations.values()))
    settings = {
        key: value for key, value in evaluation.settings.items() if key.startswith("model.")
    }
    if path.is_file():
        saved = SavedAdapter.read(path)
        with errors_at(str(path)):
            adapter = saved.config
    elif (folder / FULL_MODEL).is_file():
        adapter = AdapterConfig(AdapterKind.full, r=None, alpha=None)
    return Run(folder, folder.resolve().name, settings, adapter, evaluations)
