"""Where a run's rows come from: files, the Hub, or a computation. Nothing here imports torch."""

import collections
import functools
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

from cera_train.common.errors import UserError, errors_as, errors_at
from cera_train.common.libraries import hub_or_cache, offline_reason
from cera_train.common.settings import require, word_of
from cera_train.common.terminal import counted
from cera_train.data.chats import (
    chat_of,
    key_text,
    unmarked_exchanges,
)
from cera_train.data.computed import computed_rows
from cera_train.data.messages import is_continued, own_settings
from cera_train.data.reader import Reader
from cera_train.data.rows import (
    PROMPT,
    PlacedRow,
    Row,
    Source,
    check_files,
    from_files,
    normalized,
    rows_of,
)
from cera_train.settings.data import COLUMN_TEMPLATES, DataConfig, Layout, Turns, Writing
from cera_train.settings.evaluation import TaskConfig

FIRST_ROWS = 200
"""The first training rows: they decide the layout, and are checked."""

BY_COLUMNS: dict[tuple[str, ...], dict[str, Any]] = {
    ("messages",): {"layout": Layout.messages},
    ("conversations",): {"layout": Layout.conversations},
    ("instruction", "output"): {"layout": Layout.instruction},
    ("prompt", "completion"): {
        "layout": Layout.text,
        "prompt": "{prompt}",
        "completion": "{completion}",
    },
    ("question", "answer"): {"layout": Layout.text, "prompt": PROMPT, "completion": " {answer}"},
    ("text",): {"layout": Layout.documents},
}
"""Columns, and how `data.layout=auto` reads them. `text` counts only if no other does: rows like
Alpaca's have both."""


QUESTION = {"prompt": "{question}", "completion": "{answer}"}
"""Templates for a question and its answer where a chat template marks them."""


def decide_layouts(config: DataConfig) -> DataConfig:
    """The config with `data.layout=auto` replaced, in each part of a mix, by the layout and
    templates that fit the columns. Without `auto` the config is returned unchanged, and no file is
    opened. If files are missing the layout stays auto: the code that reads them raises.

    Raises:
        UserError: the columns of the first rows fit no layout, or several.
    """
    parts = list(config.parts())
    if all(part.layout != Layout.auto for _, part in parts):
        return config
    decided = []
    for place, part in parts:
        if part.layout == Layout.auto:
            with errors_at(place):
                decided.append(_layout_of(part))
        else:
            decided.append({"layout": part.layout} if config.layout == Layout.auto else {})
    if config.mix is None:
        return replace(config, **decided[0])
    require(
        not any("rejected" in layout for layout in decided),
        "data.mix: its parts hold preferences; train on one.",
    )
    return replace(
        config,
        mix=[replace(part, **layout) for part, layout in zip(config.mix, decided, strict=True)],
    )


def _layout_of(config: DataConfig) -> dict[str, Any]:
    """The settings by which the training rows are read; none if files are missing."""
    has_templates = (config.prompt, config.completion) not in ((None, None), COLUMN_TEMPLATES)
    if has_templates or not config.train_files:
        are_chats = config.is_paired and not has_templates and "{" not in config.rejected
        return {"layout": Layout.messages if are_chats else Layout.text}
    try:
        paths = check_files(config.train_files, "data.train_files")
    except UserError:
        return {}
    rows = list(first_training_rows(config))
    place = f"{paths[0]}: data.layout=auto"
    require(bool(rows), f"{place} finds no rows: the file is empty.")
    _, first_row = rows[0]
    rejected = (config.rejected or "rejected").strip("{}")
    if preferences := _layout_of_preferences(first_row, rejected):
        return preferences
    if is_continued(first_row):
        return {"layout": Layout.messages}
    columns = list(
        dict.fromkeys(name for _, row in rows for name, value in row.items() if value is not None)
    )
    fitting = {needed: layout for needed, layout in BY_COLUMNS.items() if {*needed} <= {*columns}}
    if len(fitting) > 1:
        fitting.pop(("text",), None)
    if len(fitting) == 1:
        [layout] = fitting.values()
        is_question = layout.get("prompt") == PROMPT and config.chat == Writing.template
        return layout | (QUESTION if is_question else {})
    known = "; ".join(map(", ".join, [*BY_COLUMNS, ("prompt", "chosen", "rejected")]))
    fix = "set data.layout, and for text data.prompt and data.completion"
    raise UserError(
        f"{place} knows {'several layouts' if fitting else 'no layout'} of the columns "
        f"{', '.join(columns) or 'none'}: rename them to one of {known}; or {fix}."
    )


def _layout_of_preferences(row: Row, rejected: str) -> dict[str, Any]:
    """How a preference is read, whatever other columns it has: its answers are texts, or lists of
    messages. Empty for any other row. `rejected` is the column of the rejected answer."""
    if rejected not in row:
        return {}
    if isinstance(row.get("chosen"), str):
        answers = {"completion": "{chosen}", "rejected": f"{{{rejected}}}"}
        return {"layout": Layout.text, "prompt": "{prompt}"} | answers
    if isinstance(row.get("chosen"), list):
        return {"layout": Layout.messages, "rejected": rejected, "turns": Turns.last}
    return {}


def decide_switches(config: DataConfig, tokenizer: Any, learns_answers: bool = True) -> DataConfig:
    """The config with the settings of the chat template that every answer of the first training
    rows needs or brings, such as {enable_thinking: false}: whatever asks the model later then asks
    as it was trained. Unchanged where answers need none, or different ones. Raises UserError where
    the config has another value.

    Args:
        learns_answers: False: the model learns from answers of its own, so those of the rows need
            nothing.
    """
    needed: list[dict[str, Any]] = []  # by each answer
    for place, part in config.trained_parts():
        with errors_at(place):
            reader = Reader(part, tokenizer, chosen_only=True)
            if reader.is_chat:
                needed += _settings_of_answers(reader, learns_answers)
    first, *others = needed or [{}]
    for name, value in first.items():
        if not all(name in other and other[name] == value for other in others):
            continue
        before = config.template_settings.get(name, value)
        require(
            before == value,
            f"data.template_settings has {name}={word_of(before)}, and all answers of the first "
            f"rows need {name}={word_of(value)}: leave it out, or change these rows.",
        )
        config = replace(config, template_settings=config.template_settings | {name: value})
    return config


def _settings_of_answers(reader: Reader, learns_answers: bool) -> Iterator[dict[str, Any]]:
    """The settings of the chat template by which each answer of the first training rows is asked,
    beside those of the config."""
    for place, row in first_training_rows(reader.config):
        with errors_at(place):
            for exchange in itertools.chain.from_iterable(reader.sequences(row)):
                needed = exchange.opening if learns_answers else {}
                if exchange.supervised:
                    yield own_settings(row) | needed


def first_training_rows(config: DataConfig) -> Iterator[PlacedRow]:
    """The first rows of the training files, of the split on the Hub, or of those computed."""
    count = min(FIRST_ROWS, config.train_rows or FIRST_ROWS)
    if config.is_computed:
        rows = open_sources(replace(config, train_rows=count))[0]
    elif config.train_files:
        rows = rows_of(check_files(config.train_files, "data.train_files"))
    else:
        rows = from_hub(config, "data.train_split", config.streaming)
    return itertools.islice(rows, count)


def open_sources(config: DataConfig) -> tuple[Source, Source]:
    """The training and the held-out rows of a config, cut to `train_rows` and `eval_rows`."""
    if config.is_computed:
        name = f"data.layout={config.layout}"
        train, evaluation = (
            Source.numbered(json.dumps(rows), rows, name) for rows in computed_rows(config)
        )
    elif config.train_files:
        rows = from_files(config.train_files, "data.train_files")
        if config.eval_files:
            train = rows
            evaluation = from_files(config.eval_files, "data.eval_files")
        elif config.holds_out_by_prompt:
            share = f"{HELD_OUT} by prompt"
            train, evaluation = _split(
                rows, partial(rows_by_prompt, config, rows), f"without {share}", share
            )
        else:
            count = config.eval_rows
            train, evaluation = _split(
                rows, partial(last_rows, count, rows), f"[:-{count}]", f"[-{count}:]"
            )
    else:
        train = from_hub(config, "data.train_split", config.streaming)
        evaluation = train  # of which no row is taken: a data set may have no other split
        if config.eval_rows != 0:
            evaluation = from_hub(config, "data.eval_split", config.streaming)
    return train.first(config.train_rows), evaluation.first(config.eval_rows)


def _split(
    source: Source, held_out: Callable[[], Container[int]], *names: str
) -> tuple[Source, Source]:
    """The rows that train, and the rows whose indices are in `held_out`; `names` distinguish the
    two in fingerprints."""
    numbers = functools.cache(held_out)

    def rows(evaluate: bool) -> Iterator[PlacedRow]:
        return (row for number, row in enumerate(source) if (number in numbers()) == evaluate)

    train, evaluation = (
        replace(source, fingerprint=f"{source.fingerprint} {name}", located=partial(rows, evaluate))
        for evaluate, name in zip((False, True), names, strict=True)
    )
    return train, evaluation


def last_rows(count: int, source: Source) -> range:
    total = sum(1 for _ in source)
    require(
        count < total or total == 0,
        f"data.eval_rows={count} holds out all {counted(total, 'row')} of {source.name}: lower it.",
    )
    return range(total - count, total)


# share of the rows that is held out by default, and the most rows
HELD_OUT = 0.05
MOST_HELD_OUT = 500


def rows_by_prompt(config: DataConfig, source: Source) -> set[int]:
    """The indices of the rows held out by default: all rows of some prompts, chosen by digest, with
    `HELD_OUT` of the rows or at least one prompt. A row without an answer stays in training, where
    it is dropped.

    Raises:
        UserError: no prompt would be left to train on.
    """
    numbers = collections.defaultdict[bytes, list[int]](list)
    for number, (place, row) in enumerate(source):
        with errors_at(place):
            chat = chat_of(row, config, is_templated=False)
        if chat is not None:
            prompt = normalized(key_text(unmarked_exchanges(chat)))
            numbers[hashlib.blake2b(prompt.encode(), digest_size=16).digest()].append(number)
    sizes = [len(rows) for rows in numbers.values()]
    room = max(min(max(1, int(HELD_OUT * sum(sizes))), MOST_HELD_OUT), min(sizes, default=0))
    held_out = set[int]()
    for _, rows in sorted(numbers.items()):
        if len(rows) <= room - len(held_out):
            held_out.update(rows)
    if len(held_out) == sum(sizes):
        reason = (
            f"{counted(len(sizes), 'different prompt')} with an answer, but training and "
            f"held-out rows need one each"
        )
        raise UserError(f"{source.name}: {reason}. Add rows, or name data.eval_files.")
    return held_out


def from_hub(config: DataConfig | TaskConfig, setting: str, streaming: bool = False) -> Source:
    """The split that a setting names, such as data.train_split, from a data set on the Hub or in a
    folder of the same form. Streaming downloads rows as they are read. Raises UserError if it
    cannot be loaded."""
    import datasets

    datasets.disable_progress_bars()
    section, _, name = setting.partition(".")
    path = config.path
    subset = config.subset
    revision = config.revision if isinstance(config, DataConfig) else None
    split = getattr(config, name)
    place = f"{section}.path={path}"
    try:
        with hub_or_cache(needs_hub=not os.path.isdir(path)):
            if streaming:
                builder = datasets.load_dataset_builder(path, subset, revision=revision)
                dataset = builder.as_streaming_dataset(split)
                # includes the commit; where the cache lies is of this machine alone
                cache = os.path.expanduser(datasets.config.HF_DATASETS_CACHE)
                fingerprint = os.path.relpath(builder.cache_dir, cache)
            else:
                dataset = datasets.load_dataset(path, subset, split=split, revision=revision)
                # changes with the rows; `datasets` shows it nowhere else
                fingerprint = dataset._fingerprint
    # ValueError: no such split or subset; OSError: the Hub's errors; RuntimeError: a data set that
    # is a Python script.
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if is_wrapped else error
        reason = " ".join(str(cause).split()).rstrip(".")
        if "offline" in reason.lower():
            reason = f"{offline_reason()}, and the cache lacks it"
        fix = (
            f"Check {setting}={split} and {section}.subset={subset}, log in with `hf auth login` "
            f"if it is gated"
        )
        files = "data.train_files" if section == "data" else f"{section}.files"
        raise UserError(
            f"{place}: cannot load it: {reason}. {fix}, or set {files} to local files."
        ) from error
    source = Source.numbered(f"{path} {split} {fingerprint}", dataset, f"{place}, split {split}")
    return replace(source, located=partial(streamed, source)) if streaming else source


def streamed(source: Source) -> Iterator[PlacedRow]:
    """Rows that are downloaded as they are read. Raises UserError where one cannot be read."""
    fix = "Fix the file, or repeat the command if the network failed."
    with errors_as(f"{source.name}: cannot read its rows", fix):
        yield from source


# --- a mix of sources -----------------------------------------------------------------------------


def rows_of_parts(
    available: Sequence[int], weights: Sequence[float | None], total: int | None
) -> list[int]:
    """How many rows of each part an epoch has: the share of its weight, by largest remainder.

    Args:
        available: rows that each part has.
        weights: of each part, in any unit; or None for all: every part gives all its rows.
        total: rows of the epoch; by default as many as possible without repeating a part.
    """
    if None in weights:
        weights = available
        total = min(total or sum(available), sum(available))
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is seven tenths
    shares = [weight / sum(exact) for weight in exact]
    if total is None:
        total = min(
            int(rows / share) for rows, share in zip(available, shares, strict=True) if share
        )
    quotas = [share * total for share in shares]
    rows = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(rows)), key=lambda part: (rows[part] - quotas[part], part))
    for part in by_remainder[: total - sum(rows)]:
        rows[part] += 1
    return rows


def drawn_rows(available: int, count: int, seed: str) -> list[int]:
    """The numbers of `count` rows of a part: whole passes over it, then rows drawn without
    replacement."""
    passes, rest = divmod(count, available)
    return [*range(available)] * passes + sorted(random.Random(seed).sample(range(available), rest))


def drawn_of_parts(parts: Sequence[Sequence[Sequence[Any]]], config: DataConfig) -> list[list[Any]]:
    """The items of the rows that each part of a mix gives to an epoch.

    Args:
        parts: the rows of each part, and the items of each row.
    """
    counts = rows_of_parts([*map(len, parts)], config.weights, config.train_rows)
    drawn = []
    for number, (rows, count) in enumerate(zip(parts, counts, strict=True)):
        # "0 " as in 0.2.0, which had a seed here: its mixes keep their rows.
        taken = drawn_rows(len(rows), count, f"0 {number}")
        drawn.append([item for row in taken for item in rows[row]])
    return drawn


def interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """The rows of all parts as one list in which each part is spread evenly: its first rows
    represent all parts."""
    places = (
        ((place + 0.5) / len(rows), part, row)
        for part, rows in enumerate(parts)
        for place, row in enumerate(rows)
    )
    return [row for *_, row in sorted(places)]
