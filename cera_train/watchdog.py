"""Names the process that the others wait for in vain. The communication library's own time limit ends a run too, but
does not say who was missing."""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler


class Hung(RuntimeError):
    """A process has not been heard of for too long."""


class Watchdog:
    """Ends this process when others wait too long for one that does not come, and says which one.

    Processes meet at the same points. Each counts those it has reached (`arrive`), and a thread beside it publishes the
    count in the key-value store by which the processes found each other; so the loop pays an addition. Where counts
    differ and nothing has moved for the limit, those behind are the ones waited for.

    Args:
        processes: how many there are; one alone waits for nobody.
        process: which of them this is.
        seconds: the limit.
    """

    def __init__(self, processes: int, process: int, seconds: float) -> None:
        self.processes, self.process, self.seconds = processes, process, seconds
        self.arrivals = 0
        self._done = threading.Event()
        if processes > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def arrive(self) -> None:
        """This process is about to wait for the others."""
        self.arrivals += 1

    def close(self) -> None:
        """Stops watching."""
        self._done.set()

    def _watch(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=self.seconds)
        try:
            store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
        except torch.distributed.DistError:  # another process has ended already
            return
        key, last, moved = "cera_train/arrivals/{}", self.arrivals, time.monotonic()
        while not self._done.wait(min(1.0, self.seconds / 10)):
            if self.arrivals != last:
                last, moved = self.arrivals, time.monotonic()
            is_late = last > 0 and time.monotonic() - moved > self.seconds
            try:
                store.set(key.format(self.process), str(last))
                if not is_late:
                    continue
                counts = [int(store.get(key.format(process))) for process in range(self.processes)]
            except torch.distributed.DistError:  # process 0 keeps the store, where no launcher does
                counts = [-1] + [last] * (self.processes - 1)
            behind = [process for process, count in enumerate(counts) if count < max(counts)]
            if is_late and behind and self.process not in behind:
                self._end(behind)

    def _end(self, behind: list[int]) -> None:
        who = ", ".join(map(str, behind))
        message = (
            f"process {who} of {self.processes} (counted from 0) hangs: the others have waited for it for "
            f"{self.seconds:g} seconds (distributed.timeout). Look at its machine; the same command goes on from the "
            "last checkpoint."
        )
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # the launcher says it
            get_error_handler().record_exception(Hung(message))
        else:
            print(f"cera-train: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits inside the communication library
