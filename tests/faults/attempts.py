"""Real `cera-train` commands that a test may kill. Each is forked from a process that has imported everything, so it
starts in milliseconds and is as alone as one from a shell: its own arguments, folder, output and exit status."""

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY
from safetensors.torch import load_file
from tiny_runs import TIMINGS, metrics_of, wait_until

from cera_train.common.files import WRITING, find_damage

UPDATES = 30
"""Of the run that faults happen to."""

FORKING = multiprocessing.get_context("forkserver")
LLAMA = "transformers.models.llama.modeling_llama"
FORKING.set_forkserver_preload(["cera_train.cli.train", "cera_train.training.train", LLAMA, "matplotlib.figure"])


class Attempt:
    """A running command.

    Args:
        log: where its output goes; its errors go to a file beside it.
        environment: added to this process's, as RANK and WORLD_SIZE are by torchrun.
    """

    def __init__(self, arguments: list[str], folder: Path, log: Path, **environment: str) -> None:
        self.log, self.error_log = log, log.with_suffix(".err")
        self._process = FORKING.Process(target=_run, args=(arguments, folder, log, self.error_log, environment))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float = 120) -> int | None:
        """The exit status, of a killed command the negative signal; None where it still runs after so long."""
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


def _run(arguments: list[str], folder: Path, log: Path, error_log: Path, environment: dict[str, str]) -> None:
    for path, stream in ((log, sys.stdout), (error_log, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder)
    os.environ |= environment
    sys.argv = ["cera-train", *arguments]
    from cera_train.cli.train import main

    main()


@contextlib.contextmanager
def started(attempts: list[Attempt]) -> Iterator[None]:
    """None of them outlives the test."""
    try:
        yield
    finally:
        for attempt in attempts:
            attempt.kill()


def content(folder: Path) -> dict[str, Any]:
    """All that two runs of one config must have in common: every file byte for byte, timings left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): _without_timings(path) for path in files}


def _without_timings(path: Path) -> Any:
    if path.name not in TIMINGS:
        return path.read_bytes()
    rows = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [{name: value for name, value in json.loads(row).items() if name not in TIMINGS[path.name]} for row in rows]


def assert_readable(folder: Path) -> None:
    """Every file under its own name is whole; of metrics.jsonl, all lines but the last."""
    for path in folder.rglob("*"):
        if path.is_dir() or any(part.startswith(WRITING) for part in path.relative_to(folder).parts):
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
    """Of the metrics: 0 before the first update."""
    return max((row.get("update") for row in metrics_of(folder) if "train/loss" in row), default=0)


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


def newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"), key=lambda path: -int(path.name))


@pytest.fixture(scope="session")
def arguments(tiny_folder) -> list[str]:
    """A run that writes something after every update, and whose best adapter is not its last."""
    return [
        *(f"model.path={tiny_folder}", *TINY, "name=run"),
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
