"""SIGKILL at random moments of a real run, damaged checkpoints, full and read-only disks, two runs
in one folder, trackers without a server: one clear line, nothing unreadable, and in the end what an
uninterrupted run leaves."""

import json
import multiprocessing
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY
from safetensors.torch import load_file
from tiny_runs import TIMINGS, metrics_of, wait_until

from cera_train.common.files import WRITING, find_damage, write_checksums, write_folder, write_text
from cera_train.runs.folder import RunFolder

UPDATES = 30
"""Settings of the run that faults happen to."""

FORKING = multiprocessing.get_context("forkserver")
LLAMA = "transformers.models.llama.modeling_llama"
FORKING.set_forkserver_preload(
    ["cera_train.cli.train", "cera_train.training.train", LLAMA, "matplotlib.figure"]
)


class Attempt:
    """A running command.

    Args:
        log: where its output goes; its errors go to a file beside it.
        environment: added to this process's, as RANK and WORLD_SIZE are by torchrun.
    """

    def __init__(self, arguments: list[str], folder: Path, log: Path, **environment: str) -> None:
        self.log = log
        self.error_log = log.with_suffix(".err")
        self._process = FORKING.Process(
            target=_run, args=(arguments, folder, log, self.error_log, environment)
        )
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float = 120) -> int | None:
        """The exit status, or the negative signal of a killed command; None if it is still running
        after the timeout."""
        self._process.join(seconds)
        return self._process.exitcode

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> int:
        """SIGKILL: no handler, no `finally`, nothing flushed."""
        self._process.kill()
        return self.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def errors(self) -> str:
        return self.error_log.read_text()


def _run(
    arguments: list[str], folder: Path, log: Path, error_log: Path, environment: dict[str, str]
) -> None:
    for path, stream in ((log, sys.stdout), (error_log, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder)
    os.environ |= environment
    sys.argv = ["cera-train", *arguments]
    from cera_train.cli.train import main

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
            case ".pt":
                assert torch.load(path, weights_only=True)["state"] is not None
            case ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
            case ".jinja" | ".md":
                assert path.read_text()
            case _:
                assert path.name == ".lock", path
    for checkpoint in (folder / "checkpoints").glob("[0-9]*"):
        assert find_damage(checkpoint) is None


def last_update(folder: Path) -> int:
    """The last update in the metrics: 0 before the first."""
    return max((row.get("update") for row in metrics_of(folder) if "train/loss" in row), default=0)


def finish(attempt: Attempt) -> Attempt:
    """A run that succeeds and prints only its usual lines."""
    assert attempt.wait() == 0, attempt.errors
    assert attempt.errors == ""
    return attempt


def refuse(attempt: Attempt) -> str:
    """The single error line of a run that ends with status 2."""
    assert attempt.wait() == 2, attempt.errors
    (line,) = attempt.errors.splitlines()
    return line


def newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"), key=lambda path: -int(path.name))


@pytest.fixture(scope="session")
def arguments(tiny_folder) -> list[str]:
    """A run that writes something after every update, and whose best adapter is not its last."""
    return [
        f"model.path={tiny_folder}",
        *TINY,
        "name=run",
        "adapter.r=4",
        "adapter.dropout=0.3",
        "optimizer.lr=0.2",
        f"train.max_updates={UPDATES}",
        "train.batch_size=16",
        "train.eval_every=2",
        "train.save_every=3",
        "train.keep=3",
    ]


@pytest.fixture
def start(arguments, tmp_path):
    """start("more=arguments", ..., VARIABLE=...): the command, in tmp_path. No command outlives the
    test."""
    attempts = []

    def start(*more: str, **environment: str) -> Attempt:
        log = tmp_path / f"attempt-{len(attempts)}.log"
        attempts.append(Attempt([*arguments, *more], tmp_path, log, **environment))
        return attempts[-1]

    yield start
    for attempt in attempts:
        attempt.kill()


@pytest.fixture(scope="session")
def whole(arguments, tmp_path_factory) -> Path:
    """The folder of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    finish(Attempt(arguments, folder, folder / "log"))
    return folder / "outputs" / "run"


@pytest.fixture(scope="session")
def uninterrupted(whole) -> dict:
    return content(whole)


@pytest.fixture(scope="session")
def cut(arguments, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its fourth checkpoint."""
    folder = tmp_path_factory.mktemp("cut")
    attempt = Attempt(arguments, folder, folder / "log")
    try:
        wait_until(lambda: last_update(folder / "outputs" / "run") > 13)
    finally:
        attempt.kill()
    assert last_update(folder / "outputs" / "run") < UPDATES
    return folder / "outputs" / "run"


def await_moment(attempt: Attempt, folder: Path, seconds: float, dice: random.Random) -> None:
    """Returns at a random moment, half the time while a checkpoint is being written; or when the
    run is over."""
    if dice.random() < 0.5:
        attempt.wait(dice.uniform(0, seconds))
        return
    for _ in range(dice.randrange(1, 6)):
        before = set((folder / "checkpoints").glob(f"{WRITING}*"))
        while attempt.is_running and not set((folder / "checkpoints").glob(f"{WRITING}*")) - before:
            time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.005))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "seed"), [(8, 0), pytest.param(20, None, marks=pytest.mark.nightly)]
)
def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(
    tmp_path, arguments, times, seed
):
    words = ["train.max_updates=16", "train.eval_every=4", "train.save_every=1"]
    words += ["optimizer.warmup_ratio=0.1"]
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
        print(f"seed {seed}")  # shown if the test fails
    dice = random.Random(seed)
    folder = tmp_path / "outputs" / "run"

    def start() -> Attempt:
        return Attempt([*arguments, *words], tmp_path, tmp_path / "log")

    for _ in range(2):  # the first one also tokenises the rows
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        assert start().wait() == 0
        seconds = time.monotonic() - started
    whole = content(folder)
    shutil.rmtree(folder)
    kills = 0
    while kills < times:
        attempt = start()
        await_moment(attempt, folder, seconds, dice)
        if attempt.kill() == 0:  # the run was over
            assert content(folder) == whole
            shutil.rmtree(folder)
        else:
            kills += 1
            assert_readable(folder)
    assert start().wait() == 0
    assert content(folder) == whole


@pytest.fixture
def run(cut, tmp_path) -> Path:
    """A copy of the folder of the run that was killed."""
    return Path(shutil.copytree(cut, tmp_path / "outputs" / "run"))


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


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(run, start, uninterrupted):
    newest, second, _ = newest_first(run)
    flip_a_bit(newest / "optimizer.pt")
    output = finish(start()).output
    (line,) = [line for line in output.splitlines() if line.startswith("damaged ")]
    assert f"{newest.relative_to(run.parents[1])} (optimizer.pt: checksum differs" in line
    assert line.endswith(f"Resuming from {second.relative_to(run.parents[1])}.")
    assert content(run) == uninterrupted


@pytest.mark.slow
def test_a_run_with_only_damaged_checkpoints_is_refused(run, start, uninterrupted):
    for checkpoint in newest_first(run):
        truncate(checkpoint / "optimizer.pt")
    before = content(run)
    line = refuse(start())
    assert "outputs/run has only damaged checkpoints: outputs/run/checkpoints/" in line
    assert line.endswith("Restore one of them, or remove the folder to start again.")
    assert content(run) == before


def test_a_folder_lost_between_two_renames_is_restored(tmp_path):
    """The moment when the old folder is gone and the new one has not arrived; it is too short to
    hit by chance."""
    write_folder(tmp_path / "best", lambda folder: (folder / "weights").write_text("old"))
    (tmp_path / "best").rename(tmp_path / f"{WRITING}old-best")
    (tmp_path / f"{WRITING}best").mkdir()
    with RunFolder.open(tmp_path, {}):
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert not list(tmp_path.glob(f"{WRITING}*"))


@pytest.fixture
def disk(tmp_path: Path):
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
@pytest.mark.parametrize(("share", "checkpoints"), [(0.2, 0), (0.99, 3)])
def test_a_full_disk_stops_a_run_that_resumes_once_there_is_space(
    tmp_path, disk, start, whole, uninterrupted, share, checkpoints
):
    """Full at the first checkpoint, and at the last one."""
    blocks = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    outputs = disk(tmp_path / "outputs", f"size={int(share * blocks) * 4}k")
    folder = outputs / "run"
    for _ in range(2):  # trying again does no harm
        line = refuse(start())
        assert "No space left on device" in line
        assert line.endswith(
            "Free some space and repeat the command: a run resumes from its last checkpoint."
        )
        assert_readable(folder)
        assert len(newest_first(folder)) == checkpoints
        assert not (folder / "adapter").exists()
        assert not (folder / "result.json").exists()
    disk(outputs, "remount,size=1m")
    output = finish(start()).output
    assert (" done" in output) == (checkpoints > 0)
    assert content(folder) == uninterrupted


@pytest.mark.slow
def test_a_read_only_folder_is_named_and_left_unharmed(tmp_path, cut, disk, start, uninterrupted):
    outputs = disk(tmp_path / "outputs", "size=1m")
    folder = Path(shutil.copytree(cut, outputs / "run"))
    before = content(folder)
    disk(outputs, "remount,ro")
    fix = "Name another file, or set output_dir"
    for name in ("run", "another"):
        assert re.search(
            rf"Read-only file system: \S*outputs/{name}\S* {fix}",
            refuse(start(f"name={name}")),
        )
    assert content(folder) == before
    disk(outputs, "remount,rw")
    finish(start())
    assert content(folder) == uninterrupted
    disk(outputs, "remount,ro")
    assert "outputs/run" in refuse(start())
    assert content(folder) == uninterrupted


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_while_the_first_trains(tmp_path, start, uninterrupted):
    attempts = [start(), start()]
    assert sorted(attempt.wait() for attempt in attempts) == [0, 2]
    loser = next(attempt for attempt in attempts if attempt.wait() == 2)
    assert (
        "another run is writing to outputs/run: wait for it, or choose another name=..."
        in refuse(loser)
    )
    assert loser.output == ""
    assert content(tmp_path / "outputs" / "run") == uninterrupted


@pytest.mark.slow
def test_a_run_without_a_reachable_wandb_server_is_recorded_offline(tmp_path, start, uninterrupted):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # refuses connections
        server = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{port.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
        }
        attempt = start("tracker=wandb", WANDB_MODE="online", WANDB_INIT_TIMEOUT="3", **server)
        assert attempt.wait() == 0, attempt.errors
    (line,) = attempt.errors.splitlines()
    assert "W&B cannot be reached, so the run is recorded offline (" in line
    assert list((tmp_path / "outputs" / "run").glob("wandb/offline-run-*/*.wandb"))
    for name in (
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        "best/adapter_model.safetensors",
    ):
        assert content(tmp_path / "outputs" / "run")[name] == uninterrupted[name]
