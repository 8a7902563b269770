"""A sweep's folder: OUTPUT_DIR/NAME holds sweep.json and one folder a job, named by the job's choices.

So a sweep has no state beside what its jobs left. Started again, each job finds its own folder: the finished are
skipped, the cut go on, the missing run. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.files import write_text
from cera_train.common.secrets import redact, redact_tree
from cera_train.common.settings import Changes, changes_of
from cera_train.common.terminal import print_line
from cera_train.config import Config
from cera_train.distributed.processes import is_main_process

RECORD = "sweep.json"
JOBS = ".jobs"
"""In the sweep's folder: NAME.json for every job that was ever started. The job writes it, wherever it runs."""

LONGEST_NAME = 150
"""Characters. A file system takes 255, and files are written under a longer name first."""


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
    if key in ("recipe", "sweep") or key.startswith("hydra"):
        return True
    return changes_of(Config, key) in (Changes.cost, Changes.nothing)


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


def begin(config: DictConfig) -> None:
    """Writes down which jobs there will be, as far as the sweeper knows them now.

    Raises:
        ValueError: the sweep has no folder of its own.
    """
    for override in _arguments(config.hydra):
        if key_of(override) in ("name", "output_dir") and re.search(r"\$\{|,|\(", override):
            raise UserError(
                f"{override} is another for each job. In a sweep, name=... is the folder of all jobs, and each job's "
                "folder in it is named by its choices: give one name, or leave it out."
            )
    folder = Path(config.hydra.sweep.dir)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is the folder of a run: choose another name=... for the sweep.")
    # A job's own name or recipe must not move it elsewhere.
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
    is_swept = {override.key_or_group: override.is_sweep_override() for override in _dimensions(config)}
    swept = [key for key, is_dimension in is_swept.items() if is_dimension]
    is_grid = config.hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}")
    jobs = [{"name": job_name(job, swept), "overrides": job} for job in grid(config)] if is_grid else []
    BEGUN[folder] = {"command": sys.argv, "swept": swept, "jobs": jobs, "detached": config.launch.detach}
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps(redact_tree(BEGUN[folder]), indent=2) + "\n")


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
        record = BEGUN.get(folder) or read_record(folder / RECORD)  # a launcher may run the job in another process
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
        print_line("job", f"{self.number}{f' of {self.of}' if self.of else ''}: {self.name}")

    def fail(self, error: str) -> None:
        """Keeps a job's error for the table; of several processes that fail, the first one's."""
        if is_main_process() or not (read_record(self.folder / JOBS / f"{self.name}.json") or {}).get("error"):
            self._write(error)

    def _write(self, error: str | None) -> None:
        (self.folder / JOBS).mkdir(parents=True, exist_ok=True)
        content = {"number": self.number, "overrides": self.overrides, "error": error}
        write_text(self.folder / JOBS / f"{self.name}.json", json.dumps(redact_tree(content), indent=2) + "\n")


def refuse_grid_of_one(hydra_config: DictConfig) -> None:
    """Raises ValueError where a sweep's file was chosen for a single run."""
    if hydra_config.mode != RunMode.MULTIRUN and (chosen := hydra_config.runtime.choices.get("sweep")) is not None:
        raise UserError(f"+sweep={chosen} is a grid of runs: add -m to take them all.")


def refuse_sweeps_folder(folder: Path) -> None:
    """Raises ValueError where a run would write among the jobs of a sweep."""
    if (folder / RECORD).exists():
        raise UserError(f"{folder} is the folder of a sweep: choose another name=... for a run, or add -m.")


def read_record(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}. Remove it, and start the sweep again.") from error
