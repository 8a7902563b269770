"""The processes that share a run, and a watchdog that names the one that all others wait for: the communication
library's time limit ends a run too, but does not name it."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

Pass = TypeVar("Pass")
Item = TypeVar("Item")

LOOKS = 4  # at the other processes before one is taken for hung


class Hung(RuntimeError):
    """A process did not come to a collective within the time limit."""


class Team:
    """Accelerate's processes with a watchdog beside them. Before each collective a process counts an arrival."""

    def __init__(self, accelerator: Accelerator, timeout: float | None = None) -> None:
        self.accelerator = accelerator
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self.is_sharded = accelerator.is_fsdp2
        self.device = accelerator.device
        self.watchdog = Watchdog(self.processes, self.process, timeout)
        self.arrive, self.close = self.watchdog.arrive, self.watchdog.close

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """The sum or the mean of a tensor over all processes."""
        self.arrive()
        return self.accelerator.reduce(tensor, reduction=reduction)

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in the order of the processes."""
        self.arrive()
        return gather_object(items)

    def passes(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, bool]]:
        """This process's passes through the model, and whether each is the last.

        Sharded, every pass gathers weights from all processes. Else they meet in the last one, which reduces the
        gradients.
        """
        for number, one in enumerate(passes, start=1):
            is_last = number == len(passes)
            if is_last or self.is_sharded:
                self.arrive()
            yield one, is_last


class Watchdog:
    """Ends this process when others wait too long for one that does not come, and names it.

    A thread publishes the arrivals again and again in the key-value store by which the processes found each other, so
    the loop pays an addition. Where nothing has moved for `seconds` (None: no limit), a process that no longer
    publishes, or one that is behind, is the one waited for.
    """

    def __init__(self, processes: int, process: int, seconds: float | None) -> None:
        self.processes, self.process, self.seconds = processes, process, seconds
        self.arrivals = 0
        self._done = threading.Event()
        if processes > 1 and seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def arrive(self) -> None:
        """Counts that this process is about to wait for the others."""
        self.arrivals += 1

    def close(self) -> None:
        """Stops watching."""
        self._done.set()

    def _watch(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit, pause = timedelta(seconds=self.seconds), min(1.0, self.seconds / 10)
        try:
            store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
        except torch.distributed.DistError:  # another process has ended already
            return
        last, moved = self.arrivals, time.monotonic()
        seen: deque[list[tuple[int, ...]]] = deque(maxlen=LOOKS)
        for beat in itertools.count():
            if beat and self._done.wait(pause):
                return
            if self.arrivals != last:
                last, moved = self.arrivals, time.monotonic()
                seen.clear()
            is_late = last > 0 and time.monotonic() - moved > self.seconds
            missing = []
            try:
                store.set(f"cera_train/{self.process}", f"{last} {beat}")
                if is_late:
                    seen.append([self._published(store, process) for process in range(self.processes)])
                    missing = self._missing(seen) if len(seen) == LOOKS else []
            except torch.distributed.DistError:  # process 0 keeps the store, where no launcher does
                missing = [0] if is_late else []
            if missing and self.process not in missing:
                self._end(missing)

    @staticmethod
    def _published(store: torch.distributed.Store, process: int) -> tuple[int, ...]:
        """Arrivals and beat of a process; -1 where it never published: `get` would block."""
        key = f"cera_train/{process}"
        return tuple(map(int, store.get(key).split())) if store.check([key]) else (-1, -1)

    @staticmethod
    def _missing(seen: Sequence[list[tuple[int, ...]]]) -> list[int]:
        """Processes that published nothing new (stopped, or their machine is gone); else those that are behind."""
        now = seen[-1]
        silent = [process for process, published in enumerate(now) if published == seen[0][process]]
        return silent or [process for process, (arrivals, _) in enumerate(now) if arrivals < max(now)[0]]

    def _end(self, behind: list[int]) -> None:
        message = (
            f"process {', '.join(map(str, behind))} of {self.processes} (counted from 0) hangs: the others have waited "
            f"for it for {self.seconds:g} seconds (distributed.timeout). Look at its machine; the same command goes on "
            "from the last checkpoint."
        )
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # the launcher reports it
            get_error_handler().record_exception(Hung(message))
        else:
            print(f"cera-train: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits inside the communication library
