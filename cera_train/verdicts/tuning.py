"""What the choice of a tuned value leaves open: a better one may lie between two of its grid."""

import math

import numpy
from numpy import ndarray
from numpy.typing import ArrayLike


def could_gain(losses: ArrayLike) -> ndarray:
    """The most by which a value between those of a grid could lower the grid's lowest loss, if the
    loss is convex in the logarithm of the value. The smaller of two bounds:

    - Near its minimum a loss is a parabola. If the neighbours are higher by b on average, the
      minimum is at most b / 4 lower.
    - A convex loss lies above its chords, extended. Between the lowest value and a neighbour, the
      chords of the two segments beyond bound it.

    Args:
        losses: [..., values], in the order of the grid, a constant ratio apart; infinite where a
            value diverged.
    """
    left, right = (_rise(losses, steps) for steps in (-1, 1))
    # A neighbour that diverged says nothing about the bend.
    has_both = numpy.isfinite(left) & numpy.isfinite(right)
    parabola = numpy.where(has_both, (left + right) / 2, numpy.minimum(left, right)) / 4
    bound = numpy.minimum(parabola, chords_could_gain(losses))
    return numpy.where(numpy.isinf(bound), 0.0, bound)


def chords_could_gain(losses: ArrayLike) -> ndarray:
    """The second bound alone."""
    left, right = (_rise(losses, steps) for steps in (-1, 1))
    return numpy.maximum(
        _below(left, right, _rise(losses, 2)), _below(right, left, _rise(losses, -2))
    )


def _rise(losses: ArrayLike, steps: int) -> ndarray:
    """How much higher than the lowest loss the one so many steps from it is; infinite beyond the
    grid."""
    losses = numpy.asarray(losses, dtype=float)
    beyond = numpy.full((*losses.shape[:-1], 2), math.inf)
    padded = numpy.concatenate([beyond, losses, beyond], -1)
    place = losses.argmin(-1)[..., None] + 2
    return numpy.take_along_axis(padded, place + steps, -1)[..., 0] - losses.min(-1)


def _below(behind: ndarray, ahead: ndarray, farther: ndarray) -> ndarray:
    """The most by which a convex curve falls below zero between 0 and 1, by its values at -1, 1 and
    2: above the chord from -1 to 0, -behind x, and that from 1 to 2."""
    with numpy.errstate(invalid="ignore"):
        slope = farther - ahead
        crossing = behind * (slope - ahead) / (behind + slope)
        crossing = numpy.where(numpy.isinf(behind), slope - ahead, crossing)
    is_known = numpy.isfinite(farther) & numpy.isfinite(ahead)
    return numpy.where(is_known, numpy.maximum(crossing, 0.0), behind)
