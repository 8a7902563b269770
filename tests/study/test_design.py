"""Plans of studies: every run."""

import pytest

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


def test_every_run_of_a_study_is_planned(plan_command):
    out = plan_command(*STUDY, "study.tune_seeds=1", "train.tasks=[logistic_map]")
    assert out.startswith("study      Does CeRA reach a lower loss than LoRA on the logistic map")
    assert "\nedges      optimizer.lr has 2 values: the best is at an edge" in out
    runs, _, _, updates, *_ = row(out, "3 cells")
    assert "\ntask       logistic_map (generation time not counted)\n" in out
    assert "\nedges " not in plan_command(*STUDY, "study.extend=true")
    assert (runs, updates) == ("12", f"{3 * (2 + 2) * 24}")  # the compared seeds run one value
    assert row(out, "cera, adapter.r=16")[:2] == [f"{2 * 16 * (32 + 32 + 32 + 16):,}", "4"]


@pytest.mark.slow
def test_every_base_of_a_study_is_planned(plan_command):
    bases = '++study.bases={few: ["train.max_updates=10"], many: ["train.max_updates=30"]}'
    study = [*STUDY, "study.arm=lora,cera", "study.seeds=2"]
    runs, _, _, updates, *_ = row(plan_command(*study, bases), "2 cells")
    assert (runs, updates) == ("16", f"{2 * 2 * 2 * (10 + 30)}")
    out = plan_command(*study, bases, "study.base=many")
    assert row(out, "2 cells")[0] == "8"
