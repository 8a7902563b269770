"""How often verdicts are wrong, and right, on simulated studies: `python -m benchmarks.verdicts`.
docs/statistics.md"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
from scipy.special import expit, stdtr, stdtrit

from cera_train.verdicts.contrast import Variances, estimate_mean
from cera_train.verdicts.interval import ERROR_RATE
from cera_train.verdicts.power import detectable
from cera_train.verdicts.tuning import could_gain
from cera_train.verdicts.verdict import holm

BLOCK = 4_000_000  # values drawn at once: 32 MB
RESAMPLES = 400  # of the bootstrap


@dataclass(frozen=True)
class Design:
    """Two arms and what their values vary with. Losses: standard deviations of the normal effects
    of each arm."""

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


def draw_weights(design: Design, generator: numpy.random.Generator) -> numpy.ndarray:
    return (
        numpy.exp(0.7 * generator.normal(size=design.problems))
        if design.weighted
        else numpy.ones(design.problems)
    )


def draw_common(design: Design, studies: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """What the arms of a study have in common [studies, seeds, problems]: of seeds, and how hard
    problems are."""
    difficulty = generator.normal(size=(studies, 1, design.problems)) * (
        0 if design.rate is None else 2
    )
    return difficulty + design.shared * generator.normal(size=(studies, design.seeds, 1))


def draw_arm(
    design: Design, arm: int, common: numpy.ndarray, generator: numpy.random.Generator
) -> numpy.ndarray:
    """Values [studies, seeds, problems] of an arm."""
    studies, seeds, problems = common.shape
    size = (studies, 1, problems)
    effect = generator.exponential(size=size) - 1 if design.skewed else generator.normal(size=size)
    values = (
        common
        + design.problem * effect
        + design.seed[arm] * generator.normal(size=(studies, seeds, 1))
    )
    if design.rate is None:
        return (
            values + design.residual * generator.normal(size=values.shape) + arm * design.difference
        )
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


def by_verdict(
    first: numpy.ndarray, second: numpy.ndarray, weights: numpy.ndarray, error_rate: float
) -> numpy.ndarray:
    """What `contrast` computes, for many studies at once."""
    difference, spread, _ = estimate_mean(second - first, weights)
    return numpy.sign(difference) * (numpy.abs(difference) > spread.half_width(error_rate))


def by_bootstrap(
    first: numpy.ndarray, second: numpy.ndarray, weights: numpy.ndarray, error_rate: float
) -> numpy.ndarray:
    """The percentile interval of the plain hierarchical bootstrap: seeds and problems, with
    replacement."""
    generator = numpy.random.default_rng(0)
    seeds, problems = first.shape[-2:]
    drawn = (
        generator.multinomial(problems, numpy.full(problems, 1 / problems), size=RESAMPLES)
        * weights
    )
    seeds_drawn = generator.multinomial(seeds, numpy.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    by_seed = (second - first) @ drawn.T / drawn.sum(1)  # [studies, seeds, resamples]
    means = (by_seed * seeds_drawn.T).sum(-2)
    lower, upper = numpy.quantile(means, [error_rate / 2, 1 - error_rate / 2], axis=-1)
    return (lower > 0).astype(float) - (upper < 0)


def rates(
    design: Design, method: Method, studies: int, error_rate: float = ERROR_RATE, seed: int = 0
) -> tuple[float, float]:
    """Shares of studies with a verdict in the direction of a positive difference, and against
    it."""
    generator = numpy.random.default_rng(seed)
    verdicts = numpy.concatenate(
        [method(*arms, error_rate) for arms in draw_studies(design, studies, generator)]
    )
    return float((verdicts > 0).mean()), float((verdicts < 0).mean())


def error_of(design: Design, method: Method, studies: int, error_rate: float = ERROR_RATE) -> float:
    """Share of verdicts where there is no difference."""
    return sum(rates(replace(design, difference=0.0), method, studies, error_rate))


def family_error(design: Design, arms: int, studies: int, seed: int = 0) -> float:
    """Share of studies with any verdict after Holm, where so many arms are compared with a baseline
    that they equal."""
    generator = numpy.random.default_rng(seed)
    wrong = 0
    for _ in range(studies):
        common = numpy.repeat(draw_common(design, 1, generator), arms, axis=0)
        baseline = draw_arm(design, 0, common[:1], generator)
        others = draw_arm(design, 1, common, generator)
        difference, spread, _ = estimate_mean(others - baseline, draw_weights(design, generator))
        wrong += min(holm(spread.p_value(difference).tolist())) <= ERROR_RATE
    return wrong / studies


def with_detectable_difference(design: Design, comparisons: int = 1) -> Design:
    return replace(
        design, difference=detectable(design.variances, design.seeds, design.problems, comparisons)
    )


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
    Design(
        "losses; one arm's seeds, and problems a quarter as much",
        seed=(0.2, 0.002),
        problem=0.58,
        residual=0.1,
    ),
    Design(
        "losses; seeds, problems and noise alike, rows weighted by tokens",
        seed=(0.1, 0.1),
        problem=1,
        weighted=True,
    ),
    Design(
        "the same, 1,319 rows, problems skewed",
        3,
        1319,
        (0.04, 0.04),
        problem=1,
        weighted=True,
        skewed=True,
    ),
    Design(
        "losses; seeds, problems and noise alike, 20 problems",
        problems=20,
        seed=(0.2, 0.2),
        problem=1,
    ),
    Design("scores; half are right, 50 problems", problems=50, rate=0.5, problem=0.5),
    Design("scores; 1 % is right, 50 problems", problems=50, rate=0.002, problem=0.5),
    Design("scores; 95 % are right, seeds differ", rate=0.99, seed=(0.5, 0.5), problem=0.5),
    Design(
        "scores; half are right, seeds differ, 1,319 problems",
        problems=1319,
        rate=0.5,
        seed=(0.5, 0.5),
        problem=0.5,
    ),
    Design("scores; half of the seeds collapse to 0 %", rate=0.5, collapse=0.5),
)
SEEDS = (2, 3, 5)


def print_errors(studies: int) -> None:
    print(
        "| what varies, where there is no difference | "
        + " | ".join(f"{seeds} seeds" for seeds in SEEDS),
        end=" | ",
    )
    print("3 seeds, bootstrap |\n|---|" + "---:|" * (len(SEEDS) + 1))
    for design in DESIGNS:
        size = studies * 200 // max(200, design.problems)
        cells = [error_of(replace(design, seeds=seeds), by_verdict, size) for seeds in SEEDS]
        cells.append(error_of(design, by_bootstrap, size // 5))
        print(row(design.name, cells), flush=True)
    family = replace(DOMINATED, problems=50)
    cells = [family_error(replace(family, seeds=seeds), 10, studies // 5) for seeds in SEEDS]
    print(row("losses; seeds dominate; any verdict on ten arms after Holm", cells) + " |")


# --- the choice of tuned values -------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """Two arms that are equal at their best rate, which lies anywhere within half a step of the
    middle of five rates a doubling apart: losses = bend d^2 + skew max(d, 0)^3 + noise, d in
    doublings. A run that breaks down is 1 higher."""

    name: str
    bend: tuple[float, float]
    noise: float = 0.035
    """Standard deviation of a run, for each rate and seed."""
    seed: float = 0.0
    """Standard deviation between the seeds of an arm, common to its rates."""
    skew: float = 0.0
    """Of the second arm."""
    broken: float = 0.0
    """Share of the runs at the three highest rates that break down."""

    def draw(self, studies: int, seeds: int, generator: numpy.random.Generator) -> numpy.ndarray:
        """[studies, arms, rates, seeds]"""
        distance = numpy.arange(-2, 3)[:, None] - generator.uniform(
            -0.5, 0.5, size=(studies, 2, 1, 1)
        )
        skew = numpy.array([0, self.skew])[:, None, None] * distance.clip(min=0) ** 3
        losses = numpy.array(self.bend)[:, None, None] * distance**2 + skew
        losses = losses + self.seed * generator.normal(size=(studies, 2, 1, seeds))
        losses = losses + self.noise * generator.normal(size=(studies, 2, 5, seeds))
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
    Tuning("bend 0.02, noise 0.03", (0.02, 0.02), noise=0.03),
    Tuning("flat against sharp: bend 0.005 and 0.08", (0.005, 0.08)),
    Tuning("flatter against sharper: bend 0 and 0.2", (0.0, 0.2)),
    Tuning("one arm steep beyond its best, 0.1 a doubling cubed", (0.02, 0.02), skew=0.1),
    Tuning("steep, hardly noisy: bend 0.2, noise 0.01", (0.2, 0.2), noise=0.01, skew=0.1),
    Tuning(
        "the first; a tenth of the runs at high rates break down",
        (0.02, 0.02),
        seed=0.03,
        broken=0.1,
    ),
    Tuning(
        "the last; a tenth of the runs at high rates break down",
        (0.2, 0.2),
        noise=0.01,
        skew=0.1,
        broken=0.1,
    ),
)


def wrong_after_tuning(
    tuning: Tuning, seeds: int, tune_seeds: int, studies: int
) -> tuple[float, float, float]:
    """Shares of wrong verdicts: each seed judged at the rate that the other seeds choose; all at
    the rate of the lowest mean; the same, widened as a study does. `tune_seeds` choose and do not
    judge; 0: all do both."""
    losses = tuning.draw(studies, seeds + tune_seeds, numpy.random.default_rng(0))
    tuning_losses = losses[..., : tune_seeds or seeds]
    judging = losses[..., tune_seeds:]
    best = tuning_losses.mean(-1).argmin(2)
    middle = numpy.median(tuning_losses, -1)
    others = best[..., None] if tune_seeds else (losses.sum(-1, keepdims=True) - losses).argmin(2)

    def at(place: numpy.ndarray) -> numpy.ndarray:
        return numpy.take_along_axis(middle, place[..., None], axis=2)[..., 0]

    def wrong(rates: numpy.ndarray, between: numpy.ndarray | float = 0.0) -> float:
        values = numpy.take_along_axis(judging, rates[:, :, None], axis=2)[:, :, 0]
        return by_student(values[:, 1] - values[:, 0], between)

    between = (at(best) - middle.min(2) + could_gain(middle)).max(1)
    # A best rate at the end of its grid allows no verdict.
    between[(best.clip(1, 3) != best).any(1)] = numpy.inf
    everywhere = numpy.broadcast_to(best[..., None], (*best.shape, seeds))
    return (
        wrong(numpy.broadcast_to(others, everywhere.shape)),
        wrong(everywhere),
        wrong(everywhere, between),
    )


def print_tuning(studies: int) -> None:
    designs = [(3, 0), (5, 0), (8, 0), (4, 1), (5, 3)]
    names = [
        f"{choose} choosing, {judge} judging" if choose else f"{judge} seeds"
        for judge, choose in designs
    ]
    print(
        "| equal arms; the others choose / the lowest mean / widened | " + " | ".join(names) + " |"
    )
    print("|---|" + "---:|" * len(names))
    for tuning in TUNINGS:
        cells = [wrong_after_tuning(tuning, judge, choose, studies) for judge, choose in designs]
        print(
            f"| {tuning.name} | "
            + " | ".join(" / ".join(f"{100 * share:.1f}" for share in cell) for cell in cells)
            + " |"
        )


# --- ways to a wrong verdict ----------------------------------------------------------------------


def second_outcome(seeds: int, studies: int) -> float:
    """Two arms are equal in a second outcome at their best rates for it. One arm's is a doubling
    from that of the first outcome, which chooses."""
    tuning = TUNINGS[0]
    generator = numpy.random.default_rng(0)
    best = tuning.draw(studies, seeds, generator).mean(-1).argmin(2)
    distance = best - 2.0 + [0, 1]
    losses = tuning.bend[0] * distance[..., None] ** 2
    losses = losses + tuning.noise * generator.normal(size=(studies, 2, seeds))
    return by_student(losses[:, 1] - losses[:, 0])


def one_value(seeds: int, studies: int) -> float:
    """Two arms whose best rates are a doubling apart, at one rate for both."""
    generator = numpy.random.default_rng(0)
    distance = generator.uniform(-0.5, 0.5, size=(studies, 2, 1)) + numpy.array([[0], [1]])
    losses = 0.02 * distance**2 + 0.035 * generator.normal(size=(studies, 2, seeds))
    return by_student(losses[:, 1] - losses[:, 0])


def words(seeds: int, studies: int) -> float:
    """The best of eight optimizers, which one arm does not care about; the other has one that is
    good."""
    losses = 0.035 * numpy.random.default_rng(0).normal(size=(studies, 9, seeds))
    best = losses[:, :8].mean(-1).argmin(1)
    chosen = numpy.take_along_axis(losses, best[:, None, None], axis=1)[:, 0]
    return by_student(chosen - losses[:, 8])


def diverged(seeds: int, studies: int) -> float:
    """One seed chooses, the others judge. A fifth of the second arm's runs diverge and the others
    are 0.25 lower: the arms are equal if a run that diverges counts 1 more. Of studies in which a
    judging run diverges at the chosen rate, where the best rate at which none does judges."""
    generator = numpy.random.default_rng(0)
    losses = TUNINGS[0].draw(studies, seeds + 1, generator) - [[[[0]], [[0.25]]]]
    has_diverged = generator.random(losses.shape) < [[[[0]], [[0.2]]]]
    choosing = numpy.where(has_diverged[..., 0], numpy.inf, losses[..., 0])
    in_judging = has_diverged[..., 1:].any(-1)
    chosen = choosing.argmin(2)[..., None]
    best = numpy.where(in_judging, numpy.inf, choosing).argmin(2)[..., None]
    at_chosen, at_best = (numpy.take_along_axis(in_judging, place, 2) for place in (chosen, best))
    values = numpy.take_along_axis(losses[..., 1:], best[..., None], axis=2)[:, :, 0]
    values = values[at_chosen.any((1, 2)) & ~at_best.any((1, 2))]
    return by_student(values[:, 1] - values[:, 0])


REFUSED = {
    "a second outcome, best a doubling from the first's": second_outcome,
    "one value of the rate for both arms": one_value,
    "the best of eight words": words,
    "a fifth of one arm's runs diverge, a judging one too": diverged,
}
"""Where a study gives no verdict: the share of verdicts that would be wrong."""

Shares = tuple[float, float]
"""Wrong verdicts before and after a rule."""


def any_wrong(p_values: numpy.ndarray) -> Shares:
    """Shares of studies [studies, families, contrasts] with any verdict: Holm in each family, and
    over all."""
    verdicts = [
        (
            any(min(holm(list(family))) <= ERROR_RATE for family in study),
            min(holm(study.ravel().tolist())) <= ERROR_RATE,
        )
        for study in p_values
    ]
    before, after = numpy.mean(verdicts, axis=0)
    return float(before), float(after)


def families(count: int, seeds: int, studies: int) -> Shares:
    """So many outcomes or commands of four contrasts each, with Holm in each and over all."""
    generator = numpy.random.default_rng(0)
    arms = generator.normal(size=(studies, count, 5, seeds))
    differences = arms[:, :, 1:] - arms[:, :, :1]
    t = differences.mean(-1) / differences.std(-1, ddof=1) * numpy.sqrt(seeds)
    return any_wrong(2 * stdtr(seeds - 1, -numpy.abs(t)))


def two_outcomes(seeds: int, studies: int) -> Shares:
    return families(2, seeds, studies)


def three_commands(seeds: int, studies: int) -> Shares:
    return families(3, seeds, studies)


def draw_bases(
    bases: int, seeds: int, studies: int, generator: numpy.random.Generator, arms: int = 2
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Judging losses [studies, arms, bases, seeds] of arms at the rate that is best on average
    over one more run of each base, and the widening of each arm [studies, arms]. Arms are equal on
    average over bases, which differ by 0.03 and in their best rate."""
    rates = numpy.arange(-2, 3)[:, None, None]
    shift = generator.uniform(-0.5, 0.5, size=(studies, arms, 1, bases, 1))
    losses = 0.02 * (rates - shift) ** 2 + 0.03 * generator.normal(
        size=(studies, arms, 1, bases, 1)
    )
    losses = losses + 0.02 * generator.normal(size=(studies, arms, 5, bases, seeds + 1))
    choosing = losses[..., 0]
    best = choosing.mean(-1).argmin(2)[..., None]
    middle = numpy.median(choosing, -1)
    lowest = numpy.take_along_axis(middle, best, axis=2)[..., 0]
    between = lowest - middle.min(2) + could_gain(middle)
    between[numpy.abs(best[..., 0] - 2) == 2] = numpy.inf
    judging = numpy.take_along_axis(losses[..., 1:], best[..., None, None], axis=2)[:, :, 0]
    return judging, between


def one_base(seeds: int, studies: int) -> Shares:
    """A claim about bases from the seeds of one; and Student over as many bases, one seed each."""
    generator = numpy.random.default_rng(0)
    losses, between = draw_bases(seeds, seeds, studies, generator)
    differences = losses[:, 1] - losses[:, 0]
    of_bases = by_student(differences[..., 0], between.max(1))
    return by_student(differences[:, 0]), of_bases


def bases_after_holm(bases: int, studies: int) -> Shares:
    """Any verdict on four arms that equal a fifth, over bases with two judging seeds each, after
    Holm: without the widening, and with it."""
    losses, between = draw_bases(bases, 2, studies, numpy.random.default_rng(0), arms=5)
    means = losses.mean(-1)
    differences = means[:, 1:] - means[:, :1]
    error = differences.std(-1, ddof=1) / numpy.sqrt(bases)
    shares = []
    for widening in (0.0, numpy.maximum(between[:, 1:], between[:, :1])):
        size = (numpy.abs(differences.mean(-1)) - widening).clip(min=0)
        p_values = 2 * stdtr(bases - 1, -size / error)
        shares.append(float((4 * p_values.min(1) <= ERROR_RATE).mean()))
    return shares[0], shares[1]


HOLES = {
    "any verdict on four contrasts in two outcomes": two_outcomes,
    "any verdict on three commands of four contrasts": three_commands,
    "one base for all; as many bases as seeds": one_base,
}
"""Before a rule, and after."""

MEASURED = {
    "any verdict on four contrasts over so many bases; unwidened / widened": bases_after_holm
}
"""Below the error rate either way."""


def print_holes(studies: int) -> None:
    print(
        "| no difference; wrong verdicts before / after the rule | "
        + " | ".join(f"{seeds} seeds" for seeds in (3, 5))
        + " |"
    )
    print("|---|" + "---:|" * 2)
    for name, simulate in REFUSED.items():
        shares = [simulate(seeds, studies) for seeds in (3, 5)]
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f} / none" for share in shares) + " |")
    for name, simulate in (HOLES | MEASURED).items():
        cells = [simulate(seeds, studies) for seeds in (3, 5)]
        print(
            f"| {name} | "
            + " | ".join(f"{100 * before:.1f} / {100 * after:.1f}" for before, after in cells)
            + " |"
        )


def print_power(studies: int) -> None:
    print(
        "| what varies, where 80 % are announced | "
        + " | ".join(f"{n} seeds" for n in SEEDS)
        + " |"
    )
    print("|---|" + "---:|" * len(SEEDS))
    for design in WITH_POWER:
        for comparisons in (1, 10):
            cells = [found(replace(design, seeds=seeds), comparisons, studies) for seeds in SEEDS]
            print(
                row(
                    design.name + (f", {comparisons} comparisons" if comparisons > 1 else ""), cells
                ),
                flush=True,
            )


def found(design: Design, comparisons: int, studies: int) -> float:
    """Share of studies that show the difference announced as found by 80 %."""
    design = with_detectable_difference(design, comparisons)
    return rates(design, by_verdict, studies, ERROR_RATE / comparisons)[0]


def row(name: str, shares: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{share:.1%}".replace("%", " %") for share in shares) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--studies", type=int, default=20_000, help="simulated for each number of 200 problems"
    )
    studies = parser.parse_args().studies
    for print_table in (print_holes, print_tuning, print_errors, print_power):
        print_table(studies)
        print()


if __name__ == "__main__":
    main()
