"""SIGKILL at random moments of a real run, as the out-of-memory killer sends it: nothing unreadable is ever left, and
in the end there is what an uninterrupted run leaves, byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from attempts import Attempt, assert_readable, content

from cera_train.common.files import WRITING

KILLS = 20


class Pair:
    """Two processes of one run, as torchrun starts them. One of them is killed; the other is told to end, as a launcher
    does, if it does not by itself."""

    def __init__(self, arguments: list[str], folder: Path, dice: random.Random) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        self.dice = dice
        self.processes = [
            Attempt(arguments, folder, folder / f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            for rank in range(2)
        ]

    def wait(self, seconds: float = 120) -> int | None:
        statuses = [process.wait(seconds) for process in self.processes]
        return None if None in statuses else max(statuses, key=abs)

    @property
    def is_running(self) -> bool:
        return any(process.is_running for process in self.processes)

    def kill(self) -> int:
        victim, other = self.dice.sample(self.processes, 2)
        status = victim.kill()
        if other.wait(10) is None:  # they had not found each other yet
            os.kill(other.pid, signal.SIGTERM)
            if other.wait(10) is None:
                other.kill()
        return status


def await_moment(attempt: Attempt | Pair, folder: Path, seconds: float, dice: random.Random) -> None:
    """Returns at a random moment, every second time while a checkpoint is being written; or when the run is over."""
    if dice.random() < 0.5:
        attempt.wait(dice.uniform(0, seconds))
        return
    for _ in range(dice.randrange(1, 6)):
        before = set((folder / "checkpoints").glob(f"{WRITING}*"))
        while attempt.is_running and not set((folder / "checkpoints").glob(f"{WRITING}*")) - before:
            time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.005))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_twenty_random_moments_is_the_uninterrupted_one(tmp_path, tiny_folder, processes):
    arguments = [
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "name=run"),
        *("adapter.r=4", "adapter.dropout=0.3", "optimizer.lr=0.2", "optimizer.warmup_ratio=0.1"),
        *("train.max_updates=16", "train.eval_every=4", "train.save_every=1", "train.batch_size=16"),
    ]
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    dice, folder = random.Random(seed), tmp_path / "outputs" / "run"

    def start() -> Attempt | Pair:
        return Attempt(arguments, tmp_path, tmp_path / "log") if processes == 1 else Pair(arguments, tmp_path, dice)

    for _ in range(2):  # the first one also tokenises the rows
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        assert start().wait() == 0
        seconds = time.monotonic() - started
    whole = content(folder)
    shutil.rmtree(folder)
    kills = 0
    while kills < KILLS:
        attempt = start()
        await_moment(attempt, folder, seconds, dice)
        if attempt.kill() == 0:  # it was over
            assert content(folder) == whole
            shutil.rmtree(folder)
        else:
            kills += 1
            assert_readable(folder)
    assert start().wait() == 0
    assert content(folder) == whole
