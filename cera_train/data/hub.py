"""Loading from the Hugging Face Hub, or from the cache alone where the Hub does not answer."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator

SECONDS = 5.0
"""How long the Hub may take for its first answer."""

LOGGERS = ("huggingface_hub", "transformers", "datasets")


@contextlib.contextmanager
def hub_or_cache(needs_hub: bool = True) -> Iterator[None]:
    """Lets the libraries load from the cache alone where the Hub does not answer: left to itself, huggingface_hub tries
    each file six times, for 24 seconds. Hides their warnings, which name their source files.

    Args:
        needs_hub: false for what lies in a folder.
    """
    import huggingface_hub

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    switches = [(huggingface_hub.constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:
        switches.append((sys.modules["datasets"].config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in switches]
    offline = needs_hub and not before[0] and not hub_answers()
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        for module, name in switches if offline else ():
            setattr(module, name, True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def hub_answers() -> bool:
    """Whether the Hub, or the mirror that HF_ENDPOINT names, answers at all. Proxies are respected."""
    import huggingface_hub

    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # its HTTP library, and so the class of an error, changes by version
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS)
            answers.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    asking.start()
    asking.join(SECONDS)
    return bool(answers)


def why_not_reached() -> str:
    """Why nothing came from the Hub: it was switched off, or it does not answer."""
    import huggingface_hub

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name):
            return f"{name}={os.environ[name]} is set"
    return f"{huggingface_hub.constants.ENDPOINT} does not answer"
