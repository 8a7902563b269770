"""Successive halving without its jobs: the rules, who is compared with whom, and halving.json, which holds every
decision and the losses that it was made on. Imports no torch.

At the update of a rung one candidate in `factor` goes on, by evaluation loss; the others stay where they are
(Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.files import finite, read_json, write_text
from cera_train.common.settings import require
from cera_train.runs.results import RunResult, read_metrics
from cera_train.settings.run import Config
from cera_train.sweep.folder import NO_CHOICE, job_name, key_of
from cera_train.sweep.record import START_AGAIN, SweepRecord

HALVING = "halving.json"
"""In the sweep's folder."""

SEED = "train.seed"
"""Jobs that differ in it alone are one candidate, whose loss is their mean."""

METHODS = ("adapter", "adapter.kind", "adapter.method", "recipe")
ROWS = ("model", "data")


class Course(NamedTuple):
    """How far some candidates train."""

    candidates: int
    rungs: tuple[int, ...]
    """The updates at which they are compared."""
    is_whole: bool
    """They train to their end, and not to the last rung alone."""


@dataclass(frozen=True)
class Rules:
    """What a user chooses: `hydra.sweeper.tune`, `.first` and `.factor`."""

    SECTION: ClassVar[str] = "hydra.sweeper"
    """Where the settings stand, for messages."""

    tune: list[str]
    first: int
    factor: int

    def __post_init__(self) -> None:
        require(
            bool(self.tune), "hydra.sweeper.tune=[]: name what is tuned, such as hydra.sweeper.tune=[optimizer.lr]."
        )
        for name in self.tune:
            place = f"{self.SECTION}.tune={name}"
            require(name != SEED, f"{place}: the loss of a candidate is its mean over seeds. Leave it out.")
            require(name not in METHODS, f"{place}: methods are not compared before they are tuned. Leave it out.")
            require(
                name.partition(".")[0] not in ROWS,
                f"{place}: losses of different models or rows cannot be compared. Leave it out.",
            )
        self._require_count("first", 1, f"the updates of the first rung, such as {self.SECTION}.first=20")
        self._require_count("factor", 2, "2 or more: one candidate in so many goes on")

    def update(self, rung: int) -> int:
        """Updates of a rung; the first is 1."""
        return self.first * self.factor ** (rung - 1)

    def courses(self, candidates: int, updates: int) -> list[Course]:
        """How far so many candidates train in runs of so many updates, if none ties with another and none fails."""
        courses, rungs = [], []
        while candidates > 1 and self.update(len(rungs) + 1) < updates:
            rungs.append(self.update(len(rungs) + 1))
            going = count_going(candidates, self.factor)
            courses.append(Course(candidates - going, tuple(rungs), False))
            candidates = going
        return [*courses, Course(candidates, tuple(rungs), True)]

    def describe(self) -> str:
        return f"tune=[{','.join(self.tune)}] first={self.first} factor={self.factor}"

    def check_run(self, config: Config) -> Config:
        """Refuses a job that ends before the first rung, or has a stop of its own."""
        updates, stop_at = config.train.max_updates, config.train.stop_at
        require(
            updates is None or self.first < updates,
            f"{self.SECTION}.first={self.first}: a job has train.max_updates={updates}, so that nothing would be "
            "stopped. Choose a smaller first rung.",
        )
        require(stop_at is None, f"train.stop_at={stop_at}: halving itself stops jobs at its rungs. Leave it out.")
        return config

    def _require_count(self, name: str, least: int, expected: str) -> None:
        value = getattr(self, name)
        shown = "null" if value is None else value
        require(type(value) is int and value >= least, f"{self.SECTION}.{name}={shown}: expected {expected}.")


class StudyRules(Rules):
    """Those of a study, whose section has them."""

    SECTION: ClassVar[str] = "study"


# --- who is compared with whom ---------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One choice of the tuned values."""

    name: str  # such as optimizer.lr=0.001
    jobs: dict[str, list[str]]  # folder -> overrides; one for each seed


@dataclass
class Group:
    """Candidates that are compared: everything but tuned values and seeds is the same."""

    name: str  # such as adapter=cera; NO_CHOICE where nothing else varies
    candidates: list[Candidate]

    @property
    def jobs(self) -> dict[str, list[str]]:
        return {name: words for candidate in self.candidates for name, words in candidate.jobs.items()}


def groups_of(record: SweepRecord, tune: Collection[str]) -> list[Group]:
    """The groups of a sweep's jobs, in the order of its grid."""
    groups: dict[str, dict[str, Candidate]] = {}
    for job, overrides in record.overrides.items():
        words = [word for word in overrides if key_of(word) in record.swept]
        group = job_name([word for word in words if key_of(word) not in (*tune, SEED)], record.swept)
        name = job_name([word for word in words if key_of(word) in tune], tune)
        candidate = groups.setdefault(group, {}).setdefault(name, Candidate(name, {}))
        candidate.jobs[job] = overrides
    return [Group(name, list(candidates.values())) for name, candidates in groups.items()]


def check_grid(jobs: Sequence[list[str]], rules: Rules) -> None:
    """Raises UserError for a tuned dimension that is none of the grid's, or has one value."""
    values: dict[str, set[str]] = {}
    for word in itertools.chain(*jobs):
        values.setdefault(key_of(word), set()).add(word)
    varied = ", ".join(sorted(key for key, found in values.items() if len(found) > 1 and key != SEED)) or "nothing"
    for name in rules.tune:
        place = f"hydra.sweeper.tune={name}"
        require(name in values, f"{place}: it is no dimension of this grid, which varies {varied}. Name one of these.")
        require(
            len(values[name]) > 1,
            f"{place}: the grid has one value, {min(values[name])}. Give more, such as optimizer.lr=1e-4,1e-3.",
        )


# --- the decision ----------------------------------------------------------------------------------------------------


def goes_on(losses: Sequence[float], factor: int) -> list[bool]:
    """Which candidates go on: the best len / factor, at least one, and those that tie with the last of them. An
    infinite loss, a failed candidate's, never does. It is the rule of Optuna's SuccessiveHalvingPruner, applied once
    all have come to the rung."""
    bound = sorted(losses)[count_going(len(losses), factor) - 1]
    return [loss <= bound and math.isfinite(loss) for loss in losses]


def count_going(candidates: int, factor: int) -> int:
    """How many candidates go on beyond a rung, without ties."""
    return max(1, candidates // factor)


def loss_at(job: Path, update: int) -> float | None:
    """The evaluation loss of a job at an update, or at its end where it ended before, as by train.patience. None: it
    was not evaluated there."""
    path, result = job / "metrics.jsonl", job / "result.json"
    evaluations = [line for line in read_metrics(path).evaluations if line.update <= update] if path.exists() else []
    if not evaluations:
        return None
    has_ended = result.exists() and RunResult.read(result, ("updates",)).updates < update
    return _finite(evaluations[-1].loss) if has_ended or evaluations[-1].update == update else None


def _finite(loss: float | None) -> float:
    """JSON has no infinity: a loss that was not finite is null."""
    return math.inf if loss is None else loss


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate at a rung."""

    name: str
    losses: dict[str, float | None]  # by job; None or infinite: it failed
    goes_on: bool

    @property
    def loss(self) -> float:
        """The mean over seeds; infinite where one failed."""
        return fmean(map(_finite, self.losses.values()))


@dataclass(frozen=True)
class Decision:
    """Who went on at a rung of a group, and by which losses."""

    group: str
    rung: int
    update: int
    candidates: list[Outcome]

    def describe(self) -> str:
        """A line such as `adapter=lora, loss at update 4: optimizer.lr=0.003 1.02 goes on; ...=0.1 2.5 stops`."""
        texts = []
        for outcome in sorted(self.candidates, key=lambda outcome: outcome.loss):
            loss = f"{outcome.loss:.4f}" if math.isfinite(outcome.loss) else "failed"
            texts.append(f"{outcome.name} {loss} {'goes on' if outcome.goes_on else 'stops'}")
        group = "" if self.group == NO_CHOICE else f"{self.group}, "
        return f"{group}loss at update {self.update:,}: {'; '.join(texts)}"


def decide(group: Group, rung: int, update: int, losses: Mapping[str, float], factor: int) -> Decision:
    """The decision of a rung from the loss of every job; infinity: it failed."""
    outcomes = [Outcome(c.name, {job: losses[job] for job in c.jobs}, False) for c in group.candidates]
    chosen = goes_on([outcome.loss for outcome in outcomes], factor)
    outcomes = [dataclasses.replace(outcome, goes_on=on) for outcome, on in zip(outcomes, chosen, strict=True)]
    return Decision(group.name, rung, update, outcomes)


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass
class HalvingRecord:
    """halving.json."""

    rules: Rules
    decisions: list[Decision]

    @classmethod
    def read(cls, sweep: Path) -> HalvingRecord | None:
        """None where there is none."""
        path = sweep / HALVING
        if not path.exists():
            return None
        tree = read_json(path)
        try:
            decisions = [
                Decision(**{**decision, "candidates": [Outcome(**outcome) for outcome in decision["candidates"]]})
                for decision in tree["decisions"]
            ]
            return cls(Rules(**tree["rules"]), decisions)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is broken: {error}. {START_AGAIN}") from error

    def write(self, sweep: Path) -> None:
        write_text(sweep / HALVING, json.dumps(finite(dataclasses.asdict(self)), indent=2) + "\n")

    def decision(self, group: str, rung: int) -> Decision | None:
        return next((found for found in self.decisions if (found.group, found.rung) == (group, rung)), None)

    def stops(self) -> dict[str, Decision]:
        """The jobs that did not go on, and the decision that stopped each."""
        return {
            job: decision
            for decision in self.decisions
            for outcome in decision.candidates
            if not outcome.goes_on
            for job in outcome.losses
        }

    def check(self, rules: Rules, groups: Sequence[Group], sweep: Path) -> None:
        """Raises UserError where a decision was made by other rules or among other candidates."""
        mend = f"Choose another name=..., or remove {sweep / HALVING} to decide anew."
        same = dataclasses.astuple(self.rules) == dataclasses.astuple(rules)
        require(same, f"{sweep} holds a halving by other rules: {self.rules.describe()}. {mend}")
        for group in groups:
            first = self.decision(group.name, 1)
            require(
                first is None or {job for outcome in first.candidates for job in outcome.losses} == set(group.jobs),
                f"{sweep} holds a halving of {group.name} among other candidates. {mend}",
            )
