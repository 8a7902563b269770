"""Mirrors of a run in W&B or TensorBoard. The run's folder is the record: a mirror that fails is dropped with one line,
and training goes on. What is measured after the run's end follows it into its W&B run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cera_train.common.files import lock_folder, write_text
from cera_train.common.settings import to_plain
from cera_train.common.terminal import print_line
from cera_train.common.trust import redact
from cera_train.runs.recorded_config import load_config
from cera_train.settings.training import TrackerConfig, TrackerKind

WANDB_ID = "wandb-run-id"
"""File in the folder of a run that W&B tracks: the id under which W&B knows it."""


class Tracker:
    """No mirror, and the interface of the others."""

    def log(self, metrics: dict[str, float], update: int) -> None:
        """Numbers at an update."""

    def picture(self, name: str, path: Path, update: int) -> None:
        """A PNG file."""

    def page(self, name: str, path: Path, update: int) -> None:
        """An HTML file."""

    def table(self, name: str, rows: list[dict[str, Any]], update: int) -> None:
        """Rows with the same names, of texts, numbers and truth values; None: not known."""

    def adapter(self, folder: Path) -> None:
        """The final adapter, as an artifact."""

    def finish(self) -> None:
        """Flushes."""


INIT_SECONDS, FINISH_SECONDS, ADAPTER_SECONDS, LOCK_SECONDS = 30, 30, 600, 120
"""Time limits of W&B: for its server to answer, else the run is recorded offline; for uploads after the last update;
for the upload of the adapter; for another command that sends something to the same run."""

LONGEST_NAME = 128
"""Characters that W&B's server takes for the name of a run or of a group."""


class WandbTracker(Tracker):
    """Weights & Biases: online with a key and a server that answers, else offline. It also keeps everything on the
    disk, for `wandb sync`."""

    def __init__(self, config: TrackerConfig, run_config: dict[str, Any], name: str, folder: Path) -> None:
        # Its error reports hold up the end of a run for 20 seconds where the server is silent.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb, self.log_adapter, self.folder = wandb, config.log_adapter, folder
        id_file = folder / WANDB_ID  # a resumed run goes on in the same W&B run
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(6))
        # A report sends to several runs, one after the other: none must be taken for the one before.
        settings = {
            "reinit": "create_new",
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
        }
        arguments = {
            "project": config.project,
            "entity": config.entity,
            "name": _short(name),
            "group": config.group and _short(config.group),
            "job_type": "train",
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": str(folder),
            "config": run_config,
            "settings": wandb.Settings(console="off", silent=True, **settings),
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        self.is_offline = mode == "offline"  # on purpose, or for want of a key
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode != "online":
                raise
            print_error(f"W&B cannot be reached, so the run is recorded offline ({error}).")
            wandb.teardown()  # else its service would refuse a second run of the same id
            self.run = wandb.init(mode="offline", **arguments)
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, metrics: dict[str, float], update: int) -> None:
        self.run.log({"update": update, **metrics})

    def picture(self, name: str, path: Path, update: int) -> None:
        self.run.log({"update": update, name: self.wandb.Image(str(path))})

    def page(self, name: str, path: Path, update: int) -> None:
        self.run.log({"update": update, name: self.wandb.Html(path, inject=False)})

    def table(self, name: str, rows: list[dict[str, Any]], update: int) -> None:
        data = [list(row.values()) for row in rows]
        table = self.wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True)
        self.run.log({"update": update, name: table})

    def adapter(self, folder: Path) -> None:
        if self.log_adapter:
            from wandb.sdk.artifacts.exceptions import WaitTimeoutError

            artifact = self.wandb.Artifact(f"{self.run.id}-adapter", type="model")
            artifact.add_dir(str(folder))
            logged = self.run.log_artifact(artifact)
            if not self.run.offline:
                with contextlib.suppress(WaitTimeoutError):  # `finish` prints how to upload the rest
                    logged.wait(ADAPTER_SECONDS)

    def finish(self) -> None:
        # A run that was resumed offline has a part for every time it ran.
        parts = [part for part in self.folder.glob("wandb/offline-run-*") if not list(part.glob("*.synced"))]
        try:
            self.run.finish()
        except TimeoutError:
            parts.append(Path(self.run.settings.sync_dir))
        if parts:
            command = shlex.join(["wandb", "sync", "--include-online", *sorted(map(str, parts))])
            so_far = "The run was recorded offline" if self.is_offline else "A part of the run is not uploaded yet"
            print_line("wandb", f"{so_far}. To upload it: {command}")


def _short(name: str) -> str:
    """A name that W&B takes; of two long ones that differ, the results differ too."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def has_key() -> bool:
    """Whether W&B can log in without a prompt: by its environment variable or by `wandb login`'s entry in netrc."""
    from requests.utils import get_netrc_auth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY")) or get_netrc_auth(host) is not None


class TensorBoardTracker(Tracker):
    """Event files in the run's folder."""

    def __init__(self, run_config: dict[str, Any], folder: Path, first_update: int) -> None:
        import json

        from torch.utils.tensorboard import SummaryWriter  # of the extra `tensorboard`

        folder = folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # no access: here in one line, not as a traceback of its thread
        self.writer = SummaryWriter(folder, purge_step=first_update + 1)
        self.writer.add_text("config", f"```json\n{json.dumps(run_config, indent=2)}\n```")

    def log(self, metrics: dict[str, float], update: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, update)

    def picture(self, name: str, path: Path, update: int) -> None:
        import matplotlib.image

        self.writer.add_image(name, matplotlib.image.imread(path), update, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


class Guarded(Tracker):
    """Keeps a tracker's failure away from training."""

    def __init__(self, kind: TrackerKind, make: Callable[[], Tracker]) -> None:
        self.kind, self.tracker = kind, Tracker()
        self.tracker = self.made = self._try(make) or Tracker()

    def _try(self, action: Callable, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:
            self.tracker = Tracker()
            print_error(f"{self.kind} failed and is left out ({error}). Everything is in the run's folder.")

    def log(self, *arguments: Any) -> None:
        self._try(self.tracker.log, *arguments)

    def picture(self, *arguments: Any) -> None:
        self._try(self.tracker.picture, *arguments)

    def page(self, *arguments: Any) -> None:
        self._try(self.tracker.page, *arguments)

    def table(self, *arguments: Any) -> None:
        self._try(self.tracker.table, *arguments)

    def adapter(self, *arguments: Any) -> None:
        self._try(self.tracker.adapter, *arguments)

    def finish(self) -> None:
        if self.tracker is self.made:
            self._try(self.made.finish)
        else:  # it failed before: W&B opens no run twice in a process
            with contextlib.suppress(Exception):
                self.made.finish()
        self.tracker = self.made = Tracker()


def print_error(text: str) -> None:
    """Prints one line of stderr."""
    program = Path(sys.argv[0]).name
    print(
        f"{program if program.startswith('cera-') else 'cera-train'}: {redact(' '.join(text.split()))}", file=sys.stderr
    )


def start_tracker(
    config: TrackerConfig, run_config: dict[str, Any], name: str, folder: Path, first_update: int
) -> Tracker:
    """The tracker of a run. `run_config` is shown as it is: it must hold no secret."""
    if config.kind == TrackerKind.wandb:
        return Guarded(config.kind, lambda: WandbTracker(config, run_config, name, folder))
    if config.kind == TrackerKind.tensorboard:
        return Guarded(config.kind, lambda: TensorBoardTracker(run_config, folder, first_update))
    return Tracker()


def send_to_run(run: Path, what: str, send: Callable[[Tracker], None]) -> None:
    """Opens the W&B run of a finished run once more and sends something to it. Does nothing for a run that W&B does not
    track; prints one line where W&B or the folder fails, or the run is not at its end.

    Args:
        what: the thing that is sent, for messages.
    """
    try:
        if not (run / WANDB_ID).is_file():
            return
        config = load_config(run / "config.yaml")
        if config.tracker.kind != TrackerKind.wandb:
            return
        if not (run / "result.json").is_file():  # W&B takes no second writer beside the one that trains
            print_line("wandb", f"{run} is unfinished: {what} stays in its folder.")
            return
        lock = lock_folder(run, "run", seconds=LOCK_SECONDS)
        try:
            tracker = start_tracker(config.tracker, to_plain(config), config.name, run, first_update=0)
            send(tracker)
            tracker.finish()
        finally:
            (run / ".lock").unlink()
            lock.release()
    except (OSError, ValueError) as error:
        print_error(f"{what} does not reach W&B ({error}).")
