"""`hydra/launcher=joblib`: jobs of a sweep at once, in processes of this command."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from omegaconf import DictConfig

from cera_train.common.errors import UserError
from cera_train.common.libraries import heavy_imports
from cera_train.common.signals import SIGNALS, Interrupted, Interruption, signal_children
from cera_train.common.terminal import print_command, print_line
from cera_train.sweep.folder import JOBS, RECORD, SweepRecord, job_status
from cera_train.sweep.grid import Job
from cera_train.sweep.launchers import MissingJobs


class Joblib(MissingJobs, JoblibLauncher):
    """Trains `n_jobs` jobs at once, in processes that share the cores, each on one GPU."""

    def setup(self, *, task_function: Callable[[DictConfig], Any], **context: Any) -> None:
        super().setup(task_function=functools.partial(run_in_worker, task_function), **context)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Passes signals on to the jobs, and stops once they have saved."""
        print_command("state", ["cera-sweep", self.config.hydra.sweep.dir])
        print_line("output", f"{self.config.hydra.sweep.dir}/{JOBS}/JOB.log")
        with Interruption(pass_on=signal_children) as interruption:
            try:
                return super().launch(job_overrides, initial_job_idx)
            except BrokenProcessPool as error:
                if interruption.signal is not None:
                    raise Interrupted(interruption.signal) from None
                raise UserError(
                    "hydra/launcher=joblib: the process of a job was killed, perhaps for lack of "
                    "memory, and the others with it. Set a lower hydra.launcher.n_jobs; the same "
                    "command resumes them."
                ) from error


# Signals that this joblib worker received; after the first it starts no job.
SIGNALLED: list[int] = []


def end_job(number: int) -> None:
    SIGNALLED.append(number)
    raise Interrupted(number)


def run_in_worker(task_function: Callable[[DictConfig], Any], composed: DictConfig) -> Any:
    """Runs a job in a process of joblib's. Its output goes to its log; one line is printed when it
    begins and one when it ends, so that lines of several jobs do not mix."""
    if multiprocessing.parent_process() is None:  # joblib starts no process for a single job
        return task_function(composed)
    # What a job starts, such as launch.processes or math-verify, does not know how joblib starts.
    multiprocessing.set_start_method("spawn", force=True)
    # Between two jobs: joblib kills all jobs when one of its processes ends.
    for number in SIGNALS:
        signal.signal(number, lambda number, _: SIGNALLED.append(number))
    if SIGNALLED:
        return None
    job = Job.current(HydraConfig.get())
    print_line("job", job.title)
    try:
        with Interruption(pass_on=end_job), output_to(job.log):
            take_gpu(HydraConfig.get().job.num)
            return task_function(composed)
    except SystemExit:
        if not SIGNALLED:
            raise
    finally:
        status = job_status(job.sweep, job.name, metric=SweepRecord.read(job.sweep / RECORD).metric)
        print_line(status.state, f"{job.name}: {status.outcome}")


def take_gpu(job: int) -> None:
    """Lets CUDA see one of the visible GPUs alone, which jobs take in turn by their number. A
    process keeps the GPU of its first job, since CUDA reads this once."""
    with heavy_imports():
        import torch
    if gpus := torch.cuda.device_count():  # which does not start CUDA yet
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[job % gpus]


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Appends to a file what this process and its children print."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = {stream: os.dup(stream.fileno()) for stream in (sys.stdout, sys.stderr)}
    with path.open("a") as file:
        for stream in streams:
            os.dup2(file.fileno(), stream.fileno())
    try:
        yield
    finally:
        for stream, terminal in streams.items():
            stream.flush()
            os.dup2(terminal, stream.fileno())
            os.close(terminal)
