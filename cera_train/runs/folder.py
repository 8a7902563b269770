"""The run's folder: config, metrics, checkpoints, best and final adapter, result.

Every file and folder in it appears whole or not at all, but for metrics.jsonl, which grows by lines and is cut back to
the checkpoint that a run resumes from. One process writes, under a lock. A checkpoint carries checksums: a disk that
lost or turned a bit is noticed, and the run goes on from the one before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import peft
import torch
import yaml

from cera_train.common.errors import UserError
from cera_train.common.files import (
    clean_folder,
    find_damage,
    finite,
    lock_folder,
    read_json,
    read_yaml,
    record,
    remove_folder,
    write_bytes,
    write_checksums,
    write_folder,
    write_text,
)
from cera_train.common.secrets import redact_tree
from cera_train.common.settings import Changes, changes_of, flatten, leaves
from cera_train.common.terminal import print_line
from cera_train.common.trust import weights_of
from cera_train.config import Config
from cera_train.data.batches import Plan
from cera_train.distributed.sharding import optimizer_state, trainable_weights


@dataclass
class Progress:
    """What resuming needs beside adapter and optimizer. The order of the rows, the learning rate and every process's
    random numbers follow from the seed and `update`, so neither they nor a data loader have a state to save."""

    update: int = 0
    """Updates done."""
    epoch: int = 0
    seconds: float = 0.0
    """Time spent in updates."""
    tokens: int = 0
    """Tokens seen in updates, padding not counted."""
    perplexity_before: float | None = None
    perplexity: float | None = None
    """Of the last evaluation."""
    best_perplexity: float | None = None
    best_update: int = 0
    evaluations_since_best: int = 0
    evaluation_pending: bool = False
    """An evaluation of `update` was due when a signal came."""

    def updated(self, tokens: int, seconds: float, plan: Plan) -> None:
        """Counts one more update."""
        self.update += 1
        self.epoch = plan.epoch(self.update)
        self.tokens += tokens
        self.seconds += seconds

    def evaluated(self, perplexity: float) -> bool:
        """Takes in an evaluation; returns whether it is the best so far."""
        self.perplexity, self.evaluation_pending = perplexity, False
        if self.perplexity_before is None:
            self.perplexity_before = perplexity
        is_best = self.best_perplexity is None or perplexity < self.best_perplexity
        if is_best:
            self.best_perplexity, self.best_update = perplexity, self.update
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        return is_best

    def forget_best(self) -> None:
        """Lets the next evaluation be the best so far."""
        self.best_perplexity, self.best_update, self.evaluations_since_best = None, 0, 0

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought no lower perplexity."""
        return patience is not None and self.evaluations_since_best >= patience


class RunFolder:
    """`output_dir/name`, locked while it is open. A folder that holds no run when it is closed is removed again. What
    saves is called by every process, and one of them writes."""

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
        with contextlib.suppress(OSError):  # of a disk that is gone: the error that stopped the run says it
            if self._is_new and not (self.path / "metrics.jsonl").exists():
                shutil.rmtree(self.path)
            else:
                (self.path / ".lock").unlink()
        self._lock.release()

    # --- resuming ----------------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any] | None:
        """What a finished run left."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in (self.path / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def last_sound_checkpoint(self) -> Path | None:
        """The newest checkpoint that is as it was written; says which are not. None where there is no checkpoint.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
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
        """Raises ValueError where `train.resume` and what the folder holds do not go together."""
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
        """Raises ValueError where the folder was begun with a config that computes something else."""
        different = self._different(self.path / "config.yaml")
        if different:
            raise UserError(
                f"{self.path} holds a run with another config: {different}. Choose another name=..., "
                "or set these back to go on with it."
            )

    def check_compatible(self, checkpoint: Path) -> None:
        """Raises ValueError where another run's checkpoint has another adapter, or other rows at the same update."""
        binding = {leaf.key for leaf in leaves(Config) if leaf.field.metadata["binds_checkpoint"]}
        different = self._different(checkpoint / "config.yaml", binding)
        if different:
            raise UserError(f"{checkpoint} was made with another config: {different}. Set these back to go on from it.")

    def _different(self, path: Path, only: set[str] | None = None) -> str:
        """The settings that differ from those in a file and change the result, in words.

        Args:
            only: keys to look at. None: all.
        """
        before = flatten(read_yaml(path)) if path.exists() else flatten(self.config)
        now = flatten(self.config)
        return "; ".join(
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and (only is None or key in only)
            and changes_of(Config, key) not in (Changes.cost, Changes.nothing)
        )

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_config(self, environment: dict[str, Any]) -> None:
        """The resolved config and what it runs on, before the first update."""
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        self.write_json("environment.json", environment)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(redact_tree(content), indent=2) + "\n")

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")

    def rewind(self, update: int | None) -> None:
        """Removes what comes after a checkpoint's update, which the resumed run writes again; None: everything.

        best/ stays, also one of a later update: the resumed run comes to the same evaluations, and so to the same best.
        """
        for checkpoint in reversed(self.checkpoints()):
            if update is None or int(checkpoint.name) > update:
                remove_folder(checkpoint)
        path = self.path / "metrics.jsonl"
        if update is None:
            for name in ("best", "adapter", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("metrics.jsonl", "wandb-run-id"):
                (self.path / name).unlink(missing_ok=True)
        elif path.exists():
            # A cut leaves half a line, and a machine that lost its power any bytes, but after the checkpoint's lines.
            lines = itertools.takewhile(is_metrics, path.read_bytes().splitlines(keepends=True))
            write_bytes(path, b"".join(line for line in lines if json.loads(line)["update"] <= update))

    def save_checkpoint(
        self,
        model: peft.PeftModel,
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
            save_adapter(model, weights, folder)
            with (folder / "optimizer.pt").open("wb") as file:
                torch.save(moments, file)
            (folder / "progress.json").write_text(json.dumps({**asdict(progress), "data_digest": data_digest}))
            (folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
            write_checksums(folder)

        with (self.path / "metrics.jsonl").open("ab") as metrics:
            os.fsync(metrics.fileno())  # after a crash of the machine too, no checkpoint knows more than the metrics
        write_folder(self.path / "checkpoints" / str(progress.update), write)
        for old in self.checkpoints()[:-keep]:
            remove_folder(old)

    def save_best(self, model: peft.PeftModel, metrics: dict[str, Any]) -> None:
        """best/: the adapter of the lowest perplexity so far."""
        weights = trainable_weights(model)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            save_adapter(model, weights, folder)
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

        write_folder(self.path / "best", write)

    def save_final(self, model: peft.PeftModel) -> None:
        """adapter/: the adapter after the last update."""
        weights = trainable_weights(model)
        if self.is_main:
            write_folder(self.path / "adapter", lambda folder: save_adapter(model, weights, folder))


def is_metrics(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is whole."""
    try:
        return line.endswith(b"\n") and "update" in json.loads(line)
    except (TypeError, ValueError):
        return False


def load_checkpoint(folder: Path, model: peft.PeftModel, data_digest: str) -> tuple[Progress, dict[str, Any]]:
    """Puts a checkpoint's adapter in place.

    Returns:
        The progress, and the optimizer's state for `load_optimizer_state`.

    Raises:
        ValueError: the folder is no checkpoint, belongs to another adapter, or its rows were others.
    """
    try:
        saved = read_json(folder / "progress.json")
        weights_of(folder)  # PEFT would also take a pickle, or look for the weights on the Hub
        weights = peft.load_peft_weights(str(folder), device="cpu")
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load takes any file for its own, and stumbles over others in every way
        raise UserError(f"{folder} is damaged or no checkpoint: {error}. Remove it to resume from another.") from error
    if saved.pop("data_digest", None) != data_digest:
        raise UserError(
            f"the training rows are not those of {folder}: its optimizer and order of rows belong to others. "
            "Restore the files, or choose another name=... for a new run."
        )
    load_adapter(model, weights)
    try:
        return record(Progress, saved), state
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} does not fit this version: {error!r}.") from error


def load_adapter(model: peft.PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Sets an adapter's weights; a missing, extra or misshapen tensor is a ValueError."""
    try:
        loaded = peft.set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit this adapter: {' '.join(str(error).split())}") from error
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(own.keys() ^ weights.keys())
    if wrong or loaded.unexpected_keys:
        raise UserError(f"the checkpoint does not fit this adapter: {len(wrong)} tensors differ, first {wrong[:1]}.")


def save_adapter(model: peft.PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """An adapter in PEFT's format."""
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)


def environment() -> dict[str, Any]:
    """The versions and the machine a run used."""
    import platform
    import sys
    from importlib.metadata import version

    packages = ("cera-train", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
    }
