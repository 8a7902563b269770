"""A study: arms that differ in what they name, each tuned by halving and run with every seed at its best."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from made_sweeps import cera_train, record_job, states
from pretended_jobs import leave_run
from pretended_studies import BEST, StudyLauncher, loss_of, write_study

from cera_train.cli.composition import without_hydra
from cera_train.settings.run import Config
from cera_train.settings.sweep import StudyConfig
from cera_train.sweep.record import RECORD, SweepRecord
from cera_train.sweep.rungs import HALVING
from cera_train.sweep.study import read_study
from cera_train.sweep.table import is_finished


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    launcher = StudyLauncher(tmp_path / "outputs" / "which")
    launcher.launch_by_hydra(monkeypatch)
    return launcher


def job(arm: str, r: int, lr: float, seed: int) -> str:
    return f"adapter.r={r},optimizer.lr={lr},study.arm={arm},train.seed={seed}"


CELLS = [(arm, 4) for arm in ("lora", "cera", "relu")]


def test_each_arm_is_tuned_on_one_seed_and_run_with_all_at_its_best(tmp_path, monkeypatch, launcher, capfd):
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path)) == 0
    rung = [(job(arm, r, lr, 0), 0, 20) for arm, r in CELLS for lr in (0.001, 0.01)]
    last = [(job(arm, r, BEST[arm], 0), 20, 100) for arm, r in CELLS]
    seeds = [(job(arm, r, BEST[arm], 1), 0, 100) for arm, r in CELLS]
    assert launcher.began == [*rung, *last, *seeds]
    sweep = tmp_path / "outputs" / "which"
    assert is_finished(sweep)
    assert sorted(states(sweep).values()) == ["finished"] * 6 + ["stopped"] * 3
    output = capfd.readouterr().out
    assert "seeds      3 jobs to the end, seed 1" in output
    assert "hydra/sweeper=basic" not in output  # which a study refuses

    study = read_study(sweep)
    assert not study.missing()
    assert [(cell.arm, cell.condition, cell.chosen) for cell in study.cells] == [
        (arm, f"adapter.r={r}", {"optimizer.lr": f"{BEST[arm]}"}) for arm, r in CELLS
    ]
    assert study.cells[1].runs == {seed: sweep / job("cera", 4, 0.01, seed) for seed in range(2)}
    assert [(asked, first.arm, second.arm, second.condition) for asked, first, second in study.contrasts()] == [
        (asked, *pair, "adapter.r=4")
        for asked, pair in {
            "cera or lora": ("lora", "cera"),
            "relu or lora": ("lora", "relu"),
            "the gate": ("relu", "cera"),
        }.items()
    ]


def chosen(tmp_path: Path) -> list[str]:
    return [cell.chosen["optimizer.lr"] for cell in read_study(tmp_path / "outputs" / "which").cells]


def test_several_seeds_choose_by_their_mean_and_the_others_follow(tmp_path, monkeypatch, launcher):
    by_seed = {("0", "0.001"): 1.0, ("0", "0.01"): 1.1, ("1", "0.001"): 1.4, ("1", "0.01"): 1.2}
    launcher.loss = lambda values, update: by_seed.get((values["train.seed"], values["optimizer.lr"]), 1.0)
    arguments = [*write_study(tmp_path), "study.seeds=3"]
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.tune_seeds=2") == 0
    rung = [(job(arm, r, lr, seed), 0, 20) for arm, r in CELLS for lr in (0.001, 0.01) for seed in (0, 1)]
    last = [(job(arm, r, 0.01, seed), 20, 100) for arm, r in CELLS for seed in (0, 1)]
    assert launcher.began == [*rung, *last, *((job(arm, r, 0.01, 2), 0, 100) for arm, r in CELLS)]
    assert chosen(tmp_path) == ["0.01"] * 3  # seed 0 alone would choose 0.001
    launcher.began.clear()
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.tune_seeds=2") == 0
    assert not launcher.began


def test_all_seeds_may_choose(tmp_path, monkeypatch, launcher, capfd):
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path, tune_seeds=2)) == 0
    assert len(launcher.began) == 3 * (2 * 2 + 2)
    assert chosen(tmp_path) == [f"{BEST[arm]}" for arm, _ in CELLS]
    assert "\nseeds  " not in capfd.readouterr().out  # none is left
    assert not read_study(tmp_path / "outputs" / "which").missing()


def test_the_last_choice_is_by_the_mean_of_all_seeds_and_not_of_one_that_failed(tmp_path, monkeypatch, launcher):
    """Both values tie at every rung and train to the end."""
    ends = {("0", "0.001"): 1.0, ("0", "0.01"): 1.2, ("1", "0.001"): 1.5, ("1", "0.01"): 1.2}
    launcher.loss = lambda values, update: ends[values["train.seed"], values["optimizer.lr"]] if update == 100 else 2.0
    arguments = write_study(tmp_path, tune_seeds=2)
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.arm=lora,cera") == 0
    assert chosen(tmp_path) == ["0.01", "0.01"]
    record_job(tmp_path / "outputs" / "which", job("cera", 4, 0.01, 1), "diverged")
    (tmp_path / "outputs" / "which" / job("cera", 4, 0.01, 1) / "result.json").unlink()
    assert chosen(tmp_path) == ["0.01", "0.001"]


def test_other_seeds_cannot_choose_in_the_same_folder(tmp_path, monkeypatch, launcher, capfd):
    arguments = write_study(tmp_path)
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    launcher.began.clear()
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.tune_seeds=2") == 2
    assert "among other candidates. Choose another name=..., or remove" in capfd.readouterr().err
    assert not launcher.began


def test_a_job_beyond_a_rung_names_the_setting_of_a_study(tmp_path, monkeypatch, launcher, capfd):
    values = {"study.arm": "cera", "optimizer.lr": "0.001", "train.seed": "0"}
    folder = launcher.sweep / job("cera", 4, 0.001, 0)
    folder.parent.mkdir(parents=True)
    leave_run(folder, 100, 100, functools.partial(loss_of, values))
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path)) == 2
    assert "compared at this rung. Choose another study.first=..., or another name=..." in capfd.readouterr().err


def test_its_jobs_are_what_their_arms_name(tmp_path, monkeypatch):
    """By Hydra's launcher, which composes every job."""
    begun = []

    def launch(config: Config) -> dict:
        values = {"optimizer.lr": config.optimizer.lr, "study.arm": config.study.arm, "train.seed": config.train.seed}
        begun.append((config.adapter.kind, config.adapter.activation, *values.values(), config.train.stop_at))
        total = config.train.max_updates
        loss = functools.partial(loss_of, values)
        leave_run(Path(config.output_dir) / config.name, config.train.stop_at or total, total, loss)
        return {}

    monkeypatch.setattr("cera_train.training.launch.launch", launch)
    arguments = [*write_study(tmp_path), "study.arm=lora,relu"]
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    arms = [("lora", "silu", "lora"), ("cera", "relu", "relu")]
    assert begun == [
        *((kind, gate, lr, arm, 0, 20) for kind, gate, arm in arms for lr in (1e-3, 1e-2)),
        *((kind, gate, 1e-3, arm, seed, None) for seed in (0, 1) for kind, gate, arm in arms),
    ]


def test_the_same_command_trains_nothing_again_and_more_seeds_train_those(tmp_path, monkeypatch, launcher):
    arguments = write_study(tmp_path)
    cera_train(monkeypatch, tmp_path, *arguments)
    launcher.began.clear()
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert not launcher.began
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.seeds=3") == 0
    assert launcher.began == [(job(arm, r, BEST[arm], 2), 0, 100) for arm, r in CELLS]
    assert len(read_study(tmp_path / "outputs" / "which").cells[0].runs) == 3


def test_a_finished_study_needs_its_rows_no_more(tmp_path, monkeypatch, launcher, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "answer": "#### 2"}\n' * 4)
    data = ["data=gsm8k", "data.path=null", f"data.train_files=[{rows}]", "data.eval_rows=2", "train.tasks=[gsm8k]"]
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 2", "answer": "#### 4"}\n')
    data.append(f"train.task_settings={{gsm8k: {{files: [{questions}]}}}}")
    arguments = [*write_study(tmp_path), *data]
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    rows.unlink()
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.seeds=3") == 2
    assert f"data.train_files={rows}: cannot read the file" in capfd.readouterr().err


def test_a_job_is_composed_once_to_be_checked(tmp_path, monkeypatch, launcher):
    checked = []

    def check(composed):
        checked.append(tuple(composed.hydra.overrides.task))
        return without_hydra(composed)

    monkeypatch.setattr("cera_train.cli.train.without_hydra", check)
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path)) == 0
    assert len(checked) == len(set(checked)) == 4  # one of each arm, and one with the second value of what is tuned


@pytest.mark.parametrize("killed", [job("cera", 4, 0.001, 0), job("cera", 4, 0.01, 1)])
def test_a_killed_study_goes_on_where_it_was(tmp_path, monkeypatch, launcher, killed):
    arguments = write_study(tmp_path)
    launcher.killed = {killed}
    assert cera_train(monkeypatch, tmp_path, *arguments) == 130
    study = read_study(tmp_path / "outputs" / "which")
    assert any("nothing chosen" in text or "no result of seed" in text for text in study.missing())
    done = set(launcher.began)
    launcher.killed = set()
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert len(launcher.began) == len(set(launcher.began)) == 6 + 3 + 3
    assert killed in [name for name, *_ in launcher.began if name not in {name for name, *_ in done}]
    assert not read_study(tmp_path / "outputs" / "which").missing()


def test_a_part_of_the_arms_can_run_elsewhere(tmp_path, monkeypatch, launcher):
    arguments = [*write_study(tmp_path), "study.arm=cera", "adapter.r=4"]
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert [name for name, _, end in launcher.began if end == 100] == [job("cera", 4, 0.01, seed) for seed in range(2)]


def test_tasks_are_a_dimension_of_overrides(tmp_path, monkeypatch, launcher):
    tasks = {"tame": ["data.logistic_map.growth=3.2"], "wild": ["data.logistic_map.growth=3.9"]}
    settings = dict(tasks=tasks, conditions={"adapter.r": [4]}, tune={"optimizer.lr": [1e-3]}, first=None, seeds=1)
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path, **settings)) == 0
    sweep = tmp_path / "outputs" / "which"
    assert [name for name, *_ in launcher.began] == [
        f"adapter.r=4,optimizer.lr=0.001,study.arm={arm},study.task={task},train.seed=0"
        for task in tasks for arm in ("lora", "cera", "relu")
    ]  # fmt: skip
    overrides = SweepRecord.read(sweep / RECORD).overrides
    assert all(tasks["wild" if "wild" in name else "tame"][0] in words for name, words in overrides.items())
    study = read_study(sweep)
    assert [cell.condition for cell in study.cells[:3]] == ["tame, adapter.r=4"] * 3
    assert not (sweep / HALVING).exists()
    assert len(study.contrasts()) == 6


def test_every_study_of_ours_can_be_composed(compose):
    from cera_train.cli.composition import options

    for name in options("study"):
        config = compose(f"+study={name}")
        assert isinstance(config.study, StudyConfig)
        assert config.study.question.endswith("?")
        assert config.name == name
