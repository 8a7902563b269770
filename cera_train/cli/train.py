"""`cera-train`: one training run, or a sweep with -m."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cera_train.cli.config import announce_imports, call, start_hydra, to_config
from cera_train.cli.start import errors_in_one_line, print_error
from cera_train.common.errors import UserError
from cera_train.common.settings import key_of, require
from cera_train.common.terminal import print_command
from cera_train.common.trust import redact
from cera_train.distributed.processes import is_main_process, is_one_of_several, join_slurm_step
from cera_train.runs.records import changes_result
from cera_train.runs.tracking import WANDB_NAME
from cera_train.settings.run import Config
from cera_train.study.design import StudySweeper
from cera_train.sweep.folder import RECORD, print_sweep
from cera_train.sweep.grid import Job, begin, job_composer, record_of

TRAIN = "cera-train"


def main() -> None:
    command = train_job
    if "--look" in sys.argv:
        sys.argv.remove("--look")
        is_sweep = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        require(not is_sweep, "--look is for one run: leave out -m.")
        command = look
    # executes the modules of Hydra's plugins, even those imported before
    Plugins.instance()
    from cera_train.cli.joblib import Joblib
    from cera_train.sweep.launchers import Local, SubmititSlurm

    plugins = {
        "StudySweeper": TrainedStudy,
        "Joblib": Joblib,
        "Local": Local,
        "SubmititSlurm": SubmititSlurm,
    }
    start_hydra(TRAIN, command, plugins)


class TrainedStudy(StudySweeper):
    check = staticmethod(to_config)


def look(composed: DictConfig) -> None:
    """Prints the rows, and the command that trains on them."""
    call("cera_train.training.console:print_run_rows", prepare(composed))
    print_command("train it", [TRAIN, *map(redact, sys.argv[1:])])


def train_job(composed: DictConfig) -> float | None:
    """One training run, or one job of a sweep. Returns its perplexity, or its `sweep.metric`, for
    sweepers that search.

    A job that fails returns None rather than raising: the others run, and a sweeper such as Optuna
    counts a failure.
    """
    join_slurm_step(os.environ)  # submitit starts a job without `start`
    job = Job.current(HydraConfig.get())
    if job is None:
        return run(prepare(composed))
    try:
        job.start()
        return run(prepare(composed, job))
    except Exception as error:
        job.fail(print_error(TRAIN, error) or f"a bug: {type(error).__name__}: {error}")
        if is_one_of_several():
            sys.exit(1)  # the other processes wait for this one
        return None


def prepare(composed: DictConfig, job: Job | None = None) -> Config:
    """The checked config of a run as composed; for a job of a sweep, with the job's folder."""
    config = to_config(composed)
    if job is not None:
        os.environ.setdefault("WANDB_RUN_GROUP", job.sweep.name[:WANDB_NAME])
        config = replace(config, output_dir=str(job.sweep), name=job.name)
    if not is_as_published(HydraConfig.get().overrides.task):
        config = replace(config, published={})
    return config


def is_as_published(overrides: list[str]) -> bool:
    """Whether the paper's figures of a recipe still apply: no override changes the result."""
    return all(key == "recipe" or not changes_result(key) for key in map(key_of, overrides))


def run(config: Config) -> float | None:
    """Trains; returns the run's `sweep.metric`."""
    folder = Path(config.output_dir) / config.name
    if (folder / RECORD).exists():
        raise UserError(
            f"{folder} is the folder of a sweep: choose another name=... for a run, or add -m."
        )
    result = call("cera_train.training.train:launch", config)
    return result.get(config.sweep.metric)


class TrainingSweep(Callback):
    """Hydra's hooks at the start and the end of a sweep. conf/config.yaml names it."""

    @errors_in_one_line(TRAIN)  # Hydra would turn an error here into a warning and continue
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        push = config.hub.push
        require(
            push is None,
            f"hub.push={push}: every job of a sweep would replace the one before. Leave it out, "
            f"and upload the best one: hf upload {push} JOB/adapter.",
        )
        if config.study is None:
            begin(config, job_composer(config, to_config), record_of(config))
        else:
            announce_imports()  # to count parameters

    @errors_in_one_line(TRAIN)
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table. Exit status 1 unless all jobs are finished, or submitted and left."""
        if is_main_process():
            # `Job.start` removes it too, but no job may have started.
            (Path(config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
            print()
            if not (print_sweep(Path(config.hydra.sweep.dir)) or config.launch.detach):
                sys.exit(1)
