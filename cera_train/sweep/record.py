"""What a sweep has on record: its jobs and what they share in sweep.json, and how each of them began. Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cera_train.runs.records import Record, key
from cera_train.sweep.metric import SweepMetric

RECORD = "sweep.json"
JOBS = ".jobs"
"""In the sweep's folder: NAME.json for every job that was ever started. The job writes it, wherever it runs."""

START_AGAIN = "Remove it, and start the sweep again."


@dataclass
class SweepRecord(Record):
    """sweep.json: the last command, and its jobs as far as the sweeper knows them."""

    mend: ClassVar[str] = START_AGAIN

    swept: list[str]  # keys that name the jobs
    jobs: dict[str, list[str]]  # in the order of the grid: the overrides of each, by the name of its folder
    fixed: list[str]  # settings that all jobs share
    command: list[Any] | None = None
    metric: dict[str, Any] | None = None
    study: dict[str, Any] | None = None  # its section

    @property
    def best_by(self) -> SweepMetric:
        """`metric`, by which the jobs compare."""
        return SweepMetric.from_json(self.metric or {}, RECORD)


@dataclass
class JobRecord(Record):
    """NAME.json of a job."""

    mend: ClassVar[str] = START_AGAIN

    number: int
    overrides: list[str]
    error: str | None = key("error", write_null=True)  # of its last start
