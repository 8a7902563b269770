"""Where a run's rows come from: files, the Hub, or a generator. Nothing here imports torch."""

import collections
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cera_train.common.errors import UserError, errors_at
from cera_train.common.hub import hub_or_cache, offline_reason
from cera_train.data import logistic_map, reasoning_gym
from cera_train.data.files import check_files, from_files, rows_of
from cera_train.data.rows import PlacedRow, Source
from cera_train.data.segments import segmenter
from cera_train.settings.data import DataConfig, Layout

CHECKED_ROWS = 200
"""Rows of each file that `check_data` reads."""


def check_data(config: DataConfig) -> None:
    """Reads the first rows of a config's files, before anything heavy is imported: most mistakes show there. Needs no
    chat template."""
    for place, part in config.parts():
        with errors_at(place):
            if part.layout == Layout.reasoning_gym:
                for generator in part.reasoning_gym.generators:
                    reasoning_gym.open_generator(generator, part.reasoning_gym.level, seed=0)
            to_segments = segmenter(part, None)
            paths = check_files(part.train_files, "data.train_files") + check_files(part.eval_files, "data.eval_files")
            for path in paths:
                if "://" not in path:
                    for where, row in itertools.islice(rows_of([path]), CHECKED_ROWS):
                        with errors_at(where):
                            to_segments(row)


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the evaluation rows of a config, cut to `train_rows` and `eval_rows`."""
    if config.is_computed:
        if config.layout == Layout.logistic_map:
            splits = logistic_map.problems(config.logistic_map, config.eval_rows)
        else:
            splits = reasoning_gym.rows(config.reasoning_gym, config.train_rows, config.eval_rows)
        train, evaluation = (Source.numbered(json.dumps(rows), rows, f"data.layout={config.layout}") for rows in splits)
    elif config.train_files:
        train = from_files(config.train_files, "data.train_files")
        if config.eval_files:
            evaluation = from_files(config.eval_files, "data.eval_files")
        elif config.streaming:  # the last rows are unknown
            train, evaluation = train.between(config.eval_rows, None), train
        else:
            train, evaluation = _held_out(train, config.eval_rows)
    else:
        train, evaluation = (
            from_hub(config.path, config.subset, config.revision, split, setting, config.streaming)
            for setting, split in (("data.train_split", config.train_split), ("data.eval_split", config.eval_split))
        )
    return train.between(0, config.train_rows), evaluation.between(0, config.eval_rows)


def _held_out(source: Source, eval_rows: int) -> tuple[Source, Source]:
    """The last `eval_rows` rows evaluate, the others train."""

    def training() -> Iterator[PlacedRow]:
        last = collections.deque()
        for row in source.located():
            last.append(row)
            if len(last) > eval_rows:
                yield last.popleft()

    def evaluation() -> Iterable[PlacedRow]:
        return collections.deque(source.located(), maxlen=eval_rows)

    return (
        replace(source, fingerprint=f"{source.fingerprint} [:-{eval_rows}]", located=training),
        replace(source, fingerprint=f"{source.fingerprint} [-{eval_rows}:]", located=evaluation),
    )


def from_hub(
    path: str, subset: str | None, revision: str | None, split: str, setting: str, streaming: bool = False
) -> Source:
    """One split of a data set on the Hub, or of a folder in the same form.

    Args:
        setting: the key of the split, for messages, such as data.train_split.
        streaming: downloads rows as they are read.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    datasets.disable_progress_bars()
    section = setting.partition(".")[0]
    place = f"{section}.path={path}"
    try:
        with hub_or_cache(needs_hub=not os.path.isdir(path)):
            if streaming:
                builder = datasets.load_dataset_builder(path, subset, revision=revision)
                dataset, fingerprint = builder.as_streaming_dataset(split), builder.cache_dir  # its name has the commit
            else:
                dataset = datasets.load_dataset(path, subset, split=split, revision=revision)
                fingerprint = dataset._fingerprint
    # ValueError: no such split or subset; OSError: the Hub's errors; RuntimeError: a data set that is a Python script.
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = " ".join(str(error.__cause__ if is_wrapped else error).split()).rstrip(".")
        if "offline" in reason.lower():
            reason = f"{offline_reason()}, and the cache lacks it"
        mend = f"Check {setting}={split} and {section}.subset={subset}, log in with `hf auth login` if it is gated"
        files = "data.train_files" if section == "data" else f"{section}.files"
        raise UserError(f"{place}: cannot load it: {reason}. {mend}, or set {files} to local files.") from error
    return Source.numbered(f"{path} {split} {fingerprint}", dataset, f"{place}, split {split}")
