"""Where a run reports while it trains: metrics.jsonl, its mirror in a tracker, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from cera_train.common.settings import to_plain
from cera_train.common.terminal import ProgressBar
from cera_train.common.trust import redact_tree
from cera_train.runs.folder import Progress, RunFolder
from cera_train.runs.results import METRICS, EvaluationMetrics, UpdateMetrics
from cera_train.runs.tracking import Tracker, start_tracker
from cera_train.training.build import Data, Model
from cera_train.training.resolve import Resolved


@dataclass(frozen=True)
class Log:
    """Every process has one; only that of the main process writes and prints."""

    folder: RunFolder
    tracker: Tracker
    bar: ProgressBar

    def metrics(self, metrics: UpdateMetrics | EvaluationMetrics) -> None:
        """A line of metrics.jsonl, and its mirror."""
        if self.folder.is_main:
            line = metrics.to_json()
            self.folder.append(METRICS, line)
            self.tracker.log(line)


@contextlib.contextmanager
def open_log(
    resolved: Resolved, folder: RunFolder, data: Data, model: Model, progress: Progress
) -> Iterator[Log]:
    """Writes the config and the machine into the run's folder, removes what comes after the
    checkpoint, and starts the tracker."""
    config = resolved.config
    tracker = Tracker()
    if folder.is_main:
        folder.rewind(progress)
        digests = {"train": data.rows.train.digest, "held_out": data.rows.evaluation.digest}
        processes = model.accelerator.num_processes
        plain = redact_tree(to_plain(config))  # no secret reaches the disk or a tracker
        folder.write_config(
            plain,
            processes,
            model.base,
            digests,
            data.updates,
            {"dtype": config.model.dtype, "reason": resolved.why["model.dtype"]},
        )
        tracker = start_tracker(config.tracker, plain, config.name, folder.path, progress.update)
    bar = ProgressBar("update", data.updates, progress.update, visible=folder.is_main)
    try:
        yield Log(folder, tracker, bar)
    finally:
        bar.close()
        tracker.finish()
