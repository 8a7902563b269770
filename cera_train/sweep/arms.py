"""The grid of a study: arms, tasks, conditions, tuned values and seeds are dimensions of a sweep. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ARM, TASK, SEED = "study.arm", "study.task", "train.seed"


def study_dimensions(study: Any) -> dict[str, str]:
    """The dimensions of a study: key -> values, as `hydra.sweeper.params` has them.

    Args:
        study: the section, as Hydra composed it.
    """
    dimensions: dict[str, Sequence[Any]] = {TASK: list(study.tasks)} if study.tasks else {}
    dimensions |= {ARM: list(study.arms), **study.conditions, **study.tune, SEED: range(study.seeds)}
    return {key: ",".join(map(_word, values)) for key, values in dimensions.items()}


def with_arms(jobs: Sequence[list[str]], study: Any) -> list[list[str]]:
    """The overrides of every job, with those that make its arm and its task."""
    return [[word for choice in job for word in (choice, *_overrides(choice, study))] for job in jobs]


def _overrides(choice: str, study: Any) -> list[str]:
    key, _, name = choice.partition("=")
    return list({ARM: study.arms, TASK: study.tasks}.get(key, {}).get(name, ()))


def _word(value: Any) -> str:
    """A value as one writes it on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return str(value)
