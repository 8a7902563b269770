"""`cera-train`: one training run, or a sweep with -m."""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.config import call, start_hydra, to_config
from cera_train.cli.start import errors_in_one_line
from cera_train.common.settings import require
from cera_train.common.terminal import print_command
from cera_train.common.trust import redact
from cera_train.distributed.processes import join_slurm_step
from cera_train.settings.run import Config
from cera_train.sweep import RECORD

TRAIN = "cera-train"


def main() -> None:
    command = train_job
    if "--look" in sys.argv:
        sys.argv.remove("--look")
        is_sweep = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        require(not is_sweep, "--look is for one run: leave out -m.")
        command = look
    start_hydra(TRAIN, command)


def look(composed: DictConfig) -> None:
    """Prints the rows, and the command that trains on them."""
    call("cera_train.training.console:print_run_rows", to_config(composed))
    print_command("train it", [TRAIN, *map(redact, sys.argv[1:])])


def train_job(composed: DictConfig) -> float | None:
    """One training run, or one job of a sweep. Returns its perplexity, or its `sweep.metric`, for
    sweepers that search."""
    join_slurm_step(os.environ)  # submitit starts a job without `start`
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from cera_train.cli.sweep import run_job

        return run_job(composed)
    return run(to_config(composed))


def run(config: Config) -> float | None:
    """Trains; returns the run's `sweep.metric`."""
    folder = Path(config.output_dir) / config.name
    require(
        not (folder / RECORD).exists(),
        f"{folder} is the folder of a sweep: choose another name=... for a run, or add -m.",
    )
    return call("cera_train.training.train:launch", config).get(config.sweep.metric)


class TrainingSweep(Callback):
    """Hydra's hooks at the start and the end of a sweep. conf/config.yaml names it."""

    @errors_in_one_line(TRAIN)  # Hydra would turn an error here into a warning and continue
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from cera_train.cli.sweep import start

        start(config)

    @errors_in_one_line(TRAIN)
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        from cera_train.cli.sweep import end

        end(config)
