"""The state of every job of a sweep, by what lies in its folder, and a table. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.common.settings import flatten
from cera_train.common.terminal import print_line
from cera_train.data.config import evaluation_rows
from cera_train.sweep.folder import JOBS, RECORD, choices_of, read_record
from cera_train.sweep.rungs import Decision, HalvingRecord

SHORT_ERROR = 72
"""Characters of an error in the table."""


class State(StrEnum):
    finished = "finished"
    failed = "failed"
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
    done: int | None = None  # updates
    total: int | None = None
    perplexity: float | None = None  # an unfinished run's: that of its last evaluation
    error: str | None = None
    rows: tuple = ()  # the settings that decide on which rows the perplexity is taken
    rung: int | None = None  # where a halving let others go on

    @property
    def standing(self) -> str:
        return f"stopped at rung {self.rung}" if self.state == State.stopped else self.state.value


def read_sweep(folder: Path) -> list[JobStatus]:
    """Every job of a sweep: those of its last command in the order of its grid, then what earlier ones left."""
    record = read_record(folder / RECORD)
    if record is None:
        if (folder / "config.yaml").exists():
            raise UserError(f"{folder} is the folder of a run, not of a sweep: cera-report {folder} shows it.")
        what = "holds no sweep" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} {what}: expected one that cera-train -m left (with {RECORD}), such as outputs/rank_lr."
        )
    overrides = {job["name"]: job["overrides"] for job in record["jobs"]}
    started = {path.stem: read_record(path) for path in (folder / JOBS).glob("[!.]*.json")}
    for name in sorted(started.keys() - overrides.keys(), key=lambda name: (started[name]["number"], name)):
        overrides[name] = started[name]["overrides"]
    halving = HalvingRecord.read(folder)
    stops = {} if halving is None else halving.stops()
    return [
        job_status(folder, name, choices_of(words, record["swept"]), stops.get(name))
        for name, words in overrides.items()
    ]


def job_status(sweep: Path, name: str, choices: Sequence[str] = (), stop: Decision | None = None) -> JobStatus:
    """How far a job of a sweep is.

    Args:
        stop: the decision of a halving that stopped it.
    """
    folder, record = sweep / name, sweep / JOBS / f"{name}.json"
    result, error = read_record(folder / "result.json"), (read_record(record) or {}).get("error")
    if error and result is not None and (folder / "result.json").stat().st_mtime > record.stat().st_mtime:
        error = None  # it was run again by itself
    config = folder / "config.yaml"
    settings = flatten(read_yaml(config)) if config.exists() else {}
    updates, perplexity = _last_metrics(folder / "metrics.jsonl")
    if result is not None:
        updates, perplexity = result["updates"], result["eval/perplexity"]
    if _is_locked(folder):
        state = State.running
    elif error:
        state = State.failed
    elif result is not None:
        state = State.finished
    elif stop is not None and updates == stop.update:  # else it was gone on with by hand
        state = State.stopped
    else:
        state = State.cut if settings else State.waiting
    total = settings.get("train.max_updates") or (read_record(folder / "environment.json") or {}).get("updates")
    rows = evaluation_rows({key: value for key, value in settings.items() if key.startswith("data.")})
    return JobStatus(name, choices, state, updates, total, perplexity, error, rows, stop and stop.rung)


def best_jobs(jobs: Sequence[JobStatus]) -> list[JobStatus]:
    """The finished jobs of the lowest perplexity, one for every choice of evaluation rows."""
    best: dict[tuple, JobStatus] = {}
    for job in jobs:
        if job.state == State.finished and (job.rows not in best or job.perplexity < best[job.rows].perplexity):
            best[job.rows] = job
    return list(best.values())


def print_sweep(folder: Path) -> None:
    """Prints a line for every job, how many are in which state, and the best."""
    jobs = read_sweep(folder)
    best = best_jobs(jobs)
    shared = set.intersection(*(set(job.choices) for job in jobs)) if len(jobs) > 1 else set()
    labels = [",".join(choice for choice in job.choices if choice not in shared) or job.name for job in jobs]
    width = max(map(len, ["job", *labels]))
    print_line("sweep", f"{folder}{': ' + ' '.join(sorted(shared)) if shared else ''}")
    states = max(9, *(len(job.standing) for job in jobs)) if jobs else 9
    print(f"\n{'job':<{width}}  {'state':<{states}}{'updates':>15}{'perplexity':>13}")
    for job, label in zip(jobs, labels, strict=True):
        done = "" if job.done is None else f"{job.done:,}" + (f"/{job.total:,}" if job.total else "")
        perplexity = "" if job.perplexity is None else f"{job.perplexity:,.3f}"
        note = "best" if job in best else ""
        if job.state == State.failed:
            note = job.error if len(job.error) <= SHORT_ERROR else job.error[: SHORT_ERROR - 1] + "…"
        print(f"{label:<{width}}  {job.standing:<{states}}{done:>15}{perplexity:>13}  {note}".rstrip())
    print()
    counts = Counter(job.state for job in jobs)
    print_line("jobs", ", ".join(f"{counts[state]:,} {state}" for state in State if counts[state]) or "none yet")
    for job in best:
        print_line("best", f"{folder / job.name}: perplexity {job.perplexity:,.3f}")
    if counts[State.stopped]:
        print_line("stopped", "the command with a job's values and hydra/sweeper=basic goes on with that job")
    if counts[State.failed]:
        is_tried_again = any(job.state == State.failed and job.rung is None for job in jobs)
        print_line(
            "errors", f"in full in {folder / JOBS}" + "; the same command tries these jobs again" * is_tried_again
        )


def _is_locked(folder: Path) -> bool:
    """Whether a run holds the folder. Its lock file is there only while it does, or after it was killed."""
    path = folder / ".lock"
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except (Timeout, OSError):  # or it is another user's
        return True


def _last_metrics(path: Path) -> tuple[int | None, float | None]:
    """The last update on record, and the last perplexity. A run that is writing may have left half a line."""
    update = None
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        if update is None or '"eval/perplexity"' in line:
            try:
                metrics = json.loads(line)
            except ValueError:
                continue
            update = metrics["update"] if update is None else update
            if "eval/perplexity" in metrics:
                return update, metrics["eval/perplexity"]
    return update, None


def is_finished(folder: Path) -> bool:
    """Whether every job of the last command is finished, or was stopped by its halving, whatever earlier ones left."""
    jobs, names = read_sweep(folder), {job["name"] for job in read_record(folder / RECORD)["jobs"]}
    if not names:  # the sweeper decided as it went
        return all(job.state != State.failed for job in jobs)
    return all(job.state in (State.finished, State.stopped) for job in jobs if job.name in names)
