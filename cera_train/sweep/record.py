"""The records of a sweep: sweep.json with its jobs, fixed settings and metric, and a file for each started job.
Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cera_train.common.errors import UserError
from cera_train.evaluation.tasks.task import task_figures
from cera_train.runs.records import Record
from cera_train.runs.results import is_task_figure
from cera_train.settings.evaluation import known_tasks

RECORD = "sweep.json"
JOBS = ".jobs"
"""Folder in the sweep's: NAME.json for every job that was started, written by the job itself."""

START_AGAIN = "Remove it, and start the sweep again."

PERPLEXITIES = ("eval/perplexity", "best_perplexity")
"""Figures that compare on the same evaluation rows only."""

HIGHER_IS_BETTER = {
    **dict.fromkeys([*PERPLEXITIES, "seconds", "peak_memory_bytes", "trainable_parameters"], False),
    "tokens_per_s": True,
}
"""The figures of result.json by which jobs compare, besides those of tasks."""


class SweepMetric(Record):
    """The figure by which jobs compare."""

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
    """The metric of `sweep.metric`; raises UserError where no run of the sweep records it. `tasks` has the changes of
    each of `train.tasks`, None where they are not known yet."""
    known = dict(HIGHER_IS_BETTER)
    for task, changes in tasks.items():
        known |= task_figures(task, changes)
    if key in known:
        return SweepMetric(key, known[key])
    task = key.partition("/")[0]
    is_left_out = task not in tasks and task in known_tasks() and key in task_figures(task)
    mend = f"add train.tasks=[{task}]" if is_left_out else f"choose one of {', '.join(known)}"
    raise UserError(f"sweep.metric={key}: no job has this figure: {mend}.")


class SweepRecord(Record):
    """sweep.json: the last command, and its jobs as far as the sweeper knows them."""

    mend: ClassVar[str] = START_AGAIN

    swept: list[str]  # keys that name the jobs
    jobs: dict[str, list[str]]  # in the order of the grid: the overrides of each, by the name of its folder
    fixed: list[str]  # settings that all jobs share
    command: list[Any] | None = None
    metric: SweepMetric = PERPLEXITY
    study: dict[str, Any] | None = None  # its section


class JobRecord(Record):
    """NAME.json of a job."""

    mend: ClassVar[str] = START_AGAIN

    number: int
    overrides: list[str]
    error: str | None = None  # of its last start
