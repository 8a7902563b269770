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

from cera_train.common.errors import UserError, words_of
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
    path: str, subset: str | None, revision: str | None, split: str, split_setting: str = "task.split"
) -> Source:
    """One split of a data set on the Hub, or in a folder. Messages name `split_setting` and the keys beside it."""
    import datasets

    datasets.disable_progress_bars()
    section = split_setting.partition(".")[0]
    place = f"{section}.path={path}"
    files = "data.train_files and data.eval_files" if section == "data" else f"{section}.files"
    mend = f"set {files} to local files"
    _check_place(path, place, mend)
    try:
        with hub_or_cache(needs_hub=not Path(path).is_dir()):
            dataset = datasets.load_dataset(path, subset, split=split, revision=revision)
    # HfHubHTTPError and ConnectionError are OSErrors; a data set that is a Python script is a RuntimeError; an unknown
    # split or subset is a ValueError.
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        mistake = _mistake_in_settings(error, path, subset, f"{split_setting}={split}", section)
        raise UserError(mistake or f"{place}: {_why_not_loaded(error, path, mend)}") from error
    return Source(f"{path} {split} {dataset._fingerprint}", lambda: dataset, f"{place}, split {split}")


def _check_place(path: str, place: str, mend: str) -> None:
    """Refuses a path that is a file, or a folder that does not exist: the Hub would be searched for it."""
    try:
        is_file, is_folder = Path(path).is_file(), Path(path).is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot read it: {words_of(error)}.") from error
    if is_file:
        raise UserError(f"{place}: it is a file: {mend}, such as [{path}].")
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        reason = f"folder does not exist (from {Path.cwd()}), and a Hub id looks like organisation/name"
        raise UserError(f"{place}: {reason}. Mend it, or {mend}.")


def _mistake_in_settings(error: Exception, path: str, subset: str | None, split: str, section: str) -> str | None:
    """The line for a subset or split that the data set does not have; None for another error."""
    text = " ".join(str(error).split())
    there = ", ".join(sorted(set(re.findall(r"'([^']+)'", text.partition("[")[2])))[:20])
    if text.startswith("Config name is missing"):
        return f"{section}.path={path}: the data set has subsets: set {section}.subset to one of {there}."
    if "BuilderConfig" in text and "not found" in text:
        return f"{section}.subset={subset}: data set {path} has no such subset: set it to one of {there}, or null."
    if text.startswith("Unknown split"):
        return f"{split}: data set {path} has no such split: set it to one of {there}."
    if "corresponds to no data" in text:
        return f"{split}: data set {path} has no such rows: take others, such as train[:1000]."
    if isinstance(error, ValueError) and ("split" in text.lower() or "instruction" in text):
        return f"{split}: not a split ({text}): write it such as train or train[:1000]."
    return None


def _why_not_loaded(error: BaseException | None, path: str, mend: str) -> str:
    """Why a data set cannot be loaded, and the mend."""
    reasons = []
    while error is not None:
        reasons.append(" ".join(str(error).split()))
        error = error.__cause__ or error.__context__
    start = f"cannot load data set {path!r} from"
    if Path(path).is_dir():
        reason = reasons[-1] if reasons[0].startswith("An error occurred") else reasons[0]
        return f"{start} this folder ({reason}). Mend its files, or {mend}."
    if any("offline" in reason.lower() for reason in reasons):
        login = "Where there is a network, log in with `hf auth login` if it is gated"
        return f"{start} the Hub ({why_not_reached()}, and the cache does not hold it). {login}; without one, {mend}."
    login = "log in with `hf auth login` if it is gated or private"
    return f"{start} the Hub ({reasons[0]}). Check its name; {login}, or {mend}."
