"""Contrasts of studies as rows of a forest plot, in units of the smallest difference that matters
to their study."""

import math
import re
from collections.abc import Sequence

from cera_train.report.forest import Mark, Row
from cera_train.settings.sweep import LOSS
from cera_train.study.results import OutcomeContrast

CAPTION = (
    "The first-named arm minus the second, in multiples of the smallest difference that matters "
    "(dotted); the axis is linear near zero and logarithmic far from it. Line: 95 % interval. "
    "Strokes below: seeds, or bases. Grey: differences that a study would miss in more than one of "
    "five repeats. Too small: the interval lies between the dotted lines."
)


def number(outcome: str, value: float, sign: str = "") -> str:
    """Nats of a loss, points of a score; empty without a bound or a difference."""
    if not math.isfinite(value):
        return ""
    return f"{value:{sign}.4f}" if outcome == LOSS else f"{100 * value:{sign}.1f}"


def interval(outcome: str, lower: float, upper: float) -> str:
    return " to ".join(filter(None, (number(outcome, end, "+") for end in (lower, upper))))


def verdict(contrast: OutcomeContrast) -> str:
    """With what could have been detected, where nothing was."""
    if contrast.obstacles:
        return "no verdict"
    if contrast.verdict == "not shown" and math.isfinite(contrast.detectable):
        return f"not shown (detects {number(contrast.outcome, contrast.detectable)})"
    return contrast.verdict


def contrast_name(contrast: OutcomeContrast) -> str:
    """A difference of differences has the name of its question."""
    is_plain = "(" not in contrast.first + contrast.second
    return f"{contrast.second} - {contrast.first}" if is_plain else contrast.asked


def brief(condition: str) -> str:
    """`r = 16, even` of `adapter.r=16, data.train_files=['folder/even.jsonl']`."""
    condition = re.sub(r"[\w.]+=\[?'?[^',]*/([^/',]+?)(\.jsonl)?'?\]?(?=,|$)", r"\1", condition)
    return re.sub(r"(?:\w+\.)*(\w+)=", r"\1 = ", condition)


def contrast_row(contrast: OutcomeContrast, matters: float, label: str) -> Row:
    outcome = contrast.outcome
    # A loss is better below, a score above.
    unit = matters if outcome == LOSS else -matters
    lower, upper = sorted([contrast.lower / unit, contrast.upper / unit])
    mark: Mark = contrast.verdict
    words = verdict(contrast)
    if mark == "not shown" and not contrast.obstacles and contrast.is_within(matters):
        mark = "too small"
        words = mark
    difference = number(outcome, contrast.difference, "+")
    bounds = interval(outcome, contrast.lower, contrast.upper)
    return Row(
        label,
        f"{difference} ({bounds})" if bounds else difference,
        words,
        mark,
        contrast.difference / unit,
        lower,
        upper,
        contrast.detectable / matters,
        [repeat / unit for repeat in contrast.by_seed],
    )


def unit_of(outcome: str, matters: Sequence[float]) -> str:
    """What a unit of rows is, in words; of rows of several studies, their range."""
    factor = 1 if outcome == LOSS else 100
    ends = dict.fromkeys(f"{factor * end:g}" for end in (min(matters), max(matters)))
    unit = "nats" if outcome == LOSS else f"points of {outcome}"
    return f"what matters: {' to '.join(ends)} {unit}"
