"""The figure of result.json by which the jobs of a sweep compare, and its direction. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cera_train.common.errors import UserError
from cera_train.evaluation.tasks.task import task_figures
from cera_train.runs.records import Record
from cera_train.runs.results import RunResult, SpectrumSummary, is_task_figure
from cera_train.settings.tasks import known_tasks

PERPLEXITIES = tuple(map(RunResult.key_of, ("perplexity", "best_perplexity")))
"""Figures that compare on the same evaluation rows only."""

HIGHER_IS_BETTER = {
    **dict.fromkeys(PERPLEXITIES, False),
    **dict.fromkeys(map(RunResult.key_of, ("seconds", "peak_memory_bytes", "trainable_parameters")), False),
    RunResult.key_of("tokens_per_s"): True,
    **{
        SpectrumSummary.key_of(f"{quantity}_{end}"): True
        for quantity in ("effective_rank", "manifold_dimension")
        for end in ("mean", "max")
    },
}
"""The figures of result.json that tell which run is better, besides those of tasks."""


@dataclass(frozen=True)
class SweepMetric(Record):
    """What the best job has the most or the least of; part of sweep.json."""

    key: str = PERPLEXITIES[0]
    higher_is_better: bool = False

    @property
    def label(self) -> str:
        return self.key.removeprefix("eval/")

    def shown(self, value: float) -> str:
        return f"{value:.1%}" if is_task_figure(self.key) else f"{value:,.3f}"

    def cost(self, value: float) -> float:
        """A number that is lower for a better value."""
        return -value if self.higher_is_better else value


PERPLEXITY = SweepMetric()


def sweep_metric(key: str, tasks: Mapping[str, Mapping[str, Any] | None]) -> SweepMetric:
    """The metric of this name. Raises UserError where a run records no such figure, or one that is neither better nor
    worse.

    Args:
        tasks: `train.tasks` and what changes each; None: whatever the changes are.
    """
    known = dict(HIGHER_IS_BETTER)
    for task, changes in tasks.items():
        known |= task_figures(task, changes)
    if key in known:
        return SweepMetric(key, known[key])
    task = key.partition("/")[0]
    is_left_out = task not in tasks and task in known_tasks() and key in task_figures(task)
    mend = f"add train.tasks=[{task}]" if is_left_out else f"choose one of {', '.join(known)}"
    raise UserError(f"sweep.metric={key}: no job has this figure: {mend}.")
