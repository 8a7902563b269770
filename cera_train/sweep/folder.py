"""A sweep's folder: OUTPUT_DIR/NAME holds sweep.json and one folder for each job, named by what
varies; the state of a job follows from its folder's contents. Imports no torch."""

import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from cera_train.common.errors import UserError
from cera_train.common.files import is_locked
from cera_train.common.settings import key_of
from cera_train.common.terminal import print_command, print_line, print_table
from cera_train.common.trust import redact
from cera_train.runs.records import Record, changes_result
from cera_train.runs.results import (
    DIVERGED,
    METRICS,
    Metrics,
    RunResult,
    environment_of,
    is_task_figure,
    read_metrics,
)
from cera_train.sweep import RECORD

# subfolder with NAME.json for every job that was started, written by the job itself
JOBS = ".jobs"

START_AGAIN = "Remove it, and start the sweep again."

LONGEST_NAME = (
    150  # characters. A file system takes 255, and files are written under a longer name first.
)

SHORT_ERROR = 72  # characters of an error in the table


# --- names ----------------------------------------------------------------------------------------


def job_name(overrides: Iterable[str], swept: Collection[str] = ()) -> str:
    """The name of a job's folder: what varies, such as `adapter=cera,adapter.r=64`; if nothing
    does, every choice. It does not depend on the order of choices, and other choices have another
    name."""
    choices = job_choices(overrides, swept)
    if swept:
        choices = [choice for choice in choices if key_of(choice) in swept]

    def plain(text: str) -> str:
        """The text with dashes for characters that plain file names lack."""
        dashed = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
        return text if dashed == text else dashed.strip("-")

    exact = ",".join(choices)
    shown = ",".join("=".join(map(plain, redact(choice).split("=", 1))) for choice in choices)
    if shown == exact and len(exact) <= LONGEST_NAME:
        return exact or "default"  # if nothing is chosen
    # What was replaced or cut may be the only difference between two jobs.
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{shown[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def job_choices(overrides: Iterable[str], swept: Collection[str] = ()) -> list[str]:
    """What a job chooses, sorted by key. A setting that changes no result counts only if it is
    swept."""
    choices = []
    for override in overrides:
        key = key_of(override)
        # These name a file that choices come from.
        is_source = key in ("recipe", "sweep", "study") or key.startswith("hydra")
        if key in swept or (changes_result(key) and not is_source):
            choices.append(override.lstrip("+").replace("$\\{", "${").replace("\\}", "}"))
    return sorted(choices, key=lambda choice: (key_of(choice), choice))


# --- records --------------------------------------------------------------------------------------

# Metrics that compare only on the same held-out rows.
PERPLEXITIES = ("eval/perplexity", "best_perplexity")


class SweepMetric(Record):
    """The figure by which jobs are ranked: a perplexity, or a score, where higher is better."""

    key: str = PERPLEXITIES[0]

    @property
    def higher_is_better(self) -> bool:
        return is_task_figure(self.key)

    @property
    def label(self) -> str:
        return self.key.removeprefix("eval/")

    def shown(self, value: float) -> str:
        return f"{value:.1%}" if self.higher_is_better else f"{value:,.3f}"

    def cost(self, value: float) -> float:
        """A number that is lower for a better value."""
        return -value if self.higher_is_better else value


PERPLEXITY = SweepMetric()


class SweepRecord(Record):
    """sweep.json: the last command, and its jobs as far as the sweeper knows them."""

    fix: ClassVar[str] = START_AGAIN

    swept: list[str]  # keys that name the jobs
    # The overrides of each job by the name of its folder, in the order of the grid.
    jobs: dict[str, list[str]]
    fixed: list[str]  # settings that all jobs share
    command: list[Any] | None = None
    metric: SweepMetric = PERPLEXITY
    study: dict[str, Any] | None = None  # its section


class JobRecord(Record):
    """NAME.json of a job."""

    fix: ClassVar[str] = START_AGAIN

    error: str | None = None  # of its last start


# --- states ---------------------------------------------------------------------------------------


class State(StrEnum):
    finished = "finished"
    diverged = "diverged"  # a result: the same command does not train it again
    failed = "failed"  # stopped by its environment or settings: the same command tries it again
    running = "running"
    stopped = "stopped"  # it began and did not end: the same command resumes it
    waiting = "waiting"


@dataclass(frozen=True)
class JobStatus:
    """The status of a job, from the contents of its folder."""

    name: str  # the name of its folder
    state: State
    metric: SweepMetric
    progress: str  # updates done, such as 5/20
    value: float | None  # of the sweep's metric; for an unfinished run, that of its last evaluation
    error: str | None
    rows: str | None  # the digest of the rows that a perplexity is measured on

    @property
    def is_over(self) -> bool:
        """Whether the job has a result: the same command does not start it again."""
        return self.state in (State.finished, State.diverged)

    @property
    def outcome(self) -> str:
        """A few words about the job after its state: its figure, its error, or its progress."""
        if self.state == State.finished and self.value is not None:
            return f"{self.metric.label} {self.metric.shown(self.value)}"
        return self.error or f"{self.progress or 'no'} updates"


def read_sweep(folder: Path) -> list[JobStatus]:
    """Every job of a sweep: those of its last command in the order of its grid, then those of
    earlier commands."""
    record = SweepRecord.find(folder / RECORD)
    if record is None:
        raise UserError(
            f"{folder} holds no sweep: expected a folder that cera-train -m left, with {RECORD}, "
            f"such as outputs/rank_lr; cera-report {folder} shows a run."
        )
    started = {path.stem for path in (folder / JOBS).glob("[!.]*.json")}
    earlier = sorted(started - record.jobs.keys())
    return [job_status(folder, name, record.metric) for name in [*record.jobs, *earlier]]


def job_status(sweep: Path, name: str, metric: SweepMetric = PERPLEXITY) -> JobStatus:
    """The status of a job of a sweep."""
    folder = sweep / name
    started = JobRecord.find(sweep / JOBS / f"{name}.json")
    result = RunResult.find(folder / "result.json")
    error = started and started.error
    if is_locked(folder):
        state = State.running
    elif result is not None:
        state = State.finished
    elif (folder / DIVERGED).exists():
        state = State.diverged
    elif error:
        state = State.failed
    else:
        state = State.stopped if (folder / "config.yaml").exists() else State.waiting
    metrics = Metrics() if result else read_metrics(folder / METRICS)
    value = (result or metrics.so_far()).to_json().get(metric.key)
    environment = environment_of(folder)
    progress = ""
    if environment.updates is not None:
        progress = (
            f"{(result.updates or 0) if result else metrics.last_update:,}/{environment.updates:,}"
        )
    return JobStatus(name, state, metric, progress, value, error, environment.held_out)


def best_jobs(jobs: Sequence[JobStatus]) -> list[JobStatus]:
    """The best finished job by the sweep's metric; for a perplexity, one for each set of held-out
    rows."""
    best: dict[str | None, JobStatus] = {}
    for job in jobs:
        rows = job.rows if job.metric.key in PERPLEXITIES else None
        if job.state != State.finished or job.value is None:
            continue
        if rows not in best or job.metric.cost(job.value) < job.metric.cost(best[rows].value):
            best[rows] = job
    return list(best.values())


def print_sweep(folder: Path) -> bool:
    """Prints a line for every job, the number of jobs in each state, and the best; for a study,
    whose best of many runs would mislead, the command of its verdict. Returns whether every job of
    the last command has ended, regardless of earlier commands."""
    jobs = read_sweep(folder)
    record = SweepRecord.read(folder / RECORD)
    best = best_jobs(jobs) if record.study is None else []
    label = jobs[0].metric.label if jobs else PERPLEXITY.label
    print_line("sweep", str(folder))
    print()
    rows = []
    for job in jobs:
        note = "best" if job in best else ""
        if job.error and job.state in (State.diverged, State.failed):
            note = textwrap.shorten(job.error, SHORT_ERROR, placeholder="…")
        rows.append(
            [
                job.name,
                job.state,
                job.progress,
                "" if job.value is None else job.metric.shown(job.value),
                note,
            ]
        )
    print_table(["job", "state", "updates", label, ""], rows, right=(2, 3))
    print()
    counts = Counter(job.state for job in jobs)
    print_line(
        "jobs",
        ", ".join(f"{counts[state]:,} {state}" for state in State if counts[state]) or "none yet",
    )
    for job in best:
        print_line("best", f"{folder / job.name}: {label} {job.metric.shown(job.value)}")
    if counts[State.failed]:
        print_line("errors", f"in full in {folder / JOBS}; the same command tries these jobs again")
    if record.study is not None:
        print_command("verdict", ["cera-report", str(folder)])
    names = record.jobs
    # A record without jobs: the sweeper chose them as it went.
    return (
        all(job.is_over for job in jobs if job.name in names) if names else not counts[State.failed]
    )
