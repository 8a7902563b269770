"""Runs and sweeps on a real Slurm of one node: tasks that join, and jobs that are cancelled or
preempted."""

import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from tiny_runs import adapter_bytes, losses_of, wait_until

from cera_train.common.files import read_json
from cera_train.settings.run import Config
from cera_train.sweep.folder import State, read_sweep
from cera_train.training.train import train

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue")
CAN_START = os.geteuid() == 0 and all(map(shutil.which, PROGRAMS))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CAN_START, reason="apt-get install slurm-wlm munge, and root's rights, to test it"
    ),
]

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""

CERA_TRAIN = str(Path(sys.executable).parent / "cera-train")
wait = functools.partial(wait_until, seconds=240, every=0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Starts Slurm, gives the environment in which its commands find it, and stops it with all its
    jobs."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (folder / "munge" / "key").chmod(0o400)
    munge = {
        "key-file": "key",
        "socket": "socket",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    options = [f"--{option}={folder / 'munge' / name}" for option, name in munge.items()]
    host = socket.gethostname().split(".")[0]
    sockets = {
        name: socket.create_server(("127.0.0.1", 0)) for name in ("controller_port", "node_port")
    }
    ports = {name: free.getsockname()[1] for name, free in sockets.items()}
    for free in sockets.values():
        free.close()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, **ports))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def printed_by(*words: str) -> bytes:
        return subprocess.run(words, capture_output=True, env=environment).stdout

    try:
        subprocess.run(["munged", "--force", *options], check=True, stderr=subprocess.DEVNULL)
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], check=True, env=environment)
        wait(lambda: b"idle" in printed_by("sinfo", "-h"))
        yield environment | {"OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run(
            ["scancel", "--signal=KILL", "--full", "--user=root"], env=environment, check=False
        )
        wait(lambda: not printed_by("squeue", "-h"))
        for file in (folder / "slurmd.pid", folder / "slurmctld.pid", folder / "munge" / "pid"):
            if file.exists():
                pid = int(file.read_text())
                os.kill(pid, signal.SIGTERM)
                wait(lambda pid=pid: not Path(f"/proc/{pid}").exists())


@pytest.fixture
def run(cluster, tmp_path):
    """run("sbatch", ...) -> what a program that ends well prints."""

    def run(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=cluster, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def arguments(tiny_folder, tmp_path) -> list[str]:
    return [
        f"model.path={tiny_folder}",
        *TINY,
        "train.batch_size=16",
        "train.max_updates=400",
        "train.eval_every=200",
        "train.save_every=100",
        f"output_dir={tmp_path}",
    ]


def sweep_command(arguments: list[str], *settings: str) -> list[str]:
    return [CERA_TRAIN, "-m", *arguments, "name=sweep", "hydra/launcher=slurm_cpu", *settings]


def assert_equals_an_uncut_run(job: Path, config: Config) -> None:
    train(config)
    assert adapter_bytes(job) == adapter_bytes(config)


def test_a_sweep_with_cancelled_and_preempted_jobs_ends_as_if_undisturbed(
    run, arguments, tmp_path, compose
):
    grid = ["adapter.r=2,4", "optimizer.lr=0.001,0.01"]
    sweep = sweep_command(arguments, *grid, "hydra.launcher.cpus_per_task=1")
    out = run(*sweep, "launch.detach=true")
    assert out.count("submitted  job ") == 4
    array = out.split("submitted  job ")[1].split("_")[0]
    folder = tmp_path / "sweep"
    jobs = [folder / job.name for job in read_sweep(folder)]
    assert len(jobs) == 4

    wait(lambda: min(len(losses_of(job)) for job in jobs[1:3]) > 20)
    run("scancel", f"{array}_1")  # SIGTERM
    # As before a time limit: the job saves, and submitit requeues it.
    run("scancel", "--signal=USR2", f"{array}_2")
    wait(lambda: [job.state for job in read_sweep(folder)].count(State.finished) == 3)
    standing = read_sweep(folder)
    assert standing[1].state == State.stopped
    assert (jobs[1] / "checkpoints" / standing[1].progress.partition("/")[0]).is_dir()
    assert (
        "Requeued job" in (folder / ".submitit" / f"{array}_2" / f"{array}_2_0_log.out").read_text()
    )

    results = {
        job: (job / "result.json").stat().st_mtime_ns
        for job in jobs
        if (job / "result.json").exists()
    }
    submitted = set((folder / ".submitit").glob("[0-9]*"))
    out = run(*sweep)
    assert "finished   3 of 4 jobs, which are not started again" in out
    assert "jobs       4 finished" in out
    assert len(set((folder / ".submitit").glob("[0-9]*")) - submitted) == 1
    assert results == {job: (job / "result.json").stat().st_mtime_ns for job in results}
    assert_equals_an_uncut_run(
        jobs[1], compose(*arguments, "adapter.r=2", "optimizer.lr=0.01", "name=first")
    )
    assert_equals_an_uncut_run(
        jobs[2], compose(*arguments, "adapter.r=4", "optimizer.lr=0.001", "name=second")
    )


def test_the_tasks_of_a_slurm_step_train_together(run, arguments, tmp_path, compose):
    """Under srun, and as the job of a sweep; the losses are those of one process."""
    short = [*arguments, "adapter.dropout=0", "train.max_updates=20"]
    train(compose(*short, "adapter.r=4", "name=one"))
    by_srun = ["srun", "--ntasks=2", sys.executable, "-m", "cera_train", *short]
    by_srun += ["adapter.r=4", "name=srun"]
    by_submitit = sweep_command(short, "adapter.r=4,2", "hydra.launcher.tasks_per_node=2")
    assert "2 x cpu" in run(*by_srun)
    run(*by_submitit)
    (job,) = (tmp_path / "sweep").glob("*adapter.r=4*")
    one, *others = (losses_of(folder) for folder in (tmp_path / "one", tmp_path / "srun", job))
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)
    record = read_json(job / "environment.json")
    assert record["processes"] == 2
    assert os.environ.get("RANK") is None


def test_srun_returns_the_status_of_a_saved_run_although_a_task_leaves_late(cluster, tmp_path):
    """The batch script of docs/cluster.md requeues the job by this status."""
    task = tmp_path / "task.py"
    task.write_text(
        "import atexit, os, signal, time\n"
        "from cera_train.common.signals import Interrupted\n"
        "from cera_train.distributed.processes import in_processes, join_slurm_step\n"
        "def saved(config):\n"
        "    raise Interrupted(signal.SIGUSR1)\n"
        "join_slurm_step(os.environ)\n"
        "if os.environ['RANK'] == '1':\n"
        "    atexit.register(time.sleep, 2)\n"
        "in_processes(saved, None)\n"
    )
    command = ["srun", "--ntasks=2", "--kill-on-bad-exit", sys.executable, str(task)]
    done = subprocess.run(command, env=cluster, cwd=tmp_path, check=False)
    assert done.returncode == 128 + signal.SIGUSR1
