"""The run's folder: config, metrics, checkpoints, best and final adapter, result.

Every file and folder in it appears whole or not at all, except metrics.jsonl, spectra.jsonl and
samples.jsonl: they grow line by line, and resuming cuts them back to the checkpoint. A checkpoint
holds adapter, optimizer and progress, which is all that resuming needs; if its checksums reveal
damage, the run resumes from the one before. One process writes, locked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from pydantic import Field
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cera_train import __version__
from cera_train.adapters.folder import is_saved_in
from cera_train.adapters.saved import load, read, save
from cera_train.common import files
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import print_line
from cera_train.data.tokens import save_tokenizer
from cera_train.distributed.sharding import optimizer_state, trainable_weights
from cera_train.model.identity import BaseIdentity
from cera_train.runs.records import Record
from cera_train.runs.results import (
    DIVERGED,
    GRADES,
    LOGS,
    LOSSES_AFTER,
    LOSSES_BEFORE,
    METRICS,
    Environment,
    EvaluationMetrics,
    Perplexity,
    RunResult,
    environment_of,
)
from cera_train.runs.tracking import IDS
from cera_train.settings.model import ModelConfig

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
"""environment.json records their versions, beside our own."""


class Progress(Record):
    """What resuming needs besides adapter and optimizer.

    The order of the rows, the learning rate and the random numbers of every process follow from the
    seed and `update`: they have no state to save."""

    fix: ClassVar[str] = "Remove the checkpoint to resume from another."

    update: int = 0  # updates done
    epoch: int = 0
    seconds: float = 0.0  # time spent in updates
    tokens: int = 0  # tokens seen in updates, padding not counted
    perplexity_before: Perplexity = None
    linear_share_before: float | None = None
    perplexity: Perplexity = None  # at the last evaluation
    best_perplexity: Perplexity = None
    best_update: int = 0
    tasks: dict[str, float] = Field(default_factory=dict)  # at the last evaluation that had any
    evaluations_since_best: int = 0
    evaluation_pending: bool = False  # the evaluation after `update` has not finished
    data_digest: str | None = None  # of the training rows
    held_out_digest: str | None = None  # of the held-out rows; earlier versions recorded none

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)  # null would read as infinite

    def updated(self, tokens: int, seconds: float, updates_per_epoch: int) -> None:
        """Counts one more update."""
        self.update += 1
        self.epoch = self.update // updates_per_epoch
        self.tokens += tokens
        self.seconds += seconds

    def evaluated(self, perplexity: float, linear_share: float | None) -> None:
        """Counts an evaluation."""
        self.perplexity = perplexity
        self.evaluation_pending = False
        if self.perplexity_before is None:
            self.perplexity_before = perplexity
            self.linear_share_before = linear_share
        self.evaluations_since_best = self.since_best(perplexity)
        if self.evaluations_since_best == 0:
            self.best_perplexity = perplexity
            self.best_update = self.update

    def since_best(self, perplexity: float) -> int:
        """`evaluations_since_best` after one more evaluation."""
        is_best = self.best_perplexity is None or perplexity < self.best_perplexity
        return 0 if is_best else self.evaluations_since_best + 1


class RunFolder:
    """`output_dir/name`. Every process calls the methods that save; only the main one writes."""

    def __init__(
        self,
        path: Path,
        is_main: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises UserError where `path` leads to another folder than at the start."""
        self.path = path
        self.is_main = is_main
        self.check = check

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, is_main: bool = True) -> Iterator[RunFolder]:
        """The folder, locked by the main process and cleared of interrupted writes."""
        if not is_main:
            yield cls(path, is_main)
            return
        with files.locked(path, "run", (path / METRICS).exists) as check:
            for inside in ("", "checkpoints", GRADES):
                files.clean_folder(path / inside)
            yield cls(path, is_main, check)

    # --- resuming ---------------------------------------------------------------------------------

    def result(self) -> RunResult | None:
        """The result; None for a run that is not finished, or whose adapter is gone: the same
        command writes it again, from the last checkpoint."""
        has_adapter = is_saved_in(self.path / "adapter")
        return RunResult.find(self.path / "result.json") if has_adapter else None

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, oldest first."""
        folders = (self.path / "checkpoints").glob("*")
        checkpoints = [folder for folder in folders if folder.name.isdecimal()]
        return sorted(checkpoints, key=lambda checkpoint: int(checkpoint.name))

    def newest_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint; None without any checkpoint. Prints which damaged ones
        it skips.

        Raises:
            UserError: all checkpoints are damaged.
        """
        damaged: list[str] = []
        for checkpoint in reversed(self.checkpoints()):
            damage = files.find_damage(checkpoint)
            if damage is None:
                if damaged:
                    print_line("damaged", f"{'; '.join(damaged)}. Resuming from {checkpoint}.")
                return checkpoint
            damaged.append(f"{checkpoint} ({damage})")
        if damaged:
            raise UserError(
                f"{self.path} has only damaged checkpoints: {'; '.join(damaged)}. Restore one of "
                "them, or remove the folder to start again."
            )
        return None

    # --- writing ----------------------------------------------------------------------------------

    def write_config(
        self,
        config: dict[str, Any],
        processes: int,
        base: BaseIdentity,
        rows: dict[str, str],
        updates: int,
        precision: dict[str, str],
    ) -> None:
        """Writes config.yaml, resolved, and environment.json, before the first update."""
        files.write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        environment = Environment(
            command=sys.argv,
            python=platform.python_version(),
            platform=platform.platform(),
            packages={"cera-train": __version__} | {name: version(name) for name in PACKAGES},
            gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            cpu_threads=torch.get_num_threads(),
            processes=processes,
            base_weights=base.weights,
            base_config=base.config,
            rows=rows,
            updates=updates,
            precision=precision,
        )
        environment.write(self.path / "environment.json")

    def append(self, log: str, line: dict[str, Any]) -> None:
        """Adds a line to one of LOGS."""
        self.check()
        with (self.path / log).open("a") as file:
            file.write(json.dumps(files.finite(line), allow_nan=False) + "\n")

    def mark_diverged(self, message: str) -> None:
        """Records that the run diverged, which a sweep counts as a result. Resuming removes the
        record."""
        if self.is_main:
            files.write_text(self.path / DIVERGED, message + "\n")

    def rewind(self, progress: Progress) -> None:
        """Removes what was written after the checkpoint of this progress: the resumed run writes
        it again. Before the first update, removes everything.

        Keeps best/, even from a later update, and losses and grades: the resumed run repeats the
        same evaluations and writes the same files.
        """
        for name in (DIVERGED, "result.json"):
            (self.path / name).unlink(missing_ok=True)
        for checkpoint in reversed(self.checkpoints()):
            if int(checkpoint.name) > progress.update:
                files.remove_folder(checkpoint)
        if progress.update > 0:
            for name in LOGS:
                cut_log(self.path / name, progress)
            return
        for name in ("best", "adapter", "tensorboard", GRADES):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (*LOGS, LOSSES_BEFORE, LOSSES_AFTER, IDS):
            (self.path / name).unlink(missing_ok=True)

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        keep: int,
        scaler: GradScaler | None = None,
    ) -> None:
        """checkpoints/UPDATE: adapter, optimizer with its gradient scaler, progress. Keeps the last
        `keep` of them."""
        moments = optimizer_state(optimizer, scaler, keep=self.is_main)

        def write(folder: Path) -> None:
            # No checkpoint is ahead of the metrics, even after a crash.
            with (self.path / METRICS).open("ab") as metrics:
                os.fsync(metrics.fileno())
            with (folder / "optimizer.pt").open("wb") as file:
                torch.save(moments, file)
            progress.write(folder / "progress.json")
            files.write_checksums(folder)

        self._save(f"checkpoints/{progress.update}", model, write)
        if self.is_main:
            for old in self.checkpoints()[:-keep]:
                files.remove_folder(old)

    def save_best(self, model: nn.Module, metrics: EvaluationMetrics) -> None:
        """best/: the adapter of the lowest perplexity so far."""
        self._save("best", model, lambda folder: metrics.write(folder / "metrics.json"))

    def save_final(self, model: nn.Module, tokenizer: Any) -> None:
        """adapter/: the adapter after the last update, with the tokenizer that it was trained
        with."""
        self._save("adapter", model, functools.partial(save_tokenizer, tokenizer))

    def _save(self, name: str, model: nn.Module, write_more: Callable[[Path], Any]) -> None:
        # All processes of a sharded model gather them.
        weights = trainable_weights(model, keep=self.is_main)
        if not self.is_main:
            return
        self.check()

        def write(part: Path) -> None:
            save(model, weights, part)
            write_more(part)

        files.write_folder(self.path / name, write)


def has_saved(folder: Path) -> bool:
    """Whether a run has left a checkpoint or a result."""
    # Others begin with a dot: a kill cut their writing.
    has_checkpoint = any((folder / "checkpoints").glob("[0-9]*"))
    return has_checkpoint or (folder / "result.json").is_file()


def cut_log(path: Path, progress: Progress) -> None:
    """Removes the lines of a log that a run resumed from this progress writes again."""
    if not path.exists():
        return
    kept = []
    # A kill leaves half a line, and a power loss arbitrary bytes, but only after the checkpoint's
    # lines.
    with contextlib.suppress(LookupError, TypeError, ValueError):
        for line in path.read_bytes().splitlines(keepends=True):
            values = json.loads(line)
            is_of_evaluation = {"train/loss", "reward"}.isdisjoint(values)
            is_pending = is_of_evaluation and progress.evaluation_pending
            newest = progress.update - 1 if is_pending else progress.update
            if values["update"] <= newest:
                kept.append(line)
    files.write_bytes(path, b"".join(kept))


def load_checkpoint(
    folder: Path, model: nn.Module, data_digest: str, held_out_digest: str
) -> tuple[Progress, dict[str, Any]]:
    """Loads a checkpoint's weights into the model; returns the progress, and a state for
    `load_optimizer_state`.

    Raises:
        UserError: the folder is no checkpoint, belongs to another adapter, or was trained on other
            rows, or evaluated on others.
    """
    try:
        progress = Progress.read(folder / "progress.json")
        weights = read(folder)
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a file that is not its own
        raise UserError(
            f"{folder} is damaged or no checkpoint: {error}. Remove it to resume from another."
        ) from error
    for rows, recorded, now in (
        ("training", progress.data_digest, data_digest),
        ("held-out", progress.held_out_digest or held_out_digest, held_out_digest),
    ):
        require(
            recorded == now,
            f"the {rows} rows are not those of {folder}: a file, the tokenizer or its chat "
            "template changed. Restore it, or choose another name=... for a new run.",
        )
    load(model, weights)
    return progress, state


def check_base(
    trained: str | Path, run: Path, model: ModelConfig, now: BaseIdentity, fix: str
) -> None:
    """Raises UserError where a run recorded another base than `model`: an adapter loads on any base
    of its shapes.

    Args:
        trained: what was trained, for the message.
        now: the identity of `model`.
    """
    recorded = environment_of(run)
    if recorded.base_config is None:  # as cera-train 0.2.0
        return
    then = BaseIdentity(recorded.base_weights, recorded.base_config)
    if difference := then.difference(now):
        raise UserError(
            f"{trained} was trained on another base than model.path={model.path} is now: "
            f"{difference}. {fix}"
        )
