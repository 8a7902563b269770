"""A checkpoint: adapter, optimizer and progress, which is all that resuming needs. Its checksums reveal damage: the run
then goes on from the checkpoint before."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import nn

from cera_train.adapters.build import load, read
from cera_train.common.errors import UserError
from cera_train.common.files import read_json, write_checksums
from cera_train.common.records import Record
from cera_train.data.batches import RowOrder


@dataclass
class Progress(Record):
    """What resuming needs beside adapter and optimizer.

    The order of the rows, the learning rate and the random numbers of every process follow from the seed and `update`:
    they have no state to save."""

    mend: ClassVar[str] = "Remove the checkpoint to resume from another."

    update: int = 0
    """Updates done."""
    epoch: int = 0
    seconds: float = 0.0
    """Time spent in updates."""
    tokens: int = 0
    """Tokens seen in updates, padding not counted."""
    perplexity_before: float | None = None
    perplexity: float | None = None
    """At the last evaluation."""
    best_perplexity: float | None = None
    best_update: int = 0
    evaluations_since_best: int = 0
    evaluation_pending: bool = False
    """An evaluation of `update` was due when a signal came."""

    def updated(self, tokens: int, seconds: float, order: RowOrder) -> None:
        """Counts one more update."""
        self.update += 1
        self.epoch = order.epoch(self.update)
        self.tokens += tokens
        self.seconds += seconds

    def evaluated(self, perplexity: float) -> bool:
        """Counts an evaluation; returns whether it is the best so far."""
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


def write_checkpoint(
    folder: Path, moments: dict[str, Any], progress: Progress, data_digest: str, config: dict[str, Any]
) -> None:
    """Writes the optimizer, the progress and the config beside the adapter, and the checksums of all files."""
    with (folder / "optimizer.pt").open("wb") as file:
        torch.save(moments, file)
    (folder / "progress.json").write_text(json.dumps({**asdict(progress), "data_digest": data_digest}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_checksums(folder)


def load_checkpoint(folder: Path, model: nn.Module, data_digest: str) -> tuple[Progress, dict[str, Any]]:
    """Loads a checkpoint's weights into the model; returns the progress, and a state for `load_optimizer_state`.

    Raises:
        UserError: the folder is no checkpoint, belongs to another adapter, or was trained on other rows.
    """
    try:
        saved = read_json(folder / "progress.json")
        weights = read(folder)
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a file that is not its own
        raise UserError(f"{folder} is damaged or no checkpoint: {error}. Remove it to resume from another.") from error
    if saved.get("data_digest") != data_digest:
        raise UserError(
            f"the training rows are not those of {folder}: its optimizer and order of rows belong to others. "
            "Restore the files, or choose another name=... for a new run."
        )
    progress = Progress.from_json(saved, folder / "progress.json")
    load(model, weights)
    return progress, state
