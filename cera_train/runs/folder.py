"""The run's folder: config, metrics, checkpoints, best and final adapter, result.

Every file and folder in it appears whole or not at all, but for metrics.jsonl and spectra.jsonl: they grow by
lines, and resuming cuts them back to the checkpoint. One process writes, under a lock.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from torch import nn

from cera_train.adapters.build import save
from cera_train.common.errors import UserError
from cera_train.common.files import (
    clean_folder,
    find_damage,
    finite,
    lock_folder,
    remove_folder,
    write_bytes,
    write_folder,
    write_text,
)
from cera_train.common.settings import Changes, changes_of, flatten, leaves, to_plain
from cera_train.common.terminal import print_line
from cera_train.common.trust import redact_tree
from cera_train.config import Config
from cera_train.distributed.sharding import optimizer_state, trainable_weights
from cera_train.runs.checkpoint import Progress, write_checkpoint
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import Environment, EvaluationMetrics, RunResult

LOGS = ("metrics.jsonl", "spectra.jsonl")
"""Files that grow by lines, each with the number of its update."""

AUTO = "auto"
"""Value of a setting that the hardware decides. A folder that records it agrees with every choice."""


class RunFolder:
    """`output_dir/name`, locked while it is open. A folder that holds no run when it is closed is removed again.

    Every process calls what saves; the main one writes.
    """

    def __init__(self, path: Path, config: dict[str, Any], is_main: bool = True) -> None:
        self.path = path
        self.config = redact_tree(config)  # no secret reaches the disk or a tracker
        self.is_main = is_main

    def __enter__(self) -> RunFolder:
        if self.is_main:
            self._is_new = not self.path.exists()
            self._lock = lock_folder(self.path, "run")
            clean_folder(self.path)
            clean_folder(self.path / "checkpoints")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self.is_main:
            return
        with contextlib.suppress(OSError):  # the disk is gone: the error that stopped the run is raised
            if self._is_new and not (self.path / "metrics.jsonl").exists():
                shutil.rmtree(self.path)
            else:
                (self.path / ".lock").unlink()
        self._lock.release()

    # --- resuming ----------------------------------------------------------------------------------------------------

    def result(self) -> RunResult | None:
        """The result of a finished run."""
        path = self.path / "result.json"
        return RunResult.read(path) if path.exists() else None

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in (self.path / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def last_sound_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint; prints which are damaged. None where there is no checkpoint.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for checkpoint in reversed(self.checkpoints()):
            damage = find_damage(checkpoint)
            if damage is None:
                if damaged and self.is_main:
                    print_line("damaged", f"{'; '.join(damaged)}. Going on from {checkpoint}.")
                return checkpoint
            damaged.append(f"{checkpoint} ({damage})")
        if damaged:
            raise UserError(
                f"every checkpoint is damaged: {'; '.join(damaged)}. Restore one of them, or start anew with "
                "train.resume=never."
            )
        return None

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this folder's."""
        return checkpoint.resolve().parent == self.path.resolve() / "checkpoints"

    def check_may_run(self, resume: str) -> None:
        """Raises UserError where `train.resume` and what the folder holds do not go together."""
        if resume == "auto":
            if self.checkpoints() or self.result() is not None:
                self.check_same_config()
            return
        if self.result() is not None:
            raise UserError(f"{self.path} holds a finished run: choose another name=..., or remove the folder.")
        if resume == "never":
            return
        checkpoint = Path(resume)
        if not (checkpoint / "progress.json").is_file():
            raise UserError(f"train.resume={resume!r}: expected auto, never or the folder of a checkpoint.")
        if self.holds(checkpoint):
            self.check_same_config()
        else:
            self.check_compatible(checkpoint)

    def check_same_config(self) -> None:
        """Raises UserError where the folder was begun with a config that changes the result."""
        different = self._different(self.path / "config.yaml")
        if "train.max_updates" in different or "train.epochs" in different:
            checkpoint = self.checkpoints()[-1:]
            longer = f"train.resume={checkpoint[0]} name=NEW" if checkpoint else "another name"
            raise UserError(
                f"{self.path} holds a run with another config: {'; '.join(different.values())}. To train longer, go on "
                f"from its checkpoint in a new folder: {longer}."
            )
        if different:
            raise UserError(
                f"{self.path} holds a run with another config: {'; '.join(different.values())}. Choose another "
                "name=..., or set these back to go on with it."
            )

    def check_compatible(self, checkpoint: Path) -> None:
        """Raises UserError where another run's checkpoint has another adapter, or other rows at the same update."""
        binding = {leaf.key for leaf in leaves(Config) if leaf.field.metadata["binds_checkpoint"]}
        different = [text for key, text in self._different(checkpoint / "config.yaml").items() if key in binding]
        if different:
            raise UserError(
                f"{checkpoint} was made with another config: {'; '.join(different)}. Set these back to go on from it."
            )

    def _different(self, path: Path) -> dict[str, str]:
        """The settings that change the result and differ from those in a file: key -> both values in words."""
        if not path.exists():
            return {}
        now, before = flatten(self.config), flatten(redact_tree(to_plain(load_config(path))))
        return {
            key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) not in (now.get(key), AUTO)
            and changes_of(Config, key) not in (Changes.cost, Changes.nothing)
        }

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_config(self, environment: Environment) -> None:
        """Writes the resolved config and the machine, before the first update."""
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        environment.write(self.path / "environment.json")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl: an update or an evaluation."""
        self._append("metrics.jsonl", line)

    def append_spectra(self, line: dict[str, Any]) -> None:
        """Adds a line to spectra.jsonl: the spectrum of every module at an evaluation."""
        self._append("spectra.jsonl", line)

    def _append(self, log: str, line: dict[str, Any]) -> None:
        with (self.path / log).open("a") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")

    def rewind(self, update: int | None) -> None:
        """Removes what comes after a checkpoint's update, which the resumed run writes again; None: everything.

        best/ stays, also one of a later update: the resumed run comes to the same evaluations, and so to the same best.
        """
        for checkpoint in reversed(self.checkpoints()):
            if update is None or int(checkpoint.name) > update:
                remove_folder(checkpoint)
        if update is None:
            for name in ("best", "adapter", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (*LOGS, "wandb-run-id"):
                (self.path / name).unlink(missing_ok=True)
            return
        for path in (self.path / log for log in LOGS):
            if path.exists():
                # A cut leaves half a line, and a loss of power any bytes, but only after the checkpoint's.
                lines = itertools.takewhile(is_whole, path.read_bytes().splitlines(keepends=True))
                write_bytes(path, b"".join(line for line in lines if json.loads(line)["update"] <= update))

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        data_digest: str,
        keep: int,
    ) -> None:
        """checkpoints/<update>: adapter, optimizer, progress and config; then removes all but the last `keep`."""
        weights, moments = trainable_weights(model), optimizer_state(optimizer)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            save(model, weights, folder)
            write_checkpoint(folder, moments, progress, data_digest, self.config)

        with (self.path / "metrics.jsonl").open("ab") as metrics:
            os.fsync(metrics.fileno())  # no checkpoint is ahead of the metrics, even after a crash
        write_folder(self.path / "checkpoints" / str(progress.update), write)
        for old in self.checkpoints()[:-keep]:
            remove_folder(old)

    def save_best(self, model: nn.Module, metrics: EvaluationMetrics) -> None:
        """best/: the adapter of the lowest perplexity so far."""
        weights = trainable_weights(model)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            save(model, weights, folder)
            metrics.write(folder / "metrics.json")

        write_folder(self.path / "best", write)

    def save_final(self, model: nn.Module, tokenizer: Any) -> None:
        """adapter/: the adapter after the last update, with the tokenizer that it was trained with."""
        weights = trainable_weights(model)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            save(model, weights, folder)
            tokenizer.save_pretrained(folder)

        write_folder(self.path / "adapter", write)


def is_whole(line: bytes) -> bool:
    """Whether a line of a log is whole."""
    try:
        return line.endswith(b"\n") and "update" in json.loads(line)
    except (TypeError, ValueError):
        return False
