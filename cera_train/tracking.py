"""Mirrors of metrics.jsonl in W&B or TensorBoard. The run's folder is the record: a mirror that fails is left out, with
one line that says so, and training goes on."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cera_train.config import TrackerConfig, TrackerKind
from cera_train.secrets import redact


class Tracker:
    """No mirror. Also what the others do: start, log, add a picture and the adapter, finish."""

    def log(self, metrics: dict[str, float], update: int) -> None:
        """Numbers at an update."""

    def picture(self, name: str, path: Path, update: int) -> None:
        """A PNG file."""

    def adapter(self, folder: Path) -> None:
        """The final adapter, as an artifact."""

    def finish(self) -> None:
        """Flushes."""


class WandbTracker(Tracker):
    """Weights & Biases: online with a key, offline without one."""

    def __init__(self, config: TrackerConfig, run_config: dict[str, Any], name: str, folder: Path) -> None:
        import wandb

        self.wandb, self.log_adapter, self.folder = wandb, config.log_adapter, folder
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        self.is_offline = mode == "offline"
        id_file = folder / "wandb-run-id"  # a resumed run goes on in the same W&B run
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(6))
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(folder),
            config=run_config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, metrics: dict[str, float], update: int) -> None:
        self.run.log({"update": update, **metrics})

    def picture(self, name: str, path: Path, update: int) -> None:
        self.run.log({"update": update, name: self.wandb.Image(str(path))})

    def adapter(self, folder: Path) -> None:
        if self.log_adapter:
            artifact = self.wandb.Artifact(f"{self.run.id}-adapter", type="model")
            artifact.add_dir(str(folder))
            self.run.log_artifact(artifact)

    def finish(self) -> None:
        self.run.finish()
        if self.is_offline:
            # A run that was resumed offline has a part for every time it ran.
            first, *others = sorted((self.folder / "wandb").glob("offline-run-*"))
            commands = [f"wandb sync {first}", *(f"wandb sync --append {part}" for part in others)]
            print(f"W&B was offline. To upload this run: {' && '.join(commands)}")


def has_key() -> bool:
    """Whether W&B can log in without asking: by its environment variable or by `wandb login`'s entry in netrc."""
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    return bool(os.environ.get("WANDB_API_KEY")) or host in hosts


class TensorBoardTracker(Tracker):
    """Event files in the run's folder."""

    def __init__(self, run_config: dict[str, Any], folder: Path, first_update: int) -> None:
        import json

        from torch.utils.tensorboard import SummaryWriter  # of the extra `tensorboard`

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_update + 1)
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

    def __init__(self, kind: TrackerKind, make: Any) -> None:
        self.kind = kind
        self.tracker = Tracker()
        self._try(lambda: setattr(self, "tracker", make()))

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self.tracker = Tracker()
            reason = redact(" ".join(str(error).split()))
            print(
                f"cera-train: {self.kind} failed and is left out ({reason}). Everything is in metrics.jsonl.",
                file=sys.stderr,
            )

    def log(self, metrics: dict[str, float], update: int) -> None:
        self._try(lambda: self.tracker.log(metrics, update))

    def picture(self, name: str, path: Path, update: int) -> None:
        self._try(lambda: self.tracker.picture(name, path, update))

    def adapter(self, folder: Path) -> None:
        self._try(lambda: self.tracker.adapter(folder))

    def finish(self) -> None:
        self._try(self.tracker.finish)


def start_tracker(
    config: TrackerConfig, run_config: dict[str, Any], name: str, folder: Path, first_update: int
) -> Tracker:
    """The tracker of a run. `run_config` is shown as it is: it must hold no secret."""
    if config.kind == TrackerKind.wandb:
        return Guarded(config.kind, lambda: WandbTracker(config, run_config, name, folder))
    if config.kind == TrackerKind.tensorboard:
        return Guarded(config.kind, lambda: TensorBoardTracker(run_config, folder, first_update))
    return Tracker()
