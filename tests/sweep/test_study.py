"""A study: arms that differ in what they name, each tuned by halving and run with every seed at its best."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from made_sweeps import cera_train, make_study_file, states

from cera_train.common.errors import UserError
from cera_train.config import Config
from cera_train.sweep.config import StudyConfig
from cera_train.sweep.folder import RECORD, read_record
from cera_train.sweep.rungs import HALVING
from cera_train.sweep.study import holds_study, read_study
from cera_train.sweep.table import is_finished

FILE = {
    "study": {
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
    },
    "train": {"max_updates": 100},
}
BEST = {"lora": 1e-3, "cera": 1e-2, "relu": 1e-3, "b": 1e-3}


def write_study(folder: Path, **changes: object) -> list[str]:
    """conf/study/which.yaml with some changes to its section; the arguments that run it."""
    return make_study_file(folder, FILE | {"study": FILE["study"] | changes})


class Trainer:
    """Leaves what runs would. An arm's loss is least at its value of BEST."""

    def __init__(self) -> None:
        self.began: list[tuple[str, int, int]] = []
        self.lost: set[str] = set()

    def __call__(self, config: Config) -> dict:
        folder, total = Path(config.output_dir) / config.name, config.train.max_updates
        if config.name in self.lost:
            raise KeyboardInterrupt
        if (folder / "result.json").exists():
            return {}
        folder.mkdir(exist_ok=True)
        path = folder / "metrics.jsonl"
        begin = json.loads(path.read_text().splitlines()[-1])["update"] if path.exists() else 0
        end = min(config.train.stop_at or total, total)
        loss = abs(math.log10(config.optimizer.lr / BEST[config.study.arm])) + 100 / end + config.train.seed / 100
        (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"max_updates": total}, "data": {}}))
        with path.open("a") as file:
            file.write(json.dumps({"update": end, "eval/loss": loss, "eval/perplexity": math.exp(loss)}) + "\n")
        if end == total:
            (folder / "result.json").write_text(json.dumps({"updates": end, "eval/perplexity": math.exp(loss)}))
        self.began.append((config.name, begin, end))
        return {"eval/perplexity": math.exp(loss)}


@pytest.fixture
def trainer(monkeypatch):
    trainer = Trainer()
    monkeypatch.setattr("cera_train.training.launch.launch", trainer)
    return trainer


def job(arm: str, r: int, lr: float, seed: int) -> str:
    return f"adapter.r={r},optimizer.lr={lr},study.arm={arm},train.seed={seed}"


CELLS = [(arm, 4) for arm in ("lora", "cera", "relu")]


def test_each_arm_is_tuned_on_one_seed_and_run_with_all_at_its_best(tmp_path, monkeypatch, trainer, capfd):
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path)) == 0
    rung = [(job(arm, r, lr, 0), 0, 20) for arm, r in CELLS for lr in (0.001, 0.01)]
    last = [(job(arm, r, BEST[arm], 0), 20, 100) for arm, r in CELLS]
    seeds = [(job(arm, r, BEST[arm], 1), 0, 100) for arm, r in CELLS]
    assert trainer.began == [*rung, *last, *seeds]
    sweep = tmp_path / "outputs" / "which"
    assert is_finished(sweep)
    assert sorted(states(sweep).values()) == ["finished"] * 6 + ["stopped"] * 3
    output = capfd.readouterr().out
    assert "seeds      3 jobs to their end, seed 1" in output
    assert "hydra/sweeper=basic" not in output  # which a study refuses

    study = read_study(sweep)
    assert not study.missing()
    assert [(cell.arm, cell.condition, cell.candidate) for cell in study.cells] == [
        (arm, f"adapter.r={r}", f"optimizer.lr={BEST[arm]}") for arm, r in CELLS
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


def test_the_same_command_trains_nothing_again_and_more_seeds_train_those(tmp_path, monkeypatch, trainer):
    arguments = write_study(tmp_path)
    cera_train(monkeypatch, tmp_path, *arguments)
    trainer.began.clear()
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert not trainer.began
    assert cera_train(monkeypatch, tmp_path, *arguments, "study.seeds=3") == 0
    assert trainer.began == [(job(arm, r, BEST[arm], 2), 0, 100) for arm, r in CELLS]
    assert len(read_study(tmp_path / "outputs" / "which").cells[0].runs) == 3


@pytest.mark.parametrize("lost", [job("cera", 4, 0.001, 0), job("cera", 4, 0.01, 1)])
def test_a_killed_study_goes_on_where_it_was(tmp_path, monkeypatch, trainer, lost):
    arguments = write_study(tmp_path)
    trainer.lost = {lost}
    assert cera_train(monkeypatch, tmp_path, *arguments) == 130
    study = read_study(tmp_path / "outputs" / "which")
    assert any("nothing chosen" in text or "no result of seed" in text for text in study.missing())
    done = set(trainer.began)
    trainer.lost = set()
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert len(trainer.began) == len(set(trainer.began)) == 6 + 3 + 3
    assert lost in [name for name, *_ in trainer.began if name not in {name for name, *_ in done}]
    assert not read_study(tmp_path / "outputs" / "which").missing()


def test_a_part_of_the_arms_can_run_elsewhere(tmp_path, monkeypatch, trainer):
    arguments = [*write_study(tmp_path), "study.arm=cera", "adapter.r=4"]
    assert cera_train(monkeypatch, tmp_path, *arguments) == 0
    assert [name for name, _, end in trainer.began if end == 100] == [job("cera", 4, 0.01, seed) for seed in range(2)]


def test_tasks_are_a_dimension_of_overrides(tmp_path, monkeypatch, trainer):
    tasks = {"tame": ["data.logistic_map.growth=3.2"], "wild": ["data.logistic_map.growth=3.9"]}
    settings = dict(tasks=tasks, conditions={"adapter.r": [4]}, tune={"optimizer.lr": [1e-3]}, first=None, seeds=1)
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path, **settings)) == 0
    sweep = tmp_path / "outputs" / "which"
    assert [name for name, *_ in trainer.began] == [
        f"adapter.r=4,optimizer.lr=0.001,study.arm={arm},study.task={task},train.seed=0"
        for task in tasks for arm in ("lora", "cera", "relu")
    ]  # fmt: skip
    overrides = {job["name"]: job["overrides"] for job in read_record(sweep / RECORD)["jobs"]}
    assert all(tasks["wild" if "wild" in name else "tame"][0] in words for name, words in overrides.items())
    study = read_study(sweep)
    assert [cell.condition for cell in study.cells[:3]] == ["tame, adapter.r=4"] * 3
    assert not (sweep / HALVING).exists()
    assert len(study.contrasts()) == 6


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (dict(baseline=None), [], "study.baseline=null: a study needs the arm that others are compared with: choose"),
        (dict(baseline="dora"), [], "study.baseline=dora: no such arm: choose one of lora, cera, relu"),
        (dict(arms={"lora": ["adapter=lora"]}), [], "study.arms has lora: a study compares two or more"),
        (dict(contrasts={"x": ["lora"]}), [], r"study.contrasts.x=\['lora'\]: expected two arms"),
        (dict(contrasts={"x": ["lora", "dora"]}), [], "study.contrasts.x=.*: no arm dora"),
        (dict(tune={}), [], "study.tune={}: name what each arm may choose"),
        (dict(tune={"adapter.r": [4]}), [], "study.conditions.adapter.r: study.tune sets it too"),
        (dict(tune={"adapter.activation": ["silu"]}), [], "study.tune.adapter.activation: an arm or a task sets it"),
        (dict(first=None), [], "study.first=null: give the updates"),
        (dict(seeds=0), [], "study.seeds=0 must be 1 or more"),
        (dict(outcomes=["gsm8k"]), [], "study.outcomes: no run has gsm8k: add it to train.tasks"),
        (dict(outcomes=["score"]), [], "study.outcomes: no run has score: name a task in train.tasks"),
        (dict(arms={"lora": ["adapter=lora"], "b": ["adapter=cera", "adapter.alpha=32"]}), [], None),
        (dict(arms={"lora": ["adapter=lora"], "b": ["adapter=rslora"]}), [],
         r"study.arms.b \(adapter.r=4\): adapter.alpha is 16.0, and None in lora, which the arm does not name"),
        (dict(arms={"lora": ["adapter=lora"], "b": ["adapter=cera", "optimizer.weight_decay=0.5"]}), [], None),
        (dict(arms={"lora": ["adapter=lora"], "b": ["adapter=dora"]}), [],
         r"study.equal=parameters \(adapter.r=4\): b has [\d,]+ trainable parameters, and lora [\d,]+. Change an arm"),
        (dict(arms={"lora": ["adapter=lora"], "b": ["adapter=dora"]}, equal="rank"), [], None),
        (dict(), ["hydra/sweeper=basic"], r"\+study=NAME has a sweeper: leave hydra/sweeper=... out"),
        (dict(), ["train.max_updates=20"], "study.first=20: a job has train.max_updates=20"),
        (dict(), ["train.seed=7"], "train.seed=7: a study has the seeds from 0: study.seeds=N"),
    ],
)  # fmt: skip
def test_a_study_that_could_not_answer_is_refused(tmp_path, monkeypatch, trainer, capfd, changes, arguments, message):
    code = cera_train(monkeypatch, tmp_path, *write_study(tmp_path, **{"contrasts": {}} | changes), *arguments)
    error = capfd.readouterr().err
    assert (code, bool(error)) == ((0, False) if message is None else (2, True))
    if message is not None:
        (line,) = error.splitlines()
        assert re.search(message, line), line
        assert not (tmp_path / "outputs").exists()


def test_a_task_whose_problems_are_trained_on_is_refused(tmp_path, monkeypatch, trainer, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(9))
    )
    arguments = [
        *("data=gsm8k", "data.path=null", f"data.train_files=[{rows}]", "data.eval_rows=2", "train.tasks=[gsm8k]"),
        f"train.task_settings={{gsm8k: {{files: [{rows}]}}}}",
    ]
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path), *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "train.tasks=[gsm8k]: 7 of its problems are among the training rows, such as 'What is 0 + 1?'" in line
    assert not trainer.began


def test_a_study_is_a_sweep(tmp_path, monkeypatch, capfd):
    assert cera_train(monkeypatch, tmp_path, *write_study(tmp_path)[1:]) == 2
    assert "+study=which is a grid of runs: add -m to take them all" in capfd.readouterr().err
    assert cera_train(monkeypatch, tmp_path, "-m", "+recipe=quickstart", "hydra/sweeper=study") == 2
    assert "hydra/sweeper=study: a study's file says what it compares: add +study=NAME" in capfd.readouterr().err
    assert not holds_study(tmp_path)
    with pytest.raises(UserError, match="holds no study: expected a folder that cera-train -m"):
        read_study(tmp_path)


def test_every_study_of_ours_can_be_composed(compose):
    from cera_train.cli.composition import options

    for name in options("study"):
        study = compose(f"+study={name}").study
        assert isinstance(study, StudyConfig)
        assert study.question.endswith("?")
        assert compose(f"+study={name}").name == name
