"""Runs built as the command builds them, for tests of one update or one part."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from cera_train.runs.folder import Progress, RunFolder
from cera_train.settings.run import Config
from cera_train.training.build import Data, Evaluator, Model
from cera_train.training.objectives.objective import Objective
from cera_train.training.resolve import resolve
from cera_train.training.train import backward, build_parts


class BuiltRun(NamedTuple):
    config: Config
    data: Data
    model: Model
    progress: Progress
    evaluator: Evaluator
    objective: Objective

    def backward(self, sequences: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients, by name, of an update on these sequences."""
        loss = backward(self.model, self.objective.draw(sequences))
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.model.adapted.named_parameters()
            if parameter.grad is not None
        }
        self.model.optimizer.zero_grad()
        return float(loss), gradients

    @torch.no_grad()
    def move(self, distance: float) -> None:
        """Changes what trains, as updates do: at the start, B is zero."""
        for weight in self.model.trained:
            weight += distance * torch.randn_like(weight)
        self.progress.update += 1


def build_run(config: Config, folder: Path) -> BuiltRun:
    """A new run, before its first update. Creates its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = resolve(config, folder).config
    return BuiltRun(config, *build_parts(config, RunFolder(folder)))
