"""Where a command runs: its processes, device and precision."""

from __future__ import annotations

import contextlib
import resource
import warnings
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, get_int_from_env

from cera_train.config import Dtype, ModelConfig

RANK_VARIABLES = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
"""Where launchers say which process this is; Accelerate reads the same."""


def is_main_process() -> bool:
    """Whether this process writes and speaks, before there is an `Accelerator` to ask."""
    return get_int_from_env(RANK_VARIABLES, 0) == 0


def start_accelerator(model: ModelConfig, autocast: bool | None, timeout: timedelta | None = None) -> Accelerator:
    """Joins the processes of this command.

    Args:
        timeout: how long one process waits for another; None: torch's own limit.

    Raises:
        ValueError: the user's `accelerate config` asks for FSDP, DeepSpeed and the like.
    """
    AcceleratorState._reset_state()  # else the precision of a process's first run would bind every later one
    # Without being told, Accelerate does not join several processes of a machine that has only CPUs.
    accelerator = Accelerator(
        mixed_precision=mixed_precision(model, autocast),
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    check_distribution(accelerator)
    return accelerator


def check_distribution(accelerator: Accelerator) -> None:
    """Takes what a user's `accelerate config` or launcher may have set, as far as our loops can follow it.

    Raises:
        ValueError: FSDP, DeepSpeed and the like.
    """
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"distributed training by {accelerator.distributed_type} is not supported: every process holds the whole "
            "model. Start with torchrun, or choose DDP in `accelerate config`."
        )
    accelerator.gradient_accumulation_steps = 1  # train.batch_size and train.micro_batch_tokens say it


def mixed_precision(model: ModelConfig, autocast: bool | None) -> str:
    """Accelerate's name for the precision of matrix products over float32 weights."""
    wanted = model.dtype != Dtype.float32 if autocast is None else autocast
    if not wanted:
        return "no"
    if model.dtype == Dtype.float16:
        return "fp16" if torch.cuda.is_available() else "no"  # needs a gradient scaler, which the CPU has not
    return "bf16"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Lets the peak be that of what comes now: the jobs of a sweep share a process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux's own way for a process
        Path("/proc/self/clear_refs").write_text("5")


def quiet_libraries() -> None:
    """Leaves the terminal to this program: errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
