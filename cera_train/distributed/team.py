"""The processes that share a run. Before each collective a process counts an arrival, so that the watchdog can name the
one that the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator

from cera_train.distributed.watchdog import Watchdog

Pass = TypeVar("Pass")


class Team:
    """Accelerate's processes with a watchdog beside them.

    Args:
        timeout: seconds that processes wait for one that does not come. None: without a limit.
    """

    def __init__(self, accelerator: Accelerator, timeout: float | None = None) -> None:
        self.accelerator = accelerator
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self.is_sharded = accelerator.is_fsdp2
        self.device = accelerator.device
        self._watchdog = Watchdog(self.processes, self.process, timeout) if timeout is not None else None

    def arrive(self) -> None:
        """Counts that this process is about to wait for the others."""
        if self._watchdog is not None:
            self._watchdog.arrive()

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """The sum or the mean of a tensor over all processes."""
        self.arrive()
        return self.accelerator.reduce(tensor, reduction=reduction)

    def passes(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, bool]]:
        """This process's passes through the model, and whether each is the last.

        Sharded, every pass gathers weights from all processes. Else they meet twice: DDP's first pass of an update
        waits for process 0's buffers, and its last one reduces the gradients.
        """
        self.arrive()
        for number, one in enumerate(passes, start=1):
            is_last = number == len(passes)
            if is_last or self.is_sharded:
                self.arrive()
            yield one, is_last

    def gather(self, whole: Callable[[], Pass]) -> Pass:
        """The result of a function in which all processes put sharded tensors together."""
        self.arrive()
        return whole()

    def close(self) -> None:
        """Stops the watchdog."""
        if self._watchdog is not None:
            self._watchdog.close()
