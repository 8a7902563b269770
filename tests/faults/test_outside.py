"""Trackers without a server and clocks that jump: the run comes out as if nothing had been."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import UPDATES, content, last_update
from tiny_runs import metrics_of, wait_until
from wandb_server import WandbServer, environment

pytest_plugins = ("disks", "faulty_runs")


HURRIED = """
from cera_train.runs import tracking
tracking.INIT_SECONDS, tracking.FINISH_SECONDS = 3, 5
from cera_train.cli.train import main
main()
"""


def start_tracked(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, since W&B starts a service and ends it at exit; it waits for less long."""
    return subprocess.Popen(
        [sys.executable, "-c", HURRIED, *arguments, "tracker=wandb"],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_synced_later(output: str, folder: Path) -> None:
    """The command that the run named brings every row of its metrics to a server."""
    (command,) = re.findall(r"To upload it: (wandb sync .*)", output)
    with WandbServer() as server:
        done = subprocess.run(
            [Path(sys.executable).parent / "wandb", *shlex.split(command)[1:]],
            cwd=folder,
            env=os.environ | server.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    expected = [row["update"] for row in metrics_of(folder / "outputs" / "run")]
    received = [row for _, row in sorted(server.rows.items()) if "run" not in row]
    assert [row["update"] for row in received] == expected
    assert any("run" in row for row in server.rows.values()), "the picture's row"


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, None], ids=["refused", "silent"])
def test_a_run_whose_wandb_server_is_down_from_the_start_is_synced_later(tmp_path, arguments, uninterrupted, answers):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if answers is None:
            port.listen()  # takes connections and never answers
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        process = start_tracked(arguments, tmp_path, **environment(url))
        output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert errors.count("cera-train: W&B cannot be reached, so the run is recorded offline (") == 1
    assert "left out" not in errors
    assert_unharmed(tmp_path / "outputs" / "run", uninterrupted)
    assert_synced_later(output, tmp_path)


@pytest.mark.slow
def test_a_run_that_loses_its_wandb_server_goes_on_and_is_synced_later(tmp_path, arguments):
    settings = ["train.max_updates=200", "train.eval_every=100", "train.save_every=null"]
    folder = tmp_path / "outputs" / "run"
    with WandbServer() as server:
        process = start_tracked([*arguments, *settings], tmp_path, **server.environment)
        wait_until(lambda: last_update(folder) >= 10)
        wait_until(lambda: last_update(folder) >= 50)
    wait_until((folder / "result.json").exists)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "cera-train:" not in errors
    assert_synced_later(output, tmp_path)


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
