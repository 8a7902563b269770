"""The smallest true difference that gets its verdict."""

import math

import numpy
from scipy.optimize import brentq
from scipy.special import betaincinv, chdtri, ndtr, ndtri

from cera_train.verdicts.contrast import Spread, Variances
from cera_train.verdicts.interval import ERROR_RATE

POWER = 0.8  # the probability with which a difference counts as detected


def detectable(variances: Variances | None, seeds: int, problems: int, contrasts: int = 1) -> float:
    """The smallest difference that gets its verdict with probability POWER; inf with one seed or
    one problem."""
    if variances is None or min(seeds, problems) < 2:
        return math.inf
    scale = math.sqrt(
        variances.seed / seeds
        + variances.problem / problems
        + variances.residual / (seeds * problems)
    )
    if scale == 0:
        return 0.0

    def excess(difference: float) -> float:
        return power_of(variances, difference, seeds, problems, contrasts) - POWER

    upper = scale
    while excess(upper) < 0:
        upper *= 2
    return float(brentq(excess, 0, upper, xtol=1e-12 * scale))


def power_of(
    variances: Variances, difference: float, seeds: int, problems: int, contrasts: int = 1
) -> float:
    """The probability of a verdict in the direction of this difference.

    With several contrasts, it is that of Holm's first step, where p is multiplied by their
    number: the later ones have more. The problems' part is taken as known, the seeds' part as
    drawn: it is integrated over its quantiles.
    """
    # Closer together where the variance is small: power is exact to 0.003.
    edges = numpy.linspace(0, 1, 65) ** 2
    drawn = chdtri(seeds - 1, 1 - (edges[1:] + edges[:-1]) / 2) / (seeds - 1)
    residual = variances.residual / (seeds * problems)
    problem = variances.problem / problems
    spread = Spread(
        (variances.seed / seeds + residual) * drawn, seeds - 1, residual, problem, problems - 1
    )
    standard_error = math.sqrt(variances.seed / seeds + residual + problem)
    shares = ndtr((difference - spread.half_width(ERROR_RATE / contrasts)) / standard_error)
    return float((numpy.diff(edges) * shares).sum())


def detectable_between_runs(variance: float, problems: int, contrasts: int = 1) -> float:
    """The smallest true difference of two runs that gets its verdict with probability POWER, by the
    normal approximation; but at least what an exact test can show, even where all problems that
    differ do so in one direction; inf where no difference does.

    Args:
        variance: of the difference between problems.
        contrasts: their number, of which this is the first that Holm's method admits.
    """
    level = ERROR_RATE / contrasts
    by_error = float(ndtri(1 - level / 2) + ndtri(POWER)) * math.sqrt(variance / problems)
    differing = math.ceil(math.log2(2 / level))  # 2 * 0.5^differing is at most the level
    if differing > problems:
        return math.inf
    least = max(by_error, float(betaincinv(differing, problems - differing + 1, POWER)))
    return least if least <= 1 else math.inf
