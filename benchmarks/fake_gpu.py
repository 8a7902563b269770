"""A CUDA device without a GPU. What a program puts there is a FakeTensor, with shape, dtype and
device and no numbers; what it computes on the CPU is real. An operation on both fails, as it would
with a GPU.

    with fake_gpu():
        model.to("cuda")(ids.to("cuda")).sum().backward()
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses import fake_tensor as fake_tensors
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from cera_train.common.files import cached_folder

NAME = "NVIDIA H100 80GB HBM3"

BLOCK = 512
"""Bytes to which torch's allocator rounds up."""

ATEN = torch.ops.aten

PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.addmm_, ATEN.bmm, ATEN.baddbmm}
"""Operations whose shapes for fake tensors ask for no common dtype."""


class FakeDevice(TorchDispatchMode):
    """Lets operations on the GPU run on fake tensors, and those on the CPU as they are.

    Numbers that come back from the GPU are zeros, truth values True. Selecting by a mask that is
    there fails: how much it selects, only a GPU could tell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.blocks = WeakIdKeyDictionary()
        """Blocks of the storages that are alive."""
        self.allocated = self.peak = 0
        """Bytes that torch's allocator would hold now, and held at most."""
        self.waits = 0
        """How often the CPU read a number of the GPU: it waits for all work before it."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they call the operations on their shards
        kwargs = kwargs or {}
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            device = kwargs.get("device")
            if device is None or torch.device(device).type != "cuda":
                return operation(*args, **kwargs)
        if operation is ATEN._local_scalar_dense.default:
            self.waits += 1
            return read(args[0]).item()
        check_dtypes(operation, inputs)
        with self.fakes:
            output = operation(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._allocate(tensor.untyped_storage())
        check_generator(kwargs.get("generator"), output)
        if isinstance(output, FakeTensor) and output.device.type == "cpu":
            self.waits += 1
            return read(output)
        return output

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage once, in the allocator's blocks, until it is let go of."""
        if storage not in self.blocks:
            self.blocks[storage] = block = SimpleNamespace(size=0)
            weakref.finalize(storage, self._resize, block, 0)
            self._resize(block, storage.nbytes())

    def _resize(self, block: SimpleNamespace, size: int) -> None:
        before = block.size
        block.size = -(-size // BLOCK) * BLOCK
        self.allocated += block.size - before
        self.peak = max(self.peak, self.allocated)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Counts a storage that FSDP frees or allocates in place, past all operations."""
        if storage in self.blocks:
            self._resize(self.blocks[storage], size)

    def reset_peak(self) -> None:
        self.peak = self.allocated


def read(fake: torch.Tensor) -> torch.Tensor:
    """What the CPU sees of a tensor of the GPU."""
    return torch.full(fake.shape, fake.dtype == torch.bool, dtype=fake.dtype, device="cpu")


def check_dtypes(operation: Any, inputs: list[torch.Tensor]) -> None:
    """Raises RuntimeError for a product of two dtypes."""
    dtypes = {str(tensor.dtype) for tensor in inputs}
    if operation._overloadpacket in PRODUCTS and len(dtypes) > 1:
        raise RuntimeError(
            f"{operation}: expected tensors of the same dtype, but found "
            f"{', '.join(sorted(dtypes))}"
        )


def check_generator(generator: torch.Generator | None, output: Any) -> None:
    """Raises RuntimeError for the generator of another device: not every operation looks at it on
    fakes."""
    if (
        generator is not None
        and isinstance(output, torch.Tensor)
        and generator.device.type != output.device.type
    ):
        raise RuntimeError(
            f"Expected a '{output.device.type}' device type for generator but found "
            f"'{generator.device}'"
        )


def swap_moved(
    swap: Callable[[torch.Tensor, torch.Tensor], None],
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """`nn.Module.to` for fakes: it would swap those that are there already too, which fails for
    watched ones."""
    return lambda old, new: (
        None if (old.device, old.dtype) == (new.device, new.dtype) else swap(old, new)
    )


def resizing(device: FakeDevice) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
    """`torch.UntypedStorage.resize_`, counted."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        device.resize(storage, size)
        return resize(storage, size)

    return resize_


@contextlib.contextmanager
def first_of(processes: int) -> Iterator[None]:
    """Process 0 of so many, whose collectives bring no numbers."""
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    with patch.dict(os.environ, ranks):
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=0, world_size=processes
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0), processes: int = 1) -> Iterator[FakeDevice]:
    """A machine with one GPU, for as long as the block lasts. Backward passes run in the calling
    thread.

    Args:
        processes: with a GPU each; this is the first of them.

    Raises:
        RuntimeError: there is a GPU.
        FileNotFoundError: there is no g++.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "fake_gpu stands in for a GPU, and this machine has one: run the program itself."
        )
    library = ctypes.CDLL(str(compiled() / "fake_gpu.so"))
    values = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": NAME,
        "get_device_properties": SimpleNamespace(
            name=NAME, total_memory=80_000_000_000, multi_processor_count=132
        ),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache")),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
    }
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(
                patch.object(torch.cuda, name, lambda *args, answer=value, **settings: answer)
            )
        for name in ("Stream", "Event", "stream", "current_stream"):
            stack.enter_context(patch.object(torch.cuda, name, getattr(torch.cpu, name)))
        # FSDP passes these to an operation, from torch 2.15 on.
        for name in ("stream_id", "device_index", "device_type"):
            stack.enter_context(patch.object(torch.cpu.Stream, name, 0, create=True))
        stack.enter_context(patch.object(torch.accelerator, "is_available", lambda: True))
        stack.enter_context(patch.object(fake_tensors, "init_gpu_context", lambda device: None))
        stack.enter_context(
            patch.object(torch.utils, "swap_tensors", swap_moved(torch.utils.swap_tensors))
        )
        # Otherwise an optimizer step goes tensor by tensor.
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            known = [*sys.modules[module]._foreach_supported_types, FakeTensor]
            stack.enter_context(patch(f"{module}._foreach_supported_types", known))
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.callback(forget_tables)
        library.exchange()
        stack.callback(library.exchange)
        lifts = torch._C._only_lift_cpu_tensors()
        # Otherwise torch.tensor(..., device="cuda") bypasses the fake mode.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # Otherwise a torch with CUDA asks cuDNN for its version, which needs a driver.
        stack.enter_context(patch.object(torch.backends.cudnn, "version", lambda: None))
        stack.enter_context(patch.dict(os.environ, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}))
        device = stack.enter_context(FakeDevice())
        stack.enter_context(
            patch.object(torch.cuda, "max_memory_allocated", lambda *args: device.peak)
        )
        stack.enter_context(
            patch.object(torch.cuda, "reset_peak_memory_stats", lambda *args: device.reset_peak())
        )
        stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resizing(device)))
        # A fake tensor reads its numbers one by one.
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda fake: fake.cpu().tolist()))
        # Accelerate finds the optimizer's weights among those of FSDP by their addresses.
        stack.enter_context(
            patch.object(FakeTensor, "data_ptr", lambda fake: fake.untyped_storage()._cdata)
        )
        if processes > 1:
            stack.enter_context(first_of(processes))
        yield device


def forget_tables() -> None:
    """Lets go of bitsandbytes' tables, which it keeps for later models: those of a fake device have
    no numbers."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes import functional
        from bitsandbytes.backends import utils

        functional.name2qmap.clear()
        utils._code_4bit_cache.clear()


def compiled() -> Path:
    """The folder of the compiled fake_gpu.cpp, for this torch."""
    source = Path(__file__).with_suffix(".cpp")
    root = Path(torch.__file__).parent

    def write(folder: Path) -> None:
        command = [
            "g++",
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-shared",
            f"-I{root / 'include'}",
            str(source),
        ]
        libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, *libraries, "-o", str(folder / "fake_gpu.so")], check=True)

    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return cached_folder(f"fake_gpu/{digest}-torch-{torch.__version__}", write)
