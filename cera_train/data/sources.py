"""Where rows come from: the Hub, local files, or a generator. A row is a dict of columns, as its author wrote it."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError, words_of
from cera_train.data import logistic_map
from cera_train.data.config import DataConfig, Layout
from cera_train.data.files import READERS, from_files
from cera_train.data.hub import hub_or_cache, why_not_reached
from cera_train.data.rows import Row, Source, head

__all__ = ["READERS", "Source", "from_files", "from_hub", "head", "open_sources"]


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the evaluation rows of a config, cut to `train_rows` and `eval_rows`.

    Raises:
        UserError: a file or data set is missing, unreadable or of an unknown kind.
    """
    if config.layout == Layout.logistic_map:
        train, evaluation = logistic_map.problems(config.logistic_map, config.eval_rows)
        name = "data.layout=logistic_map"
        sources = (
            Source(json.dumps(train), lambda: train, name),
            Source(json.dumps(evaluation), lambda: evaluation, name),
        )
    elif config.train_files and not config.eval_files:
        sources = _held_out(from_files(config.train_files, "data.train_files"), config.eval_rows)
    elif config.train_files:
        sources = from_files(config.train_files, "data.train_files"), from_files(config.eval_files, "data.eval_files")
    else:
        hub = (config.path, config.subset, config.revision)
        sources = (
            from_hub(*hub, config.train_split, "data.train_split"),
            from_hub(*hub, config.eval_split, "data.eval_split"),
        )
    return head(sources[0], config.train_rows), head(sources[1], config.eval_rows)


def _held_out(source: Source, eval_rows: int) -> tuple[Source, Source]:
    """The last `eval_rows` rows evaluate, the others train. They are read once for both, and only the last are kept."""
    held_out: list[Row] = []

    def training() -> Iterator[Row]:
        last, count = collections.deque(), 0
        for count, row in enumerate(source.read(), start=1):
            last.append(row)
            if count > eval_rows:
                yield last.popleft()
        if 0 < count <= eval_rows:
            mend = f"Lower it to at most {count - 1}." if count > 1 else "Add rows, or name another file."
            raise UserError(
                f"data.eval_rows={eval_rows} leaves nothing to train on: {source.name} has "
                f"{count} row{'s' * (count > 1)}. {mend}"
            )
        held_out[:] = last

    def evaluation() -> list[Row]:
        if not held_out:  # nobody read the training rows to their end
            collections.deque(training(), maxlen=0)
        return held_out

    return (
        Source(f"{source.fingerprint} [:-{eval_rows}]", training, source.name),
        Source(f"{source.fingerprint} [-{eval_rows}:]", evaluation, source.name),
    )


# --- the Hub ---------------------------------------------------------------------------------------------------------


def from_hub(
    path: str, subset: str | None, revision: str | None, split: str, split_setting: str = "task.split"
) -> Source:
    """One split of a data set on the Hub.

    Args:
        split_setting: the key of the split, for messages; the other keys stand beside it.

    Raises:
        UserError: it cannot be found, reached or read.
    """
    import datasets

    datasets.disable_progress_bars()
    section = split_setting.partition(".")[0]
    _check_place(path, section)
    try:
        with hub_or_cache(needs_hub=not Path(path).is_dir()):
            dataset = datasets.load_dataset(path, subset, split=split, revision=revision)
    # HfHubHTTPError and ConnectionError are OSErrors; a data set that is a Python script is a RuntimeError; an unknown
    # split or subset is a ValueError.
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        mistake = _mistake_in_settings(error, path, subset, split, split_setting)
        raise UserError(mistake or f"{section}.path={path}: {_why_not_loaded(error, path, section)}") from error
    return Source(f"{path} {split} {dataset._fingerprint}", lambda: dataset, f"{section}.path={path}, split {split}")


def _local_files(section: str) -> str:
    """The settings of local files, beside those of a data set."""
    return "data.train_files and data.eval_files" if section == "data" else f"{section}.files"


def _check_place(path: str, section: str) -> None:
    """Refuses a path that is a file, or a folder that does not exist: the Hub would be searched for it."""
    place, mend = f"{section}.path={path}", f"set {_local_files(section)} to local files"
    try:
        is_file, is_folder = Path(path).is_file(), Path(path).is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot read it: {words_of(error)}.") from error
    if is_file:
        raise UserError(f"{place}: it is a file: {mend}, such as [{path}].")
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise UserError(
            f"{place}: folder does not exist (from {Path.cwd()}), and a Hub id looks like organisation/name. Mend it, "
            f"or {mend}."
        )


def _mistake_in_settings(error: Exception, path: str, subset: str | None, split: str, split_setting: str) -> str | None:
    """The line for a subset or split that the data set does not have; None for another error."""
    section, text = split_setting.partition(".")[0], " ".join(str(error).split())
    there = ", ".join(sorted(set(re.findall(r"'([^']+)'", text.partition("[")[2])))[:20])
    if text.startswith("Config name is missing"):
        return f"{section}.path={path}: the data set has subsets: set {section}.subset to one of {there}."
    if "BuilderConfig" in text and "not found" in text:
        return f"{section}.subset={subset}: data set {path} has no such subset: set it to one of {there}, or null."
    if text.startswith("Unknown split"):
        return f"{split_setting}={split}: data set {path} has no such split: set it to one of {there}."
    if "corresponds to no data" in text:
        return f"{split_setting}={split}: data set {path} has no such rows: take others, such as train[:1000]."
    if isinstance(error, ValueError) and ("split" in text.lower() or "instruction" in text):
        return f"{split_setting}={split}: not a split ({text}): write it such as train or train[:1000]."
    return None


def _why_not_loaded(error: Exception, path: str, section: str) -> str:
    """Why a data set cannot be loaded, and the mend."""
    reasons = [" ".join(str(cause).split()) for cause in (error, *_causes(error))]
    local = f"set {_local_files(section)} to local files"
    if Path(path).is_dir():
        reason = reasons[-1] if reasons[0].startswith("An error occurred") else reasons[0]
        return f"cannot load data set {path!r} from this folder ({reason}). Mend its files, or {local}."
    if any("OfflineModeIsEnabled" in reason or "offline" in reason.lower() for reason in reasons):
        return (
            f"cannot load data set {path!r} from the Hub ({why_not_reached()}, and the cache does not hold it). Where "
            f"there is a network, log in with `hf auth login` if it is gated; without one, {local}."
        )
    return (
        f"cannot load data set {path!r} from the Hub ({reasons[0]}). Check its name; log in with `hf auth login` if it "
        f"is gated or private, or {local}."
    )


def _causes(error: BaseException) -> Iterator[Any]:
    """What an error was raised for, back to the first."""
    while (error := error.__cause__ or error.__context__) is not None:
        yield error
