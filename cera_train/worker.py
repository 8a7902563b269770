"""What each of the processes does that `launch` starts. Nothing is imported before a library's chatter is off."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from typing import Any

from cera_train.config import Config
from cera_train.errors import explain

LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset)|ProcessGroup", re.IGNORECASE)
"""In errors of the communication library: their cause is another process, which has an error of its own."""

PEER_SECONDS = 5
"""What a process that lost another waits before it fails too: the launcher takes the first failure for the cause."""


def work(config: Config) -> dict[str, Any]:
    """Trains. An error reaches the parent through the launcher, as a ValueError if it is the user's to mend."""
    os.setpgrp()  # a terminal's Ctrl-C goes to the parent alone, which passes it on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    from cera_train.train import train

    try:
        return train(config)
    except Exception as error:
        if LOST_PEER.search(str(error)):
            time.sleep(PEER_SECONDS)
        message = explain(error)
        if message is None or isinstance(error, ValueError):
            raise
        raise ValueError(message) from error
    finally:
        sys.stdout.flush()
