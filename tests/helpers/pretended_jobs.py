"""Jobs of a sweep that train nothing: a launcher that leaves what their runs would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import yaml
from hydra.core.plugins import Plugins
from made_sweeps import record_job

from cera_train.sweep.folder import job_name
from cera_train.sweep.record import RECORD, SweepRecord

Began = list[tuple]
"""Per job: its name, and the updates where it began and ended, or "failed"."""


def leave_run(folder: Path, end: int, total: int, loss: Callable[[int], float]) -> tuple[int, int] | None:
    """Leaves what a run does that trains to an update of its total, where `loss` is that of its evaluation. Returns the
    updates where it began and ended; None: it was finished before."""
    if (folder / "result.json").exists():
        return None
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    begin = json.loads(path.read_text().splitlines()[-1])["update"] if path.exists() else 0
    figures = {"eval/loss": loss(end), "eval/perplexity": math.exp(loss(end))}
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"max_updates": total}, "data": {}}))
    with path.open("a") as file:
        file.write(json.dumps({"update": end} | figures) + "\n")
    if end == total:
        (folder / "result.json").write_text(json.dumps({"updates": end} | figures))
    return begin, end


class Launcher:
    """Hydra's basic launcher, but for the training. Some jobs fail, some are lost, and some are killed, and the sweep
    with them."""

    def __init__(self, sweep: Path, loss: Callable[[dict[str, str], int], float], updates: int = 100) -> None:
        """
        Args:
            loss: of a job's overrides, key -> value, at an update.
            updates: of a job that goes on to its end.
        """
        self.sweep, self.loss, self.updates = sweep, loss, updates
        self.began: Began = []
        self.failing, self.lost, self.killed = set(), set(), set()

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list:
        swept = SweepRecord.read(self.sweep / RECORD).swept
        for words in jobs:
            values, name = dict(word.split("=", 1) for word in words), job_name(words, swept)
            if name in self.killed:
                raise KeyboardInterrupt
            if name in self.failing:
                self.began.append((name, "failed"))
                record_job(self.sweep, name, "diverged")
            elif name not in self.lost and (updates := self.run(name, values)) is not None:
                self.began.append((name, *updates))
        return []

    def run(self, name: str, values: dict[str, str]) -> tuple[int, int] | None:
        end = min(int(values.get("train.stop_at", self.updates)), self.updates)
        return leave_run(self.sweep / name, end, self.updates, lambda update: self.loss(values, update))

    def launch_by_hydra(self, monkeypatch) -> None:
        """Makes it the launcher of every sweep."""
        monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *arguments, **settings: self)
