"""Successive halving as a user starts it: by Hydra, and one that is killed as it trains."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from halvings import CERA, LORA, loss_of
from made_sweeps import cera_train, states
from pretended_jobs import leave_run

from cera_train.common.files import locked
from cera_train.runs.results import read_metrics
from cera_train.settings.run import Config
from cera_train.sweep.folder import WRITER
from cera_train.sweep.record import JOBS, RECORD
from cera_train.sweep.rungs import HALVING, HalvingRecord
from cera_train.training.train import train

HALF = ["hydra/sweeper=halving", "hydra.sweeper.first=20"]
GRID = ["-m", "+recipe=quickstart", "optimizer.lr=1e-4,1e-3", "name=grid"]


def test_hydra_runs_a_halving_by_its_launcher(tmp_path, monkeypatch, capfd):
    def launch(config: Config) -> dict:
        values, total = {"optimizer.lr": config.optimizer.lr}, config.train.max_updates
        loss = functools.partial(loss_of, values)
        leave_run(Path(config.output_dir) / config.name, config.train.stop_at or total, total, loss)
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


@pytest.mark.parametrize("how", [HALF, []], ids=["halving", "grid"])
def test_no_sweep_begins_in_the_folder_of_a_halving_that_goes_on(tmp_path, monkeypatch, capfd, how):
    sweep = tmp_path / "outputs" / "grid"
    sweep.mkdir(parents=True)
    with locked(sweep, WRITER):
        assert cera_train(monkeypatch, tmp_path, *GRID, *how) == 2
        assert [path.name for path in sweep.iterdir()] == [".lock"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "cera-train: another sweep is writing to outputs/grid: wait for it, or choose another name=..."


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
