"""A study whose jobs train nothing."""

from __future__ import annotations

import math
from pathlib import Path

from made_sweeps import make_study_file
from pretended_jobs import Launcher

STUDY = {
    "question": "Which is better?",
    "arms": {
        "lora": ["adapter=lora"],
        "cera": ["adapter=cera"],
        "relu": ["adapter=cera", "adapter.activation=relu"],
    },
    "baseline": "lora",
    "contrasts": {"the gate": ["relu", "cera"]},
    "conditions": {"adapter.r": [4]},
    "tune": {"optimizer.lr": [1e-3, 1e-2]},
    "first": 20,
    "seeds": 2,
}
BEST = {"lora": 1e-3, "cera": 1e-2, "relu": 1e-3, "b": 1e-3}


def write_study(folder: Path, **changes: object) -> list[str]:
    """conf/study/which.yaml with some changes to its section; the arguments that run it."""
    return make_study_file(folder, {"study": STUDY | changes, "train": {"max_updates": 100}})


class StudyLauncher(Launcher):
    """An arm's loss is least at its value of BEST."""

    def __init__(self, sweep: Path) -> None:
        super().__init__(sweep, loss_of)


def loss_of(values: dict[str, str], update: int) -> float:
    missed = math.log10(float(values["optimizer.lr"]) / BEST[values["study.arm"]])
    return abs(missed) + 100 / update + int(values["train.seed"]) / 100
