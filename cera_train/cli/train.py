"""`cera-train`: one training run, or a sweep with -m."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from cera_train.cli.composition import Composition, check_trust, to_config
from cera_train.cli.start import errors_in_one_line, leave_closed_pipe, print_error, start_hydra
from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.config import Config
from cera_train.data.sources import check_data
from cera_train.distributed.processes import is_main_process, is_one_of_several, join_slurm_step
from cera_train.model.folder import check_model
from cera_train.runs.recorded_config import changes_result
from cera_train.runs.subject import find_start
from cera_train.sweep.folder import Job, begin, key_of, refuse_grid_of_one, refuse_sweeps_folder
from cera_train.sweep.halving import Halving, begin_halving, is_halving
from cera_train.sweep.table import is_finished, print_sweep

TRAIN = Composition(Config, "cera-train")


def main() -> None:
    start_hydra(TRAIN, "config", train, keeps_sweeps=True, plugins=[Halving])


def train(composed: DictConfig) -> float | None:
    """One training run, or one job of a sweep. Returns its perplexity, for sweepers that minimise.

    A job that fails returns None rather than raising: the others run, and a sweeper such as Optuna counts a failure.
    """
    with errors_in_one_line(TRAIN):
        join_slurm_step(os.environ)  # submitit starts a job without `start`
        job = Job.current(HydraConfig.get())
        if job is None:
            return run(composed)
        try:
            job.start()
            return run(composed, job)
        except BrokenPipeError:
            leave_closed_pipe()
        except Exception as error:
            job.fail(print_error(TRAIN, error) or f"a bug: {type(error).__name__}: {error}")
            if is_one_of_several():
                sys.exit(1)  # others wait for this process
            return None


def run(composed: DictConfig, job: Job | None = None) -> float:
    """Trains as composed; a job of a sweep in its folder there."""
    refuse_grid_of_one(HydraConfig.get())
    config = to_config(composed)
    overrides = HydraConfig.get().overrides.task
    check_trust(composed, overrides)
    if job is None:
        refuse_sweeps_folder(Path(config.output_dir) / config.name)
    else:
        tracker = replace(config.tracker, group=config.tracker.group or job.sweep.name)
        config = replace(config, output_dir=str(job.sweep), name=job.name, tracker=tracker)
    if not is_as_published(overrides):
        config = replace(config, published={})
    has_result = (Path(config.output_dir) / config.name / "result.json").exists()
    if config.train.extend or not has_result:  # a finished run needs its files no more
        check_model(config.model.path)  # torch takes seconds to import: a mistake is answered before
        check_data(config.data)
    if config.adapter.start_from is not None and not (Path(config.output_dir) / config.name / "config.yaml").exists():
        find_start(config.adapter)
    with heavy_imports():
        from cera_train.training.launch import launch

    return launch(config)["eval/perplexity"]


def is_as_published(overrides: list[str]) -> bool:
    """Whether the paper's figures of a recipe still apply: no override changes the result."""
    return all(key == "recipe" or not changes_result(key) for key in map(key_of, overrides))


class Sweep(Callback):
    """Hydra's hooks at the start and the end of a sweep. conf/config.yaml names it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with errors_in_one_line(TRAIN):  # Hydra would turn an error into a warning and continue
            is_elsewhere, detach = "submitit" in str(config.hydra.launcher._target_), config.launch.detach
            if detach and not is_elsewhere:
                raise UserError(
                    "launch.detach=true is for jobs that run elsewhere: choose a cluster, such as "
                    "hydra/launcher=slurm_gpu."
                )
            (begin_halving if is_halving(config) else begin)(config, without_hydra)
            if is_elsewhere:
                from cera_train.sweep.cluster import replace_waiting

                replace_waiting(detach)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table. Exit status 1 unless all jobs are finished, or submitted and left."""
        if not is_main_process():
            return
        with errors_in_one_line(TRAIN):
            folder = Path(config.hydra.sweep.dir)
            print()
            print_sweep(folder)
            if not (config.launch.detach or is_finished(folder)):
                sys.exit(1)


def without_hydra(composed: DictConfig) -> Config:
    """The checked config of a job, from all that Hydra composed for it."""
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return to_config(composed)
