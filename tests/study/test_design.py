"""Studies that could not answer their question, and plans of those that can: every run, and what
the study can find."""

import pytest

from cera_train.common.terminal import duration
from cera_train.planning.table import START
from cera_train.verdicts.contrast import Variances
from cera_train.verdicts.power import detectable

STUDY = ["-m", "+study=first_look", "study.tune={optimizer.lr: [1e-3, 1e-2]}"]
"""3 arms, 3 seeds, 24 updates."""


@pytest.fixture
def plan_command(tmp_path, tiny_folder, run_command, capfd):
    """plan_command("-m", ...) -> what cera-plan prints of it, for the tiny model on an H100, or a
    mistake."""

    def plan_command(*arguments: str) -> str:
        run_command("cera-plan", *arguments, f"model.path={tiny_folder}", "plan.gpu=h100")
        assert not list(tmp_path.iterdir())
        printed = capfd.readouterr()
        return printed.out or printed.err

    return plan_command


def row(out: str, name: str) -> list[str]:
    """The cells of a table's row, after its name."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).split()


def test_a_study_is_planned_and_has_the_power_of_its_verdicts(plan_command):
    spread = "plan.spread={loss:[0.01,0,0.02]}"
    outcomes = ["study.outcomes=[loss,logistic_map]", "train.tasks=[logistic_map]"]
    study = [*STUDY, spread, *outcomes]  # the same plans each time
    out = plan_command(*study, "study.tune_seeds=1")
    assert out.startswith("study      Does CeRA reach a lower loss than LoRA on the logistic map")
    assert "\nedges      optimizer.lr has 2 values: the best is at an edge" in out
    runs, _, _, updates, time, *_ = row(out, "3 cells")
    assert time == duration(12 * START)  # the model is tiny
    assert "\nedges " not in plan_command(*study, "study.extend=true")
    assert (runs, updates) == ("12", f"{3 * (2 + 2) * 24}")  # the compared seeds run one value
    assert row(out, "cera, adapter.r=16")[:2] == [f"{2 * 16 * (32 + 32 + 32 + 16):,}", "4"]

    smallest = detectable(Variances(0.01**2, 0, 0.02**2), seeds=2, problems=20, contrasts=3)
    assert (
        f"detects    loss: a difference of {smallest:.2g} with probability 0.8: 2 seeds, 20 rows, "
        f"Holm's" in out
    )
    assert "study.matters=0.02 is not detected\n" in out
    *_, line = out.splitlines()
    assert "logistic_map: set plan.spread={logistic_map: [...]} to the square roots of" in line
    assert "Holm's first step over 3 contrasts" in plan_command(*study, "study.arm=cera")


@pytest.mark.slow
def test_every_base_of_a_study_is_planned(plan_command):
    bases = '++study.bases={few: ["train.max_updates=10"], many: ["train.max_updates=30"]}'
    study = [*STUDY, "study.arm=lora,cera", "study.seeds=2", "plan.spread={loss:[0.01,0,0]}"]
    runs, _, _, updates, *_ = row(plan_command(*study, bases), "2 cells")
    assert (runs, updates) == ("16", f"{2 * 2 * 2 * (10 + 30)}")
    out = plan_command(*study, bases, "study.base=many")
    assert row(out, "2 cells")[0] == "8"
    assert "detects    loss: a difference of inf with probability 0.8: 1 base, " in out
