"""How often verdicts are wrong, and right, on simulated studies: `python -m benchmarks.verdicts` (docs/evidence.md)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
from scipy.special import expit, stdtrit

from cera_train.evaluation.statistics import ERROR_RATE, holm
from cera_train.study.verdict import Variances, detectable, estimate_mean

BLOCK = 4_000_000  # values drawn at once: 32 MB
RESAMPLES = 400  # of the bootstrap


@dataclass(frozen=True)
class Design:
    """Two arms and what their values vary with. Losses: standard deviations of the normal effects of each arm."""

    name: str = ""
    seeds: int = 3
    problems: int = 200
    seed: tuple[float, float] = (0.0, 0.0)
    """Standard deviation between the seeds of each arm."""
    shared: float = 0.0
    """Standard deviation between seeds that both arms have in common."""
    problem: float = 0.0
    residual: float = 1.0
    weighted: bool = False
    """Rows differ in tokens, log-normal with a standard deviation of 0.7."""
    skewed: bool = False
    """Problem effects are exponential instead of normal."""
    rate: float | None = None
    """Scores of 0 or 1 with this rate where effects, then on the logit scale, are 0. Problems differ by 2."""
    collapse: float = 0.0
    """Share of seeds that solve nothing."""
    tuned: tuple[int, int] = (1, 1)
    """Values, all alike, that each arm chooses the best of: the most that tuning can do."""
    tune_seeds: int = 1
    """Seeds that choose; more than there are: all."""
    difference: float = 0.0
    """Planted; of losses."""

    @property
    def variances(self) -> Variances:
        """The variance components of a difference of losses."""
        return Variances(self.seed[0] ** 2 + self.seed[1] ** 2, 2 * self.problem**2, 2 * self.residual**2)


def draw_weights(design: Design, generator: numpy.random.Generator) -> numpy.ndarray:
    return numpy.exp(0.7 * generator.normal(size=design.problems)) if design.weighted else numpy.ones(design.problems)


def draw_common(design: Design, studies: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """What the arms of a study have in common [studies, seeds, problems]: of seeds, and how hard problems are."""
    difficulty = generator.normal(size=(studies, 1, design.problems)) * (0 if design.rate is None else 2)
    return difficulty + design.shared * generator.normal(size=(studies, design.seeds, 1))


def draw_arm(design: Design, arm: int, common: numpy.ndarray, generator: numpy.random.Generator) -> numpy.ndarray:
    """Values [studies, seeds, problems] of an arm."""
    studies, seeds, problems = common.shape
    size = (studies, 1, problems)
    effect = generator.exponential(size=size) - 1 if design.skewed else generator.normal(size=size)
    deviations = generator.normal(size=(studies, design.tuned[arm], seeds, 1))
    best = deviations[:, :, : design.tune_seeds].mean(axis=2, keepdims=True).argmax(axis=1, keepdims=True)
    deviations = numpy.take_along_axis(deviations, best, axis=1)[:, 0]
    values = common + design.problem * effect + design.seed[arm] * deviations
    if design.rate is None:
        return values + design.residual * generator.normal(size=values.shape) + arm * design.difference
    chances = expit(numpy.log(design.rate / (1 - design.rate)) + values)
    chances *= generator.random((studies, seeds, 1)) >= design.collapse
    return (generator.random(values.shape) < chances).astype(float)


def draw_studies(
    design: Design, studies: int, generator: numpy.random.Generator
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]]:
    """Both arms' values and the weights, in blocks that fit in memory."""
    block = max(1, BLOCK // (2 * design.seeds * design.problems))
    for start in range(0, studies, block):
        common = draw_common(design, min(block, studies - start), generator)
        first, second = (draw_arm(design, arm, common, generator) for arm in (0, 1))
        yield first, second, draw_weights(design, generator)


Method = Callable[[numpy.ndarray, numpy.ndarray, numpy.ndarray, float], numpy.ndarray]
"""Values of both arms, weights and the error rate -> the verdict of each study: -1, 0 or 1."""


def by_verdict(first: numpy.ndarray, second: numpy.ndarray, weights: numpy.ndarray, error_rate: float) -> numpy.ndarray:
    """What `contrast` computes, for many studies at once."""
    difference, spread, _ = estimate_mean(second - first, weights)
    return numpy.sign(difference) * (numpy.abs(difference) > spread.half_width(error_rate))


def by_satterthwaite(
    first: numpy.ndarray, second: numpy.ndarray, weights: numpy.ndarray, error_rate: float
) -> numpy.ndarray:
    """One t quantile for the sum of seeds' and problems' variances."""
    difference, spread, _ = estimate_mean(second - first, weights)
    parts = [(spread.seeds, spread.seed_degrees), (spread.problems, spread.problem_degrees)]
    variance = spread.seeds + spread.problems + 1e-300
    degrees = 1 / (sum((part / variance) ** 2 / degrees for part, degrees in parts) + 1e-300)
    return numpy.sign(difference) * (numpy.abs(difference) > -stdtrit(degrees, error_rate / 2) * numpy.sqrt(variance))


def by_bootstrap(
    first: numpy.ndarray, second: numpy.ndarray, weights: numpy.ndarray, error_rate: float
) -> numpy.ndarray:
    """The percentile interval of the plain hierarchical bootstrap: seeds and problems, with replacement."""
    generator = numpy.random.default_rng(0)
    seeds, problems = first.shape[-2:]
    drawn = generator.multinomial(problems, numpy.full(problems, 1 / problems), size=RESAMPLES) * weights
    seeds_drawn = generator.multinomial(seeds, numpy.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    by_seed = (second - first) @ drawn.T / drawn.sum(1)  # [studies, seeds, resamples]
    means = (by_seed * seeds_drawn.T).sum(-2)
    lower, upper = numpy.quantile(means, [error_rate / 2, 1 - error_rate / 2], axis=-1)
    return (lower > 0).astype(float) - (upper < 0)


def rates(
    design: Design, method: Method, studies: int, error_rate: float = ERROR_RATE, seed: int = 0
) -> tuple[float, float]:
    """Shares of studies with a verdict in the direction of a positive difference, and against it."""
    generator = numpy.random.default_rng(seed)
    verdicts = numpy.concatenate([method(*arms, error_rate) for arms in draw_studies(design, studies, generator)])
    return float((verdicts > 0).mean()), float((verdicts < 0).mean())


def error_of(design: Design, method: Method, studies: int, error_rate: float = ERROR_RATE) -> float:
    """Share of verdicts where there is no difference."""
    return sum(rates(replace(design, difference=0.0), method, studies, error_rate))


def family_error(design: Design, arms: int, studies: int, seed: int = 0) -> float:
    """Share of studies with any verdict after Holm, where so many arms are compared with a baseline that they equal."""
    generator = numpy.random.default_rng(seed)
    wrong = 0
    for _ in range(studies):
        common = numpy.repeat(draw_common(design, 1, generator), arms, axis=0)
        baseline, others = draw_arm(design, 0, common[:1], generator), draw_arm(design, 1, common, generator)
        difference, spread, _ = estimate_mean(others - baseline, draw_weights(design, generator))
        wrong += min(holm(spread.p_value(difference).tolist())) <= ERROR_RATE
    return wrong / studies


def with_detectable_difference(design: Design, comparisons: int = 1) -> Design:
    return replace(design, difference=detectable(design.variances, design.seeds, design.problems, comparisons))


DOMINATED = Design("losses; seeds dominate", seed=(1, 1))
WITH_POWER = (
    Design("losses; seeds change nothing but noise"),
    Design("losses; seeds matter as much as that noise", seed=(0.07, 0.07)),
    DOMINATED,
    Design("losses; problems dominate", problem=1, residual=0.1),
)
"""Those whose power is simulated, too."""
DESIGNS = (
    *WITH_POWER,
    Design("losses; seeds dominate, and both arms alike ten times as much", seed=(1, 1), shared=10),
    Design("losses; seeds of one arm dominate, ten times the other's", seed=(1, 0.1)),
    Design("losses; one arm's seeds, and problems a quarter as much", seed=(0.2, 0.002), problem=0.58, residual=0.1),
    Design("losses; seeds dominate; tuned on the first, one arm has the best of 12", seed=(1, 1), tuned=(1, 12)),
    Design(
        "losses; seeds dominate; tuned on all seeds, both arms have the best of 5",
        seed=(1, 1),
        tuned=(5, 5),
        tune_seeds=9,
    ),
    Design(
        "losses; seeds, problems and noise alike, rows weighted by tokens", seed=(0.1, 0.1), problem=1, weighted=True
    ),
    Design("the same, 1,319 rows, problems skewed", 3, 1319, (0.04, 0.04), problem=1, weighted=True, skewed=True),
    Design("losses; seeds, problems and noise alike, 20 problems", problems=20, seed=(0.2, 0.2), problem=1),
    Design("scores; half are right, 50 problems", problems=50, rate=0.5, problem=0.5),
    Design("scores; 1 % is right, 50 problems", problems=50, rate=0.002, problem=0.5),
    Design("scores; 95 % are right, seeds differ", rate=0.99, seed=(0.5, 0.5), problem=0.5),
    Design(
        "scores; half are right, seeds differ, 1,319 problems", problems=1319, rate=0.5, seed=(0.5, 0.5), problem=0.5
    ),
    Design("scores; half of the seeds collapse to 0 %", rate=0.5, collapse=0.5),
)
UNEQUAL = Design(
    "losses; seeds dominate; tuned on all seeds, one arm has the best of 12", seed=(1, 1), tuned=(1, 12), tune_seeds=9
)
"""Beyond 5 %: no study gives its arms unequal choices."""
SEEDS = (2, 3, 5)


def print_errors(studies: int) -> None:
    print("| what varies, where there is no difference | " + " | ".join(f"{seeds} seeds" for seeds in SEEDS), end=" | ")
    print("3 seeds, one t quantile | 3 seeds, bootstrap |\n|---|" + "---:|" * (len(SEEDS) + 2))
    for design in (*DESIGNS, UNEQUAL):
        size = studies * 200 // max(200, design.problems)
        cells = [error_of(replace(design, seeds=seeds), by_verdict, size) for seeds in SEEDS]
        cells += [error_of(design, by_satterthwaite, size), error_of(design, by_bootstrap, size // 5)]
        print(row(design.name, cells), flush=True)
    family = replace(DOMINATED, problems=50)
    cells = [family_error(replace(family, seeds=seeds), 10, studies // 5) for seeds in SEEDS]
    print(row("losses; seeds dominate; any verdict on ten arms after Holm", cells) + " | |")


def print_power(studies: int) -> None:
    print("| what varies, where 80 % are announced | " + " | ".join(f"{n} seeds" for n in SEEDS) + " |")
    print("|---|" + "---:|" * len(SEEDS))
    for design in WITH_POWER:
        for comparisons in (1, 10):
            cells = [found(replace(design, seeds=seeds), comparisons, studies) for seeds in SEEDS]
            print(row(design.name + (f", {comparisons} comparisons" if comparisons > 1 else ""), cells), flush=True)


def found(design: Design, comparisons: int, studies: int) -> float:
    """Share of studies that show the difference announced as found by 80 %."""
    design = with_detectable_difference(design, comparisons)
    return rates(design, by_verdict, studies, ERROR_RATE / comparisons)[0]


def row(name: str, shares: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{share:.1%}".replace("%", " %") for share in shares) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=20_000, help="simulated for each number of 200 problems")
    studies = parser.parse_args().studies
    print_errors(studies)
    print()
    print_power(studies)


if __name__ == "__main__":
    main()
