"""When a run evaluates, saves and ends."""

from __future__ import annotations

from dataclasses import dataclass

from cera_train.runs.folder import Progress
from cera_train.settings.run import Config


@dataclass(frozen=True)
class Timetable:
    updates: int
    eval_every: int | None
    save_every: int | None
    patience: int | None
    """The number of evaluations without a lower perplexity that ends the run."""

    @classmethod
    def of(cls, config: Config, updates: int) -> Timetable:
        # Rewards can rise while the perplexity of the rows' answers does not fall.
        patience = None if config.work.answers else config.train.patience
        return cls(updates, config.train.eval_every, config.train.save_every, patience)

    def is_done(self, progress: Progress) -> bool:
        """Whether the updates and evaluations so far end the run."""
        return self.ends_after(progress, progress.evaluations_since_best)

    def ends_after(self, progress: Progress, evaluations_since_best: int) -> bool:
        """Whether the last update is done, or patience has run out."""
        is_out = self.patience is not None and evaluations_since_best >= self.patience
        return progress.update >= self.updates or is_out

    def evaluates(self, update: int) -> bool:
        """Whether an evaluation follows this update, counted from 1."""
        return update == self.updates or _is_multiple(update, self.eval_every)

    def saves(self, update: int) -> bool:
        """Whether a checkpoint of this update is due."""
        return _is_multiple(update, self.save_every)


def _is_multiple(update: int, every: int | None) -> bool:
    return every is not None and update % every == 0
