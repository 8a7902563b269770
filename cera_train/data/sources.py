"""Where a run's rows come from: the Hub, local files, or a generator. Nothing here imports torch."""

import collections
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.data import logistic_map, reasoning_gym
from cera_train.data.files import check_files, from_files, rows_of
from cera_train.data.hub import from_hub
from cera_train.data.rows import Row, Source, at
from cera_train.data.segments import segmenter
from cera_train.settings.data import DataConfig, Layout, at_part

LOOKED_AT = 200
"""Rows of each file that `check_data` reads."""

WHOLE_BYTES = 10_000_000
"""Size up to which it reads files of kinds that are read as a whole."""


def check_data(config: DataConfig) -> None:
    """Looks at the files of a config and at their first rows, before anything heavy is imported: most mistakes show
    there. The tokenizer's chat template is not needed for that."""
    config.check_evaluates()
    for place, part in config.parts():
        with at_part(place):
            to_segments = segmenter(part, None)
            for path in data_files(part):
                if path.suffix.lower() == ".jsonl" or path.stat().st_size < WHOLE_BYTES:
                    for row in itertools.islice(rows_of([path]), LOOKED_AT):
                        with at(row.place):
                            to_segments(row)


def data_files(config: DataConfig) -> list[Path]:
    """The files of a data set, or of all parts of a mix. Opens none, and computes no rows."""
    paths = []
    for place, part in config.parts():
        with at_part(place):
            if part.layout == Layout.reasoning_gym:
                reasoning_gym.check(part.reasoning_gym)
            paths += check_files(part.train_files, "data.train_files")
            paths += check_files(part.eval_files, "data.eval_files")
    return paths


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the evaluation rows of a config, cut to `train_rows` and `eval_rows`."""
    if config.is_computed:
        train, evaluation = (
            Source(json.dumps(rows), lambda rows=rows: rows, f"data.layout={config.layout}")
            for rows in computed_rows(config)
        )
    elif config.train_files:
        train = from_files(config.train_files, "data.train_files")
        if config.eval_files:
            evaluation = from_files(config.eval_files, "data.eval_files")
        else:
            train, evaluation = _held_out(train, config.eval_rows)
    else:
        train, evaluation = (
            from_hub(config.path, config.subset, config.revision, split, setting)
            for setting, split in (("data.train_split", config.train_split), ("data.eval_split", config.eval_split))
        )
    return train.head(config.train_rows), evaluation.head(config.eval_rows)


def computed_rows(config: DataConfig) -> tuple[list[Row], list[Row]]:
    """The training and the evaluation rows of a layout that computes them."""
    if config.layout == Layout.logistic_map:
        return logistic_map.problems(config.logistic_map, config.eval_rows)
    return reasoning_gym.rows(config.reasoning_gym, config.train_rows, config.eval_rows)


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
            mend = f"rows. Lower it to at most {count - 1}." if count > 1 else "row. Add rows, or name another file."
            reason = f"data.eval_rows={eval_rows} leaves nothing to train on"
            raise UserError(f"{reason}: {source.name} has {count} {mend}")
        held_out[:] = last

    def evaluation() -> list[Row]:
        if not held_out:  # nobody read the training rows to their end
            collections.deque(training(), maxlen=0)
        return held_out

    return (
        Source(f"{source.fingerprint} [:-{eval_rows}]", training, source.name),
        Source(f"{source.fingerprint} [-{eval_rows}:]", evaluation, source.name),
    )
