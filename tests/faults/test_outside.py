"""Trackers without a server and clocks that jump: the run comes out as if nothing had been."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import UPDATES, content, last_update
from tiny_runs import metrics_of, wait_until

pytest_plugins = ("disks", "faulty_runs")


@pytest.mark.slow
def test_a_run_whose_wandb_server_is_away_is_recorded_offline(tmp_path, start, uninterrupted):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # refuses connections
        server = {"WANDB_BASE_URL": f"http://127.0.0.1:{port.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        attempt = start("tracker=wandb", WANDB_MODE="online", WANDB_INIT_TIMEOUT="3", **server)
        assert attempt.wait() == 0, attempt.errors
    (line,) = attempt.errors.splitlines()
    assert "W&B cannot be reached, so the run is recorded offline (" in line
    assert list((tmp_path / "outputs" / "run").glob("wandb/offline-run-*/*.wandb"))
    assert_unharmed(tmp_path / "outputs" / "run", uninterrupted)


@pytest.mark.slow
def test_a_tracker_without_a_folder_to_write_to_is_left_out(tmp_path, disk, start, uninterrupted):
    folder = disk(tmp_path / "outputs" / "run" / "tensorboard", "ro,size=1m")
    attempt = start("tracker=tensorboard")
    assert attempt.wait() == 0, attempt.errors
    (line,) = attempt.errors.splitlines()
    assert "tensorboard failed and is left out" in line
    assert line.endswith("Everything is in the run's folder.")
    assert not list(folder.iterdir())
    assert_unharmed(tmp_path / "outputs" / "run", uninterrupted)


def assert_unharmed(folder: Path, uninterrupted: dict) -> None:
    """The numbers of a run that was tracked are those of one that was not."""
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert content(folder)[name] == uninterrupted[name]


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)

CLOCKED = """
import sys, time
from cera_train.runs.folder import RunFolder
append = RunFolder.append_metrics
def append_metrics(*arguments):
    print("clock", time.time(), file=sys.stderr)
    append(*arguments)
RunFolder.append_metrics = append_metrics
from cera_train.cli.train import main
main()
"""
"""The command, which also tells what the clock shows when it writes metrics."""


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="the library of Debian's package faketime is not installed")
def test_a_clock_that_jumps_changes_nothing(tmp_path, arguments, uninterrupted):
    """Back by a day, on by a year, SIGKILL, and on resuming back to before what it resumes from."""
    clock, folder = tmp_path / "clock", tmp_path / "outputs" / "run"
    jumps = os.environ | {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    command = [sys.executable, "-c", CLOCKED, *arguments]
    set_clock(clock, "+0")
    process = subprocess.Popen(command, cwd=tmp_path, env=jumps, stderr=subprocess.PIPE, text=True)
    for checkpoint, jump in ((3, "-1d"), (9, "+365d")):
        wait_until((folder / "checkpoints" / str(checkpoint)).exists)
        set_clock(clock, jump)
    wait_until((folder / "checkpoints" / "15").exists)
    process.kill()
    shown = [float(time) for time in re.findall(r"^clock (.*)", process.communicate()[1], re.MULTILINE)]
    steps = [round((later - earlier) / 86400) for earlier, later in itertools.pairwise(shown)]
    assert [step for step in steps if step] == [-1, 366]
    assert last_update(folder) < UPDATES

    set_clock(clock, "-1d")
    done = subprocess.run(command, cwd=tmp_path, env=jumps, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"run .*, (15|18|21|24|27) done", done.stdout)
    assert content(folder) == uninterrupted | {"environment.json": content(folder)["environment.json"]}
    seconds = [row["train/seconds"] for row in metrics_of(folder) if "train/loss" in row]
    assert seconds[0] > 0
    assert all(0 < later - earlier < 60 for earlier, later in itertools.pairwise(seconds))


def set_clock(path: Path, offset: str) -> None:
    """At once: the clock is read at any time."""
    part = path.with_suffix(".part")
    part.write_text(offset)
    part.replace(path)
