"""The state of every job follows from its folder, and the table shows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from filelock import FileLock
from made_sweeps import cera_sweep, make_job, record_job, record_sweep, states

from cera_train.sweep.record import JOBS, RECORD
from cera_train.sweep.table import best_jobs, read_sweep


def test_a_state_follows_from_what_lies_in_the_folder(tmp_path):
    names = ["adapter.r=2", "adapter.r=4", "adapter.r=8", "adapter.r=16", "adapter.r=32"]
    record_sweep(tmp_path, *names)
    make_job(tmp_path, "adapter.r=2", 2.5)
    make_job(tmp_path, "adapter.r=4")
    make_job(tmp_path, "adapter.r=8", error="the loss is not finite")
    record_job(tmp_path, "adapter.r=16", "impossible")
    jobs = {job.name: job for job in read_sweep(tmp_path)}
    assert list(jobs) == names  # in the order of the grid
    assert [job.state for job in jobs.values()] == ["finished", "stopped", "failed", "failed", "waiting"]
    assert [(job.done, job.total) for job in jobs.values()] == [(20, 20), (5, 20), (5, 20), (None, None), (None, None)]
    assert [job.value for job in jobs.values()] == [2.5, 9.0, 9.0, None, None]
    assert jobs["adapter.r=8"].error == "the loss is not finite"


@pytest.mark.slow
def test_a_job_is_running_while_its_lock_is_held_and_cut_after_its_process_was_killed(tmp_path):
    record_sweep(tmp_path, "adapter.r=2")
    folder = make_job(tmp_path, "adapter.r=2", error="of the last time")
    hold = (
        "import sys, time; from pathlib import Path; from cera_train.common.files import locked\n"
        "with locked(Path(sys.argv[1]), 'run'): print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert states(tmp_path) == {"adapter.r=2": "running"}
    with pytest.raises(Exception, match="could not be acquired"):
        FileLock(folder / ".lock").acquire(timeout=0)  # the holder still has it
    record_job(tmp_path, "adapter.r=2", None)
    holder.kill()
    holder.communicate()
    assert (folder / ".lock").exists()
    assert states(tmp_path) == {"adapter.r=2": "stopped"}
    with FileLock(folder / ".lock").acquire(timeout=0):  # looking took nothing
        assert states(tmp_path) == {"adapter.r=2": "running"}


def test_the_newer_of_an_error_and_a_result_counts(tmp_path):
    record_sweep(tmp_path, "adapter.r=2")
    folder = make_job(tmp_path, "adapter.r=2", 2.5, error="holds a run with another config")
    result, record = folder / "result.json", tmp_path / JOBS / "adapter.r=2.json"
    os.utime(result, (100, 100))
    assert states(tmp_path) == {"adapter.r=2": "failed"}
    os.utime(record, (50, 50))
    assert states(tmp_path) == {"adapter.r=2": "finished"}


def test_jobs_that_no_file_lists_come_as_they_were_started(tmp_path):
    """So Optuna's do, and those of an earlier grid in the same folder."""
    record_sweep(tmp_path, "adapter.r=2")
    for number, name in enumerate(["optimizer.lr=0.3", "optimizer.lr=0.1", "adapter.r=2"]):
        make_job(tmp_path, name, 2.0)
        record_job(tmp_path, name, None, number)
    assert list(states(tmp_path)) == ["adapter.r=2", "optimizer.lr=0.3", "optimizer.lr=0.1"]


def test_the_best_is_of_finished_jobs_on_the_same_rows(tmp_path):
    names = ["data=a,adapter.r=2", "data=a,adapter.r=4", "data=a,adapter.r=8", "data=b,adapter.r=2"]
    record_sweep(tmp_path, *names)
    for name, perplexity in zip(names, (2.5, 2.4, None, 3.5), strict=True):
        make_job(tmp_path, name, perplexity, path=name[5])
    assert [job.name for job in best_jobs(read_sweep(tmp_path))] == [names[1], names[3]]


def test_by_accuracy_the_highest_is_best_whatever_the_rows_and_one_without_it_is_not(tmp_path):
    names = ["data=a,adapter.r=2", "data=a,adapter.r=4", "data=b,adapter.r=2", "data=b,adapter.r=4"]
    record_sweep(tmp_path, *names, metric={"key": "gsm8k/exact", "higher_is_better": True})
    for name, figures in zip(names, ({"gsm8k/exact": 0.25}, {"gsm8k/exact": 0.5}, {}, None), strict=True):
        folder = make_job(tmp_path, name, path=name[5])
        if figures is None:
            lines = '{"update": 4, "eval/perplexity": 9, "gsm8k/exact": 0.75}\n{"update": 5, "train/loss": 1}\n'
            (folder / "metrics.jsonl").write_text(lines)
        else:
            (folder / "result.json").write_text(json.dumps({"updates": 20, "eval/perplexity": 2.0} | figures))
    jobs = read_sweep(tmp_path)
    assert [job.value for job in jobs] == [0.25, 0.5, None, 0.75]
    assert [job.name for job in best_jobs(jobs)] == [names[1]]


def test_the_table_is_aligned_and_names_what_differs(tmp_path, monkeypatch, capsys):
    sweep = tmp_path / "ranks"
    names = ["adapter=cera,adapter.r=4,train.seed=1", "adapter=lora,adapter.r=512,train.seed=1"]
    record_sweep(sweep, *names)
    make_job(sweep, names[0], 1234.5678)
    make_job(sweep, names[1], error="x" * 200)
    cera_sweep(monkeypatch, sweep)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"sweep      {sweep}: train.seed=1",
        "",
        "job                         state     updates  perplexity",
        "adapter=cera,adapter.r=4    finished    20/20   1,234.568  best",
        f"adapter=lora,adapter.r=512  failed       5/20       9.000  {'x' * 71}…",
        "",
        "jobs       1 finished, 1 failed",
        f"best       {sweep / names[0]}: perplexity 1,234.568",
        f"errors     in full in {sweep / JOBS}; the same command tries these jobs again",
    ]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (".", r"\. holds no sweep: expected one that cera-train -m left \(with sweep.json\)"),
        ("run", "run is the folder of a run, not of a sweep: cera-report run shows it"),
        ("broken", "sweep.json is broken: .* Remove it, and start the sweep again"),
    ],
)
def test_a_folder_that_is_no_sweep_gets_one_line(tmp_path, monkeypatch, capsys, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    make_job(tmp_path, "run", 1.5)
    (tmp_path / "broken" / RECORD).write_text('{"jobs": [')
    with pytest.raises(SystemExit) as exit_info:
        cera_sweep(monkeypatch, folder)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"cera-sweep: .*{message}", line), line
