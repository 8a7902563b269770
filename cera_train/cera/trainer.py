"""Coverage in transformers' Trainer."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from .coverage import Coverage


class CoverageCallback(TrainerCallback):
    """`check_coverage` around the first update of transformers' Trainer, and so of TRL's trainers.
    Where all gradients are zero, as in GRPO when rewards do not differ, it checks the next update
    too."""

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.coverage = Coverage(model)
        self.updates = self._watch()
        next(self.updates)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        next(self.updates, None)

    def _watch(self) -> Iterator[None]:
        """Advances at the start of training and after each backward pass."""
        coverage = self.coverage
        while not coverage.moves_loss:
            with coverage.watch():
                yield
            if not coverage.called:
                break
        if (problem := coverage.problem()) is not None:
            raise ValueError(problem)
