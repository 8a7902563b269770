"""Rows of a data set on the Hugging Face Hub, or in a folder of its form."""

import os
import re
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.hub import hub_or_cache, why_not_reached
from cera_train.data.rows import Source


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
    return Source.numbered(f"{path} {split} {fingerprint}", dataset, f"{place}, split {split}")


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
