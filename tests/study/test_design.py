"""Studies that could not answer their question, and plans of those that can: every run, and what
the study can find."""

import re

import pytest

from cera_train.common.errors import UserError
from cera_train.settings.sweep import StudyConfig
from cera_train.settings.values import checked
from cera_train.verdicts.contrast import Variances
from cera_train.verdicts.power import detectable

TWO = {"lora": ["adapter=lora"], "b": ["adapter=cera"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(baseline=None), "study.baseline=None: no such arm: choose one of lora, cera, relu"),
        (
            dict(arms={"lora": [], "a b": []}),
            r"study.arms.a b.\[key\]=a b: string should match pattern",
        ),
        (
            dict(contrasts={"x": [["lora", "cera"], ["lora"]]}),
            "expected two arms of .*or two pairs",
        ),
        (
            dict(bases={"a": ["adapter.activation=relu"]}),
            "study.bases: an arm sets adapter.activation too. Keep one",
        ),
        (dict(tune={"adapter.r": [4]}), "study.conditions.adapter.r: study.tune sets it too"),
        (
            dict(tune={"adapter.activation": ["silu"]}),
            "study.tune.adapter.activation: an arm sets it",
        ),
        (
            dict(tune_seeds=2),
            "study.tune_seeds=2: the first of study.seeds=2 choose, and the others are compared",
        ),
    ],
    ids=str,
)
def test_a_section_that_could_not_answer_is_refused(study_section, changes, message):
    with pytest.raises(UserError, match=message):
        checked(StudyConfig, study_section | {"contrasts": {}} | changes, "study")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (dict(outcomes=["gsm8k"]), [], "study.outcomes: lora has no gsm8k: add it to train.tasks"),
        (
            dict(arms=TWO | {"b": ["adapter=randlora"]}),
            [],
            r"study.arms.b \(adapter.r=4\): adapter.dropout is 0.0, and 0.1 in lora, which the arm "
            r"does not name",
        ),
        (
            dict(arms=TWO | {"b": ["adapter=lora"]}),
            [],
            r"study.arms.b \(adapter.r=4\): the same run as lora. Change one",
        ),
        (
            dict(arms=TWO | {"b": ["adapter=dora"]}),
            [],
            r"study.equal=parameters \(adapter.r=4\): b has [\d,]+ trainable parameters, and lora "
            r"[\d,]+. Change an arm",
        ),
        (dict(arms=TWO | {"b": ["adapter=dora"]}, equal="none"), [], None),
        (
            dict(),
            ["hydra/sweeper=basic"],
            r"\+study=NAME has a sweeper: leave hydra/sweeper=... "
            r"out",
        ),
        (dict(), ["train.seed=7"], "train.seed=7: a study has the seeds from 0: study.seeds=N"),
        (
            dict(),
            ["study.tune_seeds=1", "launch.detach=true", "hydra/launcher=slurm_cpu"],
            "launch.detach=true with study.tune_seeds or",
        ),
    ],
)
def test_a_study_that_could_not_answer_is_refused(
    tmp_path, launcher, run_study, capfd, changes, arguments, message
):
    code = run_study(*arguments, study={"contrasts": {}} | changes)
    error = capfd.readouterr().err
    assert (code, bool(error)) == ((0, False) if message is None else (2, True))
    if message is not None:
        (line,) = error.splitlines()
        assert re.search(message, line), line
        assert not (tmp_path / "outputs").exists()


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
    out = plan_command(*STUDY, spread, *outcomes, "study.tune_seeds=1")
    assert out.startswith("study      Does CeRA reach a lower loss than LoRA on the logistic map")
    assert "\ntime       of updates and evaluations: what each run needs to start " in out
    runs, _, _, updates, *_ = row(out, "3 cells")
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
    assert "Holm's first step over 3 contrasts" in plan_command(*STUDY, spread, "study.arm=cera")


def test_every_base_of_a_study_is_planned(plan_command):
    bases = '++study.bases={few: ["train.max_updates=10"], many: ["train.max_updates=30"]}'
    spread = "plan.spread={loss:[0.01,0,0]}"
    runs, _, _, updates, *_ = row(plan_command(*STUDY, bases, spread), "3 cells")
    assert (runs, updates) == ("36", f"{3 * 2 * 3 * (10 + 30)}")
    out = plan_command(*STUDY, bases, spread, "study.base=many")
    assert row(out, "3 cells")[0] == "18"
    assert "detects    loss: a difference of inf with probability 0.8: 1 base, " in out


@pytest.mark.parametrize(
    ("setting", "mistake"),
    [
        (
            "plan.spread={math:[0.01,0,0]}",
            "plan.spread: math is no outcome of this study: choose from loss.",
        ),
        ("sweep.metric=gsm8k/exact", "sweep.metric=gsm8k/exact: no job has this figure"),
    ],
)
def test_what_cannot_run_is_not_planned(plan_command, setting, mistake):
    assert mistake in plan_command(*STUDY, setting)
