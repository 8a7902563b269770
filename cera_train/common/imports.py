"""Imports of torch and of what stands on it, in three quarters of the time. Nothing here imports torch."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """What is imported in it is kept from the garbage collector, which would look through all that is there after every
    few modules and find nothing; nor does it look there ever after."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    if "torch" in sys.modules:  # a later job of a sweep: what an earlier one left is garbage
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries that count what is left at the end would call it leaked
        if was_enabled:
            gc.enable()
