"""Successive halving by a launcher that trains nothing: its rungs survive a kill, and nothing is repeated."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from halvings import CERA, LORA, NAMES, HalvingLauncher
from made_sweeps import cera_sweep, record_job, record_sweep, states
from omegaconf import OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.files import lock_folder
from cera_train.sweep.halving import Halving
from cera_train.sweep.record import JOBS, RECORD, SweepRecord
from cera_train.sweep.rungs import HALVING, HalvingRecord, Rules, groups_of, loss_at
from cera_train.sweep.table import is_finished, print_sweep


@pytest.fixture
def halve(tmp_path):
    """halve(launcher, *names) -> runs a halving of these jobs; the first rung is at update 20."""

    def halve(launcher: HalvingLauncher, *names: str) -> None:
        record_sweep(tmp_path, *(names or NAMES), swept=["adapter", "optimizer.lr"])
        halving = Halving()
        sweeper = {"tune": ["optimizer.lr"], "first": 20, "factor": 2}
        halving.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": sweeper}})
        halving.launcher = launcher
        halving.sweep([])

    return halve


def run_by_hand(sweep: Path, name: str, updates: int = 100) -> tuple[int, int] | None:
    return HalvingLauncher(sweep, updates).run(name, dict(word.split("=") for word in name.split(",")))


def test_the_worse_half_of_each_method_stops_at_each_rung(tmp_path, halve, capsys):
    launcher = HalvingLauncher(tmp_path)
    halve(launcher)
    to_40 = [(job, 20, 40) for job in (*CERA[2:], *LORA[2:])]
    assert launcher.began == [*((job, 0, 20) for job in NAMES), *to_40, (CERA[2], 40, 100), (LORA[2], 40, 100)]
    output = capsys.readouterr().out
    assert "\nrung 1     8 jobs to update 20\n" in output
    assert "\nlast       2 jobs to the end\n" in output
    line = (
        "rung 2     adapter=lora, loss at update 40: optimizer.lr=0.001 2.5000 goes on; optimizer.lr=0.003 2.9771 stops"
    )
    assert f"\n{line}\n" in output


def test_the_table_names_the_rung_at_which_a_job_stopped(tmp_path, halve, monkeypatch, capsys):
    halve(HalvingLauncher(tmp_path), *CERA)
    assert "\nlast       1 job to the end\n" in capsys.readouterr().out
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
    halve(HalvingLauncher(tmp_path))
    again = HalvingLauncher(tmp_path)
    halve(again)
    assert not again.began


def test_the_record_holds_what_was_decided_on_which_losses(tmp_path, halve):
    halve(HalvingLauncher(tmp_path))
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
    halve(HalvingLauncher(tmp_path))
    assert run_by_hand(tmp_path, LORA[0]) == (20, 100)
    again = HalvingLauncher(tmp_path)
    halve(again)
    assert not again.began
    assert list(states(tmp_path).values()) == [
        *("stopped", "stopped", "finished", "stopped"),
        *("finished", "stopped", "finished", "stopped"),
    ]
    (tmp_path / CERA[0] / "metrics.jsonl").write_text('{"update": 70, "train/loss": 1.0}\n')
    assert states(tmp_path)[CERA[0]] == "cut"  # by hand, and not to its end


def test_a_killed_halving_repeats_nothing(tmp_path, halve):
    launcher = HalvingLauncher(tmp_path)
    launcher.killed = {LORA[2]}  # in rung 1
    with pytest.raises(KeyboardInterrupt):
        halve(launcher)
    assert launcher.began == [(job, 0, 20) for job in NAMES[:6]]
    assert not (tmp_path / HALVING).exists()

    launcher = HalvingLauncher(tmp_path)
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

    launcher = HalvingLauncher(tmp_path)
    halve(launcher)
    assert launcher.began == [*((job, 20, 40) for job in (CERA[3], *LORA[2:])), (CERA[2], 40, 100), (LORA[2], 40, 100)]
    assert HalvingRecord.read(tmp_path).decisions[:2] == before


def test_a_failed_job_is_last(tmp_path, halve, capsys):
    launcher = HalvingLauncher(tmp_path)
    launcher.failing = {CERA[2]}
    halve(launcher, *CERA)
    assert launcher.began[4:] == [(CERA[1], 20, 40), (CERA[3], 20, 40), (CERA[3], 40, 100)]
    assert list(states(tmp_path).values()) == ["stopped", "stopped", "failed", "finished"]
    assert not is_finished(tmp_path)  # so the command's status is 1
    first = HalvingRecord.read(tmp_path).decisions[0]
    assert [outcome.losses[job] for job, outcome in zip(CERA, first.candidates, strict=True)][2] is None
    again = HalvingLauncher(tmp_path)
    halve(again, *CERA)
    assert not again.began  # a decided rung stands
    capsys.readouterr()
    print_sweep(tmp_path)
    assert capsys.readouterr().out.endswith(f"\nerrors     in full in {tmp_path / JOBS}\n")


def test_a_method_whose_jobs_all_fail_stays_undecided(tmp_path, halve, capsys):
    """What failed them may be mended."""
    launcher = HalvingLauncher(tmp_path)
    launcher.failing = set(CERA)
    halve(launcher)
    assert "rung 1     undecided: every candidate failed" in capsys.readouterr().out
    assert [decision.group for decision in HalvingRecord.read(tmp_path).decisions] == ["adapter=lora"] * 2
    again = HalvingLauncher(tmp_path)
    for job in CERA:
        record_job(tmp_path, job, None)
    halve(again)
    assert again.began[:4] == [(job, 0, 20) for job in CERA]


def test_a_job_that_was_lost_leaves_its_method_undecided_and_the_others_go_on(tmp_path, halve, capsys):
    launcher = HalvingLauncher(tmp_path)
    launcher.lost = {CERA[2]}
    halve(launcher)
    assert f"undecided: {CERA[2]} was cut. The same command goes on." in capsys.readouterr().out
    assert list(states(tmp_path).values()) == [
        *("cut", "cut", "waiting", "cut"),
        *("stopped", "stopped", "finished", "stopped"),
    ]
    again = HalvingLauncher(tmp_path)
    halve(again)
    assert again.began == [(CERA[2], 0, 20), (CERA[2], 20, 40), (CERA[3], 20, 40), (CERA[2], 40, 100)]


def test_two_commands_never_halve_one_folder(tmp_path, halve):
    """The second one's jobs would fail at the locks of the first one's, and lose their places."""
    launcher, second = HalvingLauncher(tmp_path), HalvingLauncher(tmp_path)
    launch = launcher.launch

    def with_a_second(jobs: list[list[str]], initial_job_idx: int) -> list:
        with pytest.raises(UserError, match=f"another sweep is writing to {tmp_path}: wait for it"):
            halve(second, *CERA)
        return launch(jobs, initial_job_idx)

    launcher.launch = with_a_second
    halve(launcher, *CERA)
    assert not second.began
    assert is_finished(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_job_that_another_command_trains_leaves_its_method_undecided(tmp_path, halve, capsys):
    """As one that was started by hand."""
    lock = lock_folder(tmp_path / CERA[2], "run")
    launcher = HalvingLauncher(tmp_path)
    launcher.failing = {CERA[2]}
    halve(launcher, *CERA)
    assert f"undecided: {CERA[2]} is trained by another command. The same" in capsys.readouterr().out
    assert not (tmp_path / HALVING).exists()
    lock.release()


def test_a_rung_beyond_the_end_decides_nothing(tmp_path, halve):
    launcher = HalvingLauncher(tmp_path, updates=30)
    halve(launcher, *CERA)
    assert launcher.began[4:] == [(CERA[2], 20, 30), (CERA[3], 20, 30)]
    assert [decision.rung for decision in HalvingRecord.read(tmp_path).decisions] == [1]


def test_a_job_that_ended_before_a_rung_counts_as_it_ended(tmp_path):
    """As by train.patience."""
    run_by_hand(tmp_path, CERA[0], updates=15)
    assert loss_at(tmp_path / CERA[0], 20) == pytest.approx(1 + 100 / 15)
    assert loss_at(tmp_path / CERA[0], 10) is None


def test_a_job_that_went_past_a_rung_without_an_evaluation_there_is_refused(tmp_path, halve):
    run_by_hand(tmp_path, CERA[1])
    launcher = HalvingLauncher(tmp_path)
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
    halve(HalvingLauncher(tmp_path), *CERA)
    record_sweep(tmp_path, *names, swept=["adapter", "optimizer.lr"])
    groups = groups_of(SweepRecord.read(tmp_path / RECORD), ["optimizer.lr"])
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        HalvingRecord.read(tmp_path).check(Rules(["optimizer.lr"], first, 2), groups, tmp_path)


def test_a_broken_record_gets_one_line(tmp_path):
    (tmp_path / HALVING).write_text('{"rules": {}, "decisions": []}')
    with pytest.raises(UserError, match="halving.json is broken"):
        HalvingRecord.read(tmp_path)
