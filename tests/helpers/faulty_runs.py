"""The run that faults happen to: whole, cut, and as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from attempts import UPDATES, Attempt, content, finish, last_update, started
from tiny_runs import wait_until


@pytest.fixture(scope="session")
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
    with started([attempt]):
        wait_until(lambda: last_update(folder / "outputs" / "run") > 13)
        attempt.kill()
    assert last_update(folder / "outputs" / "run") < UPDATES
    return folder / "outputs" / "run"
