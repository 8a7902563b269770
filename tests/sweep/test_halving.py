"""Successive halving: its rule is Optuna's, its rungs survive a kill, and a job that goes on is a whole run."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from made_sweeps import cera_sweep, cera_train, record_job, record_sweep, states
from omegaconf import OmegaConf

from cera_train.common.errors import UserError
from cera_train.config import Config
from cera_train.runs.results import read_metrics
from cera_train.sweep.folder import JOBS, RECORD, read_record
from cera_train.sweep.halving import Halving
from cera_train.sweep.rungs import HALVING, Group, HalvingRecord, Rules, decide, goes_on, groups_of, loss_at
from cera_train.sweep.table import is_finished, print_sweep
from cera_train.training.train import train

# --- the rule --------------------------------------------------------------------------------------------------------


def optunas(table: dict[str, list[float]], factor: int) -> list[set[str]]:
    """Who goes on at each rung by Optuna's pruner. Each candidate is judged when all others have come to its rung; the
    pruner by itself judges each when it comes."""
    optuna = pytest.importorskip("optuna", reason="pip install hydra-optuna-sweeper")
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    rungs, alive = [], set(table)
    for rung in range(len(next(iter(table.values())))):
        passed = set()
        for name in alive:
            study = optuna.create_study(pruner=pruner)
            for other in table.keys() - {name}:
                reached = [at for at in range(rung + 1) if other in [set(table), *rungs][at]]
                attributes = {f"completed_rung_{at}": table[other][at] for at in reached}
                study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.PRUNED, system_attrs=attributes))
            trial, is_pruned = study.ask(), False
            for at in range(rung + 1):
                trial.report(table[name][at], factor**at)
                is_pruned = trial.should_prune()
            passed |= set() if is_pruned else {name}
        rungs.append(alive := passed)
    return rungs


def ours(table: dict[str, list[float]], factor: int) -> list[set[str]]:
    rungs, alive = [], list(table)
    for rung in range(len(next(iter(table.values())))):
        flags = goes_on([table[name][rung] for name in alive], factor)
        alive = [name for name, flag in zip(alive, flags, strict=True) if flag]
        rungs.append(set(alive))
    return rungs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore")
def test_who_goes_on_is_who_optunas_pruner_lets_go_on(seed):
    draw = random.Random(seed)
    count, factor = draw.randint(2, 9), draw.choice([2, 2, 3])
    losses = [1.0, 1.5, 2.0] if seed % 3 == 0 else [draw.random() for _ in range(100)]  # a few values: ties
    table = {f"lr={number}": [draw.choice(losses) for _ in range(3)] for number in range(count)}
    for name in draw.sample(list(table), (count - 1) // 2):  # the failed, which report an infinite loss
        table[name] = [math.inf] * 3
    assert ours(table, factor) == optunas(table, factor)


@pytest.mark.parametrize(
    ("losses", "flags"),
    [
        ([3.0, 1.0, 2.0, 4.0], "0110"),
        ([3.0, 1.0, 2.0, 4.0, 5.0], "01100"),  # the better half is at most half
        ([2.0, 1.0, 1.0], "011"),  # a tie decides nothing
        ([math.inf, 1.0, math.inf, math.inf], "0100"),  # a failed one never goes on
        ([math.inf, math.inf], "00"),
    ],
)
def test_the_better_half_goes_on(losses, flags):
    assert goes_on(losses, 2) == [flag == "1" for flag in flags]


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("count", range(1, 10))
def test_planned_courses_are_those_that_the_rule_leads_to(count, factor):
    rules, updates, draw = Rules(["optimizer.lr"], 5, factor), 42, random.Random(count)
    trained, alive, rung = dict.fromkeys(range(count), 0), list(range(count)), 1
    while len(alive) > 1 and rules.update(rung) < updates:  # as `Halving.sweep` goes on
        trained |= dict.fromkeys(alive, rules.update(rung))
        flags = goes_on([draw.random() for _ in alive], factor)
        alive, rung = [number for number, flag in zip(alive, flags, strict=True) if flag], rung + 1
    trained |= dict.fromkeys(alive, updates)
    planned = [
        updates if course.is_whole else course.rungs[-1]
        for course in rules.courses(count, updates)
        for _ in range(course.candidates)
    ]
    assert planned == sorted(trained.values())
    assert rules.courses(count, updates)[-1].rungs == tuple(map(rules.update, range(1, rung)))


def group_of(*seeds: int) -> Group:
    words = [[f"optimizer.lr={lr}", f"train.seed={seed}"] for lr in (1, 2) for seed in seeds]
    jobs = [{"name": ",".join(job), "overrides": job} for job in words]
    (group,) = groups_of({"jobs": jobs, "swept": ["optimizer.lr", "train.seed"]}, ["optimizer.lr"])
    return group


def test_the_loss_of_a_candidate_is_its_mean_over_seeds():
    losses = [1.0, 3.0, 1.5, 1.7]  # lr=1 has the best single seed
    decision = decide(group_of(1, 2), 1, 20, dict(zip(group_of(1, 2).jobs, losses, strict=True)), 2)
    assert [(outcome.loss, outcome.goes_on) for outcome in decision.candidates] == [(2.0, False), (1.6, True)]
    losses[3] = math.inf  # one failed seed is a failed candidate
    decision = decide(group_of(1, 2), 1, 20, dict(zip(group_of(1, 2).jobs, losses, strict=True)), 2)
    assert [outcome.goes_on for outcome in decision.candidates] == [True, False]


def test_groups_are_what_is_neither_tuned_nor_a_seed():
    jobs = [
        [f"adapter={adapter}", f"adapter.r={r}", f"optimizer.lr={lr}", f"train.seed={seed}", "train.keep=1"]
        for adapter in ("cera", "lora") for r in (4, 8) for lr in (1, 2, 3) for seed in (0, 1)
    ]  # fmt: skip
    record = {
        "jobs": [{"name": ",".join(job), "overrides": job} for job in jobs],
        "swept": ["adapter", "adapter.r", "optimizer.lr", "train.seed"],
    }
    groups = groups_of(record, ["optimizer.lr"])
    assert [group.name for group in groups] == [
        f"adapter={adapter},adapter.r={r}" for adapter in ("cera", "lora") for r in (4, 8)
    ]
    assert [[candidate.name for candidate in group.candidates] for group in groups] == [
        ["optimizer.lr=1", "optimizer.lr=2", "optimizer.lr=3"]
    ] * 4
    assert {len(candidate.jobs) for group in groups for candidate in group.candidates} == {2}
    assert [group.name for group in groups_of(record, ["optimizer.lr", "adapter.r"])] == [
        "adapter=cera",
        "adapter=lora",
    ]


# --- the sweeper, by a launcher that trains nothing ------------------------------------------------------------------

NAMES = [
    f"adapter={adapter},optimizer.lr={lr}" for adapter in ("cera", "lora") for lr in (0.0001, 0.0003, 0.001, 0.003)
]
CERA, LORA = NAMES[:4], NAMES[4:]


def pretend(sweep: Path, overrides: list[str], updates: int = 100) -> tuple[str, int, int] | None:
    """Leaves what a job's run would; the loss is least at lr=1e-3. Returns the job, and where it began and ended."""
    values = dict(word.split("=") for word in overrides)
    name = f"adapter={values['adapter']},optimizer.lr={values['optimizer.lr']}"
    folder = sweep / name
    if (folder / "result.json").exists():
        return None
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    begin = json.loads(path.read_text().splitlines()[-1])["update"] if path.exists() else 0
    end = min(int(values.get("train.stop_at", updates)), updates)
    loss = abs(math.log10(float(values["optimizer.lr"])) + 3) + 100 / end
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"max_updates": updates}, "data": {}}))
    with path.open("a") as file:
        file.write(json.dumps({"update": end, "eval/loss": loss, "eval/perplexity": math.exp(loss)}) + "\n")
    if end == updates:
        (folder / "result.json").write_text(json.dumps({"updates": end, "eval/perplexity": math.exp(loss)}))
    return name, begin, end


class Launcher:
    """Hydra's basic launcher, but for the training. Some jobs fail, and some are lost."""

    def __init__(self, sweep: Path, updates: int = 100) -> None:
        self.sweep, self.updates, self.began = sweep, updates, []
        self.failing, self.lost, self.killed = set(), set(), set()

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list:
        for job in jobs:
            name = ",".join(word for word in job if not word.startswith("train.stop_at"))
            if name in self.killed:
                raise KeyboardInterrupt
            if name in self.failing:
                self.began.append((name, "failed"))
                record_job(self.sweep, name, "diverged")
            elif name not in self.lost and (run := pretend(self.sweep, job, self.updates)) is not None:
                self.began.append(run)
        return []


@pytest.fixture
def halve(tmp_path):
    """halve(launcher, *names) -> runs a halving of these jobs; the first rung is at update 20."""

    def halve(launcher: Launcher, *names: str) -> None:
        record_sweep(tmp_path, *(names or NAMES), swept=["adapter", "optimizer.lr"])
        halving = Halving()
        sweeper = {"tune": ["optimizer.lr"], "first": 20, "factor": 2}
        halving.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": sweeper}})
        halving.launcher = launcher
        halving.sweep([])

    return halve


def test_the_worse_half_of_each_method_stops_at_each_rung(tmp_path, halve, capsys):
    launcher = Launcher(tmp_path)
    halve(launcher)
    to_40 = [(job, 20, 40) for job in (*CERA[2:], *LORA[2:])]
    assert launcher.began == [*((job, 0, 20) for job in NAMES), *to_40, (CERA[2], 40, 100), (LORA[2], 40, 100)]
    output = capsys.readouterr().out
    assert "\nrung 1     8 jobs to update 20\n" in output
    assert "\nlast       2 jobs to their end\n" in output
    line = (
        "rung 2     adapter=lora, loss at update 40: optimizer.lr=0.001 2.5000 goes on; optimizer.lr=0.003 2.9771 stops"
    )
    assert f"\n{line}\n" in output


def test_the_table_names_the_rung_at_which_a_job_stopped(tmp_path, halve, monkeypatch, capsys):
    halve(Launcher(tmp_path), *CERA)
    capsys.readouterr()
    cera_sweep(monkeypatch, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        f"sweep      {tmp_path}: adapter=cera",
        "",
        "job                  state                    updates   perplexity",
        "optimizer.lr=0.0001  stopped at rung 1         20/100      403.429",
        "optimizer.lr=0.0003  stopped at rung 1         20/100      250.355",
        "optimizer.lr=0.001   finished                 100/100        2.718  best",
        "optimizer.lr=0.003   stopped at rung 2         40/100       19.631",
        "",
        "jobs       1 finished, 3 stopped",
        f"best       {tmp_path / CERA[2]}: perplexity 2.718",
        "stopped    the command with a job's values and hydra/sweeper=basic goes on with that job",
    ]
    assert is_finished(tmp_path)


def test_the_same_command_trains_nothing_again(tmp_path, halve):
    halve(Launcher(tmp_path))
    again = Launcher(tmp_path)
    halve(again)
    assert not again.began


def test_the_record_holds_what_was_decided_on_which_losses(tmp_path, halve):
    halve(Launcher(tmp_path))
    record = json.loads((tmp_path / HALVING).read_text())
    assert record["rules"] == {"tune": ["optimizer.lr"], "first": 20, "factor": 2}
    assert [(found["group"], found["rung"], found["update"]) for found in record["decisions"]] == [
        (f"adapter={adapter}", rung, update) for rung, update in ((1, 20), (2, 40)) for adapter in ("cera", "lora")
    ]
    assert record["decisions"][2]["candidates"] == [
        {"name": "optimizer.lr=0.001", "losses": {CERA[2]: 2.5}, "goes_on": True},
        {"name": "optimizer.lr=0.003", "losses": {CERA[3]: pytest.approx(2.97712, abs=1e-5)}, "goes_on": False},
    ]
    read = HalvingRecord.read(tmp_path)
    read.write(tmp_path)
    assert HalvingRecord.read(tmp_path) == read


def test_a_stopped_job_goes_on_by_hand_and_the_halving_stands(tmp_path, halve):
    halve(Launcher(tmp_path))
    assert pretend(tmp_path, LORA[0].split(",")) == (LORA[0], 20, 100)
    again = Launcher(tmp_path)
    halve(again)
    assert not again.began
    assert list(states(tmp_path).values()) == [
        *("stopped", "stopped", "finished", "stopped"),
        *("finished", "stopped", "finished", "stopped"),
    ]
    (tmp_path / CERA[0] / "metrics.jsonl").write_text('{"update": 70, "train/loss": 1.0}\n')
    assert states(tmp_path)[CERA[0]] == "cut"  # by hand, and not to its end


def test_a_killed_halving_repeats_nothing(tmp_path, halve):
    launcher = Launcher(tmp_path)
    launcher.killed = {LORA[2]}  # in rung 1
    with pytest.raises(KeyboardInterrupt):
        halve(launcher)
    assert launcher.began == [(job, 0, 20) for job in NAMES[:6]]
    assert not (tmp_path / HALVING).exists()

    launcher = Launcher(tmp_path)
    launch = launcher.launch

    def killed_in_rung_2(jobs: list[list[str]], initial_job_idx: int) -> list:
        launcher.killed = {CERA[3]} if "train.stop_at=40" in jobs[0] else set()
        return launch(jobs, initial_job_idx)

    launcher.launch = killed_in_rung_2
    with pytest.raises(KeyboardInterrupt):
        halve(launcher)
    assert launcher.began == [(LORA[2], 0, 20), (LORA[3], 0, 20), (CERA[2], 20, 40)]
    before = HalvingRecord.read(tmp_path).decisions
    assert [(decision.group, decision.rung) for decision in before] == [("adapter=cera", 1), ("adapter=lora", 1)]

    launcher = Launcher(tmp_path)
    halve(launcher)
    assert launcher.began == [*((job, 20, 40) for job in (CERA[3], *LORA[2:])), (CERA[2], 40, 100), (LORA[2], 40, 100)]
    assert HalvingRecord.read(tmp_path).decisions[:2] == before


def test_a_failed_job_is_last(tmp_path, halve, capsys):
    launcher = Launcher(tmp_path)
    launcher.failing = {CERA[2]}
    halve(launcher, *CERA)
    assert launcher.began[4:] == [(CERA[1], 20, 40), (CERA[3], 20, 40), (CERA[3], 40, 100)]
    assert list(states(tmp_path).values()) == ["stopped", "stopped", "failed", "finished"]
    assert not is_finished(tmp_path)  # so the command's status is 1
    first = HalvingRecord.read(tmp_path).decisions[0]
    assert [outcome.losses[job] for job, outcome in zip(CERA, first.candidates, strict=True)][2] is None
    again = Launcher(tmp_path)
    halve(again, *CERA)
    assert not again.began  # a decided rung stands
    capsys.readouterr()
    print_sweep(tmp_path)
    assert capsys.readouterr().out.endswith(f"\nerrors     in full in {tmp_path / JOBS}\n")


def test_a_method_whose_jobs_all_fail_stays_undecided(tmp_path, halve, capsys):
    """What failed them may be mended."""
    launcher = Launcher(tmp_path)
    launcher.failing = set(CERA)
    halve(launcher)
    assert "rung 1     undecided: every candidate failed" in capsys.readouterr().out
    assert [decision.group for decision in HalvingRecord.read(tmp_path).decisions] == ["adapter=lora"] * 2
    again = Launcher(tmp_path)
    for job in CERA:
        record_job(tmp_path, job, None)
    halve(again)
    assert again.began[:4] == [(job, 0, 20) for job in CERA]


def test_a_job_that_was_lost_leaves_its_method_undecided_and_the_others_go_on(tmp_path, halve, capsys):
    launcher = Launcher(tmp_path)
    launcher.lost = {CERA[2]}
    halve(launcher)
    assert f"undecided: {CERA[2]} was cut. The same command goes on." in capsys.readouterr().out
    assert list(states(tmp_path).values()) == [
        *("cut", "cut", "waiting", "cut"),
        *("stopped", "stopped", "finished", "stopped"),
    ]
    again = Launcher(tmp_path)
    halve(again)
    assert again.began == [(CERA[2], 0, 20), (CERA[2], 20, 40), (CERA[3], 20, 40), (CERA[2], 40, 100)]


def test_a_rung_beyond_the_end_decides_nothing(tmp_path, halve):
    launcher = Launcher(tmp_path, updates=30)
    halve(launcher, *CERA)
    assert launcher.began[4:] == [(CERA[2], 20, 30), (CERA[3], 20, 30)]
    assert [decision.rung for decision in HalvingRecord.read(tmp_path).decisions] == [1]


def test_a_job_that_ended_before_a_rung_counts_as_it_ended(tmp_path):
    """As by train.patience."""
    pretend(tmp_path, CERA[0].split(","), updates=15)
    assert loss_at(tmp_path / CERA[0], 20) == pytest.approx(1 + 100 / 15)
    assert loss_at(tmp_path / CERA[0], 10) is None


def test_a_job_that_went_past_a_rung_without_an_evaluation_there_is_refused(tmp_path, halve):
    pretend(tmp_path, CERA[1].split(","))
    launcher = Launcher(tmp_path)
    with pytest.raises(UserError, match=f"{CERA[1]} is beyond update 20, and was not evaluated there"):
        halve(launcher, *CERA)
    assert not launcher.began


@pytest.mark.parametrize(
    ("names", "first", "message"),
    [
        (CERA, 10, r"holds a halving by other rules: tune=\[optimizer.lr\] first=20 factor=2"),
        (CERA[:3], 20, "holds a halving of adapter=cera among other candidates"),
        (CERA, 20, None),
        (LORA, 20, None),
    ],
)
def test_another_halving_in_the_same_folder_is_refused(tmp_path, halve, names, first, message):
    halve(Launcher(tmp_path), *CERA)
    record_sweep(tmp_path, *names, swept=["adapter", "optimizer.lr"])
    groups = groups_of(read_record(tmp_path / RECORD), ["optimizer.lr"])
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        HalvingRecord.read(tmp_path).check(Rules(["optimizer.lr"], first, 2), groups, tmp_path)


def test_a_broken_record_gets_one_line(tmp_path):
    (tmp_path / HALVING).write_text('{"rules": {}, "decisions": []}')
    with pytest.raises(UserError, match="halving.json is broken"):
        HalvingRecord.read(tmp_path)


# --- by Hydra --------------------------------------------------------------------------------------------------------

HALF = ["hydra/sweeper=halving", "hydra.sweeper.first=20"]
GRID = ["-m", "+recipe=quickstart", "optimizer.lr=1e-4,1e-3", "name=grid"]


def test_hydra_runs_a_halving_by_its_launcher(tmp_path, monkeypatch, capfd):
    def launch(config: Config) -> dict:
        stop = [] if config.train.stop_at is None else [f"train.stop_at={config.train.stop_at}"]
        pretend(
            Path(config.output_dir), [f"adapter={config.adapter.kind}", f"optimizer.lr={config.optimizer.lr}", *stop]
        )
        return {"eval/perplexity": 1.5}

    monkeypatch.setattr("cera_train.training.launch.launch", launch)
    assert cera_train(monkeypatch, tmp_path, *GRID, "adapter=cera,lora", *HALF) == 0
    output = capfd.readouterr().out
    assert output.count("\njob        4 of 4: adapter=lora,optimizer.lr=0.001\n") == 2
    assert "\njobs       2 finished, 2 stopped\n" in output
    assert {path.name for path in (tmp_path / "outputs" / "grid").iterdir()} == {
        *(JOBS, RECORD, HALVING),
        *(CERA[0], CERA[2], LORA[0], LORA[2]),
    }
    # A stopped job goes on by hand.
    assert cera_train(monkeypatch, tmp_path, *GRID, "adapter=lora", "optimizer.lr=1e-4") == 0
    assert states(tmp_path / "outputs" / "grid")[LORA[0]] == "finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra.sweeper.tune=null"], r"hydra.sweeper.tune=\[\]: name what is tuned"),
        (["hydra.sweeper.tune=optimizer.wd"], "tune=optimizer.wd: it is no dimension of this grid, which varies optim"),
        (["hydra.sweeper.tune=[optimizer.lr,adapter.r]"], "tune=adapter.r: it is no dimension of this grid"),
        (["optimizer.lr=1e-3"], "tune=optimizer.lr: the grid has one value, optimizer.lr=0.001"),
        (["hydra.sweeper.first=100"], "hydra.sweeper.first=100: a job has train.max_updates=100"),
        (["train.max_updates=100,20"], "hydra.sweeper.first=20: a job has train.max_updates=20"),
        (["hydra.sweeper.first=null"], "hydra.sweeper.first=null: expected the updates of the first rung, such as"),
        (["train.stop_at=5"], "train.stop_at=5: halving itself stops jobs"),
        (["train.extend=true"], "train.extend=true: a halving decides between jobs of one length"),
        (["launch.detach=true", "hydra/launcher=slurm_gpu"], "launch.detach=true: a halving waits for its jobs"),
        (["hydra.sweeper.fist=20"], "unknown setting hydra.sweeper.fist"),
    ],
)
def test_a_halving_that_cannot_be_is_refused_before_anything_starts(tmp_path, monkeypatch, capfd, arguments, message):
    assert cera_train(monkeypatch, tmp_path, *GRID, *HALF, *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (dict(tune=[]), r"hydra.sweeper.tune=\[\]: name what is tuned"),
        (dict(tune=["adapter"]), "tune=adapter: methods are not compared"),
        (dict(tune=["data"]), "tune=data: losses of different models or rows cannot be compared"),
        (dict(tune=["model.path"]), "tune=model.path: losses of different models or rows cannot be compared"),
        (dict(tune=["train.seed"]), "tune=train.seed: the loss of a candidate is its mean over seeds"),
        (dict(first=0), "hydra.sweeper.first=0: expected the updates"),
        (dict(first="abc"), "hydra.sweeper.first=abc: expected the updates"),
        (dict(factor=1), "hydra.sweeper.factor=1: expected 2 or more"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        Rules(**{"tune": ["optimizer.lr"], "first": 20, "factor": 2} | rules)


@pytest.mark.slow
def test_a_halving_that_is_killed_ends_as_if_it_was_not_and_its_winner_is_a_run_alone(tmp_path, tiny_folder, compose):
    settings = [
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "adapter.r=4"),
        *("train.batch_size=16", "train.max_updates=60", "train.eval_every=null", "train.save_every=null"),
        *("optimizer.schedule=cosine", f"output_dir={tmp_path}"),
    ]
    sweep, first = tmp_path / "halved", [name.removeprefix("adapter=cera,") for name in CERA]
    rates = "optimizer.lr=0.0001,0.0003,0.001,0.003"
    halving = [*("-m", *settings, rates, "name=halved", "hydra/sweeper=halving", "hydra.sweeper.first=10")]
    command = [sys.executable, "-m", "cera_train", *halving]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (sweep / HALVING).exists() or len(read_metrics(sweep / first[2] / "metrics.jsonl").updates) < 12:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    decided = HalvingRecord.read(sweep).decisions
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert HalvingRecord.read(sweep).decisions[: len(decided)] == decided
    assert [decision.update for decision in HalvingRecord.read(sweep).decisions] == [10, 20]
    assert done.stdout.count("\nrung 1 ") == 0
    (winner,) = [name for name, state in states(sweep).items() if state == "finished"]
    assert sorted(states(sweep).values()) == ["finished", "stopped", "stopped", "stopped"]

    train(compose(*settings, winner, "name=alone"))
    weights = "adapter/adapter_model.safetensors"
    assert (sweep / winner / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
