"""hydra/launcher=joblib: several jobs at once, each in its process, which leave what they leave one
after the other."""

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from made_sweeps import TINY, start, states
from tiny_runs import adapter_bytes, losses_of, wait_until

from cera_train.cli.joblib import take_gpu
from cera_train.sweep.folder import JOBS

JOBLIB = [*TINY, "hydra/launcher=joblib"]
ENDLESS = ["adapter=cera", "adapter.activation=relu,silu,gelu", "train.max_updates=100000"]


@pytest.fixture
def sweep(sweep_here) -> Path:
    return sweep_here / "outputs" / "tiny"


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1", "2", "0"]), ("1,3,5", ["1", "3", "5", "1"])]
)
def test_jobs_at_once_have_one_gpu_each(monkeypatch, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for job, gpu in enumerate(expected):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        take_gpu(job)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


@pytest.mark.slow
def test_jobs_at_once_leave_what_they_leave_in_turn(sweep_here, sweep):
    process = start(*JOBLIB, cwd=sweep_here)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (1, "")
    failing, *trained = states(sweep)
    assert list(states(sweep).values()) == ["failed", *["finished"] * 3]
    begun = re.findall(r"^job +\d of 4: (.*)", output, re.MULTILINE)
    assert sorted(begun) == sorted([failing, *trained])
    assert f"failed     {failing}: adapter." in output
    assert "jobs       3 finished, 1 failed" in output
    adapters = {name: adapter_bytes(sweep / name) for name in trained}
    for name in trained:
        assert "6 updates of 16 sequences" in (sweep / JOBS / f"{name}.log").read_text()

    process = start(*TINY, "name=in_turn", cwd=sweep_here)
    assert "jobs       3 finished, 1 failed" in process.communicate(timeout=300)[0]
    assert adapters == {name: adapter_bytes(sweep.with_name("in_turn") / name) for name in trained}


@pytest.mark.slow
def test_jobs_at_once_may_have_several_processes_each(sweep_here, sweep):
    gates = ["adapter=cera", "adapter.activation=relu,silu", "train.max_updates=1"]
    process = start(*JOBLIB, *gates, "launch.processes=2", cwd=sweep_here)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, ""), output
    assert list(states(sweep).values()) == ["finished"] * 2


@pytest.mark.slow
def test_a_signal_lets_every_job_save_and_begins_no_other(sweep_here, sweep):
    process = start(*JOBLIB, *ENDLESS, cwd=sweep_here)
    first, second, third = (
        sweep / f"adapter.activation={gate}" for gate in ("relu", "silu", "gelu")
    )
    wait_until(
        lambda: process.poll() is not None or (losses_of(first) and losses_of(second)), every=0.1
    )
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (143, "cera-train: stopped by SIGTERM.\n")
    assert list(states(sweep).values()) == ["stopped", "stopped", "waiting"]
    for job in (first, second):
        updates = len(losses_of(job))
        assert (job / "checkpoints" / str(updates)).is_dir()
        assert f"stopped    {job.name}: {updates:,}/100,000 updates\n" in output
    assert third.name not in output
    wait_until(lambda: not any(worker.is_running() for worker in workers), seconds=30, every=0.1)


@pytest.mark.slow
def test_a_job_that_is_killed_ends_the_sweep_in_one_line(sweep_here, sweep):
    process = start(*JOBLIB, *ENDLESS, cwd=sweep_here)
    job = sweep / "adapter.activation=relu"
    wait_until(lambda: process.poll() is not None or losses_of(job), every=0.1)
    largest = max(psutil.Process(process.pid).children(), key=lambda child: child.memory_info().rss)
    os.kill(largest.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith(
        "cera-train: hydra/launcher=joblib: the process of a job was killed, perhaps for lack of"
    )
