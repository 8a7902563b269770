"""The state of every job of a sweep, by what lies in its folder, and a table. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.files import is_locked, read_yaml
from cera_train.common.settings import flatten
from cera_train.common.terminal import print_line, print_table
from cera_train.runs.results import DIVERGED, Environment, RunResult
from cera_train.sweep.folder import choices_of, key_of
from cera_train.sweep.record import JOBS, PERPLEXITIES, PERPLEXITY, RECORD, JobRecord, SweepMetric, SweepRecord

SHORT_ERROR = 72
"""Characters of an error in the table."""


class State(StrEnum):
    finished = "finished"
    diverged = "diverged"  # which is a result: the same command leaves it
    failed = "failed"  # by its environment or its settings: the same command tries it again
    running = "running"
    stopped = "stopped"  # it began and did not end: the same command resumes it
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
    rows: str | None = None  # the digest of the rows on which a perplexity is taken

    @property
    def is_over(self) -> bool:
        """Whether the job has a result: the same command does not start it again."""
        return self.state in (State.finished, State.diverged)

    @property
    def progress(self) -> str:
        """Updates done, such as 5/20."""
        return "" if self.done is None else f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")

    @property
    def outcome(self) -> str:
        """A few words on the job beside its state: its figure, its error, or its progress."""
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
    overrides = dict(record.jobs)
    started = {path.stem: JobRecord.read(path) for path in (folder / JOBS).glob("[!.]*.json")}
    for name in sorted(started.keys() - overrides.keys(), key=lambda name: (started[name].number, name)):
        overrides[name] = started[name].overrides
    # The name of a study's arm stands for its overrides.
    of_arms = {key_of(word) for arm in (record.study or {"arms": {}})["arms"].values() for word in arm}
    choices = {
        name: [choice for choice in choices_of(words, record.swept) if key_of(choice) not in of_arms]
        for name, words in overrides.items()
    }
    return [job_status(folder, name, choices[name], record.metric) for name in overrides]


def job_status(sweep: Path, name: str, choices: Sequence[str] = (), metric: SweepMetric = PERPLEXITY) -> JobStatus:
    """How far a job of a sweep is."""
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
    else:
        state = State.stopped if settings else State.waiting
    environment = Environment.find(folder / "environment.json")
    total = settings.get("train.max_updates") or (environment and environment.updates)
    rows = environment and environment.held_out
    return JobStatus(name, choices, state, metric, updates, total, value, error, rows)


def best_jobs(jobs: Sequence[JobStatus]) -> list[JobStatus]:
    """The best finished job by the sweep's metric; by a perplexity, one for every choice of evaluation rows."""
    best: dict[str | None, JobStatus] = {}
    for job in jobs:
        rows = job.rows if job.metric.key in PERPLEXITIES else None
        if job.state != State.finished or job.value is None:
            continue
        if rows not in best or job.metric.cost(job.value) < job.metric.cost(best[rows].value):
            best[rows] = job
    return list(best.values())


def print_sweep(folder: Path) -> bool:
    """Prints a line for every job, how many are in which state, and the best. Returns whether every job of the last
    command has ended, whatever earlier ones left."""
    jobs = read_sweep(folder)
    best, label = best_jobs(jobs), jobs[0].metric.label if jobs else PERPLEXITY.label
    shared = set.intersection(*(set(job.choices) for job in jobs)) if len(jobs) > 1 else set()
    print_line("sweep", f"{folder}{': ' + ' '.join(sorted(shared)) if shared else ''}")
    print()
    rows = []
    for job in jobs:
        name = ",".join(choice for choice in job.choices if choice not in shared) or job.name
        note = "best" if job in best else ""
        if job.error and job.state in (State.diverged, State.failed):
            note = job.error if len(job.error) <= SHORT_ERROR else job.error[: SHORT_ERROR - 1] + "…"
        rows.append([name, job.state, job.progress, "" if job.value is None else job.metric.shown(job.value), note])
    print_table(["job", "state", "updates", label, ""], rows, right=(2, 3))
    print()
    counts = Counter(job.state for job in jobs)
    print_line("jobs", ", ".join(f"{counts[state]:,} {state}" for state in State if counts[state]) or "none yet")
    for job in best:
        print_line("best", f"{folder / job.name}: {label} {job.metric.shown(job.value)}")
    if counts[State.failed]:
        print_line("errors", f"in full in {folder / JOBS}; the same command tries these jobs again")
    names = SweepRecord.read(folder / RECORD).jobs
    # Without names the sweeper decided as it went.
    return all(job.is_over for job in jobs if job.name in names) if names else not counts[State.failed]


def _last_metrics(path: Path, key: str) -> tuple[int | None, float | None]:
    """The last update on record, and the last value of a metric. A run that is writing may have left half a line."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    update, wanted = None, f'"{key}"'.encode()
    for line in reversed(lines):
        if update is None or wanted in line:
            with contextlib.suppress(ValueError, RecursionError):
                metrics = json.loads(line)
                update = metrics["update"] if update is None else update
                if metrics.get(key) is not None:
                    return update, metrics[key]
    return update, None
