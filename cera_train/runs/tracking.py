"""Mirrors of a run in dashboards, by Accelerate's trackers. The run's folder is the record: a
mirror that fails is dropped with one line, and training goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.common.files import read_json, write_text
from cera_train.common.settings import flatten, require
from cera_train.common.terminal import announce, print_line
from cera_train.common.trust import redact
from cera_train.common.user_code import user_code
from cera_train.settings.training import TrackerConfig

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

WANDB = "wandb"
TENSORBOARD = "tensorboard"

IDS = "tracker-ids.json"
"""File in the run's folder: the id under which W&B knows the run, so that a resumed run continues
there."""

WANDB_NAME = 128
"""Most characters that W&B's server accepts in the name of a run or of a group."""

ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    # Error reports delay the end of a run by 20 seconds if the server does not answer.
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables that keep W&B quiet and limit the seconds that it waits for its server. The
user's own values win."""


class Tracker:
    """The trackers of a run: none, one or several."""

    def __init__(self) -> None:
        self.trackers: dict[str, GeneralTracker] = {}

    def log(self, metrics: dict[str, float]) -> None:
        """Sends a line of metrics.jsonl."""
        for kind, tracker in [*self.trackers.items()]:
            with self.drop_on_failure(kind):
                tracker.log(metrics, step=metrics["update"])

    def finish(self) -> None:
        for kind, tracker in [*self.trackers.items()]:
            with self.drop_on_failure(kind):
                tracker.finish()
        self.trackers.clear()

    @contextlib.contextmanager
    def drop_on_failure(self, kind: str) -> Iterator[None]:
        """Prints an error in one line, and drops the tracker."""
        try:
            with user_code(f"{kind} failed and is left out", "Everything is in the run's folder."):
                yield
        except UserError as error:
            self.trackers.pop(kind, None)
            announce("tracker", redact(str(error)))


def check_trackers(config: TrackerConfig) -> None:
    """Raises UserError for an unknown tracker, or one whose package is not installed."""
    for kind in config.kinds:  # a tracker has its package's name
        require(
            kind in tracker_classes() and importlib.util.find_spec(kind),
            f"tracker.kinds={{{kind}: ...}}: no such tracker is here: choose from "
            f"{', '.join(tracker_classes())}, and install its package.",
        )


def tracker_classes() -> dict[str, type[GeneralTracker]]:
    """Accelerate's trackers by name."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


def start_tracker(
    config: TrackerConfig, run_config: dict[str, Any], name: str, folder: Path, first_update: int
) -> Tracker:
    """Starts the trackers of a run. `run_config` is uploaded as it is: it must hold no secret."""
    os.environ |= ENVIRONMENT | os.environ
    started = Tracker()
    for kind in config.kinds:
        with started.drop_on_failure(kind):
            tracker = build_tracker(kind, config, name, folder, first_update)
            tracker.start()
            started.trackers[kind] = tracker
            if kind == WANDB and tracker.run.offline:
                upload = f"wandb sync {quote(tracker.run.settings.sync_dir)}"
                print_line("wandb", f"recorded offline; to upload it: {upload}")
            if kind == TENSORBOARD:
                # As hyperparameters, TensorBoard would show the config as another run.
                tracker.log({"config": f"```json\n{json.dumps(run_config, indent=2)}\n```"})
            else:
                tracker.store_init_configuration(flatten(run_config))
    return started


def build_tracker(
    kind: str, config: TrackerConfig, name: str, folder: Path, first_update: int
) -> GeneralTracker:
    """Accelerate's tracker of a name, not yet started."""
    arguments = config.kinds[kind] or {}
    tracker_class = tracker_classes()[kind]
    if kind == TENSORBOARD:
        return tracker_class(kind, folder, purge_step=first_update + 1, **arguments)
    if kind == WANDB:
        arguments = wandb_arguments(name, folder) | arguments
    return tracker_class(config.project, **arguments)


def wandb_arguments(name: str, folder: Path) -> dict[str, str]:
    """What a run of W&B begins with: offline without a key."""
    import wandb

    has_key = wandb.login(prompt=False, verify=False)
    return {
        "id": wandb_id(folder),
        "resume": "allow",
        "name": name[:WANDB_NAME],
        "dir": str(folder),
        "mode": os.environ.get("WANDB_MODE") or ("online" if has_key else "offline"),
    }


def wandb_id(folder: Path) -> str:
    """The id under which W&B knows the run: a new one at its first start."""
    path = folder / IDS
    if not path.exists():
        write_text(path, json.dumps({WANDB: secrets.token_hex(16)}, indent=2) + "\n")
    return read_json(path)[WANDB]
