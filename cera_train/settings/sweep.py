"""Settings of a sweep as a whole, and of a study: a sweep that answers a question."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, setting
from cera_train.common.trust import may_run_code

LOSS, SCORE = "loss", "score"

Equal = StrEnum("Equal", ["parameters", "rank", "time", "none"])


@dataclass
class SweepConfig:
    metric: str = setting("eval/perplexity", "nothing")
    """What the best job has the least or the most of, and what a sweeper that searches optimises: a figure of
    result.json, also one of train.tasks, such as gsm8k/exact."""


@dataclass
class StudyConfig:
    """A question about methods, and the runs that answer it. docs/evidence.md"""

    question: str = setting("", "nothing")
    """One sentence with a question mark."""
    arms: dict[str, list[str]] = setting(dict, "nothing")
    """What is compared: a name, and the overrides that make it. Everything else is equal."""
    baseline: str | None = setting(None, "nothing")
    """The arm that every other one is compared with."""
    contrasts: dict[str, list[str]] = setting(dict, "nothing")
    """More comparisons: what one asks, and two arms; the difference is the second minus the first."""
    tasks: dict[str, list[str]] = setting(dict, "nothing")
    """What the arms learn and are judged on: a name, and the overrides that choose its rows."""
    conditions: dict[str, list[Any]] = setting(dict, "nothing")
    """Settings under which all arms are compared, and their values, such as adapter.r: [16, 64]."""
    tune: dict[str, list[Any]] = setting(dict, "nothing")
    """Settings that each arm chooses for itself under each condition, and their values."""
    seeds: int = setting(3, "nothing")
    """Values of train.seed, from 0. Each runs every tuned value, and is judged at the one that the others choose."""
    tune_seeds: int | None = setting(None, "nothing")
    """To save runs: the first so many seeds run every tuned value and choose for all, and the others run that one."""
    outcomes: list[str] = setting(lambda: [LOSS], "nothing")
    """What decides, the first of all: loss, score (of the run's first train.tasks), or a name of train.tasks."""
    equal: Equal = setting(Equal.parameters, "nothing")
    """What arms have the same of under a condition: parameters and rank by their settings, time as measured."""
    matters: float = setting(0.01, "nothing")
    """The smallest difference in the first outcome that would matter: nats of a token, or a share of the score."""
    arm: str | None = setting(None, "nothing")
    """The arm of a job; a study sets it."""
    task: str | None = setting(None, "nothing")
    """The task of a job; a study sets it."""

    def __post_init__(self) -> None:
        names = ", ".join(self.arms) or "none"
        require(len(self.arms) > 1, f"study.arms has {names}: a study compares two or more.")
        require(
            self.baseline is not None,
            f"study.baseline=null: a study needs the arm that others are compared with: choose one of {names}.",
        )
        require(self.baseline in self.arms, f"study.baseline={self.baseline}: no such arm: choose one of {names}.")
        for asked, pair in self.contrasts.items():
            place = f"study.contrasts.{asked}={pair}"
            require(len(pair) == 2 and len(set(pair)) == 2, f"{place}: expected two arms, [first, second].")
            for arm in pair:
                require(arm in self.arms, f"{place}: no arm {arm}: choose from {names}.")
            others = [other for other, arms in self.contrasts.items() if other != asked and set(arms) == set(pair)]
            require(not others, f"{place}: study.contrasts.{others and others[0]} compares the same two. Keep one.")
            require(
                pair[1] != self.baseline,
                f"{place}: the difference is the second minus the first: write [{self.baseline}, {pair[0]}].",
            )
        require(bool(self.tune), "study.tune={}: name what each arm may choose, such as optimizer.lr: [1e-3, 3e-3].")
        for place, values in [*_named("conditions", self.conditions), *_named("tune", self.tune)]:
            require(bool(values), f"{place}=[]: give a value.")
            require(place.rpartition(".")[2] != "seed", f"{place}: every arm has study.seeds=N seeds. Leave it out.")
        fixed = {
            word.partition("=")[0].lstrip("+")
            for words in [*self.arms.values(), *self.tasks.values()]
            for word in words
        }
        for key in [*fixed, *self.conditions, *self.tune]:
            require(
                not may_run_code(key), f"study: {key} can run code: put it on the command line, for all arms alike."
            )
        for group, key, others, where in (
            *(("conditions", key, self.tune, "study.tune") for key in self.conditions),
            *(("conditions", key, fixed, "an arm or a task") for key in self.conditions),
            *(("tune", key, fixed, "an arm or a task") for key in self.tune),
        ):
            require(key not in others, f"study.{group}.{key}: {where} sets it too. Keep one.")
        require(self.seeds >= 1, f"study.seeds={self.seeds} must be 1 or more.")
        require(
            self.tune_seeds is None or 1 <= self.tune_seeds <= self.seeds,
            f"study.tune_seeds={self.tune_seeds}: the seeds that choose are the first of study.seeds={self.seeds}: "
            f"give 1 to {self.seeds}, or null.",
        )
        require(bool(self.outcomes), "study.outcomes=[]: name what decides, such as [loss].")
        require(self.matters > 0, f"study.matters={self.matters} must be above 0: the difference that would matter.")

    @property
    def pairs(self) -> dict[tuple[str, str], str]:
        """Every comparison: (first, second) -> what it asks."""
        pairs = {(self.baseline, arm): f"{arm} or {self.baseline}" for arm in self.arms if arm != self.baseline}
        return pairs | {(first, second): asked for asked, (first, second) in self.contrasts.items()}


def _named(group: str, values: dict[str, list[Any]]) -> list[tuple[str, list[Any]]]:
    return [(f"study.{group}.{key}", choices) for key, choices in values.items()]
