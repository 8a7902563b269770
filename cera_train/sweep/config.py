"""Settings of a sweep as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from cera_train.common.settings import setting


@dataclass
class SweepConfig:
    metric: str = setting("eval/perplexity", "nothing")
    """What the best job has the least or the most of, and what a sweeper that searches optimises: a figure of
    result.json, also one of train.tasks, such as gsm8k/exact."""
