"""`cera-plan -m` of a halving and of a study: every run as far as it trains, and what a study can find."""

from __future__ import annotations

import contextlib
import re
import sys
from types import SimpleNamespace

import pytest
from made_studies import make_study

from cera_train.cli.plan import main
from cera_train.evaluation.power import detectable
from cera_train.evaluation.verdict import Variances
from cera_train.planning.plan import make_plan
from cera_train.planning.power import Power
from cera_train.settings.planning import PlanConfig
from cera_train.sweep import plan as plan_module
from cera_train.sweep import power as power_module
from cera_train.sweep.rungs import Course

HALVING = ["-m", "+recipe=quickstart", "train.max_updates=100", "train.eval_every=null", "hydra/sweeper=halving"]
STUDY = ["-m", "+study=first_look", "study.tune={optimizer.lr: [1e-3, 3e-3, 1e-2]}", "study.tune_seeds=1"]
"""3 arms, 3 seeds; update 8 of 24."""


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


def test_a_halving_counts_each_run_as_far_as_it_trains(plan_command):
    grid = ["adapter=cera,lora", "optimizer.lr=1e-4,3e-4,1e-3,3e-3", "train.seed=0,1", "hydra.sweeper.first=20"]
    out = plan_command(*HALVING, *grid)
    assert "each       4 candidates: 2 to update 20, 1 to update 40, 1 to its end at 100\n" in out
    updates = 2 * (2 * 20 + 40 + 100)
    for adapter in ("cera", "lora"):
        trainable, runs, _, _, total, *_ = row(out, f"adapter={adapter}")
        assert (trainable, runs, total) == (f"{2 * 16 * (32 + 32 + 32 + 16):,}", "8", f"{updates}")
    runs, _, _, total, *_ = row(out, "2 groups")
    assert (runs, total) == ("16", f"{2 * updates}")


@pytest.mark.parametrize(
    ("candidates", "study", "text"),
    [
        (1, None, "1 candidate: 1 to its end at 100"),
        (1, SimpleNamespace(seeds=2, tune_seeds=1), "1 candidate: 1 to its end at 100; then the best on 1 more seed"),
        (
            2,
            SimpleNamespace(seeds=4, tune_seeds=2),
            "2 candidates: 2 to its end at 100, each on 2 seeds; then the best on 2 more seeds",
        ),
        (2, SimpleNamespace(seeds=3, tune_seeds=3), "2 candidates: 2 to its end at 100, each on 3 seeds"),
    ],
)
def test_one_of_a_kind_is_no_plural(candidates, study, text):
    whole = SimpleNamespace(totals=SimpleNamespace(updates=100))
    group = plan_module.PlannedGroup("", "", whole, [Course(candidates, (), True)], [])
    assert plan_module.describe_runs(group, study) == text


def test_the_dearest_candidate_is_taken_to_go_furthest(plan_command, monkeypatch):
    planned = []
    monkeypatch.setattr(plan_module, "print_groups", lambda groups, study: planned.extend(groups))
    plan_command(*HALVING, "adapter.r=32,2", "hydra.sweeper.tune=[adapter.r]", "hydra.sweeper.first=1")
    (group,) = planned
    assert [(run.config.adapter.r, run.totals.updates) for run in group.runs] == [(2, 1), (32, 100)]
    assert group.whole.config.adapter.r == 32


def test_a_study_is_planned_shape_by_shape_and_has_the_power_of_its_verdicts(plan_command, monkeypatch):
    planned = []
    monkeypatch.setattr(plan_module, "make_plan", lambda run, **how: planned.append(run) or make_plan(run, **how))
    spread = ["plan.spread.seed={loss:0.01}", "plan.spread.residual={loss:0.02}"]
    out = plan_command(*STUDY, *spread, "study.outcomes=[loss,logistic_map]", "train.tasks=[logistic_map]")
    assert out.startswith("study      Does CeRA reach a lower loss than LoRA on the logistic map")
    assert [run.study.arm for run in planned] == ["lora", "identity", "cera"]  # not for each learning rate and seed
    assert "each       3 candidates: 2 to update 8, 1 to its end at 24; then the best on 2 more seeds\n" in out
    runs, _, _, updates, *_ = row(out, "3 cells")
    assert (runs, updates) == ("15", f"{3 * (2 * 8 + 3 * 24)}")
    assert row(out, "cera, adapter.r=16")[:2] == [f"{2 * 16 * (32 + 32 + 32 + 16):,}", "5"]

    smallest = detectable(Variances(0.01**2, 0, 0.02**2), seeds=3, problems=20, comparisons=3, power=0.8)
    assert f"detects    loss: a difference of {smallest:.2g} with probability 0.8: 3 seeds, 20 rows, Holm's" in out
    assert "Holm's first step over 3 contrasts\n" in out
    assert "by plan.spread: 0.01 between seeds, 0 between rows, 0.02 beyond both\n" in out
    assert re.search(r"study.matters=0.02 takes \d+ seeds\n", out)
    assert out.endswith(
        "logistic_map: set plan.spread.seed={logistic_map: ...}, or plan.variances to a finished study\n"
    )


@pytest.mark.slow
def test_each_task_of_a_study_shows_its_rows(plan_command):
    out = plan_command("-m", "+study=plateau_hunt", "study.task=sums_1,backward_1", "adapter.r=4")
    assert re.findall(r"^(data|task) +(\w+: \w+.*? of \d+) tokens", out, re.MULTILINE) == [
        ("data", "sums_1: reasoning_gym (chain_sum): 800 rows of 23"),
        ("task", "sums_1: reasoning_gym: 100 problems of 25"),
        ("data", "backward_1: reasoning_gym (spell_backward): 800 rows of 20"),
        ("task", "backward_1: reasoning_gym: 100 problems of 20"),
    ]


@pytest.mark.parametrize(
    ("matters", "text"),
    [
        (0.5, "study.matters=0.5 is found"),
        (0.01, r"study.matters=0.01 takes \d+ seeds or [\d,]+ rows"),
        (1e-6, "study.matters=1e-06 takes both more seeds and more rows"),
    ],
)
def test_what_it_takes_to_find_what_matters(matters, text):
    power = Power("loss", 5, 20, 3, Variances(0.0, 0.01**2, 0.05**2))
    assert re.fullmatch(text, power_module.describe_need(matters, power, "rows"))


def test_variances_are_read_from_a_finished_study(tmp_path, monkeypatch):
    study = make_study(tmp_path, seeds=12, outcomes=["loss", "gsm8k"], noise=0.01)
    monkeypatch.setattr(power_module, "read_study", lambda folder: study)
    found = power_module.variances_measured(study.folder)
    assert list(found) == ["loss", "gsm8k"]
    assert found["loss"].seed == pytest.approx(2 * 0.01**2, rel=0.5)  # two arms; two contrasts of 12 seeds
    assert found["gsm8k"].problem + found["gsm8k"].residual > 0.1
    given = PlanConfig(variances=str(study.folder))
    assert power_module.known_variances(study.config, given) == found


def test_variances_take_a_finished_study_with_seeds(tmp_path, monkeypatch):
    study = make_study(tmp_path / "cut", seeds=2)
    monkeypatch.setattr(power_module, "read_study", lambda folder: study)
    (study.cells[0].runs[1] / "result.json").unlink()
    with pytest.raises(ValueError, match="is unfinished: cera, adapter.r=16: no result of seed 1. Run it to its end"):
        power_module.variances_measured(study.folder)
    study = make_study(tmp_path / "one", seeds=1)
    with pytest.raises(ValueError, match="has one seed an arm, which tells nothing of others"):
        power_module.variances_measured(study.folder)


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ([*STUDY, "plan.spread.seed={math:0.01}"], "plan.spread: math is no outcome of this study: choose from loss."),
        ([*STUDY, "study.outcomes=[score]"], "study.outcomes: no run has score: name a task in train.tasks"),
        ([*STUDY, "plan.variances=outputs/no"], "outputs/no holds no study"),
        ([*STUDY, "plan.compare=[dora]"], "plan.compare=['dora'] sets other adapters beside one plan; with -m, sweep"),
        ([*STUDY, "study.baseline=dora"], "study.baseline=dora: no such arm"),
        ([*HALVING, "optimizer.lr=1e-4,1e-3", "hydra.sweeper.first=100"], "hydra.sweeper.first=100: a job has train"),
        ([*HALVING, "adapter.r=1,2", "hydra.sweeper.first=5"], "tune=optimizer.lr: it is no dimension of this grid"),
    ],
    ids=str,
)
def test_what_cannot_run_is_not_planned(plan_command, arguments, mistake):
    assert mistake in plan_command(*arguments)
