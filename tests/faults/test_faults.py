"""SIGKILL at random moments of a real run, damaged checkpoints, full and read-only disks, two runs
in one folder: one clear line, nothing unreadable, and in the end what an uninterrupted run
leaves."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from safetensors.torch import load_file
from tiny_runs import TIMINGS, adapter_bytes, folder_of, train_and_die_after

from cera_train.cli.train import main
from cera_train.common.errors import UserError, explain
from cera_train.common.files import WRITING, find_damage, write_checksums, write_folder, write_text
from cera_train.runs.folder import RunFolder
from cera_train.training.train import train

FORKING = multiprocessing.get_context("forkserver")
LLAMA = "transformers.models.llama.modeling_llama"
FORKING.set_forkserver_preload(
    ["cera_train.cli.train", "cera_train.training.train", LLAMA, "matplotlib.figure"]
)


def train_in_its_process(words: list[str], folder: Path) -> None:
    """The whole of a forked process, whose output goes to `folder / "log"`."""
    with (folder / "log").open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.chdir(folder)
    sys.argv = ["cera-train", *words]
    main()


def content(folder: Path) -> dict[str, Any]:
    """Everything that two runs of one config must share: every file byte for byte, without
    timings."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): _without_timings(path) for path in files}


def _without_timings(path: Path) -> Any:
    if path.name not in TIMINGS:
        return path.read_bytes()
    rows = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [
        {name: value for name, value in json.loads(row).items() if name not in TIMINGS[path.name]}
        for row in rows
    ]


def assert_readable(folder: Path) -> None:
    """Every file under its own name is complete; in metrics.jsonl, all lines but the last."""
    for path in folder.rglob("*"):
        if path.is_dir() or any(
            part.startswith(WRITING) for part in path.relative_to(folder).parts
        ):
            continue
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".jsonl":
                *lines, _ = path.read_text().split("\n")
                assert all("update" in json.loads(line) for line in lines)
            case ".yaml":
                assert "adapter" in yaml.safe_load(path.read_text())
            case ".safetensors":
                assert load_file(path)
            case _:
                assert path.name == ".lock" or path.stat().st_size, path
    for checkpoint in (folder / "checkpoints").glob("[0-9]*"):
        assert find_damage(checkpoint) is None


def await_moment(process: BaseProcess, folder: Path, seconds: float, dice: random.Random) -> None:
    """Returns at a random moment, half the time while a checkpoint is being written; or when the
    run is over."""
    if dice.random() < 0.5:
        process.join(dice.uniform(0, seconds))
        return
    for _ in range(dice.randrange(1, 6)):
        before = set((folder / "checkpoints").glob(f"{WRITING}*"))
        while process.is_alive() and not set((folder / "checkpoints").glob(f"{WRITING}*")) - before:
            time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.005))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "seed"), [(8, 0), pytest.param(20, None, marks=pytest.mark.nightly)]
)
def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(
    tmp_path, tiny_folder, times, seed
):
    """It saves after every update, and its best adapter is not its last."""
    words = [f"model.path={tiny_folder}", *TINY, "name=run", "adapter.r=4", "adapter.dropout=0.3"]
    words += ["optimizer.lr=0.2", "optimizer.warmup_ratio=0.1", "train.batch_size=16"]
    words += ["train.max_updates=16", "train.eval_every=4", "train.save_every=1", "train.keep=3"]
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
        print(f"seed {seed}")  # shown if the test fails
    dice = random.Random(seed)
    folder = tmp_path / "outputs" / "run"

    def start() -> BaseProcess:
        process = FORKING.Process(target=train_in_its_process, args=(words, tmp_path))
        process.start()
        return process

    def finish() -> None:
        process = start()
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "log").read_text()

    for _ in range(2):  # the first one also tokenises the rows
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        finish()
        seconds = time.monotonic() - started
    whole = content(folder)
    shutil.rmtree(folder)
    kills = 0
    while kills < times:
        process = start()
        await_moment(process, folder, seconds, dice)
        process.kill()  # no handler, no `finally`, nothing flushed
        process.join()
        if process.exitcode == 0:  # the run was over
            assert content(folder) == whole
            shutil.rmtree(folder)
        else:
            kills += 1
            assert_readable(folder)
    finish()
    assert content(folder) == whole


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_to_any_file_of_a_folder_is_found(tmp_path, damage):
    folder = tmp_path / "folder"
    for name in ("a", "b", "checksums.json") * 10:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in ("a", "b"):
            (folder / file).write_bytes(random.randbytes(50))
        write_checksums(folder)
        assert find_damage(folder) is None
        damage(folder / name)
        assert find_damage(folder) or (name == "checksums.json" and damage is Path.unlink)
    for text in ("[]", json.dumps({"/dev/zero": ""})):
        (folder / "checksums.json").write_text(text)
        assert find_damage(folder)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_or_is_refused(
    finished_config, tiny_config, capsys
):
    config = tiny_config()
    train_and_die_after(config, 9)
    before, newest = (folder_of(config) / "checkpoints" / update for update in "48")
    flip_a_bit(newest / "optimizer.pt")
    aside = before.with_name("aside")
    (before / "optimizer.pt").rename(aside)
    left = content(folder_of(config))
    message = "has only damaged checkpoints: .*Restore one of them, or remove the folder"
    with pytest.raises(UserError, match=message):
        train(config)
    assert content(folder_of(config)) == left
    aside.rename(before / "optimizer.pt")
    capsys.readouterr()
    train(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged ")]
    assert f"{newest} (optimizer.pt: checksum differs" in line
    assert line.endswith(f"Resuming from {before}.")
    assert adapter_bytes(config) == adapter_bytes(finished_config)


def test_a_folder_lost_between_two_renames_is_restored(tmp_path):
    """The moment when the old folder is gone and the new one has not arrived; it is too short to
    hit by chance."""
    write_folder(tmp_path / "best", lambda folder: (folder / "weights").write_text("old"))
    (tmp_path / "best").rename(tmp_path / f"{WRITING}old-best")
    (tmp_path / f"{WRITING}best").mkdir()
    with RunFolder.open(tmp_path):
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert not list(tmp_path.glob(f"{WRITING}*"))


@pytest.fixture
def disk(tmp_path):
    """disk(folder, "size=64k") mounts a small file system there; disk(folder, "remount,ro") changes
    it."""
    mounted = []

    def disk(folder: Path, options: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False
        ).returncode:
            pytest.skip("mounting a file system needs root and its capability for it")
        if "remount" not in options:
            mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_file_that_does_not_fit_leaves_the_earlier_one_intact(tmp_path, disk):
    folder = disk(tmp_path / "small", "size=16k")
    write_text(folder / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(folder / "file", "new" * 10_000)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "old")]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.99])
def test_a_full_disk_stops_a_run_that_resumes_once_there_is_space(
    tmp_path, disk, finished_config, tiny_config_in, share
):
    """Full at the first checkpoint, and at the last one."""
    files = [path for path in folder_of(finished_config).rglob("*") if path.is_file()]
    blocks = sum(-(-path.stat().st_size // 4096) for path in files)
    outputs = disk(tmp_path / "outputs", f"size={int(share * blocks) * 4}k")
    config = tiny_config_in(outputs)
    for _ in range(2):  # trying again does no harm
        with pytest.raises(OSError, match="No space left on device") as caught:
            train(config)
        assert "Free some space and repeat the command" in explain(caught.value)
        assert_readable(folder_of(config))
        assert not (folder_of(config) / "adapter").exists()
        assert not (folder_of(config) / "result.json").exists()
    disk(outputs, "remount,size=1m")
    train(config)
    assert adapter_bytes(config) == adapter_bytes(finished_config)


@pytest.mark.slow
def test_a_read_only_folder_is_named_and_left_unharmed(
    tmp_path, disk, finished_config, tiny_config_in
):
    outputs = disk(tmp_path / "outputs", "size=1m")
    config = tiny_config_in(outputs)
    train_and_die_after(config, 9)
    before = content(folder_of(config))
    disk(outputs, "remount,ro")
    for name in ("run", "another"):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            train(tiny_config_in(outputs, f"name={name}"))
        line = explain(caught.value)
        assert str(outputs / name) in line
        assert "Name another file, or set output_dir" in line
    assert content(folder_of(config)) == before
    disk(outputs, "remount,rw")
    train(config)
    assert adapter_bytes(config) == adapter_bytes(finished_config)


def test_a_second_run_in_a_folder_is_refused_while_the_first_trains(tiny_config):
    config = tiny_config()
    with (
        RunFolder.open(folder_of(config)),
        pytest.raises(UserError, match="another run is writing to .*: wait for it, or choose"),
    ):
        train(config)
