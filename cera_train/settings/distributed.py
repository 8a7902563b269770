"""Settings of the processes that share a run."""

from dataclasses import dataclass
from enum import StrEnum

from pydantic import PositiveFloat

from cera_train.common.settings import setting
from cera_train.settings.values import Processes, Settings

Strategy = StrEnum("Strategy", ["ddp", "fsdp"])


@dataclass
class ProcessesConfig(Settings):
    processes: Processes = setting("auto", "nothing")
    """Processes that the command starts on this machine. auto: one for each visible GPU. If
    torchrun, `accelerate launch` or srun started it, it starts no others."""


@dataclass
class LaunchConfig(ProcessesConfig):
    detach: bool = setting(False, "nothing")
    """Submit the jobs of a sweep to a cluster and return. `cera-sweep FOLDER` shows their
    states."""


@dataclass
class DistributedConfig(Settings):
    strategy: Strategy = setting(Strategy.ddp, "nothing")
    """ddp: the whole model on every GPU; fsdp: its weights sharded over all of them (FSDP2), for
    bases that do not fit one GPU."""
    timeout: PositiveFloat = setting(1800.0, "nothing")
    """Seconds that processes wait for a missing one before the run ends."""
