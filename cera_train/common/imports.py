"""Imports of torch and the libraries on it."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Turns garbage collection off: a third of the time of these imports, and it frees nothing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while PEFT imports it
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
