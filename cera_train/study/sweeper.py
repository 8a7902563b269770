"""`hydra/sweeper=study`: runs the jobs of a study that have not ended, by any launcher. Imports no torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from cera_train.common.files import locked
from cera_train.common.settings import require
from cera_train.distributed.processes import is_main_process
from cera_train.settings.run import Config
from cera_train.study.cells import read_study
from cera_train.study.design import check_cells, check_problems, study_of, study_record
from cera_train.sweep.folder import WRITER, ComposeJob, begin, named
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.table import State, job_status


def is_study(config: DictConfig) -> bool:
    """Whether a sweep is that of a study. `config` has Hydra's section."""
    return config.hydra.sweeper.get("_target_", "").endswith(f".{StudySweeper.__name__}")


def begin_study(config: DictConfig, compose: ComposeJob[Config]) -> None:
    """`begin` for a study: first refuses one that could not answer its question."""
    study = study_of(config)
    require(
        not (config.launch.detach and study.tune_seeds),
        f"launch.detach=true with study.tune_seeds={study.tune_seeds}: the other seeds wait for what these choose. "
        "Leave one out.",
    )

    def checked_record(config: DictConfig) -> SweepRecord:
        record = study_record(config)
        pairs = check_cells(config, record, compose)
        check_problems(run for cell, run in pairs if not cell.is_finished)  # a finished cell reads its rows no more
        return record

    begin(config, compose, checked_record)


class StudySweeper(Sweeper):
    """Runs the whole grid; with `study.tune_seeds`, then the values that these seeds chose with every other seed."""

    def __init__(self, **_: Any) -> None:
        """Hydra passes the settings, of which a study has none here."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Holds the folder while it runs. Of several processes that run it, the main one holds."""
        self.folder, self.launched = Path(self.config.hydra.sweep.dir), 0
        with locked(self.folder, WRITER) if is_main_process() else contextlib.nullcontext():
            record = SweepRecord.read(self.folder / RECORD)
            self.launch(record.overrides)
            if self.config.study.tune_seeds:
                chosen = [
                    candidate.overrides_of(seed)
                    for cell in read_study(self.folder).cells
                    for seed, candidate in cell.chosen.items()
                    if seed >= cell.tune_seeds
                ]
                jobs = named(self.folder, chosen, record.swept)
                record.with_jobs(jobs).write(self.folder / RECORD)
                self.launch(jobs)

    def launch(self, jobs: dict[str, list[str]]) -> None:
        """Runs the jobs that have not ended, and waits for them."""
        is_over = {State.finished, State.diverged}
        waiting = [
            overrides
            for name, overrides in jobs.items()
            if self.config.train.extend or job_status(self.folder, name).state not in is_over
        ]
        if waiting:
            for job in self.launcher.launch(waiting, initial_job_idx=self.launched):
                _ = job.return_value  # raises what the job did not catch
        self.launched += len(waiting)
