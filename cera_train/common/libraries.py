"""torch and the libraries on top of it: importing them fast, and loading from nothing but the cache
if the Hugging Face Hub does not answer."""

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import huggingface_hub

SECONDS = 5.0  # how long the Hub may take for its first answer

LOGGERS = ("huggingface_hub", "transformers", "datasets")


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Turns garbage collection off: it takes a third of the time of these imports and frees
    nothing."""
    # bitsandbytes warns while PEFT imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def hub_or_cache(needs_hub: bool = True) -> Iterator[None]:
    """Lets the libraries load from nothing but the cache if the Hub does not answer: otherwise
    huggingface_hub tries each file six times, for 24 seconds. Hides their warnings, which name
    their source files.

    Args:
        needs_hub: false if everything is in a local folder.
    """
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if needs_hub and not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers():
            modules = [huggingface_hub.constants]
            if datasets := sys.modules.get("datasets"):
                modules.append(datasets.config)
            for module in modules:
                stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
                module.HF_HUB_OFFLINE = True
        yield


def hub_answers() -> bool:
    """Whether the Hub, or the mirror that HF_ENDPOINT names, answers at all. Proxies are
    respected."""
    # The HTTP library, and with it the class of an error, depends on the version.
    with contextlib.suppress(Exception):
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS)
        return True
    return False


def offline_reason() -> str:
    """Why nothing came from the Hub: it is switched off or does not answer."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name):
            return f"{name}={os.environ[name]} is set"
    return f"{huggingface_hub.constants.ENDPOINT} does not answer"
