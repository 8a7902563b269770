"""A study runs its whole grid, each arm with its own overrides, and compares arms at the values of
the lowest mean loss."""

import itertools
import math
import re
from pathlib import Path

import pytest
import yaml

from cera_train.common.files import options, read_json
from cera_train.common.settings import to_plain
from cera_train.settings.sweep import StudyConfig
from cera_train.study.design import StudySweeper
from cera_train.study.folder import find_study
from cera_train.sweep.folder import JOBS, RECORD, SweepRecord

ARMS = ("lora", "cera", "relu")


def job(arm: str, lr: float, seed: int) -> str:
    return f"adapter.r=4,optimizer.lr={lr},study.arm={arm},train.seed={seed}"


TWO = {"arms": {"lora": ["adapter=lora"], "cera": ["adapter=cera"]}, "contrasts": {}}
GRID = [job(arm, lr, seed) for arm in ARMS for lr in (0.001, 0.01) for seed in (0, 1)]


def rates(launcher) -> dict[str, str]:
    """Arm -> the rate at which it is compared."""
    return {
        cell.arm: cell.chosen.values["optimizer.lr"] for cell in find_study(launcher.sweep).cells
    }


def test_every_seed_runs_every_value(launcher, run_study, capfd):
    assert run_study() == 0
    assert launcher.began == GRID
    output = capfd.readouterr().out
    assert f"\n{job('relu', 0.01, 1)}  " in output
    assert output.endswith("verdict    cera-report outputs/which\n")
    assert "best" not in output
    study = find_study(launcher.sweep)
    assert not study.missing()
    assert rates(launcher) == {"lora": "0.001", "cera": "0.01", "relu": "0.001"}
    assert [run.folder.name for run in study.cells[1].runs] == [
        job("cera", 0.01, seed) for seed in range(2)
    ]
    assert [(each.asked, *(cell.arm for cell in each.cells)) for each in study.comparisons()] == [
        ("the gate", "relu", "cera"),
        ("cera or lora", "lora", "cera"),
        ("relu or lora", "lora", "relu"),
    ]


def test_a_job_gets_the_secret_that_the_record_leaves_out(launcher, run_study, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_abcdefghijkl")
    label = "adapter.label=hf_abcdefghijkl"
    assert run_study(label, "study.arm=cera") == 0
    assert all(label in read_json(file)["overrides"] for file in (launcher.sweep / JOBS).iterdir())
    assert "hf_abcdefghijkl" not in (launcher.sweep / RECORD).read_text()


def test_with_tune_seeds_the_first_seeds_choose_and_the_others_are_compared(launcher, run_study):
    losses = {("0", "0.001"): 1.0, ("0", "0.01"): 1.1, ("1", "0.001"): 1.4, ("1", "0.01"): 1.2}
    launcher.loss = lambda values: losses.get((values["train.seed"], values["optimizer.lr"]), 1.0)
    assert run_study("study.arm=cera", "study.tune_seeds=2", "study.seeds=3") == 0
    assert launcher.began == [*(name for name in GRID if "cera" in name), job("cera", 0.01, 2)]
    study = find_study(launcher.sweep)
    assert not study.missing()
    assert [run.folder.name for run in study.cells[0].runs] == [job("cera", 0.01, 2)]


def test_every_arm_runs_on_every_base_and_chooses_one_value_for_all(launcher, run_study):
    """LoRA is best at 0.01 on base b alone, and by more."""
    growths = {"a": "3.5", "b": "3.7"}
    launcher.loss = lambda values: {("a", "0.001"): 1.0, ("b", "0.01"): 1.0}.get(
        (values["study.base"], values["optimizer.lr"]), 1.1 + 0.1 * (values["study.base"] == "b")
    )
    bases = {name: [f"data.logistic_map.growth={r}"] for name, r in growths.items()}
    study = {"bases": bases, "tune_seeds": 1, "contrasts": {}}
    assert run_study("study.arm=lora,cera", study=study) == 0
    assert launcher.began == [
        f"adapter.r=4,optimizer.lr={lr},study.arm={arm},study.base={base},train.seed={seed}"
        for seed, lrs in ((0, (0.001, 0.01)), (1, (0.01,)))
        for arm, base, lr in itertools.product(("lora", "cera"), growths, lrs)
    ]
    for overrides in SweepRecord.read(launcher.sweep / RECORD).jobs.values():
        words = dict(word.split("=", 1) for word in overrides)
        assert words["data.logistic_map.growth"] == growths[words["study.base"]]
    assert rates(launcher)["lora"] == "0.01"
    assert run_study("study.base=c", study=study) == 2


def test_extend_adds_values_until_the_best_lies_inside(launcher, run_study):
    launcher.loss = lambda values: 1 + abs(math.log10(float(values["optimizer.lr"]) / 0.1))
    assert run_study("study.extend=true", "study.arm=cera", "adapter.r=4") == 0
    grid = [name for name in GRID if "cera" in name]
    assert launcher.began == grid + [job("cera", lr, seed) for lr in (0.1, 1) for seed in (0, 1)]
    (cell,) = find_study(launcher.sweep).cells
    assert (cell.chosen.values, cell.edges) == ({"optimizer.lr": "0.1"}, [])
    launcher.began.clear()
    assert run_study("study.extend=true", "study.arm=cera", "adapter.r=4") == 0
    assert not launcher.began


def test_extend_fills_the_grid_of_two_tuned_settings(launcher, run_study):
    """Both are best at 0.4, one step beyond."""

    def loss(values):
        return 1 + sum((float(values[key]) - 0.4) ** 2 for key in tune)

    launcher.loss = loss
    tune = {"adapter.dropout": [0.1, 0.2], "optimizer.weight_decay": [0.1, 0.2]}
    study = {"tune": tune, "seeds": 1}
    assert run_study("study.extend=true", "study.arm=cera", study=study) == 0
    (cell,) = find_study(launcher.sweep).cells
    assert {*cell.chosen.values.values()} == {"0.4"}
    assert not cell.obstacles


def test_an_edited_study_keeps_no_old_runs(launcher, run_study, monkeypatch, capfd):
    sweepers = []
    setup = StudySweeper.setup

    def kept(sweeper, **settings):
        sweepers.append(sweeper)
        setup(sweeper, **settings)

    monkeypatch.setattr(StudySweeper, "setup", kept)
    assert run_study(study=TWO) == 0
    for cell in find_study(launcher.sweep).cells:
        for point, run in itertools.product(cell.grid, cell.tuning_runs):
            config = to_plain(sweepers[0].compose(cell.overrides(point, run)))
            (cell.folder(point, run) / "config.yaml").write_text(yaml.safe_dump(config))
    launcher.began.clear()
    assert run_study(study=TWO) == 0
    for cell in find_study(launcher.sweep).cells:  # a lost job: others tell that the arm was edited
        (cell.folder(cell.grid[0], cell.tuning_runs[0]) / "result.json").unlink()
    arms = {"lora": ["adapter=lora"], "cera": ["adapter=cera", "adapter.b_lr_ratio=4"]}
    assert run_study(study=TWO | {"arms": arms}) == 2
    message = r"which/\S+ holds a run with another config: adapter.b_lr_ratio was 1.0, is 4.0. Set"
    assert re.search(message, capfd.readouterr().err)
    assert not launcher.began


def test_a_study_varies_nothing_that_it_does_not_compare(launcher, run_study, capfd):
    assert run_study("train.batch_size=8,32") == 2
    assert "train.batch_size=8,32: a study varies its arms" in capfd.readouterr().err
    assert not launcher.began


def test_a_killed_study_runs_what_failed_or_is_missing_and_later_only_more_seeds(
    launcher, run_study, run_command, capfd
):
    launcher.failing = {job("cera", 0.01, 1)}
    launcher.killed = {GRID[8]}
    assert run_study() == 130
    missing = [job("cera", 0.01, 1), *GRID[8:]]
    assert find_study(launcher.sweep).missing() == missing
    assert run_command("cera-report", "outputs/which") == 2
    error = capfd.readouterr().err
    assert "unfinished study. Its command runs what is missing: " in error
    assert f": {missing[0]}, and 4 more." in error
    launcher.killed = set()
    assert run_study() == 1
    launcher.failing = set()
    launcher.began.clear()
    assert run_study() == 0
    assert launcher.began == missing[:1]
    assert run_command("cera-report", "outputs/which") == 0
    launcher.began.clear()
    assert run_study("study.seeds=3") == 0
    assert launcher.began == [job(arm, lr, 2) for arm in ARMS for lr in (0.001, 0.01)]


def test_a_judging_run_that_diverges_chooses_no_value_and_allows_no_verdict(
    launcher, run_study, run_command
):
    """Neither at a value where none diverged, nor by the seeds that are left."""
    launcher.diverging = {job("cera", 0.01, 1)}
    assert run_study("study.tune_seeds=1", "study.seeds=4") == 0
    assert rates(launcher)["cera"] == "0.01"
    assert job("cera", 0.001, 1) not in launcher.began
    assert run_command("cera-report", "outputs/which") == 0
    results = read_json(Path("report/which/study_results.json"))
    of_cera, _, of_relu = results["contrasts"]
    assert "cera: 1 of 3 judging runs diverged" in of_cera["obstacles"]
    assert (of_cera["verdict"], of_cera["difference"], of_cera["p_holm"]) == ("not shown", None, 1)
    assert of_relu["difference"] is not None


def test_an_arm_that_diverges_at_every_value_gets_no_verdict(
    launcher, run_study, run_command, capfd
):
    launcher.diverging = {job("cera", lr, 1) for lr in (0.001, 0.01)}
    run_study(study=TWO)
    assert run_command("cera-report", "outputs/which") == 2
    assert "cera, adapter.r=4 diverged at every value of study.tune" in capfd.readouterr().err


def test_every_study_of_conf_composes(compose):
    for name in options("study"):
        config = compose(f"+study={name}")
        assert isinstance(config.study, StudyConfig)
        assert config.study.question.endswith("?")
        assert config.name == {"dose": "v_proj_d0"}.get(name, name)  # dose: a study a teacher


@pytest.mark.parametrize(
    ("key", "values", "sign"),
    [
        ("adapter.dropout", [0.2, 0.4], -1),
        ("train.batch_size", [1, 2], 1),
    ],
)
def test_a_grid_is_not_extended_past_zero_or_an_impossible_value(
    launcher, run_study, key, values, sign
):
    """A dropout of 1.6 is refused, and half a row too."""
    launcher.loss = lambda words: 1 + sign * 0.1 * float(words[key])
    study = {"tune": {key: values}, "seeds": 1}
    assert run_study("study.extend=true", "study.arm=cera", study=study) == 0
    assert len(launcher.began) == (3 if key == "adapter.dropout" else 2)  # 0.8
