"""Imports of torch and the libraries on it, without garbage collection: a quarter faster."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Turns garbage collection off while modules are imported, and freezes what they made: the collector would traverse
    it again and again and find nothing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    if "torch" in sys.modules:  # a later job of a sweep: an earlier job's objects must be collected
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else libraries report frozen objects as leaks at exit
        if was_enabled:
            gc.enable()
