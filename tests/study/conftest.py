"""Studies whose jobs train nothing: each leaves what a run would, with losses drawn around a given
one."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra.core.plugins import Plugins
from made_files import write_json

from cera_train.runs.results import DIVERGED, LOSSES_AFTER, GradedProblem, TokenLosses, write_grades
from cera_train.study.folder import Study, find_study
from cera_train.sweep.folder import JOBS, RECORD, SweepRecord, job_name, job_status

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
    "seeds": 2,
}
BEST = {"lora": 1e-3, "cera": 1e-2, "relu": 1e-3}

Loss = Callable[[dict[str, str]], float]
"""The held-out loss of a job by its overrides, key -> value."""


def loss_by_rate(values: dict[str, str]) -> float:
    """Least at the arm's value of BEST."""
    return 1 + abs(math.log10(float(values["optimizer.lr"]) / BEST[values["study.arm"]]))


def values_of(overrides: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in overrides)


def leave_run(folder: Path, loss: float, seed: int, scores: float | None = None) -> None:
    """What a finished run leaves: 80 held-out rows around a loss, and the scores of 80 problems."""
    result = {
        "eval/perplexity": math.exp(loss),
        "updates": 9,
        "seconds": 60.0,
        "trainable_parameters": 1234,
        "spectrum/effective_rank/mean": 3.5,
    }
    write_json(folder / "result.json", result)
    environment = {
        "gpus": [],
        "platform": "Linux",
        "python": "3.12",
        "packages": {"torch": "2.13"},
        "rows": {"train": "a", "held_out": "b"},
    }
    write_json(folder / "environment.json", environment)
    tokens = np.random.default_rng(0).integers(3, 9, size=80)
    draw = np.random.default_rng([seed, len(folder.name)])
    noise = draw.normal(size=tokens.sum())
    losses = loss + 0.01 * (noise - noise.mean())
    TokenLosses(tokens, losses.astype("float32")).write(folder / LOSSES_AFTER)
    if scores is not None:
        right = [float(draw.random() < scores) for _ in range(80)]
        problems = [
            GradedProblem(f"p{n}", score, "right" if score else "wrong")
            for n, score in enumerate(right)
        ]
        (folder / "grades").mkdir(exist_ok=True)
        write_grades(folder, "gsm8k", problems)


class Launcher:
    """In the place of Hydra's launchers. Some jobs fail or diverge, and one is killed with the
    sweep."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.loss = loss_by_rate
        self.scores: float | None = None  # the share of problems that a run solves
        self.began: list[str] = []
        self.failing = set[str]()
        self.diverging = set[str]()
        self.killed = set[str]()

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list:
        swept = SweepRecord.read(self.sweep / RECORD).swept
        for words in jobs:
            name = job_name(words, swept)
            if job_status(self.sweep, name).is_over:  # as MissingJobs
                continue
            values = values_of(words)
            if name in self.killed:
                raise KeyboardInterrupt
            self.began.append(name)
            error = None
            if name in self.failing:
                error = "the disk is full"
            elif name in self.diverging:
                error = "the loss of update 3 is not finite"
                (self.sweep / name).mkdir(exist_ok=True)
                (self.sweep / name / DIVERGED).write_text(error)
            else:
                seed = int(values["train.seed"])
                leave_run(self.sweep / name, self.loss(values), seed, scores=self.scores)
            record = self.sweep / JOBS / f"{name}.json"
            write_json(record, {"overrides": words, "error": error})
        return []


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """The launcher of every sweep."""
    launcher = Launcher(tmp_path / "outputs" / "which")
    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *arguments, **settings: launcher)
    return launcher


@pytest.fixture
def run_study(tmp_path: Path, run_command: Callable[..., int]) -> Callable[..., int]:
    """run_study(*arguments, study={...}, **file) -> the exit status of cera-train -m
    +study=which."""
    defaults = {
        "protocol": "paper",
        "model": "smollm2_135m_pypi",
        "data": "logistic_map",
        "hydra/sweeper": "study",
    }

    def run_study(*arguments: str, study: dict | None = None, **file: dict) -> int:
        content = {
            "defaults": [{f"override /{group}": name} for group, name in defaults.items()],
            "name": "which",
        }
        content |= {"study": STUDY | (study or {}), "train": {"max_updates": 100}} | file
        path = tmp_path / "conf" / "study" / "which.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# @package _global_\n" + yaml.safe_dump(content, sort_keys=False))
        words = ["-m", "+study=which", "--config-dir", str(tmp_path / "conf"), *arguments]
        return run_command("cera-train", *words)

    return run_study


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    """make_study(loss, scores=..., name=..., **section) -> a finished study of LoRA and CeRA."""

    def make_study(
        loss: Loss = loss_by_rate,
        scores: Loss = lambda values: None,
        name: str = "which",
        **section: object,
    ) -> Study:
        settings = STUDY | {
            "contrasts": {},
            "arms": {"lora": ["adapter=lora"], "cera": ["adapter=cera"]},
        }
        settings |= {"tune": {"optimizer.lr": [3e-4, 1e-3, 3e-3]}} | section
        folder = tmp_path / "outputs" / name
        grid = {"study.arm": settings["arms"], "study.base": settings.get("bases", {})}
        grid = {key: values for key, values in grid.items() if values}
        grid |= {**settings["conditions"], **settings["tune"]}
        grid["train.seed"] = range(settings["seeds"])
        jobs = {}
        for values in itertools.product(*grid.values()):
            overrides = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            job = job_name(overrides, list(grid))
            jobs[job] = overrides
            words = values_of(overrides)
            leave_run(folder / job, loss(words), int(words["train.seed"]), scores=scores(words))
        record = {
            "swept": list(grid),
            "jobs": jobs,
            "fixed": [],
            "command": ["cera-train", "-m", "+study=which"],
            "study": settings,
        }
        write_json(folder / RECORD, record)
        return find_study(folder)

    return make_study
