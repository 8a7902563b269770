"""`cera-train -m`: a sweep, or a study, and each of its jobs."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cera_train.cli.config import announce_imports, register_plugins, to_config
from cera_train.cli.joblib import Joblib
from cera_train.cli.start import print_error
from cera_train.cli.train import TRAIN, run
from cera_train.common.settings import require
from cera_train.distributed.processes import is_main_process, is_one_of_several
from cera_train.runs.tracking import WANDB_NAME
from cera_train.study.design import StudySweeper
from cera_train.sweep.folder import print_sweep
from cera_train.sweep.grid import Job, begin, job_composer, record_of
from cera_train.sweep.launchers import Local, SubmititSlurm


class TrainedStudy(StudySweeper):
    check = staticmethod(to_config)


def start(config: DictConfig) -> None:
    """Checks and records the sweep."""
    push = config.hub.push
    require(
        push is None,
        f"hub.push={push}: every job of a sweep would replace the one before. Leave it out, "
        f"and upload the best one: hf upload {push} JOB/adapter.",
    )
    register_plugins(
        StudySweeper=TrainedStudy, Joblib=Joblib, Local=Local, SubmititSlurm=SubmititSlurm
    )
    if config.study is None:
        begin(config, job_composer(config, to_config), record_of(config))
    else:
        announce_imports()  # to count parameters


def run_job(composed: DictConfig) -> float | None:
    """One job. One that fails returns None rather than raising: the others run, and a sweeper such
    as Optuna counts a failure."""
    job = Job.current(HydraConfig.get())
    try:
        job.start()
        os.environ.setdefault("WANDB_RUN_GROUP", job.sweep.name[:WANDB_NAME])
        return run(replace(to_config(composed), output_dir=str(job.sweep), name=job.name))
    except Exception as error:
        job.fail(print_error(TRAIN, error) or f"a bug: {type(error).__name__}: {error}")
        if is_one_of_several():
            sys.exit(1)  # the other processes wait for this one
        return None


def end(config: DictConfig) -> None:
    """Prints the table. Exit status 1 unless all jobs are finished, or submitted and left."""
    if is_main_process():
        # `Job.start` removes it too, but no job may have started.
        (Path(config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
        print()
        if not (print_sweep(Path(config.hydra.sweep.dir)) or config.launch.detach):
            sys.exit(1)
