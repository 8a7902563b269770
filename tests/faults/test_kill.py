"""SIGKILL at random moments of a real run, as the out-of-memory killer sends it: nothing unreadable is ever left, and
in the end there is what an uninterrupted run leaves, byte for byte."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attempts import Attempt, assert_readable, content
from tiny_runs import metrics_of

from cera_train.common.files import WRITING

KILLS = 20
UPDATES, EVALUATE_EVERY = 16, 4
WRITE, EVALUATION, START, ANY = "in a checkpoint's writing", "in an evaluation", "before its first update", "elsewhere"
AT_LEAST = {WRITE: 4, EVALUATION: 2, START: 2}
"""How many of the kills must have landed where."""


def kill_at_random(
    start: Callable[[], Attempt], folder: Path, whole: dict[str, Any], seconds: float, dice: random.Random
) -> Counter:
    """Starts a command again and again and kills it, until it was killed KILLS times and as often as AT_LEAST asks.

    Args:
        start: starts the command, which goes on where an earlier one was cut.
        folder: of its run.
        whole: what an uninterrupted run leaves there. A run that is over before it is killed is compared with it, and
            the next begins anew.
        seconds: how long an uninterrupted run takes.

    Returns:
        How many kills landed where, and how many "runs" came to their end.
    """
    landed = Counter()
    while landed.total() - landed["runs"] < KILLS or any(landed[place] < least for place, least in AT_LEAST.items()):
        before = metrics_of(folder), unfinished(folder)
        attempt = start()
        await_moment(dice.choice([WRITE, WRITE, EVALUATION, START, ANY, ANY]), attempt, folder, seconds, dice)
        status = attempt.kill()
        if status == 0:
            assert content(folder) == whole
            shutil.rmtree(folder)
            landed["runs"] += 1
        else:
            assert status == -9, attempt.errors
            assert_readable(folder)
            landed[place(folder, *before)] += 1
    return landed


def await_moment(aim: str, attempt: Attempt, folder: Path, seconds: float, dice: random.Random) -> None:
    """Returns at a random moment of the kind that is aimed at, or when the command is over."""
    happens = {WRITE: lambda: unfinished(folder), EVALUATION: lambda: is_evaluating(metrics_of(folder))}.get(aim)
    if happens is None:
        attempt.wait(dice.uniform(0, seconds * (0.4 if aim == START else 1)))
        return
    times, did_happen = dice.randrange(1, 6), bool(happens())
    while attempt.is_running and times:
        does_happen = bool(happens())
        times -= does_happen and not did_happen
        did_happen = does_happen
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.005))


def place(folder: Path, metrics_before: list, unfinished_before: set) -> str:
    """Where a kill landed, by what it left."""
    lines = metrics_of(folder)
    if unfinished(folder) - unfinished_before:
        return WRITE
    if lines == metrics_before[: len(lines)]:
        return START
    return EVALUATION if is_evaluating(lines) else ANY


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """The checkpoints that are being written or removed, with the time of their last change."""
    found = set()
    for path in (folder / "checkpoints").glob(f"{WRITING}[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # since then it has its name
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def is_evaluating(lines: list[dict[str, Any]]) -> bool:
    return bool(lines) and "train/loss" in lines[-1] and lines[-1]["update"] % EVALUATE_EVERY == 0


class Pair:
    """Two processes of one run, as torchrun starts them. One of them is killed; the other is told to end, as a launcher
    does, if it does not by itself."""

    def __init__(self, arguments: list[str], folder: Path, dice: random.Random) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        self.processes = [
            Attempt(arguments, folder, folder / f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            for rank in range(2)
        ]
        self.dice = dice

    def wait(self, seconds: float = 120) -> int | None:
        statuses = [process.wait(seconds) for process in self.processes]
        return None if None in statuses else max(statuses, key=abs)

    @property
    def is_running(self) -> bool:
        return any(process.is_running for process in self.processes)

    @property
    def errors(self) -> str:
        return "".join(process.errors for process in self.processes)

    def kill(self) -> int:
        victim, other = self.dice.sample(self.processes, 2)
        status = victim.kill()
        if other.wait(10) is None:  # they had not found each other yet
            os.kill(other.pid, signal.SIGTERM)
            if other.wait(10) is None:
                other.kill()
        return status


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_twenty_random_moments_is_the_uninterrupted_one(tmp_path, tiny_folder, processes):
    """Of two processes, one is killed."""
    arguments = [
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "name=run"),
        *("adapter.r=4", "adapter.dropout=0.3", "optimizer.lr=0.2", "optimizer.warmup_ratio=0.1"),
        *(f"train.max_updates={UPDATES}", f"train.eval_every={EVALUATE_EVERY}", "train.save_every=1"),
        "train.batch_size=16",
    ]
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)

    def start() -> Attempt | Pair:
        return Attempt(arguments, tmp_path, tmp_path / "log") if processes == 1 else Pair(arguments, tmp_path, dice)

    folder = tmp_path / "outputs" / "run"
    for _ in range(2):  # the first one also tokenises the rows
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        assert start().wait() == 0
        seconds = time.monotonic() - started
    whole = content(folder)
    shutil.rmtree(folder)

    print(f"seed {seed}, {seconds:.1f} s without a kill")  # shown where the test fails
    landed = kill_at_random(start, folder, whole, seconds, dice)
    print(dict(landed))
    last = start()
    assert last.wait() == 0, last.errors
    assert content(folder) == whole
