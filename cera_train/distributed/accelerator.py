"""Where a command runs: its processes, device and precision."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from cera_train.common.errors import UserError
from cera_train.distributed.config import Strategy
from cera_train.distributed.sharding import fsdp2
from cera_train.model.config import Dtype, ModelConfig


def start_accelerator(
    model: ModelConfig, autocast: bool | None, timeout: timedelta, strategy: Strategy = Strategy.ddp
) -> Accelerator:
    """Joins the processes of this command.

    Args:
        timeout: how long one process waits for another.
        strategy: how they share the model.

    Raises:
        ValueError: the user's `accelerate config` asks for something else, such as DeepSpeed.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # else a process's first run would bind every later one
    has_gpu = torch.accelerator.is_available()
    plugin = fsdp2() if strategy == Strategy.fsdp else None
    accelerator = Accelerator(
        mixed_precision=mixed_precision(model, autocast),
        cpu=not has_gpu,  # without being told, it does not join several processes of a machine that has only CPUs
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    if plugin is not None:
        os.environ.pop("ACCELERATE_USE_FSDP")  # and so would Accelerate's mark
    if plugin is not None and not has_gpu and accelerator.num_processes > 1:
        # Accelerate offers FSDP2 on accelerators only; torch has it on CPUs too.
        accelerator.state.fsdp_plugin = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    check_distribution(accelerator, strategy)
    return accelerator


def check_distribution(accelerator: Accelerator, strategy: Strategy) -> None:
    """Takes what a user's `accelerate config` or launcher may have set, as far as our loops can follow it.

    Raises:
        ValueError: DeepSpeed and the like, or FSDP without `distributed.strategy=fsdp`.
    """
    supported = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if strategy == Strategy.fsdp:
        supported = {DistributedType.FSDP}
        if accelerator.num_processes == 1:
            raise UserError(
                "distributed.strategy=fsdp shards the weights over several processes, and there is one: leave it out."
            )
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"distributed training by {accelerator.distributed_type} is not what distributed.strategy={strategy} says. "
            "Choose no engine in `accelerate config`, and distributed.strategy=ddp or fsdp here."
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
    """Bytes: of the GPU's allocator, or resident on a CPU. Not `ru_maxrss`, which a new process takes over from its
    parent."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_earlier_runs() -> None:
    """Frees what an earlier job of a sweep left in this process, and lets the peak be that of what comes now."""
    gc.collect()  # Accelerate's model and its forward refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux's own way for a process
        Path("/proc/self/clear_refs").write_text("5")


def quiet_libraries() -> None:
    """Leaves the terminal to this program: errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
