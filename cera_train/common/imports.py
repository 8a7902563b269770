"""Imports of torch and the libraries on it, without garbage collection: a quarter faster."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Turns garbage collection off while modules are imported, and freezes their objects: the collector would traverse
    them again and again and free nothing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    if "torch" in sys.modules:  # a later job of a sweep: an earlier job's objects must be collected
        yield
        return
    postpone("bitsandbytes")  # PEFT imports it, and it torch's compiler: a fifth of all imports, for quantised bases
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else libraries report frozen objects as leaks at exit
        if was_enabled:
            gc.enable()


class Postponed(ModuleType):
    """A package that is imported on first use. Python's LazyLoader imports it as soon as `find_spec` looks for it."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType
        self.__path__ = self.__spec__.submodule_search_locations
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def postpone(package: str) -> None:
    """Lets `import package` import nothing until something of it is used."""
    spec = importlib.util.find_spec(package)
    if spec is None or package in sys.modules:
        return
    module = sys.modules[package] = Postponed(package)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__ = package
