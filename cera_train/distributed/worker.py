"""The work of one of several processes. Nothing here imports torch at module level: the workers silence it first."""

from __future__ import annotations

import os
import pkgutil
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cera_train.common.errors import explain
from cera_train.common.imports import heavy_imports
from cera_train.distributed.signals import SIGNALS

LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset)|ProcessGroup", re.IGNORECASE)
"""Errors of the communication library, caused by the error of another process."""

PEER_SECONDS = 5
"""Pause of a process that lost another before it fails too: the launcher reports the first failure."""


def work(target: str, config: Any, mistakes: str) -> Any:
    """Calls a function in one of the processes that `in_processes` started. Torch's launcher brings an error to the
    parent as text, so a mistake of the user's is left in the folder `mistakes`.

    Args:
        target: MODULE:FUNCTION. It is imported here, since signals are not handled while the arguments are unpickled.
    """
    os.setpgrp()  # a terminal's Ctrl-C goes to the parent alone, which passes it on
    for number in SIGNALS:  # while the function does not handle them, such as while it loads
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with heavy_imports():
            function = pkgutil.resolve_name(target)
        result = beside_others(function, config)
        import torch

        if torch.distributed.is_initialized():  # not where the result was there already
            torch.distributed.destroy_process_group()
        return result
    except Exception as error:
        if (message := explain(error)) is not None:
            Path(mistakes, os.environ["RANK"]).write_text(message)
        raise
    finally:
        sys.stdout.flush()


def read_mistake(mistakes: Path, rank: int) -> str | None:
    """The mistake that a process left. None: it failed with a bug, or was killed."""
    path = mistakes / str(rank)
    return path.read_text() if path.exists() else None


def beside_others(function: Callable[[Any], Any], config: Any) -> Any:
    """Calls a function in one of several processes."""
    try:
        return function(config)
    except Exception as error:
        if LOST_PEER.search(str(error)):
            time.sleep(PEER_SECONDS)
        raise
