"""How often verdicts are wrong, and right, on simulated studies: `python -m benchmarks.verdicts`.
docs/statistics.md"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
from scipy.special import expit, stdtrit

from cera_train.verdicts.contrast import Variances, estimate_mean
from cera_train.verdicts.interval import ERROR_RATE
from cera_train.verdicts.power import detectable
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

    @property
    def variances(self) -> Variances:
        """The variance components of a difference of losses."""
        return Variances(
            self.seed[0] ** 2 + self.seed[1] ** 2, 2 * self.problem**2, 2 * self.residual**2
        )


def draw_common(design: Design, studies: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """How hard the problems are for both arms [studies, seeds, problems]."""
    difficulty = generator.normal(size=(studies, 1, design.problems))
    spread = 0 if design.rate is None else 2
    return numpy.broadcast_to(spread * difficulty, (studies, design.seeds, design.problems))


def draw_arm(
    design: Design, arm: int, common: numpy.ndarray, generator: numpy.random.Generator
) -> numpy.ndarray:
    """Values [studies, seeds, problems] of an arm."""
    studies, seeds, problems = common.shape
    values = common + design.problem * generator.normal(size=(studies, 1, problems))
    values = values + design.seed[arm] * generator.normal(size=(studies, seeds, 1))
    if design.rate is None:
        values = values + design.residual * generator.normal(size=values.shape)
        return values + arm * design.difference
    chances = expit(numpy.log(design.rate / (1 - design.rate)) + values)
    chances *= generator.random((studies, seeds, 1)) >= design.collapse
    return (generator.random(values.shape) < chances).astype(float)


def draw_studies(
    design: Design, studies: int, generator: numpy.random.Generator
) -> Iterator[list[numpy.ndarray]]:
    """Both arms' values, in blocks that fit in memory."""
    block = max(1, BLOCK // (2 * design.seeds * design.problems))
    for start in range(0, studies, block):
        common = draw_common(design, min(block, studies - start), generator)
        yield [draw_arm(design, arm, common, generator) for arm in (0, 1)]


def rates(design: Design, studies: int, error_rate: float = ERROR_RATE) -> tuple[float, float]:
    """Shares of studies with a verdict in the direction of a positive difference, and against it:
    what `contrast` computes, for many studies at once."""
    generator = numpy.random.default_rng(0)
    verdicts = []
    for first, second in draw_studies(design, studies, generator):
        difference, spread, _ = estimate_mean(second - first, numpy.ones(design.problems))
        is_shown = numpy.abs(difference) > spread.half_width(error_rate)
        verdicts.append(numpy.sign(difference) * is_shown)
    verdicts = numpy.concatenate(verdicts)
    return float((verdicts > 0).mean()), float((verdicts < 0).mean())


def error_of(design: Design, studies: int) -> float:
    """Share of verdicts where there is no difference."""
    return sum(rates(design, studies))


def family_error(design: Design, arms: int, studies: int) -> float:
    """Share of studies with any verdict after Holm, where so many arms are compared with a baseline
    that they equal."""
    generator = numpy.random.default_rng(0)
    wrong = 0
    for _ in range(studies):
        common = numpy.repeat(draw_common(design, 1, generator), arms, axis=0)
        baseline = draw_arm(design, 0, common[:1], generator)
        others = draw_arm(design, 1, common, generator)
        difference, spread, _ = estimate_mean(others - baseline, numpy.ones(design.problems))
        wrong += min(holm(spread.p_value(difference).tolist())) <= ERROR_RATE
    return wrong / studies


def found(design: Design, comparisons: int, studies: int) -> float:
    """Share of studies that show the difference announced as found by 80 %."""
    announced = detectable(design.variances, design.seeds, design.problems, comparisons)
    return rates(replace(design, difference=announced), studies, ERROR_RATE / comparisons)[0]


DOMINATED = Design("losses; seeds dominate", seed=(1, 1))
DESIGNS = (
    Design("losses; seeds are noise"),
    DOMINATED,
    Design("losses; problems dominate", problem=1, residual=0.1),
    Design("losses; seeds of one arm dominate, ten times the other's", seed=(1, 0.1)),
    Design("scores; half of the seeds collapse to 0 %", rate=0.5, collapse=0.5),
)
SEEDS = (2, 3, 5)


def print_table(head: str, columns: Sequence[str], rows: Iterable[tuple[str, list[str]]]) -> None:
    print(f"\n| {head} | {' | '.join(columns)} |\n|---|" + "---:|" * len(columns))
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def percent(*shares: float) -> str:
    return "/".join(f"{100 * share:.1f}" for share in shares)


def print_errors(studies: int) -> None:
    rows = [
        (
            design.name,
            [percent(error_of(replace(design, seeds=seeds), studies)) for seeds in SEEDS],
        )
        for design in DESIGNS
    ]
    family = replace(DOMINATED, problems=50)
    errors = [family_error(replace(family, seeds=seeds), 10, studies // 5) for seeds in SEEDS]
    rows.append(
        (f"{DOMINATED.name}; any verdict on ten arms after Holm", list(map(percent, errors)))
    )
    print_table("what varies; wrong verdicts in %", [f"{seeds} seeds" for seeds in SEEDS], rows)


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
    between = (lowest - middle.min(2) + could_gain(middle)).max(1)
    # A best rate at the end of its grid allows no verdict.
    between[(best.clip(1, 3) != best).any((1, 2))] = numpy.inf
    values = numpy.take_along_axis(judging, best[..., None], axis=2)[:, :, 0]
    differences = values[:, 1] - values[:, 0]
    return by_student(differences), by_student(differences, between)


def print_tuning(studies: int) -> None:
    designs = [(3, 0), (5, 0), (8, 0), (4, 1), (5, 3)]
    columns = [
        f"{choose} choosing, {judge} judging" if choose else f"{judge} seeds"
        for judge, choose in designs
    ]
    rows = [
        (
            tuning.name,
            [percent(*wrong_after_tuning(tuning, *design, studies)) for design in designs],
        )
        for tuning in TUNINGS
    ]
    print_table("two equal arms; wrong verdicts in %, unwidened/widened", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--studies", type=int, default=20_000, help="simulated for each number of 200 problems"
    )
    studies = parser.parse_args().studies
    for print_part in (print_errors, print_tuning):
        print_part(studies)


if __name__ == "__main__":
    main()
