"""Faults made for real: damaged disks, full disks, read-only disks, trackers without a server, clocks that jump, two
runs in one folder. Each ends in one clear line, and the run then comes out as if nothing had been."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attempts import Attempt, assert_readable, content, last_update, metrics, started, wait_until
from wandb_server import WandbServer, environment

from cera_train.common.files import WRITING, find_damage, write_checksums, write_folder, write_text
from cera_train.runs.folder import RunFolder

pytest_plugins = ["disks"]

UPDATES = 30


@pytest.fixture(scope="module")
def arguments(tiny_folder) -> list[str]:
    """A run that writes something after every update, and whose best adapter is not its last."""
    return [
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "name=run"),
        *("adapter.r=4", "adapter.dropout=0.3", "optimizer.lr=0.2"),
        *(f"train.max_updates={UPDATES}", "train.batch_size=16", "train.eval_every=2", "train.save_every=3"),
        "train.keep=3",
    ]


@pytest.fixture
def start(arguments, tmp_path):
    """start("more=arguments", ..., VARIABLE=...): the command, in tmp_path."""
    attempts = []

    def start(*more: str, folder: Path = tmp_path, **environment: str) -> Attempt:
        log = tmp_path / f"attempt-{len(attempts)}.log"
        attempts.append(Attempt([*arguments, *more], folder, log, **environment))
        return attempts[-1]

    with started(attempts):
        yield start


def finish(attempt: Attempt) -> Attempt:
    """A run that ends well and says nothing but what it always says."""
    assert attempt.wait() == 0, attempt.errors
    assert attempt.errors == ""
    return attempt


def refuse(attempt: Attempt) -> str:
    """The one line of a run that ends with status 2."""
    assert attempt.wait() == 2, attempt.errors
    (line,) = attempt.errors.splitlines()
    return line


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The folder of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    finish(Attempt(arguments, folder, folder / "log"))
    return folder / "outputs" / "run"


@pytest.fixture(scope="module")
def uninterrupted(whole) -> dict:
    return content(whole)


@pytest.fixture(scope="module")
def cut(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its fourth checkpoint."""
    folder = tmp_path_factory.mktemp("cut")
    attempt = Attempt(arguments, folder, folder / "log")
    with started([attempt]):
        wait_until(lambda: last_update(folder / "outputs" / "run") > 13)
        attempt.kill()
    assert last_update(folder / "outputs" / "run") < UPDATES
    return folder / "outputs" / "run"


@pytest.fixture
def run(cut, tmp_path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "outputs" / "run"))


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"), key=lambda path: -int(path.name))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_to_any_file_of_a_folder_is_found(tmp_path, damage):
    folder = tmp_path / "folder"
    for number in range(30):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(random.randbytes(50))
        write_checksums(folder)
        assert find_damage(folder) is None
        name = "abc"[number % 3]
        damage(folder / name)
        assert find_damage(folder).startswith(f"{name}: ")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_damaged_checksums_vouch_for_nothing(tmp_path, damage):
    for _ in range(30):
        (tmp_path / "a").write_text("content")
        (tmp_path / "checksums.json").unlink(missing_ok=True)
        write_checksums(tmp_path)
        damage(tmp_path / "checksums.json")
        assert find_damage(tmp_path) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("optimizer.pt", flip_a_bit, "checksum differs"),
        ("adapter_model.safetensors", truncate, "checksum differs"),
        ("progress.json", Path.unlink, "No such file"),
        ("checksums.json", truncate, ""),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, start, uninterrupted, name, damage, said):
    newest, second, _ = newest_first(run)
    damage(newest / name)
    output = finish(start()).output
    (line,) = [line for line in output.splitlines() if line.startswith("damaged ")]
    assert f"{newest.relative_to(run.parents[1])} ({name}: {said}" in line
    assert line.endswith(f"Going on from {second.relative_to(run.parents[1])}.")
    assert content(run) == uninterrupted


@pytest.mark.slow
def test_going_far_back_leaves_the_best_adapter_of_an_uninterrupted_run(run, start, uninterrupted):
    *damaged, oldest = newest_first(run)
    for checkpoint in damaged:
        truncate(checkpoint / "optimizer.pt")
    best = json.loads((run / "best" / "metrics.json").read_text())["update"]
    assert best > int(oldest.name), "the run was cut too early for this test"
    finish(start())
    assert content(run) == uninterrupted


@pytest.mark.slow
def test_a_run_without_a_sound_checkpoint_is_refused_and_named(run, start, uninterrupted):
    for checkpoint in newest_first(run):
        truncate(checkpoint / "optimizer.pt")
    before = content(run)
    line = refuse(start())
    assert "every checkpoint is damaged: outputs/run/checkpoints/" in line
    assert line.endswith("Restore one of them, or start anew with train.resume=never.")
    assert content(run) == before
    finish(start("train.resume=never"))
    assert content(run).keys() == uninterrupted.keys()
    assert content(run)["adapter/adapter_model.safetensors"] == uninterrupted["adapter/adapter_model.safetensors"]


@pytest.mark.slow
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run, start):
    newest = newest_first(run)[0]
    flip_a_bit(newest / "optimizer.pt")
    line = refuse(start(f"train.resume={newest}"))
    assert f"{newest} is damaged (optimizer.pt: checksum differs). Restore it" in line


@pytest.mark.slow
def test_metrics_with_rubbish_after_the_checkpoint_are_cut_back(run, start, uninterrupted):
    """What a file system may leave at the end of a file when the power goes."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 14, "tra' + bytes(300) + b"\n\xff\xfe\n{}\n")
    finish(start())
    assert content(run) == uninterrupted


def test_a_folder_between_two_renames_is_put_back(tmp_path):
    """The moment at which the old folder has gone and the new one has not come; found by looking, too short to hit."""
    write_folder(tmp_path / "best", lambda folder: (folder / "weights").write_text("old"))
    (tmp_path / "best").rename(tmp_path / f"{WRITING}old-best")
    (tmp_path / f"{WRITING}best").mkdir()
    with RunFolder(tmp_path, {}):
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert not list(tmp_path.glob(f"{WRITING}*"))


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_leaves_the_earlier_one_alone(tmp_path, disk):
    folder = disk(tmp_path / "small", "size=16k")
    write_text(folder / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(folder / "file", "new" * 10_000)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "old")]


def assert_full(line: str) -> None:
    assert line.startswith("cera-train: the disk is full (")
    assert line.endswith("Free some space and repeat the command: a run goes on from its last checkpoint.")


@pytest.mark.slow
@pytest.mark.parametrize(("share", "checkpoints"), [(0.2, 0), (0.5, 2), (0.97, 3)])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_space(
    tmp_path, disk, start, whole, uninterrupted, share, checkpoints
):
    """Full at the first checkpoint, at a later one, and at the very last files."""
    blocks = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    outputs = disk(tmp_path / "outputs", f"size={int(share * blocks) * 4}k")
    folder = outputs / "run"
    for _ in range(2):  # it is no worse for trying again
        assert_full(refuse(start()))
        assert_readable(folder)
        assert len(newest_first(folder)) == checkpoints
        assert (folder / "adapter").exists() == (share == 0.97)
        assert not (folder / "result.json").exists()
    disk(outputs, "remount,size=1m")
    output = finish(start()).output
    assert (" done" in output) == (checkpoints > 0)
    assert content(folder) == uninterrupted


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_metrics_leaves_a_checkpoint_to_go_on_from(tmp_path, disk, start, arguments):
    """With nothing but metrics to write after update 50, whose lines fill a page and need another."""
    settings = ["train.max_updates=100", "train.save_every=50", "train.eval_every=null"]
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(start(*settings, folder=whole))
    outputs = disk(tmp_path / "outputs", "size=1m")
    attempt = start(*settings)
    wait_until((outputs / "run" / "checkpoints" / "50").exists)
    with contextlib.suppress(OSError), (outputs / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert_full(refuse(attempt))
    assert_readable(outputs / "run")
    assert 50 <= last_update(outputs / "run") < 100
    (outputs / "filler").unlink()
    assert ", 50 done" in finish(start(*settings)).output
    assert content(outputs / "run") == content(whole / "outputs" / "run")


@pytest.mark.slow
def test_a_read_only_folder_is_named_and_nothing_in_it_harmed(tmp_path, cut, disk, start, uninterrupted):
    outputs = disk(tmp_path / "outputs", "size=1m")
    folder = Path(shutil.copytree(cut, outputs / "run"))
    before = content(folder)
    disk(outputs, "remount,ro")
    mend = "Runs are written to output_dir, .*: set these to folders you may write to"
    for name in ("run", "another"):
        assert re.search(
            rf"no access to \S*outputs/{name}\S*: Read-only file system. {mend}", refuse(start(f"name={name}"))
        )
    assert content(folder) == before
    disk(outputs, "remount,rw")
    finish(start())
    assert content(folder) == uninterrupted
    disk(outputs, "remount,ro")
    assert "outputs/run" in refuse(start())
    assert content(folder) == uninterrupted


@pytest.mark.slow
def test_a_read_only_cache_serves_what_it_has_and_is_named_for_what_it_lacks(tmp_path, disk, start, uninterrupted):
    cache = disk(tmp_path / "cache", "size=1m")
    finish(start("name=fills_the_cache", CERA_TRAIN_CACHE=str(cache)))
    disk(cache, "remount,ro")
    finish(start(CERA_TRAIN_CACHE=str(cache)))
    assert content(tmp_path / "outputs" / "run") == uninterrupted
    line = refuse(start("name=other", "data.max_length=200", CERA_TRAIN_CACHE=str(cache)))
    assert re.search(rf"no access to {cache}\S*: Read-only file system. .* \$CERA_TRAIN_CACHE: set these", line)


# --- two runs in one folder -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_trains_and_the_other_is_refused(tmp_path, start, uninterrupted):
    attempts = [start(), start()]
    assert sorted(attempt.wait() for attempt in attempts) == [0, 2]
    loser = next(attempt for attempt in attempts if attempt.wait() == 2)
    assert "another run is writing to outputs/run: wait for it, or choose another name=..." in refuse(loser)
    assert loser.output == ""
    assert content(tmp_path / "outputs" / "run") == uninterrupted


# --- trackers ---------------------------------------------------------------------------------------------------------

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
    expected = [row["update"] for row in metrics(folder / "outputs" / "run")]
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
        started = time.monotonic()
        process = start_tracked(arguments, tmp_path, **environment(url))
        output, errors = process.communicate(timeout=200)
        print(f"{time.monotonic() - started:.1f} s")
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
        began = time.monotonic()
        wait_until(lambda: last_update(folder) >= 50)
    lost = time.monotonic()
    wait_until((folder / "result.json").exists)
    trained = time.monotonic()
    output, errors = process.communicate(timeout=200)
    finished = time.monotonic() - trained
    print(f"40 updates in {lost - began:.1f} s; then 150 and the end in {trained - lost:.1f} s; W&B {finished:.1f} s")
    assert process.returncode == 0, errors
    assert "cera-train:" not in errors
    assert trained - lost < 5 * (150 / 40) * (lost - began) + 10, "updates wait for the tracker"
    assert finished < 30
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


# --- clocks -----------------------------------------------------------------------------------------------------------

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
    seconds = [row["train/seconds"] for row in metrics(folder) if "train/loss" in row]
    assert seconds[0] > 0
    assert all(0 < later - earlier < 60 for earlier, later in itertools.pairwise(seconds))


def set_clock(path: Path, offset: str) -> None:
    """At once: the clock is read at any time."""
    part = path.with_suffix(".part")
    part.write_text(offset)
    part.replace(path)
