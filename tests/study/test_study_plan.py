"""`cera-plan -m` of a study: every run, and what the study can find."""

from __future__ import annotations

import contextlib
import sys

import pytest

from cera_train.cli.plan import main
from cera_train.study.verdict import Variances, detectable

STUDY = ["-m", "+study=first_look", "study.tune={optimizer.lr: [1e-3, 3e-3, 1e-2]}"]
"""3 arms, 3 seeds, 24 updates."""


@pytest.fixture
def plan_command(tmp_path, tiny_folder, monkeypatch, capfd):
    """plan_command("-m", ...) -> what cera-plan prints of it, for the tiny model on an H100, or a mistake."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        tiny = [f"model.path={tiny_folder}", "plan.gpu=h100"]
        monkeypatch.setattr(sys, "argv", ["cera-plan", *arguments, *tiny])
        with contextlib.suppress(SystemExit):
            main()
        assert not list(tmp_path.iterdir())
        printed = capfd.readouterr()
        return printed.err or printed.out

    return run


def row(out: str, name: str) -> list[str]:
    """The cells of a table's row, after its name."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).split()


def test_a_study_is_planned_and_has_the_power_of_its_verdicts(plan_command):
    spread = "plan.spread={loss:[0.01,0,0.02]}"
    out = plan_command(*STUDY, spread, "study.outcomes=[loss,logistic_map]", "train.tasks=[logistic_map]")
    assert out.startswith("study      Does CeRA reach a lower loss than LoRA on the logistic map")
    runs, _, _, updates, *_ = row(out, "3 cells")
    assert (runs, updates) == ("27", f"{3 * 3 * 3 * 24}")
    assert row(out, "cera, adapter.r=16")[:2] == [f"{2 * 16 * (32 + 32 + 32 + 16):,}", "9"]

    smallest = detectable(Variances(0.01**2, 0, 0.02**2), seeds=3, problems=20, comparisons=3)
    assert f"detects    loss: a difference of {smallest:.2g} with probability 0.8: 3 seeds, 20 rows, Holm's" in out
    assert "study.matters=0.02 is not detected\n" in out
    assert out.endswith("logistic_map: set plan.spread={logistic_map: [...]}\n")


def test_with_tune_seeds_the_other_seeds_run_one_value(plan_command):
    runs, *_ = row(plan_command(*STUDY, "study.tune_seeds=1"), "3 cells")
    assert runs == f"{3 * (3 + 2)}"


@pytest.mark.parametrize(
    ("setting", "mistake"),
    [
        ("plan.spread={loss:[0.01,0.02]}", "plan.spread={'loss': [0.01, 0.02]}: expected three standard deviations"),
        ("plan.spread={math:[0.01,0,0]}", "plan.spread: math is no outcome of this study: choose from loss."),
    ],
)
def test_what_cannot_run_is_not_planned(plan_command, setting, mistake):
    assert mistake in plan_command(*STUDY, setting)
