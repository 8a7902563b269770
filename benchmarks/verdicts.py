"""How often verdicts are wrong, and right, on simulated studies: `python -m benchmarks.verdicts`.
docs/statistics.md"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import numpy
from scipy.special import expit, stdtrit

from cera_train.verdicts.contrast import estimate_mean
from cera_train.verdicts.interval import ERROR_RATE
from cera_train.verdicts.tuning import could_gain
from cera_train.verdicts.verdict import holm

BLOCK = 4_000_000  # values drawn at once: 32 MB


@dataclass(frozen=True)
class Design:
    """Two arms and what their values vary with. Losses: standard deviations of the normal effects
    of each arm."""

    name: str = ""
    seeds: int = 3
    problems: int = 200
    seed: tuple[float, float] = (0.0, 0.0)
    """Standard deviation between the seeds of each arm."""
    problem: float = 0.0
    residual: float = 1.0
    rate: float | None = None
    """Scores of 0 or 1 with this rate where effects, then on the logit scale, are 0. Problems
    differ by 2."""
    collapse: float = 0.0
    """Share of seeds that solve nothing."""
    difference: float = 0.0
    """Planted; of losses."""

    def draw(
        self, studies: int, arms: int, generator: numpy.random.Generator
    ) -> Iterator[numpy.ndarray]:
        """Values [studies, seeds, problems] of a baseline and then of so many arms."""
        hardness = generator.normal(size=(studies, 1, self.problems))
        common = 0 if self.rate is None else 2 * hardness
        for arm in range(1 + arms):
            side = min(arm, 1)
            values = common + self.problem * generator.normal(size=hardness.shape)
            values = values + self.seed[side] * generator.normal(size=(studies, self.seeds, 1))
            if self.rate is None:
                noise = generator.normal(size=(studies, self.seeds, self.problems))
                yield values + self.residual * noise + side * self.difference
            else:
                chances = expit(numpy.log(self.rate / (1 - self.rate)) + values)
                chances *= generator.random((studies, self.seeds, 1)) >= self.collapse
                yield (generator.random(chances.shape) < chances).astype(float)


def p_values(design: Design, studies: int, arms: int = 1) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Differences from the baseline and their p-values [studies, arms]: what `contrast` computes,
    for many studies at once."""
    generator = numpy.random.default_rng(0)
    block = max(1, BLOCK // ((1 + arms) * design.seeds * design.problems))
    differences = []
    tests = []
    for start in range(0, studies, block):
        baseline, *others = design.draw(min(block, studies - start), arms, generator)
        values = numpy.stack(others, axis=1) - baseline[:, None]
        difference, spread, _ = estimate_mean(values, numpy.ones(design.problems))
        differences.append(difference)
        tests.append(spread.p_value(difference))
    return numpy.concatenate(differences), numpy.concatenate(tests)


def error_of(design: Design, studies: int, arms: int = 1) -> float:
    """Share of studies with any verdict after Holm, where so many arms equal the baseline that they
    are compared with."""
    _, tests = p_values(design, studies, arms)
    return fmean(min(holm(each)) <= ERROR_RATE for each in tests.tolist())


DESIGNS = (
    Design("losses; seeds dominate", seed=(1, 1)),
    Design("losses; problems dominate", problem=1, residual=0.1),
    Design("losses; seeds of one arm dominate, ten times the other's", seed=(1, 0.1)),
    Design("scores; half of the seeds collapse to 0 %", rate=0.5, collapse=0.5),
)


def print_errors(studies: int) -> None:
    """Share of wrong verdicts of each design."""
    family = replace(DESIGNS[0], problems=50)
    for seeds in (2, 3, 5):
        for design in DESIGNS:
            error = error_of(replace(design, seeds=seeds), studies)
            print(f"{design.name}; {seeds} seeds: {error:.1%}", flush=True)
        error = error_of(replace(family, seeds=seeds), studies // 5, arms=10)
        print(f"{family.name}, 50 problems; ten arms after Holm; {seeds} seeds: {error:.1%}")


# --- the choice of tuned values -------------------------------------------------------------------


NOISE = 0.035
"""Standard deviation of a run, for each rate and seed."""


@dataclass(frozen=True)
class Tuning:
    """Two arms that are equal at their best rate, which lies anywhere within half a step of the
    middle of five rates a doubling apart: losses = bend d^2 + noise, d in doublings. A run that
    breaks down is 1 higher."""

    name: str
    bend: tuple[float, float]
    seed: float = 0.0
    """Standard deviation between the seeds of an arm, common to its rates."""
    broken: float = 0.0
    """Share of the runs at the three highest rates that break down."""

    def draw(self, studies: int, seeds: int, generator: numpy.random.Generator) -> numpy.ndarray:
        """[studies, arms, rates, seeds]"""
        distance = numpy.arange(-2, 3)[:, None] - generator.uniform(
            -0.5, 0.5, size=(studies, 2, 1, 1)
        )
        losses = numpy.array(self.bend)[:, None, None] * distance**2
        losses = losses + self.seed * generator.normal(size=(studies, 2, 1, seeds))
        losses = losses + NOISE * generator.normal(size=(studies, 2, 5, seeds))
        losses[:, :, 2:] += generator.random((studies, 2, 3, seeds)) < self.broken
        return losses


def by_student(differences: numpy.ndarray, between: numpy.ndarray | float = 0.0) -> float:
    """The share of studies whose interval over seeds or bases, widened, leaves out zero.

    Args:
        differences: [studies, seeds] or [studies, bases].
    """
    count = differences.shape[1]
    half = stdtrit(count - 1, 1 - ERROR_RATE / 2) * differences.std(1, ddof=1) / numpy.sqrt(count)
    return float((numpy.abs(differences.mean(1)) > half + between).mean())


TUNINGS = (
    Tuning("bend 0.02, a run's noise 0.035, seeds 0.03", (0.02, 0.02), seed=0.03),
    Tuning("flat against sharp: bend 0 and 0.2", (0.0, 0.2)),
    Tuning(
        "the first; a tenth of the runs at the best and higher rates is 1 higher",
        (0.02, 0.02),
        seed=0.03,
        broken=0.1,
    ),
)


def wrong_after_tuning(
    tuning: Tuning, seeds: int, tune_seeds: int, studies: int
) -> tuple[float, float]:
    """The shares of wrong verdicts where all judge at the rate of the lowest mean: unwidened, and
    widened as a study does. `tune_seeds` choose and do not judge; 0: all do both."""
    losses = tuning.draw(studies, seeds + tune_seeds, numpy.random.default_rng(0))
    tuning_losses = losses[..., : tune_seeds or seeds]
    judging = losses[..., tune_seeds:]
    best = tuning_losses.mean(-1).argmin(2)[..., None]
    middle = numpy.median(tuning_losses, -1)
    lowest = numpy.take_along_axis(middle, best, axis=2)[..., 0]
    between = (lowest - middle.min(2) + could_gain(middle, numpy.arange(5))).max(1)
    # A best rate at the end of its grid allows no verdict.
    between[(best.clip(1, 3) != best).any((1, 2))] = numpy.inf
    values = numpy.take_along_axis(judging, best[..., None], axis=2)[:, :, 0]
    differences = values[:, 1] - values[:, 0]
    return by_student(differences), by_student(differences, between)


def print_tuning(studies: int) -> None:
    """Shares of wrong verdicts of two arms that are equal, without the widening and with it."""
    for tuning in TUNINGS:
        for judge, choose in ((3, 0), (5, 0), (8, 0), (4, 1), (5, 3)):
            plain, widened = wrong_after_tuning(tuning, judge, choose, studies)
            seeds = f"{judge} seeds judge, {choose or 'all'} choose"
            print(f"{tuning.name}; {seeds}: {plain:.1%}, widened {widened:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--studies", type=int, default=20_000, help="simulated for each number of 200 problems"
    )
    studies = parser.parse_args().studies
    print_errors(studies)
    print_tuning(studies)


if __name__ == "__main__":
    main()
