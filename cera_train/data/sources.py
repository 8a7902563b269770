"""Where a run's rows come from: the Hub, files, or a generator. Nothing here imports torch."""

import collections
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cera_train.common.errors import UserError
from cera_train.data import logistic_map, reasoning_gym
from cera_train.data.files import check_files, from_files, rows_of, suffix_of
from cera_train.data.hub import from_hub
from cera_train.data.rows import PlacedRow, Source, at
from cera_train.data.segments import segmenter
from cera_train.settings.data import DataConfig, Layout, at_part

LOOKED_AT = 200
"""Rows of each file that `check_data` reads."""

READ_BY_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
WHOLE_BYTES = 10_000_000
"""Size up to which it reads files that are read as a whole."""


def check_data(config: DataConfig) -> None:
    """Looks at the first rows of a config's files, before anything heavy is imported: most mistakes show there. The
    tokenizer's chat template is not needed for that."""
    config.check_evaluates()
    for place, part in config.parts():
        with at_part(place):
            to_segments = segmenter(part, None)
            for path in data_files(part):
                if "://" not in path and (suffix_of(path) in READ_BY_LINES or os.path.getsize(path) < WHOLE_BYTES):
                    for where, row in itertools.islice(rows_of([path]), LOOKED_AT):
                        with at(where):
                            to_segments(row)


def data_files(config: DataConfig) -> list[str]:
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
        if config.layout == Layout.logistic_map:
            splits = logistic_map.problems(config.logistic_map, config.eval_rows)
        else:
            splits = reasoning_gym.rows(config.reasoning_gym, config.train_rows, config.eval_rows)
        train, evaluation = (Source.numbered(json.dumps(rows), rows, f"data.layout={config.layout}") for rows in splits)
    elif config.train_files:
        train = from_files(config.train_files, "data.train_files")
        if config.eval_files:
            evaluation = from_files(config.eval_files, "data.eval_files")
        elif config.streaming:  # nobody knows which rows are the last
            train, evaluation = train.between(config.eval_rows, None), train
        else:
            train, evaluation = _held_out(train, config.eval_rows)
    else:
        train, evaluation = (
            from_hub(config.path, config.subset, config.revision, split, setting, config.streaming)
            for setting, split in (("data.train_split", config.train_split), ("data.eval_split", config.eval_split))
        )
    return train.head(config.train_rows), evaluation.head(config.eval_rows)


def _held_out(source: Source, eval_rows: int) -> tuple[Source, Source]:
    """The last `eval_rows` rows evaluate, the others train."""

    def training() -> Iterator[PlacedRow]:
        rows, trains = iter(source.located()), False
        last = collections.deque(itertools.islice(rows, eval_rows))
        for row in rows:
            trains = True
            last.append(row)
            yield last.popleft()
        if last and not trains:
            mend = f"rows. Lower it to at most {len(last) - 1}." if len(last) > 1 else "row. Add rows."
            reason = f"data.eval_rows={eval_rows} leaves nothing to train on"
            raise UserError(f"{reason}: {source.name} has {len(last)} {mend}")

    def evaluation() -> Iterable[PlacedRow]:
        return collections.deque(source.located(), maxlen=eval_rows)

    return (
        replace(source, fingerprint=f"{source.fingerprint} [:-{eval_rows}]", located=training),
        replace(source, fingerprint=f"{source.fingerprint} [-{eval_rows}:]", located=evaluation),
    )
