"""What each of several processes does. Nothing is imported before a library's chatter is off."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from typing import Any

from cera_train.common.errors import UserError, explain
from cera_train.common.imports import heavy_imports
from cera_train.config import Config
from cera_train.distributed.signals import SIGNALS

LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset)|ProcessGroup", re.IGNORECASE)
"""In errors of the communication library: their cause is another process, which has an error of its own."""

PEER_SECONDS = 5
"""What a process that lost another waits before it fails too: the first failure is taken for the cause."""


def work(config: Config) -> dict[str, Any]:
    """One of the processes that `launch` started. An error reaches the parent through torch's launcher, as a ValueError
    if it is the user's to mend."""
    os.setpgrp()  # a terminal's Ctrl-C goes to the parent alone, which passes it on
    for number in SIGNALS:  # where the run does not listen, such as while it loads: an end that the parent understands
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        result = train_beside_others(config)
        import torch

        if torch.distributed.is_initialized():  # not where the run was finished already
            torch.distributed.destroy_process_group()
        return result
    except Exception as error:
        message = explain(error)
        if message is None or type(error) is ValueError:
            raise
        raise UserError(message) from error
    finally:
        sys.stdout.flush()


def train_beside_others(config: Config) -> dict[str, Any]:
    """`train`, in one of several processes."""
    with heavy_imports():
        from cera_train.training.train import train

    try:
        return train(config)
    except Exception as error:
        if LOST_PEER.search(str(error)):
            time.sleep(PEER_SECONDS)
        raise
