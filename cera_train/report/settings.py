"""Settings, as dotted keys: which of them make the figures of two runs comparable, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cera_train.config import CHANGES_NO_ANSWER, CHANGES_NO_RESULT

Settings = dict[str, Any]
"""A config.yaml with dotted keys."""

HUB = ("data.path", "data.subset", "data.revision", "data.eval_split")
TRAINING_ROWS_ONLY = ("data.train_split", "data.train_rows", "data.allow_overlap", "data.facts")
"""Prefixes of settings of the data that leave the evaluation rows as they are."""
SPEED = ("train.micro_batch_tokens", "train.batch_layout", "train.compile", "model.gradient_checkpointing")
"""Settings that change no result, but speed or memory in the table."""
NOT_SHOWN = tuple(key for key in CHANGES_NO_RESULT if key not in SPEED)


def decides_rows(settings: Settings) -> tuple:
    """What decides the tokens of a perplexity: equal for the same tokens."""
    ignored = HUB if settings.get("data.train_files") else ()  # then nothing comes from the Hub
    ignored += ("data.train_files",) if settings.get("data.eval_files") else ()
    return tuple(
        sorted(
            (key, repr(value))
            for key, value in settings.items()
            # a null is a key that another version lacks
            if value is not None and key not in ignored and not key.startswith(TRAINING_ROWS_ONLY)
        )
    )


def differing_keys(settings: Sequence[Settings]) -> list[str]:
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if any(own.get(key) != settings[0].get(key) for own in settings)]


def differing_settings(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """The settings in which training runs differ: key -> a text for each run."""
    keys = [key for key in differing_keys(settings) if not key.startswith(NOT_SHOWN)]
    return {key: [show(own.get(key)) for own in settings] for key in keys}


def differing_in_evaluation(first: Settings, second: Settings) -> tuple[str, ...]:
    """The settings in which two evaluations of a task differ, beside their models and adapters."""
    ignored = (*CHANGES_NO_ANSWER, "adapter_digest", "model.", "task.name")
    keys = [key for key in sorted(differing_keys([first, second])) if not key.startswith(ignored)]
    return tuple(f"{key} {show(first.get(key))} and {show(second.get(key))}" for key in keys)


def show(value: Any) -> str:
    """A setting as one writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
