"""Settings of the processes that share a run."""

from dataclasses import dataclass
from enum import StrEnum

from cera_train.common.settings import require, require_positive, setting

Strategy = StrEnum("Strategy", ["ddp", "fsdp"])


@dataclass
class ProcessesConfig:
    processes: str = setting("auto", "nothing")
    """Processes that the command starts on this machine. auto: one for each visible GPU. If
    torchrun, `accelerate launch` or srun started it, it starts no others."""

    def __post_init__(self) -> None:
        if self.processes == "auto":
            return
        is_number = (
            self.processes.isascii() and self.processes.isdecimal() and int(self.processes) > 0
        )
        require(is_number, f"launch.processes={self.processes} must be auto or a positive number.")


@dataclass
class LaunchConfig(ProcessesConfig):
    detach: bool = setting(False, "nothing")
    """Submit the jobs of a sweep to a cluster and return. `cera-sweep FOLDER` shows their
    states."""


@dataclass
class DistributedConfig:
    strategy: Strategy = setting(Strategy.ddp, "nothing")
    """ddp: the whole model on every GPU; fsdp: its weights sharded over all of them (FSDP2), for
    bases that do not fit one GPU."""
    timeout: float = setting(1800.0, "nothing")
    """Seconds that processes wait for a missing one before the run ends."""

    def __post_init__(self) -> None:
        require_positive("distributed", self, "timeout")
