"""Loading from the Hugging Face Hub, or from the cache alone where the Hub does not answer."""

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.data.rows import Source

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

    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if needs_hub and not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers():
            datasets = sys.modules.get("datasets")
            for module in (huggingface_hub.constants, *([datasets.config] if datasets else [])):
                stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
                module.HF_HUB_OFFLINE = True
        yield


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


def from_hub(
    path: str,
    subset: str | None,
    revision: str | None,
    split: str,
    setting: str = "task.split",
    streaming: bool = False,
) -> Source:
    """One split of a data set on the Hub, or in a folder. Messages name its `setting` and the keys beside it.
    `streaming`, the rows are downloaded as they are read."""
    import datasets

    datasets.disable_progress_bars()
    section = setting.partition(".")[0]
    place = f"{section}.path={path}"
    files = "data.train_files and data.eval_files" if section == "data" else f"{section}.files"
    mend = f"set {files} to local files"
    if os.path.isfile(path):
        raise UserError(f"{place}: it is a file: {mend}, such as [{path}].")
    if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        reason = f"folder does not exist (from {Path.cwd()}), and a Hub id looks like organisation/name"
        raise UserError(f"{place}: {reason}. Mend it, or {mend}.")
    try:
        with hub_or_cache(needs_hub=not os.path.isdir(path)):
            if streaming:
                builder = datasets.load_dataset_builder(path, subset, revision=revision)
                dataset, fingerprint = builder.as_streaming_dataset(split), builder.cache_dir  # which names the commit
            else:
                dataset = datasets.load_dataset(path, subset, split=split, revision=revision)
                fingerprint = dataset._fingerprint
    except ValueError as error:  # of a split or a subset; the message lists those that there are
        reason = " ".join(str(error).split()).rstrip(".")
        keys = f"{setting}={split} and {section}.subset={subset}"
        raise UserError(f"{place}: {reason}. Mend {keys}, or {mend}.") from error
    # HfHubHTTPError and ConnectionError are OSErrors; a data set that is a Python script is a RuntimeError.
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError) as error:
        raise UserError(f"{place}: {_why_not_loaded(error, path)}, or {mend}.") from error
    return Source(f"{path} {split} {fingerprint}", lambda: dataset, f"{place}, split {split}")


def _why_not_loaded(error: Exception, path: str) -> str:
    """Why a data set cannot be loaded, and a mend."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    reasons = [" ".join(str(each).split()).rstrip(".") for each in chain]
    if os.path.isdir(path):
        return f"cannot load this folder ({reasons[-1]}). Mend its files"
    login = "log in with `hf auth login` if it is gated or private"
    if any("offline" in reason.lower() for reason in reasons):
        return f"cannot load it from the Hub ({why_not_reached()}, and the cache lacks it). On a network, {login}"
    return f"cannot load it from the Hub ({reasons[0]}). Check its name; {login}"
