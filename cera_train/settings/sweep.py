"""Settings of a sweep as a whole, and of a study: a sweep that answers a question."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, require_positive, setting
from cera_train.common.trust import may_run_code

LOSS = "loss"

Equal = StrEnum("Equal", ["parameters", "none"])


@dataclass
class SweepConfig:
    metric: str = setting("eval/perplexity", "nothing")
    """The figure that ranks jobs and that a searching sweeper optimises: a key of result.json,
    including those of train.tasks, such as gsm8k/exact."""


@dataclass
class StudyConfig:
    """A question about methods, and the runs that answer it. docs/studies.md"""

    question: str = setting("", "nothing")
    """One sentence with a question mark."""
    arms: dict[str, list[str]] = setting(dict, "nothing")
    """What is compared: names, each with the overrides that define it. Everything else is equal."""
    baseline: str | None = setting(None, "nothing")
    """The arm that every other arm is compared with."""
    contrasts: dict[str, list[str]] = setting(dict, "nothing")
    """Further comparisons, or the direction of one: its question, and two arms; the difference is
    the second minus the first."""
    conditions: dict[str, list[Any]] = setting(dict, "nothing")
    """Settings under which all arms are compared, and their values, such as adapter.r: [16, 64]."""
    tune: dict[str, list[Any]] = setting(dict, "nothing")
    """Settings that each arm chooses for itself under each condition, and their values."""
    seeds: int = setting(3, "nothing")
    """The number of values of train.seed, from 0. Each seed runs every tuned value; the arm is
    compared at the value with the lowest mean loss."""
    tune_seeds: int | None = setting(None, "nothing")
    """To save runs: only this many seeds, the first ones, run every tuned value and choose; only
    the other seeds are compared."""
    extend: bool = setting(False, "nothing")
    """Add values beyond the end of the grid while an arm is best there, by the ratio of the last
    two."""
    outcomes: list[str] = setting(lambda: [LOSS], "nothing")
    """The outcomes, the primary one first: loss, or a name in train.tasks for its score."""
    equal: Equal = setting(Equal.parameters, "nothing")
    """What all arms have the same amount of under a condition."""
    matters: float = setting(0.01, "nothing")
    """The smallest difference in the first outcome that would matter: in nats per token, or as a
    share of the score."""
    arm: str | None = setting(None, "nothing")
    """The arm of a job; a study sets it."""

    def __post_init__(self) -> None:
        names = ", ".join(self.arms) or "none"
        require(len(self.arms) > 1, f"study.arms has {names}: a study compares two or more.")
        for name in self.arms:
            is_name = re.fullmatch(r"[\w.+-]*[A-Za-z][\w.+-]*", name, re.ASCII)
            require(
                bool(is_name),
                f"study.arms.{name}: give a name of letters, digits and _ . + -, with a letter.",
            )
        require(
            self.baseline in self.arms,
            f"study.baseline={self.baseline}: no such arm: choose one of {names}.",
        )
        for question, pair in self.contrasts.items():
            is_pair = len(pair) == len({*pair}) == 2 and {*pair} <= self.arms.keys()
            require(is_pair, f"study.contrasts.{question}={pair}: expected two arms of {names}.")
        require(
            bool(self.tune),
            "study.tune={}: name what each arm may choose, such as optimizer.lr: [1e-3, 3e-3].",
        )
        require(bool(self.outcomes), "study.outcomes=[]: name what decides, such as [loss].")
        self._check_keys()
        require_positive("study", self, "seeds", "matters")
        require(
            self.tune_seeds is None or 1 <= self.tune_seeds < self.seeds,
            f"study.tune_seeds={self.tune_seeds}: the first of study.seeds={self.seeds} choose, "
            f"and the others are compared: give 1 to {self.seeds - 1}, or null.",
        )

    def _check_keys(self) -> None:
        """Raises UserError if a setting is set in two places, has no value, or can run code."""
        words = [word for words in self.arms.values() for word in words]
        places = dict.fromkeys((word.partition("=")[0].lstrip("+") for word in words), "an arm")
        for group, values_by_key in (("tune", self.tune), ("conditions", self.conditions)):
            for key, values in values_by_key.items():
                place = f"study.{group}.{key}"
                require(bool(values), f"{place}=[]: give a value.")
                require(
                    key != "train.seed",
                    f"{place}: every arm has study.seeds=N seeds. Leave it out.",
                )
                is_free = key not in places or (places[key], group) == ("an arm", "conditions")
                require(is_free, f"{place}: {places.get(key)} sets it too. Keep one.")
                places[key] = f"study.{group}"
        overrides = [word.lstrip("+").partition("=")[::2] for word in words]
        for key, value in (*overrides, *self.tune.items(), *self.conditions.items()):
            fix = "put it on the command line, for all arms alike"
            require(not may_run_code(key, str(value)), f"study: {key} can run code: {fix}.")

    @property
    def pairs(self) -> dict[tuple[str, str], str]:
        """Every comparison: (first, second) -> what it asks. First those of `contrasts`, then with
        the baseline."""
        pairs = {(first, second): question for question, (first, second) in self.contrasts.items()}
        for arm in self.arms:
            if (
                arm != self.baseline
                and not {(self.baseline, arm), (arm, self.baseline)} & pairs.keys()
            ):
                pairs[self.baseline, arm] = f"{arm} or {self.baseline}"
        return pairs
