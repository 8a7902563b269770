"""The state of every job follows from its folder, and the table shows it."""

from __future__ import annotations

import os
import re

import pytest
from made_sweeps import make_job, record_job, record_sweep, states

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
        make_job(tmp_path, name, perplexity, rows=name[5])
    assert [job.name for job in best_jobs(read_sweep(tmp_path))] == [names[1], names[3]]


def test_the_table_is_aligned_and_names_what_differs(tmp_path, run_command, capsys):
    sweep = tmp_path / "ranks"
    names = ["adapter=cera,adapter.r=4,train.seed=1", "adapter=lora,adapter.r=512,train.seed=1"]
    record_sweep(sweep, *names)
    make_job(sweep, names[0], 1234.5678)
    make_job(sweep, names[1], error="x" * 200)
    run_command("cera-sweep", sweep)
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
def test_a_folder_that_is_no_sweep_gets_one_line(tmp_path, run_command, capsys, folder, message):
    (tmp_path / "broken").mkdir()
    make_job(tmp_path, "run", 1.5)
    (tmp_path / "broken" / RECORD).write_text('{"jobs": [')
    assert run_command("cera-sweep", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"cera-sweep: .*{message}", line), line
