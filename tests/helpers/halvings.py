"""The jobs of a halving that train nothing."""

from __future__ import annotations

import math
from pathlib import Path

from pretended_jobs import Launcher

NAMES = [
    f"adapter={adapter},optimizer.lr={lr}" for adapter in ("cera", "lora") for lr in (0.0001, 0.0003, 0.001, 0.003)
]
CERA, LORA = NAMES[:4], NAMES[4:]


class HalvingLauncher(Launcher):
    """The loss is least at lr=1e-3."""

    def __init__(self, sweep: Path, updates: int = 100) -> None:
        super().__init__(sweep, loss_of, updates)


def loss_of(values: dict[str, str], update: int) -> float:
    return abs(math.log10(float(values["optimizer.lr"])) + 3) + 100 / update
