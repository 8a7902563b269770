"""`cera-train`: one training run, or a sweep with -m."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cera_train.cli.composition import Composition, check_trust, to_config
from cera_train.cli.start import errors_in_one_line, hydra_command, leave_closed_pipe, print_error, start
from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.common.settings import Changes, changes_of
from cera_train.config import Config
from cera_train.distributed.processes import is_main_process, is_one_of_several, join_slurm_step
from cera_train.sweep.folder import BEGUN, Job, begin, key_of, refuse_grid_of_one, refuse_sweeps_folder

TRAIN = Composition(Config, "cera-train")


def main() -> None:
    start(TRAIN, train_and_print_sweep)


@hydra_command("config")
def train(composed: DictConfig) -> float | None:
    """One training run, or one job of a sweep. Returns its perplexity, for sweepers that minimise.

    A job that fails returns None rather than raising: the others go on, and a sweeper such as Optuna counts a failure.
    """
    with errors_in_one_line(TRAIN):
        join_slurm_step(os.environ)  # a job that submitit started did not come by `start`
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
    """Trains as composed, a job in a folder within the sweep's."""
    refuse_grid_of_one(HydraConfig.get())
    config = to_config(composed)
    overrides = HydraConfig.get().overrides.task
    check_trust(composed, overrides)
    if job is None:
        refuse_sweeps_folder(Path(config.output_dir) / config.name)
    else:
        config = replace(config, output_dir=str(job.folder), name=job.name)
    if not is_as_published(overrides):
        config = replace(config, published={})
    with heavy_imports():
        from cera_train.training.launch import launch

    return launch(config)["eval/perplexity"]


def is_as_published(overrides: list[str]) -> bool:
    """Whether the paper's figures of a recipe still apply: no override changes the result."""
    changing = (Changes.result, Changes.tokens, Changes.answers)
    keys = [key for key in map(key_of, overrides) if key != "recipe"]
    return all(changes_of(Config, key) not in changing for key in keys)


class SweepStart(Callback):
    """Hydra's hook at the start of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with errors_in_one_line(TRAIN):  # Hydra would turn an error into a warning and go on
            begin(config)
            detach = config.launch.detach
            if "submitit" in str(config.hydra.launcher._target_):
                from cera_train.sweep.cluster import replace_waiting

                replace_waiting(detach)
            elif detach:
                raise UserError(
                    "launch.detach=true is for jobs that run elsewhere: choose a cluster, such as "
                    "hydra/launcher=slurm_gpu."
                )


def train_and_print_sweep() -> None:
    """`train`, and after a sweep its table; exit status 1 unless all its jobs are finished or still to come."""
    train()
    for folder, record in BEGUN.items() if is_main_process() else ():
        from cera_train.sweep.table import is_finished, print_sweep

        print()
        print_sweep(folder)
        if not (record["detached"] or is_finished(folder)):
            sys.exit(1)
