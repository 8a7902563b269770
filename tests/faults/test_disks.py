"""Full and read-only disks, two runs in one folder, trackers without a server: one clear line, and the run then comes
out as if nothing had been."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest
from attempts import assert_readable, content, finish, newest_first, refuse

from cera_train.common.files import write_text

pytest_plugins = ("attempts",)


def test_a_file_that_does_not_fit_leaves_the_earlier_one_alone(tmp_path, disk):
    folder = disk(tmp_path / "small", "size=16k")
    write_text(folder / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(folder / "file", "new" * 10_000)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "old")]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "checkpoints"), [(0.2, 0), (0.97, 3)])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_space(
    tmp_path, disk, start, whole, uninterrupted, share, checkpoints
):
    """Full at the first checkpoint, and at the very last files."""
    blocks = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    outputs = disk(tmp_path / "outputs", f"size={int(share * blocks) * 4}k")
    folder = outputs / "run"
    for _ in range(2):  # it is no worse for trying again
        line = refuse(start())
        assert line.startswith("cera-train: the disk is full (")
        assert line.endswith("Free some space and repeat the command: a run goes on from its last checkpoint.")
        assert_readable(folder)
        assert len(newest_first(folder)) == checkpoints
        assert (folder / "adapter").exists() == (share == 0.97)
        assert not (folder / "result.json").exists()
    disk(outputs, "remount,size=1m")
    output = finish(start()).output
    assert (" done" in output) == (checkpoints > 0)
    assert content(folder) == uninterrupted


@pytest.mark.slow
def test_a_read_only_folder_is_named_and_nothing_in_it_harmed(tmp_path, cut, disk, start, uninterrupted):
    outputs = disk(tmp_path / "outputs", "size=1m")
    folder = Path(shutil.copytree(cut, outputs / "run"))
    before = content(folder)
    disk(outputs, "remount,ro")
    mend = "Name another file, or set output_dir"
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
def test_of_two_runs_in_one_folder_one_trains_and_the_other_is_refused(tmp_path, start, uninterrupted):
    attempts = [start(), start()]
    assert sorted(attempt.wait() for attempt in attempts) == [0, 2]
    loser = next(attempt for attempt in attempts if attempt.wait() == 2)
    assert "another run is writing to outputs/run: wait for it, or choose another name=..." in refuse(loser)
    assert loser.output == ""
    assert content(tmp_path / "outputs" / "run") == uninterrupted


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
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert content(tmp_path / "outputs" / "run")[name] == uninterrupted[name]
