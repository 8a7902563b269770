"""What a forest plot of studies says beside its rows."""

import re
from collections.abc import Sequence

from cera_train.settings.sweep import LOSS
from cera_train.study.results import OutcomeContrast

CAPTION = (
    "The first-named arm minus the second, in multiples of the smallest difference that matters "
    "(dotted); the axis is linear near zero and logarithmic far from it. Line: 95 % interval. "
    "Strokes below: seeds, or bases. Grey: differences that a study would miss in more than one of "
    "five repeats. Too small: the interval lies between the dotted lines."
)


def contrast_name(contrast: OutcomeContrast) -> str:
    """A difference of differences has the name of its question."""
    is_plain = "(" not in contrast.first + contrast.second
    return f"{contrast.second} - {contrast.first}" if is_plain else contrast.asked


def brief(condition: str) -> str:
    """`r = 16, even` of `adapter.r=16, data.train_files=['folder/even.jsonl']`."""
    condition = re.sub(r"[\w.]+=\[?'?[^',]*/([^/',]+?)(\.jsonl)?'?\]?(?=,|$)", r"\1", condition)
    return re.sub(r"(?:\w+\.)*(\w+)=", r"\1 = ", condition)


def unit_of(outcome: str, matters: Sequence[float]) -> str:
    """What a unit of rows is, in words; of rows of several studies, their range."""
    factor = 1 if outcome == LOSS else 100
    ends = dict.fromkeys(f"{factor * end:g}" for end in (min(matters), max(matters)))
    unit = "nats" if outcome == LOSS else f"points of {outcome}"
    return f"what matters: {' to '.join(ends)} {unit}"
