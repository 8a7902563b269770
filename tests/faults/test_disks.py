"""Full and read-only disks, and two runs in one folder: one clear line, and the run then comes out as if nothing had
been."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from attempts import assert_readable, content, finish, last_update, newest_first, refuse
from tiny_runs import wait_until

from cera_train.common.files import write_text

pytest_plugins = ("disks", "faulty_runs")


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


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_trains_and_the_other_is_refused(tmp_path, start, uninterrupted):
    attempts = [start(), start()]
    assert sorted(attempt.wait() for attempt in attempts) == [0, 2]
    loser = next(attempt for attempt in attempts if attempt.wait() == 2)
    assert "another run is writing to outputs/run: wait for it, or choose another name=..." in refuse(loser)
    assert loser.output == ""
    assert content(tmp_path / "outputs" / "run") == uninterrupted
