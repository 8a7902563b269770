"""What tests of whole runs share: readers of what a run leaves, a clock, and a run that is killed.
A run is given by its folder or its config."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.amp import GradScaler

from cera_train.runs.folder import RunFolder
from cera_train.runs.results import METRICS
from cera_train.settings.run import Config
from cera_train.training import build
from cera_train.training.train import train

TIMINGS = {
    "metrics.jsonl": {"train/tokens_per_s", "train/seconds"},
    "result.json": {"tokens_per_s", "seconds", "peak_memory_bytes"},
    "progress.json": {"seconds"},
    "checksums.json": {"progress.json"},
}
"""What a clock, or the machine's state, decides in a run's files."""


def folder_of(run) -> Path:
    return run if isinstance(run, Path) else Path(run.output_dir) / run.name


def run_card(folder: Path) -> dict[str, Any]:
    """The names that the code of a card defines."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), names)
    return names


def metrics_of(run) -> list[dict]:
    """The whole lines of metrics.jsonl, which may not be there yet."""
    try:
        *lines, _ = (folder_of(run) / "metrics.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def timeless_metrics(run) -> list[dict]:
    """The metrics without what a clock measured."""
    timings = TIMINGS["metrics.jsonl"]
    return [
        {key: value for key, value in line.items() if key not in timings}
        for line in metrics_of(run)
    ]


def losses_of(run) -> list[float]:
    """The loss of every update."""
    return [line["train/loss"] for line in metrics_of(run) if "train/loss" in line]


def all_losses_of(run) -> list[float]:
    """The loss of every update and every evaluation, in their order."""
    return [line.get("train/loss", line.get("eval/loss")) for line in metrics_of(run)]


def evaluations_of(run) -> list[dict]:
    """Perplexity and spectra of every evaluation."""
    lines = (line for line in metrics_of(run) if "eval/loss" in line)
    return [{key: value for key, value in line.items() if key != "epoch"} for line in lines]


def adapter_bytes(run) -> bytes:
    """Or those of a full model."""
    [weights] = (folder_of(run) / "adapter").glob("*model.safetensors")
    return weights.read_bytes()


def wait_until(condition: Callable[[], Any], seconds: float = 120, every: float = 0.001) -> None:
    """Polls a thousand times a second, unless the check itself takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(every)


class Cut(BaseException):
    """Stands in for the death of the process: none of the run's code runs after it."""


@contextmanager
def once_logged(update: int, act: Callable[[], None], log: str = METRICS) -> Iterator[None]:
    """Acts as soon as the line of an update is in a log of a run; in metrics, its training line."""
    append = RunFolder.append

    def append_and_act(self, name, line):
        append(self, name, line)
        if name == log and line["update"] == update and (log != METRICS or "train/loss" in line):
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", append_and_act)
        yield


def train_and_die_after(config, update: int, log: str = METRICS) -> None:
    """Runs until that update is logged, then stops between two statements."""

    def die() -> None:
        raise Cut

    with once_logged(update, die, log), pytest.raises(Cut):
        train(config)


def assert_resumes_to_the_byte(config_of: Callable[..., Config], *settings: str) -> Config:
    """A run that was cut after 7 updates ends with the adapter and the metrics of a whole one.
    Returns the config of the cut one."""
    whole = config_of("name=whole", *settings)
    cut = config_of("name=cut", *settings)
    train(whole)
    train_and_die_after(cut, 7)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert timeless_metrics(cut) == timeless_metrics(whole)
    return cut


def scale_gradients(monkeypatch) -> list[GradScaler]:
    """Makes every run of the test scale its gradients, as in float16 on a GPU: by 4 at first, and
    twice as much after every 5 updates. Returns the runs' scalers."""
    scalers = []
    start = build.start_accelerator

    def start_with_scaler(*arguments):
        accelerator = start(*arguments)
        accelerator.scaler = scaler = GradScaler("cpu", init_scale=4.0, growth_interval=5)
        # Called before clipping.
        accelerator.unscale_gradients = lambda: scaler.unscale_(
            accelerator._optimizers[0].optimizer
        )
        scalers.append(scaler)
        return accelerator

    monkeypatch.setattr(build, "start_accelerator", start_with_scaler)
    return scalers
