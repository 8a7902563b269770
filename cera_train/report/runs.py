"""What a report knows of a run, whatever program made it: `readers` fill it in. What is not on
record is None, or empty."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from cera_train.adapters.families import title
from cera_train.runs.results import Environment, Metrics, RunResult
from cera_train.settings.adapters import AdapterConfig
from cera_train.verdicts.interval import accuracy_interval

Settings = dict[str, Any]  # dotted keys, as in config.yaml

T = TypeVar("T")

BASE = ("model.path", "model.revision", "model.dtype", "model.quantization")

Scores = dict[str, float]
"""Problem -> how right its answers are by one rule, from 0 to 1."""


class Metric(NamedTuple):
    """A number of result.json that a report shows."""

    label: str  # follows the task's name in the column's header
    is_share: bool = True  # shown in per cent; False: a number with three decimals


class Figure(NamedTuple):
    """A figure of an evaluation, with the 95 % interval of an accuracy."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """A run on one task."""

    figures: dict[Metric, Figure]
    """Figures to show, in the order of their columns; none: it is unfinished."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Scores by the name of the rule that graded the answers, the best rule first; none: it is
    unfinished, or has no answers."""
    same: dict[str, str] = field(default_factory=dict)
    """What has to be equal where two evaluations that are compared have it on record, such as the
    shots."""
    settings: Settings = field(default_factory=dict)
    """What a reader should know to differ."""

    @classmethod
    def of_scores(cls, scores: dict[str, Scores], **others: Any) -> "Evaluation":
        """An evaluation whose figures are the means of its scores."""
        figures = {
            Metric(rule): Figure(
                fmean(by_problem.values()), accuracy_interval([*by_problem.values()])
            )
            for rule, by_problem in scores.items()
        }
        return cls(figures, scores, **others)


@dataclass(frozen=True)
class Run:
    """A training run, an adapter, or the untouched base model, with its evaluations."""

    folder: Path  # or file
    name: str
    settings: Settings = field(default_factory=dict)  # without training, what is known of it
    adapter: AdapterConfig | None = None  # None: no adapter, or none on record
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by the name of their task
    is_base: bool = False  # the untouched base model
    is_training: bool = False  # else there are evaluations only
    has_diverged: bool = False
    result: RunResult | None = None
    metrics: Metrics = field(default_factory=Metrics)
    environment: Environment = field(default_factory=Environment)
    spectrum: list[float] = field(default_factory=list)
    """Singular values over their sum, in the mean over modules."""
    notes: list[str] = field(default_factory=list)  # what its reader left out

    @property
    def figures(self) -> RunResult:
        """The result; while the run is unfinished, its latest figures."""
        return self.result or self.metrics.so_far()

    @property
    def is_unfinished(self) -> bool:
        return self.is_training and self.result is None

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
            return "untouched base" if self.is_base else ""
        text = title(self.adapter)
        if self.adapter.alpha not in (None, self.rank):
            text += f" (alpha {self.adapter.alpha:g})"
        return text

    @property
    def base(self) -> str:
        """The base model and the precision of its weights, which changes a perplexity too."""
        values = map(self.settings.get, BASE)
        known = [str(value) for value in values if value not in (None, "none")]
        return ", ".join(known) or "not on record"


def group_by(items: Sequence[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
