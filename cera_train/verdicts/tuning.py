"""What the choice of a tuned value leaves open: a better one may lie between two of its grid."""

import math

import numpy
from numpy import ndarray
from numpy.typing import ArrayLike


def could_gain(losses: ArrayLike, places: ArrayLike) -> ndarray:
    """The most by which a value between those of a grid could lower the grid's lowest loss, if the
    loss is convex. The smaller of two bounds:

    - Near its minimum a loss is a parabola, and the minimum is at most half of the longer step
      away. If neighbours one step away are higher by b on average, it is at most b / 4 lower.
    - A convex loss lies above its chords, extended. Between the lowest value and a neighbour, the
      chords of the two segments beyond bound it.

    Args:
        losses: [..., values], in the order of the grid; infinite where a value diverged.
        places: [values], where each value lies, such as its logarithm, of which the loss is convex.
    """
    near = around(losses, places)
    ahead, after = near[..., 3]
    bend = (ahead / after).sum(0) / after.sum(0)
    # A neighbour that diverged says nothing about the bend.
    bend = numpy.where(numpy.isinf(bend), (ahead / after**2).min(0), bend)
    bound = numpy.minimum(bend * after.max(0) ** 2 / 4, by_chords(near))
    return numpy.where(numpy.isinf(bound), 0.0, bound)


def by_chords(near: ndarray) -> ndarray:
    """Between the lowest value and the next, a loss is above the chord that ends at the lowest,
    which falls, and the one that begins at the next, which climbs."""
    (_, behind, _, ahead, farther), (_, before, _, after, beyond) = numpy.moveaxis(near, -1, 1)
    with numpy.errstate(invalid="ignore"):
        fall = behind * after / -before
        climb = (farther - ahead) * after / (beyond - after)
        crossing = fall * (climb - ahead) / (fall + climb)
        crossing = numpy.where(numpy.isinf(behind), climb - ahead, crossing)
    is_known = numpy.isfinite(farther) & numpy.isfinite(ahead)
    return numpy.where(is_known, numpy.maximum(crossing, 0.0), fall).max(0)


def around(losses: ArrayLike, places: ArrayLike) -> ndarray:
    """How much higher the two values before the lowest, itself and the two after it are, infinite
    beyond the grid, and how far away: [2, 2, ..., 5], each upwards and downwards."""
    losses = numpy.asarray(losses, dtype=float)
    beyond = numpy.full((*losses.shape[:-1], 2), math.inf)
    padded = numpy.concatenate([beyond, losses, beyond], -1)
    padded_places = numpy.pad(places, 2, mode="reflect", reflect_type="odd")
    near = losses.argmin(-1)[..., None] + numpy.arange(5)
    both = (numpy.take_along_axis(padded, near, -1), padded_places[near])
    rises, steps = (values - values[..., 2:3] for values in both)
    return numpy.array([[rises, rises[..., ::-1]], [steps, -steps[..., ::-1]]])
