"""A sweep's folder: OUTPUT_DIR/NAME holds sweep.json and one folder a job, named by the job's choices.

So a sweep has no state beside what its jobs left. Started again, each job finds its own folder: the finished are
skipped, the cut go on, the missing run. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cera_train.config import CHANGES_NO_RESULT, flatten
from cera_train.files import write_text
from cera_train.secrets import redact, redact_tree
from cera_train.words import say

RECORD = "sweep.json"
JOBS = ".jobs"
"""In the sweep's folder: NAME.json for every job that was ever started. The job writes it, wherever it runs."""

LONGEST_NAME = 150
"""Characters. A file system takes 255, and files are written under a longer name first."""

SHORT_ERROR = 72
"""Characters of an error in the table."""


# --- which jobs ------------------------------------------------------------------------------------------------------


def job_name(overrides: Iterable[str], swept: Collection[str] = ()) -> str:
    """A job's choices as the name of its folder, such as `adapter=cera,adapter.r=64,optimizer.lr=0.0003`: the same for
    the same choices in any order, and never that of other choices.

    Args:
        overrides: as Hydra gives them to the job.
        swept: the keys that differ between the jobs.
    """
    choices = choices_of(overrides, swept)
    exact, shown = ",".join(choices), ",".join(_file_name(redact(choice)) for choice in choices)
    if shown == exact and len(exact) <= LONGEST_NAME:
        return exact or "default"
    # What was replaced or cut may have told two jobs apart.
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{shown[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def choices_of(overrides: Iterable[str], swept: Collection[str] = ()) -> list[str]:
    """What a job chooses, sorted by key. A setting that changes no result is no choice unless it is swept."""
    choices = [override.lstrip("+").replace("$\\{", "${").replace("\\}", "}") for override in overrides]
    choices = [choice for choice in choices if (key := key_of(choice)) in swept or not is_beside_the_point(key)]
    return sorted(choices, key=lambda choice: (key_of(choice), choice))


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def is_beside_the_point(key: str) -> bool:
    """Whether a setting says where or how a run computes, or which file the job's choices come from."""
    return key in ("recipe", "sweep") or key.startswith((*CHANGES_NO_RESULT, "hydra"))


def _file_name(choice: str) -> str:
    """A choice with nothing in it that does not belong in the name of a folder."""
    key, equals, value = choice.partition("=")
    return _plain(key) + equals + _plain(value)


def _plain(text: str) -> str:
    plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    return text if plain == text else plain.strip("-")


def _dimensions(config: DictConfig) -> list[Override]:
    """What a sweep is over: the file's dimensions and the arguments, of which a later one replaces an earlier."""
    params = config.hydra.sweeper.get("params") or {}
    arguments = [*(f"{key}={values}" for key, values in params.items()), *_arguments(config.hydra)]
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(arguments)


def _arguments(hydra_config: DictConfig) -> list[str]:
    """As they were typed: ${...} in them is for each job to resolve."""
    return OmegaConf.to_container(hydra_config.overrides.task, resolve=False)


def grid(config: DictConfig) -> list[list[str]]:
    """The overrides of every job that Hydra's own sweeper runs, in its order. `config` has Hydra's section."""
    (jobs,) = BasicSweeper.split_arguments(_dimensions(config), None)
    return jobs


# --- the record ------------------------------------------------------------------------------------------------------

BEGUN: dict[Path, dict[str, Any]] = {}
"""The sweep that this process leads: its folder, and what stands in its sweep.json."""


class Record(Callback):
    """Hydra's hook at the start of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from cera_train.cli import TRAIN, errors_in_one_line

        with errors_in_one_line(TRAIN):  # Hydra would turn an error into a warning and go on
            begin(config)
            launcher = str(config.hydra.launcher._target_)
            if "submitit" in launcher:
                from cera_train.cluster import wait_for_jobs

                wait_for_jobs(not config.launch.detach)
            elif config.launch.detach:
                raise ValueError(
                    "launch.detach=true is for jobs that run elsewhere: choose a cluster, such as "
                    "hydra/launcher=slurm_gpu."
                )


def begin(config: DictConfig) -> None:
    """Writes down which jobs there will be, as far as the sweeper knows them now.

    Raises:
        ValueError: the sweep has no folder of its own.
    """
    for override in _arguments(config.hydra):
        if key_of(override) in ("name", "output_dir") and re.search(r"\$\{|,|\(", override):
            raise ValueError(
                f"{override} is another for each job. In a sweep, name=... is the folder of all jobs, and each job's "
                "folder in it is named by its choices: give one name, or leave it out."
            )
    folder = Path(config.hydra.sweep.dir)
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is the folder of a run: choose another name=... for the sweep.")
    # A job's own name or recipe must not move it elsewhere.
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
    is_swept = {override.key_or_group: override.is_sweep_override() for override in _dimensions(config)}
    swept = [key for key, is_dimension in is_swept.items() if is_dimension]
    is_grid = config.hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}")
    jobs = [{"name": job_name(job, swept), "overrides": job} for job in grid(config)] if is_grid else []
    BEGUN[folder] = {"command": sys.argv, "swept": swept, "jobs": jobs}
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps(redact_tree(BEGUN[folder]), indent=2) + "\n")


def has_failed(folder: Path, jobs: Iterable[Standing]) -> bool:
    """Whether a job of this command failed, whatever earlier ones left in the folder."""
    own = {job["name"] for job in BEGUN[folder]["jobs"]}
    return any(job.state == State.failed and (job.name in own or not own) for job in jobs)


@dataclass(frozen=True)
class Job:
    """One job, while it runs."""

    folder: Path
    """The sweep's."""
    name: str
    overrides: list[str]
    number: int
    of: int
    """Jobs in all. 0: the sweeper decides as it goes."""

    @classmethod
    def current(cls, hydra_config: DictConfig) -> Job | None:
        """The job that Hydra has just started, from `HydraConfig.get()`. None: this is a single run."""
        if hydra_config.mode != RunMode.MULTIRUN:
            return None
        folder = Path(hydra_config.sweep.dir)
        record = BEGUN.get(folder) or _read_json(folder / RECORD)  # a launcher may run the job in another process
        overrides = _arguments(hydra_config)
        return cls(
            folder, job_name(overrides, record["swept"]), overrides, hydra_config.job.num + 1, len(record["jobs"])
        )

    def start(self) -> None:
        """Says which job this is and clears the error of an earlier start."""
        if not is_main_process():
            return
        (self.folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's own record, in which secrets are not redacted
        self._write(None)
        print()
        say("job", f"{self.number}{f' of {self.of}' if self.of else ''}: {self.name}")

    def fail(self, error: str) -> None:
        """Keeps a job's error for the table."""
        if is_main_process():
            self._write(error)

    def _write(self, error: str | None) -> None:
        (self.folder / JOBS).mkdir(parents=True, exist_ok=True)
        content = {"number": self.number, "overrides": self.overrides, "error": error}
        write_text(self.folder / JOBS / f"{self.name}.json", json.dumps(redact_tree(content), indent=2) + "\n")


def refuse_grid_of_one(hydra_config: DictConfig) -> None:
    """Raises ValueError where a sweep's file was chosen for a single run."""
    if hydra_config.mode != RunMode.MULTIRUN and (chosen := hydra_config.runtime.choices.get("sweep")) is not None:
        raise ValueError(f"+sweep={chosen} is a grid of runs: add -m to take them all.")


def refuse_sweeps_folder(folder: Path) -> None:
    """Raises ValueError where a run would write among the jobs of a sweep."""
    if (folder / RECORD).exists():
        raise ValueError(f"{folder} is the folder of a sweep: choose another name=... for a run, or add -m.")


def is_main_process() -> bool:
    """Under torchrun every process goes through the sweep, and one writes."""
    return os.environ.get("RANK", "0") == "0"


# --- where it stands -------------------------------------------------------------------------------------------------


class State(StrEnum):
    finished = "finished"
    failed = "failed"
    running = "running"
    cut = "cut"
    """It was begun, and the same command goes on with it."""
    waiting = "waiting"


@dataclass(frozen=True)
class Standing:
    """How far one job is, by what lies in its folder."""

    name: str
    """Of its folder."""
    choices: list[str]
    state: State
    done: int | None = None
    """Updates."""
    total: int | None = None
    perplexity: float | None = None
    """Of an unfinished run, at its last evaluation."""
    error: str | None = None
    rows: tuple = ()
    """What decides on which rows the perplexity is taken."""


def read_sweep(folder: Path) -> list[Standing]:
    """Every job of a sweep: those of its last command in the order of its grid, then what earlier ones left.

    Raises:
        ValueError: the folder is not a sweep's.
    """
    record = _read_json(folder / RECORD)
    if record is None:
        what = "holds no sweep" if folder.is_dir() else "is not a folder"
        raise ValueError(
            f"{folder} {what}: expected one that cera-train -m left (with {RECORD}), such as outputs/rank_lr."
        )
    overrides = {job["name"]: job["overrides"] for job in record["jobs"]}
    started = {path.stem: _read_json(path) for path in (folder / JOBS).glob("[!.]*.json")}
    for name in sorted(started.keys() - overrides.keys(), key=lambda name: (started[name]["number"], name)):
        overrides[name] = started[name]["overrides"]
    return [standing(folder, name, choices_of(own, record["swept"])) for name, own in overrides.items()]


def standing(sweep: Path, name: str, choices: list[str]) -> Standing:
    """How far a job of a sweep is."""
    folder, record = sweep / name, sweep / JOBS / f"{name}.json"
    result, error = _read_json(folder / "result.json"), (_read_json(record) or {}).get("error")
    if error and result is not None and _written(folder / "result.json") > _written(record):
        error = None  # it was run again by itself
    settings = flatten(_read_yaml(folder / "config.yaml"))
    updates, perplexity = _last_metrics(folder / "metrics.jsonl")
    if result is not None:
        updates, perplexity = result["updates"], result["eval/perplexity"]
    if _is_locked(folder):
        state = State.running
    elif error:
        state = State.failed
    elif result is not None:
        state = State.finished
    else:
        state = State.cut if settings else State.waiting
    from cera_train.report.runs import decides_rows

    total = settings.get("train.max_updates") or (_read_json(folder / "environment.json") or {}).get("updates")
    rows = decides_rows({key: value for key, value in settings.items() if key.startswith("data.")})
    return Standing(name, choices, state, updates, total, perplexity, error, rows)


def best_jobs(jobs: Sequence[Standing]) -> list[Standing]:
    """The finished jobs of the lowest perplexity, one for every choice of evaluation rows."""
    best: dict[tuple, Standing] = {}
    for job in jobs:
        if job.state == State.finished and (job.rows not in best or job.perplexity < best[job.rows].perplexity):
            best[job.rows] = job
    return list(best.values())


def say_sweep(folder: Path) -> None:
    """Prints a line for every job, how many are in which state, and the best."""
    jobs = read_sweep(folder)
    best = best_jobs(jobs)
    shared = set.intersection(*(set(job.choices) for job in jobs)) if len(jobs) > 1 else set()
    labels = [",".join(choice for choice in job.choices if choice not in shared) or job.name for job in jobs]
    width = max(map(len, ["job", *labels]))
    say("sweep", f"{folder}{': ' + ' '.join(sorted(shared)) if shared else ''}")
    print(f"\n{'job':<{width}}  {'state':<9}{'updates':>15}{'perplexity':>13}")
    for job, label in zip(jobs, labels, strict=True):
        done = "" if job.done is None else f"{job.done:,}" + (f"/{job.total:,}" if job.total else "")
        perplexity = "" if job.perplexity is None else f"{job.perplexity:,.3f}"
        note = "best" if job in best else ""
        if job.state == State.failed:
            note = job.error if len(job.error) <= SHORT_ERROR else job.error[: SHORT_ERROR - 1] + "…"
        print(f"{label:<{width}}  {job.state:<9}{done:>15}{perplexity:>13}  {note}".rstrip())
    print()
    counts = Counter(job.state for job in jobs)
    say("jobs", ", ".join(f"{counts[state]:,} {state}" for state in State if counts[state]) or "none yet")
    for job in best:
        say("best", f"{folder / job.name}: perplexity {job.perplexity:,.3f}")
    if counts[State.failed]:
        say("errors", f"in full in {folder / JOBS}; the same command tries these jobs again")


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


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}. Remove it, and start the sweep again.") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}. Remove the job's folder.") from error
