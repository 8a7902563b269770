"""The state of every job of a sweep, by what lies in its folder, and a table. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.files import is_locked, read_yaml
from cera_train.common.settings import flatten
from cera_train.common.terminal import labelled
from cera_train.runs.results import DIVERGED, Environment, MetricsLine, RunResult
from cera_train.settings.data import evaluation_rows
from cera_train.sweep.folder import choices_of
from cera_train.sweep.metric import PERPLEXITIES, PERPLEXITY, SweepMetric
from cera_train.sweep.record import JOBS, RECORD, JobRecord, SweepRecord
from cera_train.sweep.rungs import Decision, HalvingRecord

SHORT_ERROR = 72
"""Characters of an error in the table."""


class State(StrEnum):
    finished = "finished"
    diverged = "diverged"  # which is a result: the same command leaves it
    failed = "failed"  # by its environment or its settings: the same command tries it again
    running = "running"
    stopped = "stopped"  # a halving let others go on
    cut = "cut"  # it began and did not end: the same command resumes it
    waiting = "waiting"


@dataclass(frozen=True)
class JobStatus:
    """How far one job is, by what lies in its folder."""

    name: str  # the name of its folder
    choices: Sequence[str]
    state: State
    metric: SweepMetric
    done: int | None = None  # updates
    total: int | None = None
    value: float | None = None  # of the sweep's metric; an unfinished run's: that of its last evaluation
    error: str | None = None
    rows: tuple = ()  # the settings that decide on which rows a perplexity is taken
    rung: int | None = None  # where a halving let others go on

    @property
    def standing(self) -> str:
        return f"stopped at rung {self.rung}" if self.state == State.stopped else self.state.value

    @property
    def progress(self) -> str:
        """Updates done, such as 5/20."""
        return "" if self.done is None else f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")

    @property
    def outcome(self) -> str:
        """What came of it, after its state: its error, its figure, or how far it came."""
        if self.state == State.finished and self.value is not None:
            return f"{self.metric.label} {self.metric.shown(self.value)}"
        return self.error or f"{self.progress or 'no'} updates"


def read_sweep(folder: Path) -> list[JobStatus]:
    """Every job of a sweep: those of its last command in the order of its grid, then what earlier ones left."""
    record = SweepRecord.find(folder / RECORD)
    if record is None:
        if (folder / "config.yaml").exists():
            raise UserError(f"{folder} is the folder of a run, not of a sweep: cera-report {folder} shows it.")
        what = "holds no sweep" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} {what}: expected one that cera-train -m left (with {RECORD}), such as outputs/rank_lr."
        )
    overrides = record.overrides
    started = {path.stem: JobRecord.read(path) for path in (folder / JOBS).glob("[!.]*.json")}
    for name in sorted(started.keys() - overrides.keys(), key=lambda name: (started[name].number, name)):
        overrides[name] = started[name].overrides
    halving = HalvingRecord.read(folder)
    stops = {} if halving is None else halving.stops()
    return [
        job_status(folder, name, choices_of(words, record.swept), record.best_by, stops.get(name))
        for name, words in overrides.items()
    ]


def job_status(
    sweep: Path,
    name: str,
    choices: Sequence[str] = (),
    metric: SweepMetric = PERPLEXITY,
    stop: Decision | None = None,
) -> JobStatus:
    """How far a job of a sweep is.

    Args:
        stop: the decision of a halving that stopped it.
    """
    folder, record = sweep / name, sweep / JOBS / f"{name}.json"
    result, started = RunResult.find(folder / "result.json"), JobRecord.find(record)
    error = started and started.error
    if error and result is not None and (folder / "result.json").stat().st_mtime > record.stat().st_mtime:
        error = None  # it was run again by itself
    config = folder / "config.yaml"
    settings = flatten(read_yaml(config)) if config.exists() else {}
    updates, value = _last_metrics(folder / "metrics.jsonl", metric.key)
    if result is not None:
        updates, value = result.updates, result.to_json().get(metric.key)
    if is_locked(folder):
        state = State.running
    elif result is None and (folder / DIVERGED).exists():
        state = State.diverged
    elif error:
        state = State.failed
    elif result is not None:
        state = State.finished
    elif stop is not None and updates == stop.update:  # else it was gone on with by hand
        state = State.stopped
    else:
        state = State.cut if settings else State.waiting
    environment = Environment.find(folder / "environment.json")
    total = settings.get("train.max_updates") or (environment and environment.updates)
    rows = evaluation_rows({key: value for key, value in settings.items() if key.startswith("data.")})
    return JobStatus(name, choices, state, metric, updates, total, value, error, rows, stop and stop.rung)


def best_jobs(jobs: Sequence[JobStatus]) -> list[JobStatus]:
    """The best finished job by the sweep's metric; by a perplexity, one for every choice of evaluation rows."""
    best: dict[tuple, JobStatus] = {}
    for job in jobs:
        rows = job.rows if job.metric.key in PERPLEXITIES else ()
        if job.state != State.finished or job.value is None:
            continue
        if rows not in best or job.metric.cost(job.value) < job.metric.cost(best[rows].value):
            best[rows] = job
    return list(best.values())


def print_sweep(folder: Path) -> None:
    """Prints a line for every job, how many are in which state, and the best."""
    head, rows, tail = sweep_table(folder, read_sweep(folder))
    print("\n".join([*head, *rows, *tail]), flush=True)


def sweep_table(folder: Path, jobs: Sequence[JobStatus]) -> tuple[list[str], list[str], list[str]]:
    """The lines before the jobs, a line for every job, and those after: how many are in which state, and the best."""
    best = best_jobs(jobs)
    shared = set.intersection(*(set(job.choices) for job in jobs)) if len(jobs) > 1 else set()
    labels = [",".join(choice for choice in job.choices if choice not in shared) or job.name for job in jobs]
    width = max(map(len, ["job", *labels]))
    label = jobs[0].metric.label if jobs else PERPLEXITY.label
    column = max(13, len(label) + 2)
    states = max(9, *(len(job.standing) for job in jobs)) if jobs else 9
    head = [
        labelled("sweep", f"{folder}{': ' + ' '.join(sorted(shared)) if shared else ''}"),
        "",
        f"{'job':<{width}}  {'state':<{states}}{'updates':>15}{label:>{column}}",
    ]
    rows = []
    for job, choices in zip(jobs, labels, strict=True):
        value = "" if job.value is None else job.metric.shown(job.value)
        note = "best" if job in best else ""
        if job.error and job.state in (State.diverged, State.failed):
            note = job.error if len(job.error) <= SHORT_ERROR else job.error[: SHORT_ERROR - 1] + "…"
        rows.append(f"{choices:<{width}}  {job.standing:<{states}}{job.progress:>15}{value:>{column}}  {note}".rstrip())
    counts = Counter(job.state for job in jobs)
    in_words = ", ".join(f"{counts[state]:,} {state}" for state in State if counts[state])
    tail = ["", labelled("jobs", in_words or "none yet")]
    tail += [labelled("best", f"{folder / job.name}: {label} {job.metric.shown(job.value)}") for job in best]
    if counts[State.stopped] and SweepRecord.read(folder / RECORD).study is None:
        how = "the command with a job's values and hydra/sweeper=basic goes on with that job"
        tail.append(labelled("stopped", how))
    if counts[State.failed]:
        is_tried_again = any(job.state == State.failed and job.rung is None for job in jobs)
        again = "; the same command tries these jobs again" if is_tried_again else ""
        tail.append(labelled("errors", f"in full in {folder / JOBS}{again}"))
    return head, rows, tail


def _last_metrics(path: Path, key: str) -> tuple[int | None, float | None]:
    """The last update on record, and the last value of a metric. A run that is writing may have left half a line."""
    update = None
    try:
        lines = path.read_bytes().splitlines()
    except OSError:  # not there yet
        lines = []
    for line in reversed(lines):
        if update is None or f'"{key}"'.encode() in line:
            try:
                metrics = MetricsLine.from_json(json.loads(line), path)
            except (ValueError, RecursionError):
                continue
            update = metrics.update if update is None else update
            if (value := metrics.to_json().get(key)) is not None:
                return update, value
    return update, None


def is_finished(folder: Path) -> bool:
    """Whether every job of the last command has ended, whatever earlier ones left."""
    jobs, names = read_sweep(folder), SweepRecord.read(folder / RECORD).overrides
    if not names:  # the sweeper decided as it went
        return all(job.state != State.failed for job in jobs)
    ends = (State.finished, State.diverged, State.stopped)
    return all(job.state in ends for job in jobs if job.name in names)
