"""A real Slurm of one node on this machine: munge, slurmctld and slurmd, on free ports and in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue")

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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=10
"""


def is_installed() -> bool:
    """Whether there is a Slurm to start, and the right to start it."""
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Starts it, gives the environment in which its commands find it, and stops it with all its jobs."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (folder / "munge" / "key").chmod(0o400)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder / 'munge' / name}" for option, name in munge.items()]
    host = socket.gethostname().split(".")[0]
    ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, **ports))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    try:
        subprocess.run(["munged", "--force", *options], check=True, stderr=subprocess.DEVNULL)
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], check=True, env=environment)
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True, env=environment).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield environment
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=environment, check=False)
        _wait(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, env=environment).stdout)
        for file in (folder / "slurmd.pid", folder / "slurmctld.pid", folder / "munge" / "pid"):
            if file.exists():
                pid = int(file.read_text())
                os.kill(pid, signal.SIGTERM)
                _wait(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def _wait(is_done: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]
