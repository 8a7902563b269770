"""Accelerate, set up for our loops: processes, device and precision. The time limit of the process
group ends a run when one of its processes hangs."""

import contextlib
import gc
import os
import warnings
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.distributed.processes import MEETING, RANKS, is_one_of_several
from cera_train.settings.distributed import DistributedConfig, Strategy
from cera_train.settings.model import Dtype, ModelConfig

MIXED_PRECISIONS = {None: "no", Dtype.bfloat16: "bf16", Dtype.float16: "fp16"}
"""Accelerate's names of the dtypes that autocast computes in."""


def this_device() -> torch.device:
    """CUDA or the CPU: precision, kernels and layout are chosen and tested for these two only."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_accelerator(
    model: ModelConfig, autocast: bool | None, config: DistributedConfig
) -> Accelerator:
    """Joins the processes of this command. Raises UserError where they do not meet."""
    # Otherwise the first run of a process would fix the precision of later ones.
    AcceleratorState._reset_state(reset_partial_state=True)
    has_gpu = this_device().type == "cuda"
    plugin = None
    if config.strategy == Strategy.fsdp:
        # Each decoder layer is gathered when it computes, in its stored precision, so the numbers
        # are those of DDP.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=MixedPrecisionPolicy(),
        )
    try:
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISIONS[model.autocast_dtype(autocast, has_gpu)],
            # otherwise Accelerate joins no processes there, or picks another accelerator
            cpu=not has_gpu,
            fsdp_plugin=plugin,
            # train.compile decides, not `accelerate config`
            dynamo_backend="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout)),
                # Buffers are not trained: they are the same everywhere.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except (torch.distributed.DistError, ValueError) as error:
        # A launcher's variables may be left over, or some missing.
        where = ", ".join(f"{name}={os.environ.get(name)}" for name in MEETING)
        cause = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{where}: {cause}: start all processes, or this command alone: unset "
            f"{' '.join(RANKS)}."
        ) from error
    if plugin is not None:
        # Otherwise later runs of this process would use FSDP too.
        os.environ.pop("ACCELERATE_USE_FSDP")
    if not has_gpu:
        # Accelerate's device is cpu:0, and moving weights there copies memory-mapped ones.
        shared = {"device": torch.device("cpu")}
        if plugin is not None and accelerator.num_processes > 1:
            # Accelerate offers FSDP2 on accelerators only; torch has it on CPUs too.
            shared |= {"fsdp_plugin": plugin, "distributed_type": DistributedType.FSDP}
        for state in (accelerator.state, PartialState()):
            vars(state).update(shared)  # shared by all instances of its class
    require(
        accelerator.num_processes > 1 or not is_one_of_several(),
        "several processes were started, and each would train alone: start them by torchrun, "
        "`accelerate launch` or srun, which set RANK, WORLD_SIZE and LOCAL_RANK.",
    )
    check_distribution(accelerator, config.strategy)
    return accelerator


def check_distribution(accelerator: Accelerator, strategy: Strategy) -> None:
    """Refuses what our loops do not support: DeepSpeed and the like of `accelerate config` or a
    launcher, and FSDP without `distributed.strategy=fsdp`."""
    supported = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if strategy == Strategy.fsdp:
        supported = {DistributedType.FSDP}
        require(
            accelerator.num_processes > 1,
            "distributed.strategy=fsdp shards the weights over several processes, and there is "
            "one: leave it out.",
        )
    require(
        accelerator.distributed_type in supported,
        f"The launcher set up {accelerator.distributed_type.value}, but "
        f"distributed.strategy={strategy} needs plain processes: choose no engine in `accelerate "
        "config`. distributed.strategy=fsdp shards without one.",
    )
    accelerator.gradient_accumulation_steps = 1  # a user's config would divide the loss


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or resident on a CPU. Those of now where the system keeps
    no peak of a process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    # Not `ru_maxrss`, which a new process inherits from its parent.
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def prepare_memory() -> None:
    """Frees the memory of earlier jobs of a sweep in this process, and resets the peak. Lets
    torch's CUDA allocator grow its segments, since micro-batches differ in length: CUDA reads the
    variable once, when it starts."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    gc.collect()  # Accelerate's model and its forward refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux resets VmHWM
        Path("/proc/self/clear_refs").write_text("5")


def quiet_libraries() -> None:
    """Silences libraries, except for errors."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
