"""A study's folder by hand: runs in the format that training leaves, whose losses and grades are drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType

import numpy as np
from made_runs import make_run, result_of

from cera_train.report.study.page import Records
from cera_train.runs.outcomes import LOSSES_AFTER, LOSSES_BEFORE, GradedProblem, TokenLosses, write_grades
from cera_train.runs.results import ENDINGS
from cera_train.settings.sweep import LOSS, StudyConfig
from cera_train.sweep.study import Cell, Study

GAINS = {("cera", 16): 0.0, ("cera", 64): 0.05, ("lora", 16): 0.0, ("lora", 64): 0.0}
"""Nats by which an arm at a rank is better than the baseline, or ten times the share of problems."""

TUNED = {"optimizer.lr": [1e-4, 1e-3, 1e-2]}


def make_study(
    folder: Path,
    gains: Mapping[tuple[str, int], float] = GAINS,
    seeds: int = 3,
    outcomes: Sequence[str] = (LOSS,),
    tasks: Sequence[str] = ("",),
    problems: int = 80,
    noise: float = 0.004,
    samples: int = 1,
    chosen: Mapping[str, str] = MappingProxyType({"optimizer.lr": "0.001"}),
    **config: object,
) -> Study:
    """A finished study of the arms and ranks of `gains`.

    Args:
        noise: the standard deviation of a seed's outcome.
    """
    arms = list(dict.fromkeys(arm for arm, _ in gains))
    ranks = sorted({rank for _, rank in gains})
    settings = {
        "question": "Is CeRA better than LoRA?",
        "arms": {arm: [f"adapter={arm}"] for arm in arms},
        "baseline": "lora",
        "tasks": {task: [f"data={task}"] for task in tasks if task},
        "conditions": {"adapter.r": ranks} if len(ranks) > 1 else {},
        "tune": TUNED,
        "first": 10,
        "seeds": seeds,
        "outcomes": list(outcomes),
    }
    cells = []
    for number, (task, rank, arm) in enumerate(product(tasks, ranks, arms)):
        runs = {}
        for seed in range(seeds):
            place = f"{f'study.task={task},' * bool(task)}study.arm={arm},adapter.r={rank},train.seed={seed}"
            draw = np.random.default_rng([number, seed])
            gain = gains[arm, rank] + noise * draw.normal()
            runs[seed] = _make_run(folder / place, arm, rank, seed, gain, problems, samples, outcomes, draw)
        choices = {"adapter.r": str(rank)} if len(ranks) > 1 else {}
        cells.append(Cell(arm, task, choices, dict(chosen), runs))
    return Study(folder, StudyConfig(**(settings | config)), cells)


def _make_run(
    path: Path, arm: str, rank: int, seed: int, gain: float, problems: int, samples: int, outcomes: Sequence[str],
    draw: np.random.Generator,
) -> Path:  # fmt: skip
    kind = arm if arm in ("cera", "lora", "dora") else "cera"
    make_run(path, **{"adapter.kind": kind, "adapter.r": rank, "train.seed": seed, "train.tasks": ["gsm8k"]})
    share = {"lora": 1.0, "cera": 0.8}.get(arm, 0.95)
    result = result_of(kind, rank, 2.0) | {"spectrum/linear_share/mean": share, "adapter/gamma": None}
    (path / "result.json").write_text(json.dumps(result))
    environment = {"command": ["cera-train"], "gpus": [], "cpu_threads": 2, "processes": 1, "python": "3.12.1",
                   "platform": "Linux", "packages": {"torch": "2.9.0"}}  # fmt: skip
    (path / "environment.json").write_text(json.dumps(environment))
    rows = np.random.default_rng(0)  # the same held-out rows for all
    tokens = rows.integers(3, 9, size=problems)
    before = rows.gamma(1.5, 1.2, size=tokens.sum()).astype("float32")
    after = 0.6 * before + 0.3 - gain + 0.01 * draw.normal(size=len(before))
    TokenLosses(tokens, before).write(path / LOSSES_BEFORE)
    TokenLosses(tokens, after.astype("float32")).write(path / LOSSES_AFTER)
    for task in (name for name in outcomes if name != LOSS):
        difficulty = np.random.default_rng(1).random(problems)
        graded = []
        for n in range(problems):
            is_right = draw.random(samples) < np.clip(1 - difficulty[n] + 10 * gain, 0, 1)
            wrong = list(ENDINGS)[1 + n % (len(ENDINGS) - 1)]
            endings = ["right" if right else wrong for right in is_right]
            graded.append(GradedProblem(f"id{n:03}", [float(right) for right in is_right], endings))
        write_grades(path, "gsm8k" if task == "score" else task, graded)
    return path


def records_of(study: Study) -> Records:
    decision = "study.arm=cera, loss at update 10: optimizer.lr=0.001 1.02 goes on; optimizer.lr=0.01 1.05 stops"
    return Records(f"cera-train -m +study={study.folder.name}", [decision])
