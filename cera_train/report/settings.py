"""Settings, as dotted keys: which of them make the figures of two runs comparable, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cera_train.common.settings import Changes, changes_of
from cera_train.config import Config
from cera_train.evaluation.config import EvalConfig

Settings = dict[str, Any]
"""A config.yaml with dotted keys."""


def differing_keys(settings: Sequence[Settings]) -> list[str]:
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if any(own.get(key) != settings[0].get(key) for own in settings)]


def differing_settings(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """The settings in which training runs differ: key -> a text for each run."""
    keys = [key for key in differing_keys(settings) if changes_of(Config, key) != Changes.nothing]
    # A setting that means nothing to a method stays auto.
    keys = [key for key in keys if len({repr(own.get(key)) for own in settings} - {"'auto'"}) > 1]
    return {key: [show(own.get(key)) for own in settings] for key in keys}


def differing_in_evaluation(first: Settings, second: Settings) -> tuple[str, ...]:
    """The settings in which two evaluations of a task differ, beside their models and adapters."""
    keys = [key for key in sorted(differing_keys([first, second])) if _changes_answers(key)]
    return tuple(f"{key} {show(first.get(key))} and {show(second.get(key))}" for key in keys)


def _changes_answers(key: str) -> bool:
    if key in ("adapter_digest", "task.name") or key.startswith("model."):
        return False  # these are what is compared
    return changes_of(EvalConfig, key) not in (Changes.cost, Changes.nothing)


def show(value: Any) -> str:
    """A setting as one writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
